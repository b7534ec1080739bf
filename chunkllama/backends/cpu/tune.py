"""Measure the numbers of ``Tuning`` on this machine: each candidate against the one before it,
alternating in this process.
"""

from __future__ import annotations

import ctypes
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch

from chunkllama.attention.plan import Planner
from chunkllama.backends.base import DevicePlan
from chunkllama.backends.cpu.abi import BF16, F32, INT4, INT8
from chunkllama.backends.cpu.backend import CpuBackend
from chunkllama.backends.cpu.packed import CLinear, pack_linear
from chunkllama.backends.cpu.sizes import round_up, row_stride
from chunkllama.backends.cpu.tuning import FewRows, Tuning
from chunkllama.backends.model import Linear

PAIRS: Final = 7
SAMPLE_SECONDS: Final = 0.006
ROWS: Final = (1, 2, 3, 4, 6, 8, 12, 16)  # of products, and per kv head in attention
OUT, IN, COPIES = 2048, 2048, 16  # copies of a weight together exceed L2, as a model's layers do
HEADS, KV_HEADS, DIM, CHUNK = 9, 3, 64, 64
GAIN: Final = 0.97  # share of the time that a candidate of the packing must not exceed

Call = Callable[[], object]
# Time of the first call over that of the second.
Ratio = Callable[[Call, Call], float]
Report = Callable[[str], None]


