"""`benchmarks/gpu.py` where there is no GPU: dry runs, resumption, the table that tune writes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gpu_suite import tune
from gpu_suite.bench import PAT_TREES, predicted_microseconds
from gpu_suite.device import Device, DryLauncher
from gpu_suite.peers import sdpa_per_sequence
from gpu_suite.points import Point, forget, run_points, sources_digest
from gpu_suite.serve import Setting, serve_rows
from gpu_suite.workload import Step, Tree, Workload

from chunkllama.backends.cuda import source
from chunkllama.backends.cuda.source import hardware_tables, parse_hardware_table, table_for

ROOT = Path(__file__).parents[2]
# What a machine with torch, numpy and CuPy may lack, and CuPy itself.
ABSENT = ("cupy", "yaml", "msgspec", "pydantic", "fastapi", "transformers", "rich", "safetensors")


@pytest.mark.parametrize(
    "verb",
    ["check", *(pytest.param(verb, marks=pytest.mark.nightly) for verb in ("bench", "tune"))],
)
def test_dry_run_needs_torch_and_numpy_only(verb: str) -> None:
    code = f"""
import sys, runpy; sys.path.insert(0, "benchmarks")
for name in {ABSENT!r}:
    sys.modules[name] = None
sys.argv = ["gpu.py", {verb!r}, "--dry-run"]
runpy.run_path("benchmarks/gpu.py", run_name="__main__")
"""
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
    last = process.stdout.splitlines()[-1]
    done, _, total, *rest = last.split()
    assert done == total and int(total) >= 13 and "0 failed" in " ".join(rest), last


def test_without_a_gpu_it_says_so() -> None:
    code = """
import sys, runpy; sys.path.insert(0, "benchmarks")
sys.modules["cupy"] = None
import torch
torch.cuda.current_device = lambda: 0
sys.argv = ["gpu.py", "check"]
runpy.run_path("benchmarks/gpu.py", run_name="__main__")
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 2
    assert "pip install 'chunkllama[cu" in process.stderr and "--dry-run" in process.stderr


def test_a_later_run_goes_on_where_the_last_one_stopped(tmp_path: Path) -> None:
    results, ran = tmp_path / "results.jsonl", []

    def point(name: str, fails: bool = False) -> Point:
        def run() -> dict[str, int]:
            ran.append(name)
            if fails:
                raise ValueError("not today")
            return {"value": 1}

        return Point(name, run)

    machine = {"name": "a GPU"}
    records = run_points("bench", [point("a"), point("b", fails=True)], results, machine, 100)
    assert [("result" in r, r["point"]) for r in records] == [(True, "a"), (False, "b")]
    records = run_points("bench", [point("a"), point("b"), point("c")], results, machine, 100)
    assert ran == ["a", "b", "c", "b"], "what has a result is kept, what failed comes last"
    assert [record["point"] for record in records] == ["a", "b", "c"]
    run_points("bench", [point("a")], results, {"name": "another GPU"}, 100)
    assert ran[-1] == "a", "a result counts for its own device"
    assert len([json.loads(line) for line in results.read_text().splitlines()]) == 5
    forget(results, "a GPU")
    (left,) = results.read_text().splitlines()
    assert json.loads(left)["device"] == "another GPU"


def test_a_lost_device_ends_the_run_and_what_failed_comes_last(tmp_path: Path) -> None:
    results, ran = tmp_path / "results.jsonl", []

    def point(name: str) -> Point:
        def run() -> dict[str, int]:
            ran.append(name)
            if name == "b":
                raise RuntimeError("an illegal memory access was encountered")
            return {"value": 1}

        return Point(name, run)

    points = [point(name) for name in "abc"]
    for _ in range(2):
        run_points("check", points, results, {"name": "a GPU"}, 100, lost=lambda: True)
    assert ran == ["a", "b", "c", "b"]


