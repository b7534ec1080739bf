"""`benchmarks/gpu.py` where there is no GPU: dry runs, resumption, the table that tune writes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from gpu_suite import tune
from gpu_suite.device import Device
from gpu_suite.points import Point, run_points

from chunkllama.ops import source
from chunkllama.ops.source import hardware_tables, parse_hardware_table

ROOT = Path(__file__).parents[2]
# What a machine with torch, numpy and CuPy may lack, and CuPy itself.
ABSENT = ("cupy", "yaml", "msgspec", "pydantic", "fastapi", "transformers", "rich", "safetensors")


@pytest.mark.parametrize("verb", ["check", "bench", "tune"])
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
    assert ran == ["a", "b", "b", "c"], "what has a result is kept, what failed is tried again"
    assert [record["point"] for record in records] == ["a", "b", "c"]
    run_points("bench", [point("a")], results, {"name": "another GPU"}, 100)
    assert ran[-1] == "a", "a result counts for its own device"
    assert len([json.loads(line) for line in results.read_text().splitlines()]) == 5


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


def test_every_candidate_of_the_sweep_fits_the_device() -> None:
    for table in source.hardware_tables():
        for head_dim in source.HEAD_DIMS:
            for rows in tune.ROWS:
                shapes = list(tune.candidates(table, head_dim, rows))
                assert shapes and {shape.rows for shape in shapes} == {rows}
                assert all(s.shared_bytes <= table.shared_bytes_per_block for s in shapes)
    assert Device.open(dry=True).launcher.table == table
