"""The attention kernels on the CPU emulator: numbers, traffic, bank conflicts, NaN, schedules.

Every case goes the way of the engine: planner, backend, kernels. Only the launcher is another. It
runs on every machine of emulation/machines.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from attention_plans import Case, attention_oracle, make_case, random_case
from kernel_emulator import Counters, EmulatedLauncher, table

from chunkllama.attention.plan_format import (
    FIRST_POSITION,
    FLAGS,
    ITEM_MASK,
    NUM_ROWS,
    NUM_TOKENS,
    ROW_BEGIN,
    TILE_CLASS,
    AttentionPlan,
)
from chunkllama.backends.base import KVCache
from chunkllama.backends.cuda.backend import CudaBackend

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {"bf16": 2e-3, "fp16": 5e-4}
SCHEDULES = (0, 1, 7)  # forward, reverse, shuffled


@dataclass(frozen=True)
class Setting:
    """A model's and a device's shape; one field changed at a time in the tests below."""

    head_dim: int = 64
    dtype: str = "bf16"
    num_kv_heads: int = 2
    group: int = 4
    arch: str = "sm_90"
    schedule: int = 0
    num_sms: int = 4

    @property
    def num_qo_heads(self) -> int:
        return self.num_kv_heads * self.group

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    def ops(self) -> tuple[CudaBackend, EmulatedLauncher]:
        launcher = EmulatedLauncher(table(self.arch), num_sms=self.num_sms, schedule=self.schedule)
        ops = CudaBackend(
            torch.device("cpu"),
            dtype=DTYPES[self.dtype],
            head_dim=self.head_dim,
            num_kv_heads=self.num_kv_heads,
            launcher=launcher,
        )
        return ops, launcher


@dataclass
class Inputs:
    """K and V in float64 as the dtype holds them, and queries with needles among the keys."""

    keys: np.ndarray
    values: np.ndarray
    q: torch.Tensor


def random_inputs(rng: np.random.Generator, case: Case, setting: Setting) -> Inputs:
    """|V| below 1/2, where rounding an output to bf16 costs at most 2^-10, half the tolerance.

    A row's first head points at the row's own key, every other head of every other row at a random
    visible one, so strongly that this key has most of the weight: a key lost shows at once.
    """
    dtype = DTYPES[setting.dtype]
    shape = (case.num_chunks, case.chunk_size, setting.num_kv_heads, setting.head_dim)

    def rounded(x: np.ndarray) -> np.ndarray:
        return torch.from_numpy(x).to(dtype).double().numpy()

    keys = rounded(rng.standard_normal(shape))
    values = rounded(rng.uniform(-0.5, 0.5, shape))
    q = rng.standard_normal((case.num_rows, setting.num_qo_heads, setting.head_dim))
    row = 0
    for first, count, ids in zip(
        case.first_positions, case.num_tokens, case.chunk_ids, strict=True
    ):
        for position in range(first, first + count):
            strength = (np.log(position + 1) + 2) / np.sqrt(setting.head_dim)
            needles = rng.integers(0, position + 1, setting.num_qo_heads)
            needles[0] = position
            for head in range(setting.num_qo_heads if row % 2 else 1):
                chunk, slot = ids[needles[head] // 64], needles[head] % 64
                q[row, head] = strength * keys[chunk, slot, head // setting.group]
            row += 1
    return Inputs(keys, values, torch.from_numpy(q).to(dtype))


def fill(kv: KVCache, case: Case, inputs: Inputs) -> None:
    """NaN everywhere, then the case's tokens: spares, freed chunks and tails' ends stay NaN."""
    pool = kv.layers[0]
    pool.fill_(torch.nan)
    filled = torch.from_numpy(np.arange(case.chunk_size) < case.filled()[:, None])
    for which, source in enumerate((inputs.keys, inputs.values)):
        tokens = torch.from_numpy(source).to(pool.dtype)  # [chunks, 64, Hkv, D]
        pool[:, which].transpose(1, 2)[filled] = tokens[filled]


def predicted_bytes(
    plan: AttentionPlan, case: Case, setting: Setting, rows_per_tile: dict[int, int]
) -> int:
    """Bytes of K, V and Q that the items copy: a run's visible tokens once per row tile."""
    total, width = 0, setting.head_dim * 2
    for item in plan.items[: plan.num_items]:
        packed = int(item[NUM_ROWS]) * setting.group
        tile = rows_per_tile[int(item[TILE_CLASS])]
        for begin in range(0, packed, tile):
            end = min(begin + tile, packed)
            last_row = int(item[ROW_BEGIN]) + (end - 1) // setting.group
            tokens = int(item[NUM_TOKENS])
            if item[FLAGS] & ITEM_MASK:
                visible = int(case.positions[last_row]) + 1 - int(item[FIRST_POSITION])
                tokens = max(0, min(tokens, visible))
            total += setting.num_kv_heads * width * (2 * tokens + end - begin)
    return total