def test_results_outlive_only_what_they_do_not_depend_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`tune` rewrites the table after every run and must go on from its results all the same."""
    for folder in ("cuda", "hardware"):
        (tmp_path / folder).mkdir()
    kernel, table = tmp_path / "cuda" / "kernel.cuh", tmp_path / "hardware" / "sm_90.yaml"
    kernel.write_text("one")
    table.write_text("one")
    monkeypatch.setattr("gpu_suite.points.data_folder", lambda _name: tmp_path)
    before = [sources_digest("bench"), sources_digest("tune")]
    table.write_text("two")
    after = [sources_digest("bench"), sources_digest("tune")]
    assert before[0] != after[0] and before[1] == after[1]
    kernel.write_text("two")
    assert sources_digest("tune") != after[1]


def test_points_stop_at_their_limit_and_runs_at_their_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gpu_suite.points.POINT_SECONDS", 1)
    slow = Point("slow", lambda: {"slept": time.sleep(30)})
    never = Point("never", lambda: {"value": 1})
    records = run_points("bench", [slow, never], None, {"name": "a GPU"}, 1.5)
    assert [record["point"] for record in records] == ["slow"]
    assert "PointTimeout" in records[0]["error"]


def test_tune_writes_a_table_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hardware").mkdir()
    monkeypatch.setattr(tune, "data_folder", lambda _name: tmp_path)
    table = hardware_tables()[-1]
    tile = replace(table.tiles[128][0], stages=3, min_ctas=2)
    records = [
        {"point": "tile 128 rows 16", "result": {"tile": asdict(tile), "us": 1.0}},
        {"point": "tile 64 rows 16", "error": "PointTimeout: over 40 s"},
        {"point": "planner", "result": {"waves": 2, "min_run_chunks": 8}},
    ]
    name = tune.write_table(table, records, {"name": "a GPU", "cuda": "13.0"})
    written = parse_hardware_table(json.loads((tmp_path / "hardware" / name).read_text()))
    assert written.tiles[128] == (tile, *table.tiles[128][1:])
    assert {d: t for d, t in written.tiles.items() if d != 128} == {
        d: t for d, t in table.tiles.items() if d != 128
    }
    assert (written.waves, written.min_run_chunks) == (2, 8)


def test_tune_writes_the_table_of_the_device_not_of_the_one_it_borrows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An RTX 3090 runs the shapes of sm_89."""
    properties = SimpleNamespace(
        major=8,
        minor=6,
        shared_memory_per_block_optin=101376,
        shared_memory_per_multiprocessor=102400,
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
    borrowed = table_for((8, 6), 101376)
    device = Device(False, torch.device("cuda"), DryLauncher(borrowed))
    assert borrowed.arch == "sm_89"
    assert device.table == replace(borrowed, arch="sm_86")


def test_the_trees_of_pats_benchmark_are_planned() -> None:
    """Neighbours share the whole chunks below the nodes that they have in common."""
    ops = Device.open(dry=True).ops(128, 8)
    for text in PAT_TREES:
        tree = Tree.of(text, 32, 8)
        levels = [int(n) for n in text.partition("_")[0].split(",")]
        assert (len(tree.chunk_ids), tree.rows) == (levels[-1], levels[-1])
        for row in range(1, min(tree.rows, 80)):
            before, after = (tree.chunk_ids[i].tolist() for i in (row - 1, row))
            common = 0
            for nodes, tokens in zip(levels, tree.tokens, strict=True):
                if (row - 1) // (tree.rows // nodes) != row // (tree.rows // nodes):
                    break
                common += tokens
            shared = common // 64
            assert before[:shared] == after[:shared] and before[shared] != after[shared]
        ids = np.unique(np.concatenate(tree.chunk_ids))
        assert len(ids) == tree.num_chunks == ids.max() + 1
    assert len(PAT_TREES) == 20
    small = Tree.of("1,2,64_1024,256,256", 32, 8)
    assert small.unique_bytes == (1024 + 2 * 256 + 64 * 256) * small.token_bytes
    plans = [small.plan(ops, sharing=sharing) for sharing in (True, False)]
    assert [int(p.items[: p.num_items, 1].max()) > 1 for p in plans] == [True, False]


def test_points_have_predicted_times_on_gpus_with_known_rates() -> None:
    device = Device.open(dry=True)
    workload = Workload(32, 4096, 512, 32, 8)
    assert predicted_microseconds(device, workload) == pytest.approx(32, abs=3)
    assert predicted_microseconds(device, replace(workload, head_dim=64)) is None


def test_prompts_of_serve_are_shared_as_their_settings_say() -> None:
    shared, alone, trace = (
        s.prompts(500)
        for s in (Setting(192, 128, 3, 2), Setting(64, 0, 3, 2), Setting(4096, 0, 3, 8, True))
    )
    assert {len(p) for p in shared} == {192} and len({tuple(p[:128]) for p in shared}) == 1
    assert len({tuple(p[:128]) for p in alone}) == len(alone) == 4
    assert max(map(len, trace)) <= 4096 and len(trace) == 16
    assert len({tuple(p[:1024]) for p in trace}) == 3
    assert shared == Setting(192, 128, 3, 2).prompts(500)


def test_serve_compares_with_ours() -> None:
    records = [
        {"point": "ours: a", "result": {"tokens_per_s": 30.0}},
        {"point": "sharing off: a", "result": {"tokens_per_s": 10.0}},
        {"point": "transformers: a", "error": "ImportError"},
    ]
    assert [row.get("ours x") for row in serve_rows(records)] == [1.0, 3.0, None]


@pytest.mark.nightly
def test_a_dry_run_of_serve_answers_all_requests() -> None:
    command = [sys.executable, "benchmarks/gpu.py", "serve", "--dry-run", "--points", "off: trace"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
    assert process.stdout.splitlines()[-1].startswith("2 of 2 points done, 0 failed")


def test_peers_without_a_tree_walk_all_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or their K and V would stay in the L2 cache."""
    monkeypatch.setattr(Device, "l2_bytes", 1 << 15)
    device = Device(False, torch.device("cpu"), DryLauncher())
    workload = Workload(2, 64, 6, num_qo_heads=4, num_kv_heads=2, head_dim=64)
    step = Step(workload, device, device.layers_beyond_l2(workload.unique_bytes))
    peer = sdpa_per_sequence(step)
    for layer in range(device.layers_beyond_l2(workload.unshared_bytes)):
        keys, values = (x.double().repeat_interleave(2, dim=1) for x in step.contiguous(layer))
        scores = (keys @ step.q.double().unsqueeze(-1)).squeeze(-1) * workload.scale
        expected = torch.einsum("rht,rhtd->rhd", scores.softmax(-1), values)
        assert (peer(layer).squeeze(2).double() - expected).abs().max() < 0.05
    assert layer > 0


def test_rows_beyond_the_second_grid_dimension() -> None:
    """CUDA launches 2^31 - 1 CTAs along x, 65,535 along y and z."""
    ops = Device.open(dry=True).ops(64, 2)
    rows = torch.empty(1 << 17, 512, dtype=torch.bfloat16, device="meta")
    assert ops.silu_and_mul(rows).shape == (1 << 17, 256)
    assert ops.rms_norm(rows, rows[0], 1e-5)[0].shape == rows.shape


def test_every_candidate_of_the_sweep_fits_the_device() -> None:
    for table in source.hardware_tables():
        for head_dim in source.HEAD_DIMS:
            for rows in tune.ROWS:
                shapes = list(tune.candidates(table, head_dim, rows))
                assert shapes and {shape.rows for shape in shapes} == {rows}
                assert all(s.shared_bytes <= table.shared_bytes_per_block for s in shapes)
    assert Device.open(dry=True).launcher.table == table
