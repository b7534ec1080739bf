"""Measure schedule() alone with 1,000 waiting requests of 256 tenants.

    python benchmarks/schedule.py [--save]

Each case keeps the queue at its length and reports the CPU time of one ``schedule()``, which
neither sleeps nor does I/O, in milliseconds: the median (target: below 1 ms) and the 99th
percentile. The scheduler's clock is a virtual one, which a step advances by what it would take the
demo model, so that every run does the same work. To compare with another checkout, put that
checkout's folder in PYTHONPATH.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import numpy as np
from machine import cpu_name

from chunkllama.cache.manager import CacheManager
from chunkllama.messages import EngineRequest
from chunkllama.sampling_params import SamplingParams
from chunkllama.scheduler.output import SampledTokens
from chunkllama.scheduler.scheduler import Scheduler
from chunkllama.simulation.cost_model import DEFAULT_COST
from chunkllama.simulation.engine import make_limits

SIZE = 64
WAITING = 1000
TENANTS = 256
HISTORY_CHUNKS = 1024  # the default of explain_chunks


class Load:
    """A scheduler whose queue is refilled to ``WAITING`` requests after each step."""

    def __init__(self, num_chunks: int, max_num_seqs: int = 64) -> None:
        self.random = random.Random(0)
        limits = make_limits(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=512,
            max_model_len=16384,
            max_waiting=10**6,
        )
        self.now = 0.0
        cache = CacheManager(num_chunks, SIZE, lambda: self.now, history_chunks=HISTORY_CHUNKS)
        self.scheduler = Scheduler(limits, cache, lambda: self.now)
        self.count = 0
        self.started = 0

    def tokens(self, count: int) -> list[int]:
        return [self.random.randrange(32_000) for _ in range(count)]

    def add(self, prompt: list[int], max_tokens: int, tenant: int) -> str:
        name = f"r{self.count}"
        self.count += 1
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=0, temperature=0.0)
        self.scheduler.add(
            EngineRequest(
                request_id=name,
                prompt_token_ids=prompt,
                sampling=sampling,
                namespace=f"t{tenant}",
                tenant=f"t{tenant}",
            )
        )
        return name

    def step(self) -> float:
        """Run a step; returns milliseconds of CPU time of schedule()."""
        begin = time.thread_time()
        output = self.scheduler.schedule()
        elapsed = (time.thread_time() - begin) * 1e3
        assert output is not None
        self.started += len(output.new_sequences)
        self.now += DEFAULT_COST.seconds(output, SIZE)
        sampled = SampledTokens({piece.slot: 5 for piece in output.slices if piece.samples})
        self.scheduler.commit(output, sampled)
        return elapsed

    def measure(self, steps: int, refill: Callable[[int], None]) -> list[float]:
        """Warm up, then time ``steps`` of them with a full queue."""
        times = []
        for i in range(steps + 20):
            for _ in range(WAITING - self.scheduler.stats().requests_waiting):
                refill(self.random.randrange(TENANTS))
            if i == 20:
                self.started = 0
                gc.collect()
            times.append(self.step())
        return times[20:]


def pool_full(steps: int) -> tuple[list[float], int]:
    """16 long answers fill the pool: the first candidate does not fit."""
    load = Load(16 * 16 + 8)
    for i in range(16):
        load.add(load.tokens(8 * SIZE), 600, i)
        load.step()
    return load.measure(steps, lambda t: load.add(load.tokens(1000), 64, t) and None), load.started


def followers(steps: int) -> tuple[list[float], int]:
    """Each tenant's requests wait for its leader, whose long prompt is being computed."""
    load = Load(40_000, max_num_seqs=256)
    prefixes = [load.tokens(12_000) for _ in range(TENANTS)]
    for tenant in range(TENANTS):
        load.add([*prefixes[tenant], 1], 64, tenant)
    for _ in range(TENANTS // 2):
        load.step()

    def refill(tenant: int) -> None:
        load.add([*prefixes[tenant], *load.tokens(20)], 64, tenant)

    return load.measure(steps, refill), load.started


def churn(steps: int) -> tuple[list[float], int]:
    """Short prompts over a cached prefix of each tenant: several start and end in every step."""
    load = Load(8000)
    prefixes = [load.tokens(4 * SIZE) for _ in range(TENANTS)]

    def refill(tenant: int) -> None:
        load.add([*prefixes[tenant], *load.tokens(30)], 8, tenant)

    return load.measure(steps, refill), load.started


def long_prompts(steps: int) -> tuple[list[float], int]:
    """Unshared prompts of 4,000 tokens, running and waiting: a part of the step is reserved."""
    load = Load(8000, max_num_seqs=32)
    return load.measure(steps, lambda t: load.add(load.tokens(4000), 4, t) and None), load.started


def held(steps: int) -> tuple[list[float], int]:
    """All that wait have a grammar that is being compiled; one request decodes."""
    load = Load(8000)
    load.add(load.tokens(100), 15_000, 0)
    load.step()

    def refill(tenant: int) -> None:
        load.scheduler.hold(load.add(load.tokens(200), 64, tenant))

    return load.measure(steps, refill), load.started


CASES = (pool_full, followers, churn, long_prompts, held)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/schedule-*")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--name", default=platform.machine(), help="of the result file")
    options = parser.parse_args()
    rows = []
    before = os.getloadavg()[0]
    for case in CASES:
        times, started = case(options.steps)
        row = {
            "case": case.__name__,
            "what": case.__doc__,
            "median_ms": round(median(times), 4),
            "p99_ms": round(sorted(times)[int(0.99 * len(times))], 4),
            "starts_per_step": round(started / len(times), 2),
        }
        rows.append(row)
        print(
            f"{row['case']:<14} median {row['median_ms']:>8.3f} ms   "
            f"p99 {row['p99_ms']:>8.3f} ms   {row['starts_per_step']:>6} starts a step",
            flush=True,
        )
    if options.save:
        result = {
            "command": "python benchmarks/schedule.py --save",
            "machine": cpu_name(),
            "python": platform.python_version(),
            "numpy": np.__version__,
            "date": datetime.now(UTC).date().isoformat(),
            "waiting": WAITING,
            "tenants": TENANTS,
            "steps": options.steps,
            "target_median_ms": 1.0,
            "load_average_1min": [round(before, 2), round(os.getloadavg()[0], 2)],
            "rows": rows,
        }
        path = Path(__file__).parent / "results" / f"schedule-{options.name}.json"
        path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
