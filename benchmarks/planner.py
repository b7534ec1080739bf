"""Measure the time to build an attention plan: python benchmarks/planner.py [--save]

A decode plan is rebuilt only when its version changes. Target: 64 rows over 8,192 shared and 32
private chunks each in under 300 us.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from chunkllama.attention.plan import Planner
from chunkllama.attention.plan_format import AttentionPlan, Packing

CHUNK_SIZE = 64
RESULTS = Path(__file__).parent / "results"
PACKINGS = {
    "cpu": Packing(rows_per_item=64, target_units=6, num_kv_heads=3),
    "gpu": Packing(
        rows_per_item=16,
        small_rows_per_item=4,
        min_run_chunks=4,
        target_units=396,
        num_kv_heads=8,
        split_private=True,
    ),
}


def decode(
    tenants: int, rows: int, shared: int, private: int
) -> Callable[[Planner], AttentionPlan]:
    """Return a step of ``rows`` decoding sequences; each tenant shares ``shared`` chunks."""
    chunk_ids, lcp = [], []
    for row in range(rows):
        tenant, nth = divmod(row, rows // tenants)
        run = np.arange(tenant * shared, (tenant + 1) * shared)
        own = 1_000_000 + np.arange(row * (private + 1), (row + 1) * (private + 1))
        chunk_ids.append(np.concatenate((run, own)).astype(np.int32))
        lcp.append(shared if nth else 0)
    position = (shared + private) * CHUNK_SIZE - 1
    return lambda planner: planner.build(
        first_positions=[position] * rows,
        num_tokens=[1] * rows,
        chunk_ids=chunk_ids,
        shared=lcp,
        version=1,
    )


def prefill(tokens: int, decodes: int, prefix: int) -> Callable[[Planner], AttentionPlan]:
    """Return a step: a slice of ``tokens`` and decodes after ``prefix`` shared chunks."""
    rows = decodes + 1
    run = np.arange(prefix, dtype=np.int32)
    chunk_ids = [
        np.concatenate((run, np.arange(1_000 * (i + 10), 1_000 * (i + 10) + 64))).astype(np.int32)
        for i in range(rows)
    ]
    position = prefix * CHUNK_SIZE
    return lambda planner: planner.build(
        first_positions=[position] * rows,
        num_tokens=[1] * decodes + [tokens],
        chunk_ids=chunk_ids,
        shared=[0] + [prefix] * decodes,
        version=0,
    )


CASES = {
    "1 row, 16 private": decode(1, 1, 0, 16),
    "16 rows, 16 shared, 2 private": decode(1, 16, 16, 2),
    "64 rows, 8192 shared, 32 private": decode(1, 64, 8192, 32),
    "64 rows, 8 tenants x 64, 8 private": decode(8, 64, 64, 8),
    "256 rows, 16 tenants x 64, 8 private": decode(16, 256, 64, 8),
    "512-token slice, 16 decodes, 16 shared": prefill(512, 16, 16),
    "2048-token slice, 64 decodes, 64 shared": prefill(2048, 64, 64),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/planner.json")
    options = parser.parse_args()
    results = []
    print(f"{'case':<42} {'packing':<8} {'items':>6} {'slots':>6} {'median us':>10} {'p99 us':>8}")
    for case, build in CASES.items():
        for name, packing in PACKINGS.items():
            planner = Planner(packing, CHUNK_SIZE)
            plan = build(planner)
            seconds = []
            for _ in range(options.repeats):
                start = time.perf_counter()
                build(planner)
                seconds.append(time.perf_counter() - start)
            median = statistics.median(seconds) * 1e6
            p99 = statistics.quantiles(seconds, n=100)[98] * 1e6
            row = f"{case:<42} {name:<8} {plan.num_items:>6} {plan.num_slots:>6}"
            print(f"{row} {median:>10.0f} {p99:>8.0f}")
            results.append(
                {
                    "case": case,
                    "packing": name,
                    "items": plan.num_items,
                    "slots": plan.num_slots,
                    "median_us": round(median, 1),
                    "p99_us": round(p99, 1),
                }
            )
    if options.save:
        report = {
            "command": f"python benchmarks/planner.py --repeats {options.repeats} --save",
            "python": platform.python_version(),
            "numpy": np.__version__,
            "machine": platform.machine(),
            "rows": results,
        }
        (RESULTS / "planner.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
