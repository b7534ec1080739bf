"""One decode and one causal case through an emulator library, for sanitizers and planted bugs.

numpy only: torch under ThreadSanitizer would drown the kernels in its own threads. Run as

    python run_case.py LIBRARY SCHEDULE

Prints one JSON object: largest error against float64, bank conflicts, copied and predicted bytes.
"""

from __future__ import annotations

import ctypes
import json
import math
import sys
from itertools import pairwise

import numpy as np

from chunkllama.attention.plan import Planner
from chunkllama.attention.plan_format import AttentionPlan, Packing
from chunkllama.backends.cuda.plan import gpu_packing, partial_launches, plan_addresses
from chunkllama.backends.cuda.source import PARAMS, KernelSpec, hardware_tables, merge_kernel

HEAD_DIM, KV_HEADS, GROUP, NUM_SMS = 64, 1, 3, 1
HEADS = KV_HEADS * GROUP
Counters = ctypes.c_int64 * 8  # see emulation::Counters: [2] bank conflicts, [3] copied bytes


def to_bf16(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


class Emulator:
    def __init__(self, library: str, schedule: int) -> None:
        self.library, self.schedule = ctypes.CDLL(library), schedule
        self.counters = Counters()

    def launch(
        self,
        kernel: KernelSpec,
        grid: tuple[int, int, int],
        call: tuple[int | float, ...],
        plan: tuple[int, ...],
    ) -> None:
        params = PARAMS[kernel.params]
        packed = params.call.pack(*call) + params.plan.pack(*plan)
        status = self.library.emulate(
            kernel.expression.encode(),
            (ctypes.c_uint * 3)(*grid),
            kernel.threads,
            ctypes.c_size_t(kernel.shared_bytes),
            packed,
            ctypes.c_size_t(len(packed)),
            self.schedule,
            self.counters,
        )
        assert status == 0, status


def attend(
    emulator: Emulator, plan: AttentionPlan, q: np.ndarray, kv: np.ndarray, positions: np.ndarray
) -> tuple[np.ndarray, int]:
    """Run the plan's launches; the output [R, Hq, D] and the bytes its items should have copied."""
    table = next(t for t in hardware_tables() if t.arch == "sm_90")
    packing = packing_of_case()
    launches = partial_launches(
        plan,
        packing,
        table,
        NUM_SMS,
        dtype="bf16",
        head_dim=HEAD_DIM,
        group=GROUP,
        replayable=False,
    )
    out = np.zeros_like(q)
    partial_out = np.full((plan.num_slots, HEADS, HEAD_DIM), np.nan, np.float32)
    partial_lse = np.full((plan.num_slots, HEADS), np.nan, np.float32)
    at = plan_addresses(plan, plan.buffer.ctypes.data)
    workspace = (partial_out.ctypes.data, partial_lse.ctypes.data)
    tensors = tuple(x.ctypes.data for x in (q, kv, out, positions))
    for launch in launches:
        shape = (KV_HEADS, GROUP, launch.row_tiles, launch.tile_class, plan.window or 0)
        arrays = (at.header, at.items, at.chunk_ids, at.row_flags)
        emulator.launch(
            launch.kernel,
            launch.grid,
            (*tensors, HEAD_DIM**-0.5 * math.log2(math.e), 0.0),
            (*shape, *workspace, *arrays, kv[0].size),
        )
    emulator.launch(
        merge_kernel("bf16", HEAD_DIM),
        (len(q), -(-HEADS // 4), 1),
        (out.ctypes.data,),
        (*workspace, at.header, at.merge_indptr, at.merge_slots, at.row_flags, HEADS),
    )
    expected_bytes = 0
    for row, rows, _, tokens, first, _, masked, _ in plan.items[: plan.num_items].tolist():
        if masked:
            tokens = max(0, min(tokens, int(positions[row + rows - 1]) + 1 - first))
        expected_bytes += KV_HEADS * HEAD_DIM * 2 * (2 * tokens + rows * GROUP)
    return out, expected_bytes


def packing_of_case() -> Packing:
    table = next(t for t in hardware_tables() if t.arch == "sm_90")
    return gpu_packing(table, NUM_SMS, num_qo_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM)


def run(
    emulator: Emulator, paths: list[list[int]], spans: list[tuple[int, int]], version: int
) -> tuple[float, int]:
    """Largest error of a step over slices (first position, tokens), and its predicted bytes."""
    rng = np.random.default_rng(5)
    shared = [0]
    for before, after in pairwise(paths):
        pairs = zip(before, after, strict=False)
        shared.append(next((i for i, (a, b) in enumerate(pairs) if a != b), len(before)))
    plan = Planner(packing_of_case(), 64).build(
        first_positions=[first for first, _ in spans],
        num_tokens=[count for _, count in spans],
        chunk_ids=[np.array(path, np.int32) for path in paths],
        shared=shared,
        version=version,
    )
    kv = np.full((max(map(max, paths)) + 1, 2, KV_HEADS, 64, HEAD_DIM), 0x7FFF, np.uint16)
    for path, (first, count) in zip(paths, spans, strict=True):
        for index in range(-(-(first + count) // 64)):
            filled = min(64, first + count - 64 * index)
            kv[path[index], :, :, :filled] = to_bf16(
                rng.uniform(-0.5, 0.5, (2, KV_HEADS, filled, HEAD_DIM))
                * [[[[6.0 + 10.0 * index]]], [[[1.0]]]]  # later scores exceed earlier ones by far
            )
    positions = np.concatenate([np.arange(f, f + n) for f, n in spans]).astype(np.int32)
    q = to_bf16(rng.standard_normal((len(positions), HEADS, HEAD_DIM)))
    out, expected_bytes = attend(emulator, plan, q, kv, positions)
    worst, row = 0.0, 0
    for path, (first, count) in zip(paths, spans, strict=True):
        for position in range(first, first + count):
            tokens = from_bf16(kv[path]).transpose(1, 2, 0, 3, 4).reshape(2, KV_HEADS, -1, HEAD_DIM)
            for head in range(HEADS):
                keys, values = tokens[:, head // GROUP, : position + 1]
                scores = keys @ from_bf16(q[row, head]) * HEAD_DIM**-0.5
                weights = np.exp(scores - scores.max())
                error = np.abs(from_bf16(out[row, head]) - weights @ values / weights.sum())
                worst = max(worst, float(error.max())) if not np.isnan(error).any() else math.inf
            row += 1
    return worst, expected_bytes


def main(library: str, schedule: int) -> None:
    emulator = Emulator(library, schedule)
    shared = list(range(1, 5))
    decode = run(
        emulator,
        [[*shared, 5 + 2 * i, 6 + 2 * i] for i in range(8)],
        [(256 + 9 * i, 1) for i in range(8)],
        version=1,
    )
    causal = run(emulator, [[1, 2, 3]], [(100, 40)], version=0)
    print(
        json.dumps(
            {
                "error": max(decode[0], causal[0]),
                "bank_conflicts": emulator.counters[2],
                "copied_bytes": emulator.counters[3],
                "predicted_bytes": decode[1] + causal[1],
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
