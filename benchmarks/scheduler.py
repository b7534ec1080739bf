"""Measure the scheduler without a model: match, step, and simulator steps per minute.

    python benchmarks/scheduler.py [--save]

Prints a table of medians. Targets: a match below 10,000 children under
0.2 ms; schedule() + commit() of a decode step with 16 rows under 0.15 ms; 200,000 steps per
minute of simulated traffic with every invariant checked and every output compared with the oracle.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

from chunkllama.cache.manager import CacheManager
from chunkllama.cache.node import encode_tokens
from chunkllama.scheduler.output import SampledTokens
from chunkllama.simulation.engine import SimulatedEngine
from chunkllama.simulation.random_traffic import RandomTraffic

SIZE = 64


def _milliseconds(work: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append((time.perf_counter() - start) * 1e3)
    return median(times)


def _filled(cache: CacheManager, prompts: list[np.ndarray]) -> None:
    """Put prompts into the tree as if each had been computed and released."""
    for tokens in prompts:
        key = encode_tokens(tokens)
        match = cache.match(key, len(tokens), "")
        admission = next(iter(cache.admissions(match, -(-len(tokens) // SIZE), "")))
        chunks = cache.admit(admission, key, "", len(tokens))
        cache.will_compute(chunks, match.num_tokens, len(tokens))
        cache.end_step()
        cache.did_compute(chunks, match.num_tokens, len(tokens))
        cache.release(chunks, tokens, len(tokens))


def match_below_many_children(num_children: int) -> float:
    """Build one level of prefix, then ``num_children`` siblings that share half of their tokens."""
    rng = np.random.default_rng(0)
    cache = CacheManager(num_children + 8, SIZE, time.monotonic)
    prefix = rng.integers(0, 32000, SIZE + SIZE // 2, dtype=np.int32)
    tails = rng.integers(0, 32000, (num_children, SIZE // 2), dtype=np.int32)
    _filled(cache, [np.concatenate([prefix, tail]) for tail in tails])
    assert cache.tree.num_nodes == num_children + 1
    wanted = np.concatenate([prefix, tails[num_children // 2], tails[0]])
    key = encode_tokens(wanted)
    assert cache.match(key, len(wanted) - 1, "").num_tokens == 2 * SIZE
    return _milliseconds(lambda: cache.match(key, len(wanted) - 1, ""), 500)


def match_long_prefix(num_tokens: int) -> float:
    """Match a whole prompt that is in the tree as a path of chunks."""
    rng = np.random.default_rng(0)
    cache = CacheManager(num_tokens // SIZE + 8, SIZE, time.monotonic)
    prompt = rng.integers(0, 32000, num_tokens, dtype=np.int32)
    _filled(cache, [prompt])
    return _milliseconds(lambda: cache.match(encode_tokens(prompt), len(prompt) - 1, ""), 200)


def decode_step(
    num_rows: int, shared_chunks: int, private_chunks: int, spare_chunks: int
) -> tuple[float, float, float]:
    """Measure milliseconds of schedule(), commit(), and a step in which all sequences join."""
    rng = np.random.default_rng(0)
    total = shared_chunks + num_rows * (private_chunks + 8)
    engine = SimulatedEngine(
        total,
        SIZE,
        check=False,
        max_num_seqs=num_rows,
        max_num_batched_tokens=(shared_chunks + num_rows * (private_chunks + 1)) * SIZE,
        max_model_len=total * SIZE,
        spare_chunks=spare_chunks,
    )
    scheduler = engine.scheduler
    base = rng.integers(0, 32000, shared_chunks * SIZE).tolist()

    def step() -> tuple[float, float]:
        start = time.perf_counter()
        output = scheduler.schedule()
        scheduled = time.perf_counter()
        assert output is not None
        sampled = SampledTokens(token_ids={piece.slot: 5 for piece in output.slices})
        begin = time.perf_counter()
        scheduler.commit(output, sampled)
        return (scheduled - start) * 1e3, (time.perf_counter() - begin) * 1e3

    joins = []
    for _ in range(num_rows):
        own = rng.integers(0, 32000, private_chunks * SIZE).tolist()
        engine.add([*base, *own], 400)
        joins.append(sum(step()))
    times = [step() for _ in range(200)]
    return median(t[0] for t in times), median(t[1] for t in times), median(joins[1:] or joins)


def simulated_steps_per_minute(seconds: float) -> float:
    """Run random traffic with all checks on."""
    steps, seed = 0, 0
    start = time.process_time()
    while time.process_time() - start < seconds:
        steps += RandomTraffic(seed, (2, 4, 8, 64)[seed % 4]).run(400).num_steps
        seed += 1
    return steps / (time.process_time() - start) * 60


def measure(seconds: float) -> list[dict[str, object]]:
    """Return all rows of the table."""
    rows: list[dict[str, object]] = []

    def row(what: str, value: float, unit: str, target: str = "") -> None:
        rows.append({"what": what, "value": round(value, 4), "unit": unit, "target": target})
        print(f"{what:<62} {value:>12,.3f} {unit:<10} {target}", flush=True)

    row("match below 10,000 children", match_below_many_children(10_000), "ms", "< 0.2")
    row("match of a cached 8,192-token prompt", match_long_prefix(8192), "ms")
    for num_rows in (1, 16, 64):
        schedule, commit, _ = decode_step(num_rows, 16, 2, 1)
        target = "< 0.15" if num_rows == 16 else ""
        row(f"decode step, {num_rows} rows: schedule + commit", schedule + commit, "ms", target)
    for name, shared in (("128 chunks (8,192 tokens)", 128), ("8,192 chunks", 8192)):
        schedule, commit, join = decode_step(64, shared, 32, 1)
        where = f"64 rows, {name} shared + 32 private each"
        row(f"{where}: schedule", schedule, "ms")
        row(f"{where}: commit", commit, "ms")
        row(f"{where}: step with a join", join, "ms")
    steps = simulated_steps_per_minute(seconds)
    row("simulated traffic, checks on (CPU time)", steps, "steps/min", "> 200,000")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--save", action="store_true", help="write benchmarks/results/scheduler.json"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="CPU time of the simulator")
    options = parser.parse_args()
    rows = measure(options.seconds)
    if options.save:
        result = {
            "command": "python benchmarks/scheduler.py --save",
            "python": platform.python_version(),
            "numpy": np.__version__,
            "machine": platform.machine(),
            "rows": rows,
        }
        path = Path(__file__).parent / "results" / "scheduler.json"
        path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
