"""Compare K/V in bfloat16 with K/V in int8: attention of a layer and a whole decode step.

    python benchmarks/kv_dtype.py                 # the best level of this CPU
    python benchmarks/kv_dtype.py --level avx2 --no-steps

Both kinds alternate, and so does the order inside a pair; a ratio is int8 to bfloat16 of the same
pair, the median over the pairs is reported. Attention runs over all layers of the shape (at most
1.2 GB), a step has random weights of SmolLM2-135M's shape (see ``step.py``).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from attention import LLAMA3, SMOLLM2, Bench, Case, timed
from machine import cpu_name, new_result
from step import SMOLLM2 as MODEL
from step import Bench as StepBench
from step import StepCase

from chunkllama.backends.cpu.backend import CpuBackend

ATTENTION = [
    *(Case(SMOLLM2, batch, 2048, private) for batch, private in ((16, 0), (16, 96), (1, 0))),
    Case(SMOLLM2, 16, 0, 1024),
    *(Case(LLAMA3, 16, 2048, private) for private in (0, 96)),
    Case(LLAMA3, 16, 0, 1024),
]
STEPS = [StepCase(16, 1024, 96), StepCase(16, 4096, 96), StepCase(16, 0, 1120)]


def alternate(kinds: dict[str, Callable[[], float]], pairs: int) -> dict[str, float]:
    """Run both kinds in turns; return the median of each and of the pairs' ratios."""
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for run in kinds.values():
        run()
    for number in range(pairs):
        for name in list(kinds)[:: -1 if number % 2 else 1]:
            times[name].append(kinds[name]())
    ratios = [b / a for a, b in zip(times["bf16"], times["int8"], strict=True)]
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {**medians, "ratio": statistics.median(ratios)}


def attention_of(case: Case, level: str, pairs: int) -> dict[str, float]:
    """Measure microseconds of attention per layer."""
    heads = {"num_kv_heads": case.shape.kv_heads, "head_dim": case.shape.head_dim}
    backend = CpuBackend(dtype=torch.bfloat16, level=level, **heads)
    benches = {
        name: Bench(backend, case, torch.bfloat16, is_int8=name == "int8", apart=False)
        for name in ("bf16", "int8")
    }
    return alternate(
        {
            name: lambda b=bench: timed(b.run["on"], backend.device)
            for name, bench in benches.items()
        },
        pairs,
    )


def steps(pairs: int) -> list[dict[str, object]]:
    """Measure milliseconds of decode steps at the best level."""
    needed = max(c.tenants * (c.shared // 64) + c.batch * -(-c.private // 64) for c in STEPS)
    benches = {name: StepBench(MODEL, needed, is_int8=name == "int8") for name in ("bf16", "int8")}
    rows = []
    for case in STEPS:
        runs = {name: bench.step(case) for name, bench in benches.items()}

        def timed_step(run: Callable[[], object]) -> float:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e3

        found = alternate({n: lambda r=run: timed_step(r) for n, run in runs.items()}, pairs)
        name = f"step, batch {case.batch}, {case.shared} shared + {case.private}"
        rows.append(show(name, found, "ms"))
    return rows


def show(name: str, found: dict[str, float], unit: str) -> dict[str, object]:
    """Print a row of the table and return it for the report."""
    values = {key: round(value, 3) for key, value in found.items()}
    print(f"| {name} ({unit}) | {' | '.join(str(v) for v in values.values())} |", flush=True)
    return {"case": name, "unit": unit, **values}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--level", default="", help="of the attention cases; default: the best")
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--no-steps", action="store_true")
    parser.add_argument("--save", action="store_true", help="write results/kv-dtype-<machine>.json")
    options = parser.parse_args()
    print("| case | bf16 | int8 | int8 / bf16 |\n| --- | --- | --- | --- |")
    with torch.inference_mode():
        rows = []
        for case in ATTENTION:
            name = f"{case.shape.name}, batch {case.batch}, {case.shared} shared + {case.private}"
            rows.append(show(name, attention_of(case, options.level, options.pairs), "us"))
        if not options.no_steps:
            rows += steps(options.pairs)
    if options.save:
        report = {
            "command": " ".join(["python", *sys.argv]),
            "machine": cpu_name(),
            "level": options.level
            or CpuBackend(dtype=torch.bfloat16, head_dim=64, num_kv_heads=1).level,
            "threads": torch.get_num_threads(),
            "cases": rows,
        }
        new_result("kv-dtype").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
