"""Measure a decode step of the native CPU backend: batch, shared length, tenants, weights.

    python benchmarks/step.py                       # the cases of the README's table
    python benchmarks/step.py --sweep               # and step time against batch, length, tenants
    python benchmarks/step.py --layers 4 --rounds 5 # a quick look
    python benchmarks/step.py --sweep --level avx512_bf16 --save

Random weights of SmolLM2-135M's shape: the arithmetic does not depend on them. Times are medians,
cases interleaved; a step is embedding to best token (greedy), without scheduling.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from attention import fill_pool
from machine import cpu_name, new_result

from chunkllama.attention.plan import Planner
from chunkllama.backends.cpu.backend import CpuBackend
from chunkllama.model_spec import ModelSpec
from chunkllama.models.attention import Attention
from chunkllama.models.llama import Llama
from chunkllama.models.loading.weights import random_weights
from chunkllama.models.rotary import rotary_tables

SMOLLM2 = ModelSpec(
    num_layers=30,
    hidden_size=576,
    intermediate_size=1536,
    num_qo_heads=9,
    num_kv_heads=3,
    head_dim=64,
    vocab_size=49152,
    max_position=8448,
    tie_word_embeddings=True,
)


@dataclass(frozen=True)
class StepCase:
    """``tenants`` prefixes of ``shared`` tokens, ``batch`` sequences spread over them evenly, each
    with ``private`` tokens of its own.
    """

    batch: int
    shared: int
    private: int
    tenants: int = 1
    weights: str = "bf16"


TABLE = [
    StepCase(batch, shared, private, weights=weights)
    for batch, shared, private in (
        *((1, 0, 128), (16, 1024, 96), (16, 2048, 96)),
        *((16, 0, 1120), (32, 1024, 96)),
    )
    for weights in ("bf16", "int8")
]
SWEEPS = {
    "batch": [StepCase(batch, 1024, 96) for batch in (1, 2, 4, 8, 16, 32, 64)],
    "shared": [StepCase(16, n, 96) for n in (0, 64, 320, 1024, 2048, 4096, 8192)],
    "tenants": [StepCase(64, 1024, 96, n) for n in (1, 2, 4, 8, 16, 32, 64)],
}


class Bench:
    """One packed model per weight type and one chunk pool for all cases."""

    def __init__(
        self, spec: ModelSpec, num_chunks: int, *, is_int8: bool = False, level: str = ""
    ) -> None:
        self.spec = spec
        self.models = {}
        heads = {"num_kv_heads": spec.num_kv_heads, "head_dim": spec.head_dim}
        ops = CpuBackend(dtype=torch.bfloat16, level=level, **heads)
        self.ops = ops
        self.packing = ops.packing(num_qo_heads=spec.num_qo_heads, **heads)
        self.kv = ops.allocate_kv(
            num_layers=spec.num_layers,
            num_chunks=num_chunks,
            chunk_size=64,
            dtype=torch.bfloat16,
            is_int8=is_int8,
            **heads,
        )
        fill_pool(ops, self.kv)
        rotary = rotary_tables(spec, spec.max_position)
        attention = Attention(
            ops, self.kv, Planner(self.packing, 64), spec.num_qo_heads, spec.head_dim**-0.5
        )
        for weights in ("bf16", "int8"):
            model = Llama(spec, random_weights(spec, 0, torch.bfloat16), attention, rotary)
            self.models[weights] = ops.fuse(model, weights)  # type: ignore[arg-type]

    def step(self, case: StepCase) -> Callable[[], object]:
        """Return a function that runs one decode step of the case."""
        ids, chunks, shared = iter(range(self.kv.num_chunks)), [], []
        for tenant in range(case.tenants):
            prefix = [next(ids) for _ in range(case.shared // 64)]
            for nth in range(case.batch // case.tenants):
                tail = [next(ids) for _ in range(-(-case.private // 64))]
                chunks.append(np.array(prefix + tail, np.int32))
                shared.append(len(prefix) if nth else 0)
            assert tenant < case.batch, "more tenants than sequences"
        last = case.shared + case.private - 1
        plan = Planner(self.packing, 64).build(
            first_positions=[last] * case.batch,
            num_tokens=[1] * case.batch,
            chunk_ids=chunks,
            shared=shared,
            version=1,
        )
        device_plan = self.ops.upload_plan(plan, self.kv, num_qo_heads=self.spec.num_qo_heads)
        token_ids = torch.arange(case.batch) * 7
        positions = torch.full((case.batch,), last, dtype=torch.int32)
        model = self.models[case.weights]

        def run() -> object:
            return model.best_tokens(model.forward(token_ids, positions, device_plan))

        return run


def measure(bench: Bench, cases: list[StepCase], rounds: int) -> dict[StepCase, float]:
    """Return median milliseconds per step: every round runs each case five times and keeps the
    median.
    """
    steps = {case: bench.step(case) for case in cases}
    times: dict[StepCase, list[float]] = {case: [] for case in cases}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for case, step in steps.items():
            inner = []
            for _ in range(5):
                start = time.perf_counter()
                step()
                inner.append((time.perf_counter() - start) * 1e3)
            times[case].append(statistics.median(inner))
    return {case: statistics.median(values) for case, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="store_true", help="also vary batch, length and tenants")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=SMOLLM2.num_layers)
    parser.add_argument("--level", default="", help="instruction set; default: the best one here")
    parser.add_argument(
        "--save", action="store_true", help="write results/step-LEVEL-MACHINE.json, a plot beside"
    )
    options = parser.parse_args()
    cases = TABLE + [c for sweep in SWEEPS.values() for c in sweep if options.sweep]
    needed = max(c.tenants * (c.shared // 64) + c.batch * -(-c.private // 64) for c in cases)
    with torch.inference_mode():
        bench = Bench(replace(SMOLLM2, num_layers=options.layers), needed, level=options.level)
        results = measure(bench, cases, options.rounds)
    print("| batch | tenants | shared | private | weights | ms per step | tokens/s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    rows = []
    for case, ms in results.items():
        rows.append({**vars(case), "ms": round(ms, 3)})
        print(
            f"| {case.batch} | {case.tenants} | {case.shared} | {case.private} | {case.weights} "
            f"| {ms:.2f} | {case.batch / ms * 1e3:.0f} |"
        )
    if options.save:
        report = {
            "command": " ".join(["python", *sys.argv]),
            "machine": cpu_name(),
            "level": bench.ops.level,
            "date": time.strftime("%Y-%m-%d"),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "layers": options.layers,
            "steps": rows,
        }
        path = new_result(f"step-{bench.ops.level}")
        path.write_text(json.dumps(report, indent=1) + "\n")
        if options.sweep:
            plot(results, path.with_suffix(".png"))


def plot(results: dict[StepCase, float], path: Path) -> None:
    """Plot step time against batch, shared length and tenants."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(SWEEPS), figsize=(12, 3.5), layout="constrained")
    for panel, (name, cases) in zip(panels, SWEEPS.items(), strict=True):
        panel.plot([getattr(c, name) for c in cases], [results[c] for c in cases], "o-")
        panel.set_xlabel({"shared": "shared tokens"}.get(name, name))
        panel.set_ylabel("ms per step")
        panel.set_ylim(bottom=0)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
