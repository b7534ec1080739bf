"""Measure attention alone: latency, bandwidth and the gain of sharing, on any backend.

    python benchmarks/attention.py --backend cpu            # GQA shapes
    python benchmarks/attention.py --grid table3               # ChunkAttention's Table 3, MHA
    python benchmarks/attention.py --grid quick --paired       # one case of each kind

Every case alternates between three variants, over enough layers to exceed the caches:
``on`` (the planner sees the shared prefix), ``off`` (each sequence over its own copy, nothing
shared) and ``sdpa`` (torch's scaled_dot_product_attention per sequence, query groups as rows).
Predicted bytes are K and V read once per run. With --paired the case with nothing shared is run
200 times in alternation with sharing detection on and off, and the ratio's 95% bound is printed.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from machine import cpu_name
from torch.nn.functional import scaled_dot_product_attention

from chunkllama.attention.plan import Planner
from chunkllama.backends.base import Backend, KVCache
from chunkllama.backends.int8_kv import quantize_kv
from chunkllama.backends.select import select_backend
from chunkllama.scheduler.tree_order import num_shared_chunks

RESULTS = Path(__file__).parent / "results"
COLD_BYTES = 1.2e9  # K/V read per round, more than the caches hold
CHUNK = 64


@dataclass(frozen=True)
class Shape:
    name: str
    q_heads: int
    kv_heads: int
    head_dim: int
    layers: int

    def token_bytes(self, dtype: torch.dtype) -> int:
        return 2 * self.kv_heads * self.head_dim * dtype.itemsize


@dataclass(frozen=True)
class Case:
    """``private`` counts the token being decoded; 0: the whole context is shared, as in Table 3."""

    shape: Shape
    batch: int
    shared: int
    private: int


SMOLLM2 = Shape("SmolLM2-135M", 9, 3, 64, 30)
LLAMA3 = Shape("Llama-3-8B", 32, 8, 128, 32)
LLAMA2 = Shape("Llama-2-7B", 32, 32, 128, 32)
GRIDS = {
    "gqa": [
        *(
            Case(s, b, n, 0)
            for s in (SMOLLM2, LLAMA3)
            for b in (16, 32)
            for n in (1024, 2048, 4096)
        ),
        *(Case(s, 16, 2048, 96) for s in (SMOLLM2, LLAMA3)),
        *(Case(s, b, 0, n) for s in (SMOLLM2, LLAMA3) for b, n in ((1, 4096), (16, 1024))),
    ],
    "table3": [
        Case(LLAMA2, 32, shared, total - shared)
        for total in (1024, 2048, 4096)
        for shared in (0, total // 2, total)
    ],
    "quick": [Case(SMOLLM2, 16, 1024, 0), Case(SMOLLM2, 16, 1024, 96), Case(SMOLLM2, 16, 0, 1024)],
}


class Bench:
    """One case: pools, plans and queries; ``run`` maps a variant's name to one call per layer."""

    def __init__(
        self,
        backend: Backend,
        case: Case,
        dtype: torch.dtype,
        *,
        sdpa: bool = False,
        is_int8: bool = False,
        apart: bool = True,
    ) -> None:
        shape = case.shape
        self.backend, self.case, self.dtype, self.is_int8 = backend, case, dtype, is_int8
        self.planner = Planner(
            backend.packing(
                num_qo_heads=shape.q_heads, num_kv_heads=shape.kv_heads, head_dim=shape.head_dim
            ),
            CHUNK,
        )
        length = case.shared + case.private
        size = (case.batch, shape.q_heads, shape.head_dim)
        self.q = torch.randn(size).to(dtype).to(backend.device)
        self.positions = torch.full((case.batch,), length - 1, dtype=torch.int32)
        self.positions = self.positions.to(backend.device)
        prefix = list(range(case.shared // CHUNK))
        own = -(-case.private // CHUNK)
        first = len(prefix)
        together = [
            [*prefix, *range(first + i * own, first + (i + 1) * own)] for i in range(case.batch)
        ]
        whole = -(-length // CHUNK)
        apart = [list(range(i * whole, (i + 1) * whole)) for i in range(case.batch)]
        self.run: dict[str, list[Callable[[], object]]] = {"on": self._variant(together, first)}
        if case.shared and apart:
            self.run["off"] = self._variant(apart, 0)
        if sdpa:
            self.run["sdpa"] = self._sdpa(length)

    def variant(
        self, paths: list[list[int]], shared: list[int], kv: KVCache
    ) -> list[Callable[[], object]]:
        """Return a call of attention over chunk paths; ``shared`` chunks are those of the path
        before.
        """
        shape, count = self.case.shape, self.case.batch
        plan = self.planner.build(
            first_positions=self.positions.tolist(),
            num_tokens=[1] * count,
            chunk_ids=[np.array(path, np.int32) for path in paths],
            shared=shared,
            version=1,
        )
        device_plan = self.backend.upload_plan(plan, kv, num_qo_heads=shape.q_heads)
        scale = shape.head_dim**-0.5

        def call(layer: int) -> Callable[[], object]:
            return lambda: self.backend.tpp_attention(
                self.q, kv, layer, self.positions, device_plan, scale
            )

        return [call(layer) for layer in range(len(kv.layers))]

    def pool(self, num_chunks: int) -> KVCache:
        shape = self.case.shape
        layer_bytes = num_chunks * CHUNK * shape.token_bytes(self.dtype)
        kv = self.backend.allocate_kv(
            num_layers=self._layers(layer_bytes),
            num_chunks=num_chunks,
            chunk_size=CHUNK,
            num_kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            dtype=self.dtype,
            is_int8=self.is_int8,
        )
        fill_pool(self.backend, kv)
        return kv

    def _variant(self, paths: list[list[int]], shared: int) -> list[Callable[[], object]]:
        common = [0] + [shared] * (len(paths) - 1)
        return self.variant(paths, common, self.pool(max(map(max, paths)) + 1))

    def _sdpa(self, length: int) -> list[Callable[[], object]]:
        shape, batch = self.case.shape, self.case.batch
        size = (batch, shape.kv_heads, length, shape.head_dim)
        layers = self._layers(batch * length * shape.token_bytes(self.dtype))
        device = self.backend.device
        keys, values = (
            [torch.empty(size, dtype=self.dtype, device=device).normal_() for _ in range(layers)]
            for _ in range(2)
        )
        q = self.q.view(batch, shape.kv_heads, -1, shape.head_dim)

        def call(k: torch.Tensor, v: torch.Tensor) -> Callable[[], object]:
            return lambda: scaled_dot_product_attention(q, k, v)

        return [call(k, v) for k, v in zip(keys, values, strict=True)]

    def _layers(self, layer_bytes: float) -> int:
        return int(min(self.case.shape.layers, max(2, COLD_BYTES // max(layer_bytes, 1))))

    @property
    def predicted_bytes(self) -> int:
        """Return K and V of one layer, each token once."""
        case = self.case
        tokens = case.shared + case.batch * case.private
        return tokens * case.shape.token_bytes(self.dtype)


def fill_pool(backend: Backend, kv: KVCache) -> None:
    """Store the same random K/V in every chunk."""
    chunk = torch.randn(1, 2, kv.num_kv_heads, kv.chunk_size, kv.head_dim)
    stored = quantize_kv(chunk) if kv.is_int8 else chunk.to(kv.dtype)
    arranged = backend.arrange_chunk(kv, stored)[0]
    for layer in kv.layers:
        layer.copy_(arranged.to(backend.device))


def timed(calls: list[Callable[[], object]], device: torch.device) -> float:
    """Measure microseconds per layer."""
    start = time.perf_counter()
    for call in calls:
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / len(calls) * 1e6


def read_bandwidth(device: torch.device) -> float:
    """Measure the GB/s at which a reduction reads memory larger than the caches."""
    words = torch.ones(1 << 28, dtype=torch.float32, device=device)
    best = min(timed([words.sum], device) for _ in range(5))
    return words.numel() * 4 / best / 1e3


def paired(bench: Bench, rounds: int = 200) -> dict[str, float]:
    """Return time with sharing on / off when nothing is shared: median, upper 95% bound.

    A step of either kind builds a plan and runs all layers; with sharing on it first looks for what
    neighbours share. A real step does so only when a sequence starts, grows a chunk or ends.
    """
    batch, own = bench.case.batch, bench.case.private // CHUNK
    paths = [list(range(i * own, (i + 1) * own)) for i in range(batch)]
    arrays = [np.array(path, np.int32) for path in paths]
    kv = bench.pool(batch * own)

    def on() -> None:
        shared = [0, *(num_shared_chunks(a, b) for a, b in pairwise(arrays))]
        timed(bench.variant(paths, shared, kv), bench.backend.device)

    def off() -> None:
        timed(bench.variant(paths, [0] * batch, kv), bench.backend.device)

    ratios = []
    for turn in range(rounds):
        order = (on, off) if turn % 2 else (off, on)
        times = [timed([step], bench.backend.device) for step in order]
        ratios.append(times[0] / times[1] if turn % 2 else times[1] / times[0])
    ratios.sort()
    # Order statistics: the upper end of a 95% interval of the median.
    bound = ratios[min(rounds - 1, math.ceil(rounds / 2 + 0.98 * rounds**0.5))]
    return {"median": statistics.median(ratios), "upper_95": bound}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="auto", choices=["auto", "reference", "cpu", "cuda"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--grid", default="gqa", choices=[*GRIDS])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-sdpa", action="store_true")
    parser.add_argument("--paired", action="store_true", help="200 alternations, nothing shared")
    parser.add_argument("--save", action="store_true", help="write a JSON file to results/")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    device = torch.device(options.device)
    bandwidth = read_bandwidth(device)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, reads {bandwidth:.1f} GB/s")
    print("| case | on us | off us | sdpa us | GB/s | of reads | off / on | sdpa / on |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")

    def bench(case: Case, *, sdpa: bool) -> Bench:
        backend = select_backend(
            options.device,
            dtype=dtype,
            head_dim=case.shape.head_dim,
            chunk_size=CHUNK,
            num_kv_heads=case.shape.kv_heads,
            backend=options.backend,
        )
        return Bench(backend, case, dtype, sdpa=sdpa)

    rows = [
        report(bench(case, sdpa=not options.no_sdpa), options.rounds, bandwidth)
        for case in GRIDS[options.grid]
    ]
    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": cpu_name(),
        "date": time.strftime("%Y-%m-%d"),
        "backend": options.backend,
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "read_gb_per_s": round(bandwidth, 1),
        "cases": rows,
    }
    if options.paired:
        result["nothing_shared"] = paired(bench(Case(SMOLLM2, 16, 0, 1024), sdpa=False))
        print("nothing shared, on / off over 200 alternations:", result["nothing_shared"])
    if options.save:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"attention_{options.grid}_{options.backend}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")


def report(bench: Bench, rounds: int, bandwidth: float) -> dict[str, object]:
    """Measure a case, print its row of the table, return it for the JSON file."""
    times: dict[str, list[float]] = {name: [] for name in bench.run}
    for calls in bench.run.values():
        timed(calls[:2], bench.backend.device)
    for _ in range(rounds):
        for name, calls in bench.run.items():
            times[name].append(timed(calls, bench.backend.device))
    medians = {name: statistics.median(values) for name, values in times.items()}
    case, on = bench.case, medians["on"]
    rate = bench.predicted_bytes / on / 1e3
    cells = [f"{medians[n]:.0f}" if n in medians else "" for n in ("on", "off", "sdpa")]
    gains = [f"{medians[n] / on:.1f}" if n in medians else "" for n in ("off", "sdpa")]
    bench.run.clear()  # the calls refer to the bench and would keep its pools alive
    name = f"{case.shape.name} b={case.batch} {case.shared} shared + {case.private}"
    rates = [f"{rate:.1f}", f"{rate / bandwidth:.0%}"]
    print(f"| {name} | {' | '.join([*cells, *rates, *gains])} |", flush=True)
    return {
        **asdict(case),
        "us": {n: round(v, 1) for n, v in medians.items()},
        "gb_per_s": round(rate, 2),
    }


if __name__ == "__main__":
    main()