def paired_ratio(first: Call, second: Call) -> float:
    """Return the median ratio of the times of two calls, sampled in turns."""

    def seconds(call: Call, repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats

    repeats = {}
    for call in (first, second):
        seconds(call, 1)
        repeats[call] = max(1, round(SAMPLE_SECONDS / max(seconds(call, 2), 1e-7)))
    ratios = [
        seconds(first, repeats[first]) / seconds(second, repeats[second]) for _ in range(PAIRS)
    ]
    return statistics.median(ratios)


def measure(level: str, report: Report, ratio: Ratio = paired_ratio) -> tuple[Tuning, str]:
    """Return the numbers of this machine, and the instruction-set level they are for.

    Args:
        level: name of a level; empty for the best one.
        report: takes a line for each number.
        ratio: of the times of two calls.

    Raises:
        ConfigError: no level can be built or used here.
    """
    ops = CpuBackend(dtype=torch.bfloat16, head_dim=DIM, num_kv_heads=KV_HEADS, level=level)
    products, attention = _Products(ops), _Attention(ops)
    few = ops.tuning.few_rows
    pairs = ops.library.ck_activation_type(BF16) == BF16
    if pairs:  # the other levels have floats only
        few = replace(few, int8=products.most_rows("few_rows.int8", INT8, False, report, ratio))
        most = products.most_rows("few_rows.int4_float", INT4, False, report, ratio)
        few = replace(few, int4_float=most)
    few = replace(few, int4=products.most_rows("few_rows.int4", INT4, True, report, ratio))
    ops.tuning = replace(ops.tuning, few_rows=few)
    if ops.level == "amx":
        most = attention.most_vector_rows(report, ratio)
        ops.tuning = replace(ops.tuning, vector_rows=most)
    for name, candidates in (
        ("units_per_thread", (2, 4, 6)),
        ("min_run_chunks", (4, 16)),
        ("query_rows_per_item", (96, 384)),
    ):
        attention.choose(name, candidates, report, ratio)
    return ops.tuning, ops.level


def _last_gain(ratios: dict[int, float]) -> int:
    """Return the last number before the first that does not pay; 0 if none does."""
    found = 0
    for number, ratio in ratios.items():
        if ratio > 1:
            break
        found = number
    return found


def _report_rows(report: Report, name: str, found: int, ratios: dict[int, float]) -> None:
    listed = ", ".join(f"{rows}: {ratio:.2f}" for rows, ratio in ratios.items())
    report(f"{name}: {found} (time by rows against the other path: {listed})")


class _Products:
    """Linear layers of random weights, by storage."""

    def __init__(self, ops: CpuBackend) -> None:
        self._ops = ops
        generator = torch.Generator().manual_seed(0)
        self._weight = torch.randn(OUT, IN, generator=generator)
        activation = ops.library.ck_activation_type(BF16)
        dtype = torch.bfloat16 if activation == BF16 else torch.float32
        self._activation = activation
        self._x = torch.zeros(round_up(max(ROWS), 32), row_stride(IN), dtype=dtype)
        self._x[:, :IN] = torch.randn(len(self._x), IN, generator=generator)
        self._y = torch.empty(len(self._x), OUT)

    def most_rows(self, name: str, storage: int, rounds: bool, report: Report, ratio: Ratio) -> int:
        """Return up to how many rows multiplying the codes is faster than widening them."""
        most = max(ROWS)
        few = FewRows(int8=most, int4=most, int4_float=most, rounds=rounds)
        packed = pack_linear(self._ops.library, Linear(self._weight.clone()), F32, storage, few)
        memory = [packed.memory[0].clone() for _ in range(COPIES)]
        ratios = {}
        for rows in ROWS:
            first, second = (
                [_copy(packed.packed, each.data_ptr(), limit) for each in memory]
                for limit in (most, 0)
            )
            ratios[rows] = ratio(self._product(first, rows), self._product(second, rows))
            if ratios[rows] > 1:
                break
        found = _last_gain(ratios)
        _report_rows(report, name, found, ratios)
        return found

    def _product(self, copies: list[CLinear], rows: int) -> Call:
        x, y, turn = self._x, self._y, itertools.cycle(copies)

        def run() -> None:
            layer = next(turn)
            self._ops.library.ck_linear(
                *(ctypes.byref(layer), x.data_ptr(), x.stride(0), self._activation),
                *(y.data_ptr(), OUT, rows, torch.get_num_threads()),
            )

        return run


def _copy(linear: CLinear, address: int, few_rows: int) -> CLinear:
    """Return the description of a layer whose only part lies at another address."""
    copied = CLinear.from_buffer_copy(linear)
    copied.parts[0].data, copied.parts[0].few_rows = address, few_rows
    return copied


class _Attention:
    """One layer's attention: 16 requests that share 1,024 tokens, and a prompt of 512 tokens."""

    def __init__(self, ops: CpuBackend) -> None:
        self._ops = ops
        self._kv = ops.allocate_kv(
            num_layers=1,
            num_chunks=64,
            chunk_size=CHUNK,
            num_kv_heads=KV_HEADS,
            head_dim=DIM,
            dtype=torch.bfloat16,
        )
        for layer in self._kv.layers:
            layer.normal_()
        shared = list(range(16))
        self._decode = [np.array([*shared, 16 + 2 * i, 17 + 2 * i], np.int32) for i in range(16)]
        self._alone = [np.arange(16 * i, 16 * i + 16, dtype=np.int32) for i in range(4)]

    def most_vector_rows(self, report: Report, ratio: Ratio) -> int:
        """Return up to how many rows per kv head the vector units are faster than AMX."""
        ratios = {}
        for rows in ROWS:
            plan = self._plan(self._alone, 1024 - 1, 1, [0] * 4, rows * KV_HEADS)
            vectors, tiles = (self._call(plan, rows * KV_HEADS, most) for most in (max(ROWS), 0))
            ratios[rows] = ratio(vectors, tiles)
            if ratios[rows] > 1:
                break
        found = _last_gain(ratios)
        _report_rows(report, "vector_rows", found, ratios)
        return found

    def choose(self, name: str, candidates: Sequence[int], report: Report, ratio: Ratio) -> None:
        """Give the tuning the fastest candidate, where that is faster than what it has."""
        ops, before = self._ops, self._ops.tuning
        ratios: dict[int, float] = {}
        for candidate in candidates:
            changed: dict[str, Any] = {name: candidate}
            ops.tuning = replace(before, packing=replace(before.packing, **changed))
            tried = self._step()
            ops.tuning = before
            ratios[candidate] = ratio(tried, self._step())
        best = min(ratios, key=ratios.__getitem__)
        if ratios[best] <= GAIN:
            changed = {name: best}
            ops.tuning = replace(before, packing=replace(before.packing, **changed))
        listed = ", ".join(f"{number}: {each:.2f}" for number, each in ratios.items())
        kept = getattr(ops.tuning.packing, name)
        report(f"packing.{name}: {kept} (time against {getattr(before.packing, name)}: {listed})")

    def _step(self) -> Call:
        """A step of decoding and one of a prompt, cut as the tuning says now."""
        decode = self._plan(self._decode, 1024 + 96, 1, [0, *[16] * 15], HEADS)
        prompt = self._plan(self._alone[:1], 512, 512, [0], HEADS)
        most = self._ops.tuning.vector_rows
        calls = [self._call(step, HEADS, most) for step in (decode, prompt)]
        return lambda: [call() for call in calls]

    def _plan(
        self, chunks: list[Any], first: int, tokens: int, shared: list[int], heads: int
    ) -> tuple[DevicePlan, torch.Tensor]:
        """The plan, and the positions of its rows."""
        packing = self._ops.packing(num_qo_heads=heads, num_kv_heads=KV_HEADS, head_dim=DIM)
        count = len(chunks)
        plan = Planner(packing, CHUNK).build([first] * count, [tokens] * count, chunks, shared, 0)
        positions = torch.arange(first, first + tokens, dtype=torch.int32).repeat(count)
        return self._ops.upload_plan(plan, self._kv, num_qo_heads=heads), positions

    def _call(self, step: tuple[DevicePlan, torch.Tensor], heads: int, vector_rows: int) -> Call:
        plan, positions = step
        q = torch.randn(len(positions), heads, DIM).bfloat16()

        def run() -> None:
            before, self._ops.vector_rows = self._ops.vector_rows, vector_rows
            self._ops.tpp_attention(q, self._kv, 0, positions, plan, DIM**-0.5)
            self._ops.vector_rows = before

        return run
