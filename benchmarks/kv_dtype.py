"""Compare K/V in bfloat16 with K/V in int8: attention of a layer and a whole decode step.

    python benchmarks/kv_dtype.py                    # all levels of this CPU that are named below
    python benchmarks/kv_dtype.py --pairs 21 --save

Both kinds alternate, and so does the order inside a pair. Times are processor time of one thread,
which other programs disturb least; a ratio is int8 to bfloat16 of the same pair, the median over
the pairs is reported. Steps have random weights of SmolLM2-135M's shape (see ``step.py``).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from attention import LLAMA3, SMOLLM2, Bench, Case
from machine import cpu_name, new_result
from step import SMOLLM2 as MODEL
from step import Bench as StepBench
from step import StepCase

from chunkllama.backends.cpu.backend import CpuBackend
from chunkllama.backends.cpu.build import available_levels

LEVELS = ("amx", "avx512_bf16", "avx512", "avx2")
ATTENTION_LAYERS, STEP_LAYERS = 3, 6
ATTENTION = [
    Case(replace(shape, layers=ATTENTION_LAYERS), *numbers)
    for shape, numbers in (
        (SMOLLM2, (16, 2048, 96)),
        (SMOLLM2, (1, 2048, 0)),
        (LLAMA3, (16, 1024, 96)),
    )
]
STEPS = [StepCase(16, 1024, 96), StepCase(16, 3072, 96), StepCase(16, 0, 1120), StepCase(1, 0, 128)]
KINDS = ("bf16", "int8")


def alternate(name: str, runs: dict[str, Callable[[], object]], pairs: int) -> dict[str, object]:
    """Run both kinds in turns; print and return the median of each (ms) and of the ratios."""
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for run in runs.values():
        run()
    for number in range(pairs):
        for kind in KINDS[:: -1 if number % 2 else 1]:
            start = time.thread_time()
            runs[kind]()
            times[kind].append((time.thread_time() - start) * 1e3)
    ratios = [b / a for a, b in zip(times["bf16"], times["int8"], strict=True)]
    found = {kind: round(statistics.median(values), 3) for kind, values in times.items()}
    found["ratio"] = round(statistics.median(ratios), 3)
    print(f"| {name} | {' | '.join(map(str, found.values()))} |", flush=True)
    return {"case": name, **found}


def steps(pairs: int) -> list[dict[str, object]]:
    """Measure decode steps at the best level."""
    needed = max(c.shared // 64 + c.batch * -(-c.private // 64) for c in STEPS)
    spec = replace(MODEL, num_layers=STEP_LAYERS)
    benches = {kind: StepBench(spec, needed, is_int8=kind == "int8") for kind in KINDS}
    rows = []
    for case in STEPS:
        name = f"step of {STEP_LAYERS} layers, batch {case.batch}, {case.shared} + {case.private}"
        runs = {kind: bench.step(case) for kind, bench in benches.items()}
        rows.append(alternate(name, runs, pairs))
    return rows


def attention(level: str, case: Case, pairs: int) -> dict[str, object]:
    """Measure attention of all layers of a case."""
    heads = {"num_kv_heads": case.shape.kv_heads, "head_dim": case.shape.head_dim}
    backend = CpuBackend(dtype=torch.bfloat16, level=level, **heads)

    def calls(*, is_int8: bool) -> Callable[[], object]:
        bench = Bench(backend, case, torch.bfloat16, is_int8=is_int8, apart=False)
        return lambda: [call() for call in bench.run["on"]]

    name = f"{level}, {case.shape.name}, batch {case.batch}, {case.shared} + {case.private}"
    return alternate(name, {kind: calls(is_int8=kind == "int8") for kind in KINDS}, pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--save", action="store_true", help="write results/kv-dtype-<machine>.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| case (shared + private tokens) | bf16 ms | int8 ms | int8 / bf16 |")
    print("| --- | --- | --- | --- |")
    levels = [level.name for level in available_levels() if level.name in LEVELS]
    with torch.inference_mode():
        rows = steps(options.pairs)
        rows += [attention(level, case, options.pairs) for level in levels for case in ATTENTION]
    if options.save:
        report = {
            "command": " ".join(["python", *sys.argv]),
            "machine": cpu_name(),
            "attention_layers": ATTENTION_LAYERS,
            "cases": rows,
        }
        new_result("kv-dtype").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