def check(
    case: Case,
    setting: Setting,
    rng: np.random.Generator,
    window: int | None = None,
    softcap: float | None = None,
) -> Counters:
    """Run a case and hold it to the float64 oracle, the predicted traffic and no bank conflict."""
    ops, launcher = setting.ops()
    inputs = random_inputs(rng, case, setting)
    kv = ops.allocate_kv(
        num_layers=1,
        num_chunks=case.num_chunks,
        chunk_size=64,
        num_kv_heads=setting.num_kv_heads,
        head_dim=setting.head_dim,
        dtype=DTYPES[setting.dtype],
    )
    fill(kv, case, inputs)
    packing = ops.packing(
        num_qo_heads=setting.num_qo_heads,
        num_kv_heads=setting.num_kv_heads,
        head_dim=setting.head_dim,
    )
    plan = case.plan(packing, window=window)
    device_plan = ops.upload_plan(plan, kv, num_qo_heads=setting.num_qo_heads)
    positions = torch.from_numpy(case.positions)
    out = ops.tpp_attention(inputs.q, kv, 0, positions, device_plan, setting.scale, softcap)
    expected = attention_oracle(
        case, inputs.q, inputs.keys, inputs.values, setting.scale, window, softcap
    )
    error = np.abs(out.view(inputs.q.shape).double().numpy() - expected)
    assert error.max() <= TOLERANCE[setting.dtype], f"largest error {error.max():.2e}"
    assert launcher.counters.bank_conflicts == 0
    tiles = {launch.tile_class: launch.kernel.expression for launch, _ in device_plan.state.partial}
    rows_per_tile = {
        tile_class: next(
            t.rows
            for t in launcher.table.tiles[setting.head_dim]
            if t.kernel(setting.dtype).expression == expression
        )
        for tile_class, expression in tiles.items()
    }
    expected_bytes = predicted_bytes(plan, case, setting, rows_per_tile)
    assert launcher.counters.copied_bytes == expected_bytes
    return launcher.counters


