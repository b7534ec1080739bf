"""Compute a layer's attention time on a GPU from the planner's plans and the kernels' instructions.

    python benchmarks/gpu_model.py           prints the table
    python benchmarks/gpu_model.py --write   also writes benchmarks/results/gpu_model.md

Arithmetic, not a measurement: it needs no GPU and gives the same numbers on every machine. The
columns add one change of the kernels after another, ``BUILT`` of which exist. Work items come from
the planner as the engine calls it, instructions from the SASS of the kernels (NVRTC 12.9, bf16,
head_dim 128). The rates of ``GPUS`` and the constants below it are assumptions, good to about 20%.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from gpu_suite.device import Device, DryLauncher
from gpu_suite.workload import Workload

from chunkllama.attention.plan_format import (
    CHUNK_OFFSET,
    FIRST_POSITION,
    NUM_ROWS,
    NUM_TOKENS,
    TILE_CLASS,
    AttentionPlan,
)
from chunkllama.backends.cuda.plan import PartialLaunch, gpu_packing, partial_launches
from chunkllama.backends.cuda.source import HardwareTable, TileShape, hardware_tables

RESULT = Path(__file__).resolve().parent / "results" / "gpu_model.md"
CHANGES = (
    "generic addresses",
    "constant addresses",  # and rescaling under a vote, sums by mma, divisions hoisted
    "128-row tiles",
    "one launch",
    "wgmma",
)
BUILT = 1  # index in CHANGES of the kernels as they are


@dataclass(frozen=True)
class Gpu:
    """A GPU's rates.

    Attributes:
        hz: clock of the SMs.
        copy, l2: bytes per second of HBM (a plain copy) and of the L2 cache.
        l2_kept: bytes of a run that still lie in L2 when the next round of CTAs reads it.
        mma_cycles: of an m16n8k16 on one of an SM's four tensor cores.
        peak: dense bf16 operations per second.
    """

    arch: str
    sms: int
    hz: float
    copy: float
    l2: float
    l2_kept: float
    mma_cycles: float
    peak: float


GPUS = {
    "A100": Gpu("sm_80", 108, 1.41e9, 1.75e12, 4.5e12, 32e6, 8.0, 312e12),
    "H200": Gpu("sm_90", 132, 1.755e9, 4.3e12, 5.5e12, 40e6, 6.5, 989e12),
}


@dataclass(frozen=True)
class Stage:
    """Instructions that a warp issues for a full, unmasked stage of a tile.

    Attributes:
        generic, constant: all of them, by how addresses are computed.
        mma, ldmatrix: of them; the mma of ``constant``, which adds weights by mma too.
    """

    generic: int
    constant: int
    mma: int
    ldmatrix: int


STAGES = {
    ("sm_80", 16): Stage(462, 200, 33, 16),
    ("sm_80", 32): Stage(393, 185, 33, 16),
    ("sm_80", 64): Stage(520, 259, 66, 32),
    ("sm_80", 128): Stage(476, 476, 132, 48),
    ("sm_90", 16): Stage(478, 204, 33, 16),
    ("sm_90", 32): Stage(398, 190, 33, 16),
    ("sm_90", 64): Stage(860, 433, 132, 64),
    ("sm_90", 128): Stage(476, 476, 132, 48),
}
# Issue slots of a unit beside its stages, by rows of the tile: counted with divisions in the inner
# copies, and estimated with these hoisted.
UNIT_SLOTS = {16: (1330, 700), 32: (1900, 800), 64: (2750, 900), 128: (1400, 1400)}
# Shares of the issue slots, the tensor cores and shared memory that can be sustained.
ISSUE_SHARE, TENSOR_SHARE, SHARED_SHARE, PEAK_SHARE = 0.7, 0.9, 0.85, 0.65
SHARED_BYTES_PER_CYCLE, WARP_SCHEDULERS = 128, 4
# Cycles: a stage's dependent instructions; index loads, first stage and joining of a unit.
CHAIN_CYCLES, UNIT_CYCLES = 900, 2200
# Seconds: a dependent kernel more in a graph, the first bytes of a kernel, the merge itself.
BOUNDARY_SECONDS, RAMP_SECONDS, MERGE_SECONDS = 1.0e-6, 0.8e-6, 1.2e-6
OVERLAP_LOSS = 0.3  # share of the smaller tile class's work that one launch does not hide
WIDE_TILE = TileShape(128, 2, 4, 1, 32, 3, 2, 248)

GQA = {"num_qo_heads": 32, "num_kv_heads": 8}
WORKLOADS = [
    *(
        Workload(32, shared, private, **heads)
        for heads in ({}, GQA)
        for shared in (1024, 2048, 4096)
        for private in (0, 512)
    ),
    *(Workload(rows, 4096, 512, **GQA) for rows in (64, 128, 256)),
    Workload(256, 4096, 64, **GQA),
    Workload(64, 4096, 512, 64, 8),
    Workload(128, 4096, 0),
    Workload(64, 0, 2048, **GQA),
]


@dataclass(frozen=True)
class ClassTime:
    """Seconds that a tile class keeps the SMs, HBM and L2 busy."""

    compute: float
    hbm: float
    l2: float


def stage_cycles(gpu: Gpu, tile: TileShape, change: int) -> float:
    """Cycles of an SM for a stage: the busiest of issue slots, tensor cores and shared memory."""
    counts, warps = STAGES[gpu.arch, tile.rows], tile.threads // 32
    stage_bytes = 2 * tile.stage_tokens * tile.head_dim * 2
    if CHANGES[change] == "wgmma" and tile.rows >= 64 and gpu.arch == "sm_90":
        operations = 4 * tile.rows * tile.stage_tokens * tile.head_dim
        per_cycle = gpu.peak / gpu.sms / gpu.hz * PEAK_SHARE
        shared = stage_bytes * (1 + tile.rows / 64) / SHARED_BYTES_PER_CYCLE / SHARED_SHARE
        return max(operations / per_cycle, shared)
    instructions = counts.constant if change >= 1 else counts.generic
    return max(
        instructions * warps / WARP_SCHEDULERS / ISSUE_SHARE,
        counts.mma * gpu.mma_cycles * warps / WARP_SCHEDULERS / TENSOR_SHARE,
        (counts.ldmatrix * warps * 512 + stage_bytes) / SHARED_BYTES_PER_CYCLE / SHARED_SHARE,
    )


def class_time(
    gpu: Gpu,
    workload: Workload,
    plan: AttentionPlan,
    launch: PartialLaunch,
    tile: TileShape,
    change: int,
) -> ClassTime:
    """One launch: CTAs walk the units by turns, SMs run CTAs side by side."""
    items = plan.items[: plan.num_items]
    items = items[items[:, TILE_CLASS] == launch.tile_class]
    group = workload.num_qo_heads // workload.num_kv_heads
    tokens = np.minimum(items[:, NUM_TOKENS], workload.context - items[:, FIRST_POSITION])
    repeats = workload.num_kv_heads * -(-items[:, NUM_ROWS] * group // tile.rows)
    stages = np.repeat(-(-tokens // tile.stage_tokens), repeats)
    ctas = min(len(stages), launch.grid[0])
    turn = np.arange(len(stages)) % ctas
    cta_stages = np.bincount(turn, stages, ctas)
    cta_units = np.bincount(turn, minlength=ctas)
    slots = UNIT_SLOTS[tile.rows][change >= 1] / ISSUE_SHARE
    work = cta_stages * stage_cycles(gpu, tile, change) + cta_units * slots
    busiest = np.bincount(np.arange(ctas) % gpu.sms, work).max()
    latency = (cta_stages * CHAIN_CYCLES + cta_units * UNIT_CYCLES).max()

    runs = zip(items[:, CHUNK_OFFSET].tolist(), tokens.tolist(), strict=True)
    unique = {int(c) for at, n in runs for c in plan.chunk_ids[at : at + (n + 63) // 64]}
    hbm = len(unique) * 64 * workload.token_bytes
    if hbm > gpu.l2_kept and change < 2:  # a later round of CTAs finds no run of before in L2
        hbm = min(int(tokens.sum()) * workload.token_bytes, hbm * -(-len(stages) // ctas))
    l2 = int(stages.sum()) * 2 * tile.stage_tokens * tile.head_dim * 2
    return ClassTime(max(busiest, latency) / gpu.hz, hbm / gpu.copy, l2 / gpu.l2)


def layer_seconds(gpu: Gpu, workload: Workload, change: int) -> float:
    """Attention of one layer with the changes up to ``change``."""
    table = _table(gpu, change)
    ops = Device(True, torch.device("meta"), DryLauncher(table, gpu.sms)).ops(
        workload.head_dim, workload.num_kv_heads
    )
    plan = workload.plan(ops)
    packing = gpu_packing(
        table,
        gpu.sms,
        num_qo_heads=workload.num_qo_heads,
        num_kv_heads=workload.num_kv_heads,
        head_dim=workload.head_dim,
    )
    launches = partial_launches(
        plan,
        packing,
        table,
        gpu.sms,
        dtype="bf16",
        head_dim=workload.head_dim,
        group=workload.num_qo_heads // workload.num_kv_heads,
        replayable=False,
    )
    tiles = {tile.kernel("bf16"): tile for tile in table.tiles[workload.head_dim]}
    classes = [class_time(gpu, workload, plan, x, tiles[x.kernel], change) for x in launches]
    merged = not plan.row_flags[: plan.num_rows].all()
    slots = plan.num_slots if merged else 0
    partials = 2 * slots * workload.num_qo_heads * (workload.head_dim * 4 + 4) / gpu.l2
    if change >= 3:
        hidden = OVERLAP_LOSS * sum(c.compute for c in classes[1:])
        compute = max(c.compute for c in classes) + hidden
        body = max(compute, sum(c.hbm for c in classes), sum(c.l2 for c in classes)) + RAMP_SECONDS
    else:
        body = sum(max(c.compute, c.hbm, c.l2) + RAMP_SECONDS for c in classes)
        body += BOUNDARY_SECONDS * (len(classes) - 1)
    return body + partials + (BOUNDARY_SECONDS + MERGE_SECONDS if merged else 0)


def ideal_seconds(gpu: Gpu, workload: Workload) -> float:
    """Every unique byte read once, or the shared tokens' products at the tensor cores' best."""
    operations = 4 * workload.rows * workload.num_qo_heads * workload.head_dim * workload.shared
    return max(workload.unique_bytes / gpu.copy, operations / (gpu.peak * PEAK_SHARE))


def _table(gpu: Gpu, change: int) -> HardwareTable:
    table = next(t for t in hardware_tables() if t.arch == gpu.arch)
    if change < 2:
        return table
    return replace(table, tiles=table.tiles | {128: (*table.tiles[128], WIDE_TILE)})


def microseconds(gpu: str, workload: Workload) -> list[float]:
    """The ideal, then one number per change."""
    rates = GPUS[gpu]
    times = [layer_seconds(rates, workload, change) for change in range(len(CHANGES))]
    return [1e6 * t for t in (ideal_seconds(rates, workload), *times)]


def report() -> str:
    columns = ["ideal", *CHANGES]
    columns[BUILT + 1] = f"**{columns[BUILT + 1]}** (built)"
    lines = [
        "# Modelled attention time of a layer",
        "",
        "Microseconds, head_dim 128, bf16, written by `python benchmarks/gpu_model.py --write`:",
        "arithmetic with assumed rates, not a measurement. Every column adds a change to the one",
        "before. b: rows, ns: shared tokens, nu: private tokens of each row, heads: query/kv.",
    ]
    for gpu in GPUS:
        lines += ["", f"| {gpu} | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
        for w in WORKLOADS:
            name = f"b{w.rows} ns{w.shared} nu{w.private} heads {w.num_qo_heads}/{w.num_kv_heads}"
            numbers = " | ".join(f"{t:.1f}" for t in microseconds(gpu, w))
            lines.append(f"| {name} | {numbers} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write results/{RESULT.name}")
    text = report()
    if parser.parse_args().write:
        RESULT.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
