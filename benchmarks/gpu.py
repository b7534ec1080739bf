"""Check, measure and tune the CUDA kernels on a GPU.

    python benchmarks/gpu.py check     numbers: device layer, attention, ops, graphs, a model
    python benchmarks/gpu.py bench     times: against torch SDPA, varlen, FlashInfer, sharing off
    python benchmarks/gpu.py tune      sweeps tile shapes; writes configs/hardware/<arch>.yaml
    python benchmarks/gpu.py serve     requests end to end: sharing off, transformers

Needs torch, numpy and CuPy, and `serve` the whole package. Work is cut into points of at most 40 s
in a fixed order of value; results are appended to benchmarks/results/gpu-<verb>.jsonl, and a later
run continues after the last recorded point. Every verb ends within 8 minutes (--budget) with a
short table.

--dry-run executes every step up to the first launch, on any machine, and stores nothing; `serve`
then runs a tiny model on the CPU.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu_suite import bench, check, tune
from gpu_suite.device import Device
from gpu_suite.points import POINT_SECONDS, Point, Record, forget, print_table, run_points

from chunkllama.errors import ConfigError

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=("check", "bench", "tune", "serve", "sanitized"))
    parser.add_argument("--dry-run", action="store_true", help="every step before the first launch")
    parser.add_argument("--budget", type=float, default=440.0, help="seconds (default: 440)")
    parser.add_argument("--fresh", action="store_true", help="measure again what has a result")
    parser.add_argument("--points", default="", help="only points whose name contains this")
    arguments = parser.parse_args()
    try:
        device = Device.open(arguments.dry_run)
    except (ConfigError, AssertionError, RuntimeError) as error:
        print(f"no GPU to run on ({error}); --dry-run needs none", file=sys.stderr)
        return 2
    if arguments.verb == "sanitized":  # the part of `check` that runs under compute-sanitizer
        check.run_small_cases(device)
        return 0
    return run_verb(arguments, device)


def run_verb(arguments: argparse.Namespace, device: Device) -> int:
    verb, machine = arguments.verb, device.describe()
    make_points, make_rows = parts_of(verb)
    points = [p for p in make_points(device) if arguments.points in p.name]
    results = None if device.dry else RESULTS / f"gpu-{verb}.jsonl"
    if results and results.exists() and arguments.fresh:
        forget(results, machine["name"])
    budget = max(arguments.budget, POINT_SECONDS)
    records = run_points(verb, points, results, machine, budget, device.lost)
    if verb == "tune" and not device.dry:
        print("wrote", tune.write_table(device.table, records, machine))
    print()
    print_table(make_rows(records))
    return report(records, len(points))


def parts_of(verb: str) -> tuple[Callable[[Device], list[Point]], Callable[..., list[Any]]]:
    """Return what makes a verb's points and what makes rows of its records."""
    if verb == "serve":
        from gpu_suite import serve

        return serve.serve_points, serve.serve_rows
    return {
        "check": (check.check_points, check.check_rows),
        "bench": (bench.bench_points, bench.bench_rows),
        "tune": (tune.tune_points, tune.tune_rows),
    }[verb]


def report(records: list[Record], total: int) -> int:
    """Print the last line; return 1 if a point failed."""
    failed = [record["point"] for record in records if "error" in record]
    print(f"{len(records)} of {total} points done, {len(failed)} failed {failed or ''}")
    return 1 if failed else 0


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    sys.exit(main())