def decode_case(prefixes: list[tuple[int, list[int]]]) -> Case:
    """Decode rows below prefixes: per prefix its chunks, and the private tokens of each row."""
    paths: list[list[int]] = []
    spans: list[tuple[int, int]] = []
    chunk = 1  # chunk 0 is never used: it stays NaN
    for shared, tails in prefixes:
        prefix = list(range(chunk, chunk + shared))
        chunk += shared
        for tail in tails:
            own = -(-tail // 64) + 1  # one spare
            paths.append(prefix + list(range(chunk, chunk + own)))
            spans.append((shared * 64 + tail - 1, 1))
            chunk += own
    return make_case(paths, spans, chunk_size=64, version=3)


def prefill_case(prefix: int, new: list[int], shared_chunks: int = 0) -> Case:
    """Slices of ``new`` causal rows, each after ``prefix`` tokens, some chunks of them shared."""
    chunk, paths = 1 + shared_chunks, []
    for count in new:
        own = -(-(prefix + count) // 64) - shared_chunks
        paths.append(list(range(1, 1 + shared_chunks)) + list(range(chunk, chunk + own)))
        chunk += own
    return make_case(paths, [(prefix, count) for count in new], chunk_size=64)


TREES = {
    "flat": decode_case([(0, [1, 64, 65, 100, 129, 300])]),
    "prefix": decode_case([(5, [1 + 37 * i % 130 for i in range(9)])]),
    "two_levels": make_case(
        [[1, 2, 3, 10], [1, 2, 3, 11, 12], [1, 2, 4, 5, 13, 14], [1, 2, 4, 5, 15], [6, 16]],
        [(200, 1), (256, 1), (319, 1), (256, 1), (127, 1)],
        chunk_size=64,
        version=1,
        num_chunks=20,
    ),
    "three_levels": make_case(
        [
            [1, 2, 3, 4, 10],
            [1, 2, 3, 4, 11],
            [1, 2, 3, 5, 12],
            [1, 6, 7, 13],
            [1, 6, 7, 14],
            [1, 15],
            [8, 9, 16],
            [8, 9, 17],
        ],
        [(256, 1), (319, 1), (300, 1), (200, 1), (192, 1), (64, 1), (128, 1), (191, 1)],
        chunk_size=64,
        version=1,
        num_chunks=19,
    ),
    "many_groups": decode_case(
        [(1 + i % 3, [1 + (i + 5 * j) % 80 for j in range(3)]) for i in range(8)]
    ),
    "all_shared": decode_case([(8, [1] * 20)]),
    "one_row": decode_case([(0, [700])]),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("tree", TREES)
def test_emulation_trees(tree: str, schedule: int, rng: np.random.Generator) -> None:
    check(TREES[tree], Setting(schedule=schedule), rng)


@pytest.mark.parametrize("tree", ["prefix", "three_levels"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_emulation_shapes(
    head_dim: int, dtype: str, arch: str, tree: str, rng: np.random.Generator
) -> None:
    check(TREES[tree], Setting(head_dim=head_dim, dtype=dtype, arch=arch), rng)


@pytest.mark.parametrize("tokens", range(129, 193))
def test_emulation_context_ends(tokens: int, rng: np.random.Generator) -> None:
    """A context that ends at each position of a chunk, beside neighbours that end elsewhere."""
    case = decode_case([(1, [tokens - 64, 1 + 3 * tokens % 64, 64])])
    check(case, Setting(num_kv_heads=1, group=4, schedule=tokens % 3), rng)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 64, 65, 100, 128, 200, 300])
def test_emulation_rows(rows: int, rng: np.random.Generator) -> None:
    """Decode batches of every width over one shared prefix."""
    case = decode_case([(3, [1 + (7 * i) % 66 for i in range(rows)])])
    check(case, Setting(num_kv_heads=1, group=1 + rows % 2), rng)


@pytest.mark.parametrize("group", [1, 3, 4, 5, 7, 8, 12, 16, 24, 32, 71])
@pytest.mark.parametrize("tree", ["prefix", "two_levels"])
def test_emulation_groups(tree: str, group: int, rng: np.random.Generator) -> None:
    """Groups of query heads that fill a tile, leave rows of it idle, or take several row tiles."""
    check(TREES[tree], Setting(num_kv_heads=1 if group > 8 else 2, group=group), rng)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prefix", [0, 1, 63, 64, 100])
@pytest.mark.parametrize("new", [1, 2, 50, 64, 130])
def test_emulation_causal(new: int, prefix: int, schedule: int, rng: np.random.Generator) -> None:
    check(prefill_case(prefix, [new]), Setting(num_kv_heads=1, schedule=schedule), rng)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_emulation_causal_shapes(head_dim: int, dtype: str, rng: np.random.Generator) -> None:
    """Slices over a shared cached prefix: the rows of all of them read it together."""
    case = prefill_case(200, [30, 1, 70], shared_chunks=3)
    check(case, Setting(head_dim=head_dim, dtype=dtype, num_kv_heads=1, group=3), rng)


@pytest.mark.parametrize("kind", ["decode", "slices", "mixed"])
@pytest.mark.parametrize("seed", range(8))
def test_emulation_random(seed: int, kind: str) -> None:
    """Random trees and steps, same-step sharing included."""
    rng = np.random.default_rng([seed, 4])
    case = random_case(rng, kind=kind, max_rows=120)
    dtype = ("bf16", "fp16")[seed % 2]
    check(case, Setting(dtype=dtype, num_kv_heads=1, group=1 + seed, schedule=seed), rng)


@pytest.mark.nightly
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_emulation_full_matrix(
    head_dim: int, dtype: str, arch: str, group: int, schedule: int, rng: np.random.Generator
) -> None:
    setting = Setting(head_dim=head_dim, dtype=dtype, arch=arch, group=group, schedule=schedule)
    for case in (*TREES.values(), prefill_case(100, [1, 50, 64, 300], shared_chunks=1)):
        check(case, setting, rng)
    for kind in ("decode", "slices", "mixed"):
        check(random_case(rng, kind=kind), setting, rng)


WINDOWS = (1, 40, 64, 130, 1000)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("head_dim", [64, 256])
def test_emulation_windows(head_dim: int, window: int, rng: np.random.Generator) -> None:
    """Decode batches, slices over a shared prefix, and both in one step, seen through a window."""
    setting = Setting(head_dim=head_dim, num_kv_heads=1, group=3, schedule=window % 3)
    for case in (TREES["two_levels"], prefill_case(200, [30, 1, 70], shared_chunks=3)):
        check(case, setting, rng, window)
    check(random_case(rng, kind="mixed", max_rows=60), setting, rng, window)


@pytest.mark.parametrize(("softcap", "window"), [(0.5, None), (5.0, 70), (50.0, None)])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_emulation_soft_caps(
    head_dim: int, softcap: float, window: int | None, rng: np.random.Generator
) -> None:
    setting = Setting(head_dim=head_dim, num_kv_heads=1, group=2)
    for case in (TREES["prefix"], prefill_case(100, [50])):
        check(case, setting, rng, window, softcap)


@pytest.mark.nightly
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_emulation_full_matrix_of_windows_and_soft_caps(
    head_dim: int, dtype: str, arch: str, window: int, rng: np.random.Generator
) -> None:
    setting = Setting(head_dim=head_dim, dtype=dtype, arch=arch, schedule=7)
    for case in (*TREES.values(), prefill_case(100, [1, 50, 64, 300], shared_chunks=1)):
        for softcap in (None, 4.0):
            check(case, setting, rng, window, softcap)
    for kind in ("decode", "slices", "mixed"):
        check(random_case(rng, kind=kind), setting, rng, window)


@pytest.mark.parametrize("rows", [16, 17, 64, 65, 130])
def test_emulation_shared_chunks_are_read_once_per_row_tile(
    rows: int, rng: np.random.Generator
) -> None:
    """Traffic from the tree's arithmetic alone, not from the plan: the paper's central claim."""
    shared, setting = 6, Setting(num_kv_heads=2, group=1)
    counters = check(decode_case([(shared, [5] * rows)]), setting, rng)
    token_bytes = 2 * setting.num_kv_heads * setting.head_dim * 2
    row_tiles = -(-rows // 64)
    kv_bytes = (row_tiles * shared * 64 + rows * 5) * token_bytes
    q_row_bytes = setting.num_qo_heads * setting.head_dim * 2
    runs, rest = divmod(counters.copied_bytes - kv_bytes, q_row_bytes)
    assert rest == 0 and rows < runs, "queries once per item, K and V exactly once"
    assert runs <= rows * (1 + shared // 2), "runs are not cut below min_run_chunks"


def test_emulation_launches_walk_all_units(rng: np.random.Generator) -> None:
    """Fewer CTAs than units: one persistent CTA walks them all."""
    check(TREES["many_groups"], Setting(num_sms=1), rng)


def test_emulation_captured_launches_follow_the_plan(rng: np.random.Generator) -> None:
    """Launches recorded with one plan compute another one of its capacity, as a CUDA graph does."""
    setting = Setting(num_kv_heads=2, group=4)
    ops, launcher = setting.ops()
    packing = ops.packing(num_qo_heads=8, num_kv_heads=2, head_dim=64)
    before, after = TREES["prefix"], TREES["three_levels"]
    both = max(before.num_chunks, after.num_chunks)
    before, after = replace(before, num_chunks=both), replace(after, num_chunks=both)
    capacity = replace(before.plan(packing).capacity, rows=16, items=64, slots=256, chunk_ids=64)
    rows = capacity.rows
    kv = ops.allocate_kv(
        num_layers=1,
        num_chunks=both,
        chunk_size=64,
        num_kv_heads=2,
        head_dim=64,
        dtype=torch.bfloat16,
    )
    q = torch.zeros(rows, 8, 64, dtype=torch.bfloat16)
    positions = torch.zeros(rows, dtype=torch.int32)
    plan = ops.upload_plan(before.plan(packing, capacity), kv, num_qo_heads=8, replayable=True)
    out = ops.tpp_attention(q, kv, 0, positions, plan, setting.scale)
    recorded = list(launcher.launched)
    assert len(recorded) == 3, "two tile classes and the merge"

    inputs = random_inputs(rng, after, setting)
    fill(kv, after, inputs)
    q[: after.num_rows] = inputs.q
    positions[: after.num_rows] = torch.from_numpy(after.positions)
    plan.buffer.copy_(torch.from_numpy(after.plan(packing, capacity).buffer))
    for kernel, grid, params in recorded:
        launcher.launch(kernel, grid, params)
    expected = attention_oracle(after, inputs.q, inputs.keys, inputs.values, setting.scale)
    got = out.view(rows, 8, 64)[: after.num_rows].double().numpy()
    assert np.abs(got - expected).max() <= TOLERANCE["bf16"]


def test_emulation_a_lost_key_is_noticed(rng: np.random.Generator) -> None:
    """The inputs are sharp enough: the oracle without each row's last key differs everywhere."""
    case, setting = TREES["two_levels"], Setting()
    inputs = random_inputs(rng, case, setting)
    whole = attention_oracle(case, inputs.q, inputs.keys, inputs.values, setting.scale)
    shorter = replace(case, first_positions=[first - 1 for first in case.first_positions])
    lost = attention_oracle(shorter, inputs.q, inputs.keys, inputs.values, setting.scale)
    assert (np.abs(whole - lost).max(axis=(1, 2)) > 10 * TOLERANCE["bf16"]).all()
