"""Measure what a cache tier on disk saves, in a simulation of a trace and in a real engine.

    python benchmarks/tier.py --save
    python benchmarks/tier.py --trace conversation_trace.jsonl --save

With ``--trace``: Mooncake's hashed trace, replayed by ``chunkllama.simulation`` with pools of
several sizes, each without a tier and with tiers of several sizes: the share of the prompt tokens
that are found. The cost model is the built-in one; ``--read-seconds`` is the time of reading a
chunk. Without: the time to the first token of a prompt of ``--shared`` tokens and 32 others on the
model's engine, in turns cold, from the pool, and from the tier after the pool was emptied.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import cpu_name, new_result

import chunkllama
from chunkllama.config import EngineConfig
from chunkllama.engine.build import build_engine
from chunkllama.engine.core import EngineCore
from chunkllama.messages import EngineRequest
from chunkllama.sampling_params import SamplingParams
from chunkllama.simulation.capacity import summarize
from chunkllama.simulation.cost_model import DEFAULT_COST
from chunkllama.simulation.engine import make_limits
from chunkllama.simulation.replay import Replay
from chunkllama.simulation.trace import TraceRequest, read_trace

CHUNK_SIZE = 64
QUESTION_TOKENS = 32


def replay(
    requests: list[TraceRequest], pool: int, tier: int, read_seconds: float
) -> dict[str, Any]:
    """Replay a trace with one pool and one tier, both in chunks."""
    limits = make_limits(max_model_len=1 << 20, max_waiting=1 << 20, max_num_batched_tokens=8192)
    run = Replay(
        limits, pool, CHUNK_SIZE, DEFAULT_COST.seconds, tier_chunks=tier, read_seconds=read_seconds
    )
    began = time.perf_counter()
    result = summarize(run.run(requests), pool)
    return {
        "pool_chunks": pool,
        "tier_chunks": tier,
        "hit_rate": round(result.hit_rate, 4),
        "requests": result.requests - result.refused - result.too_long,
        "evicted_chunks": result.evicted_chunks,
        "first_token_seconds": [round(value, 2) for value in result.first_token_seconds],
        "seconds": round(time.perf_counter() - began, 1),
    }


def measure_trace(arguments: argparse.Namespace) -> dict[str, Any]:
    """Hit rates of every pool with every tier."""
    requests = read_trace(arguments.trace, _no_text, limit=arguments.limit or None)
    rows = []
    for pool in arguments.pools:
        for tier in (0, *arguments.tiers):
            row = replay(requests, pool, tier, arguments.read_seconds)
            print(json.dumps(row), flush=True)
            rows.append(row)
    return {
        "trace": arguments.trace.name,
        "num_requests": len(requests),
        "chunk_size": CHUNK_SIZE,
        "read_seconds": arguments.read_seconds,
        "replays": rows,
    }


def _no_text(entry: dict[str, Any]) -> list[int]:
    raise ValueError("the trace has texts; give a hashed one")


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw hit rate against pool size, a line for each tier."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    rows = result["replays"]
    for tier in sorted({row["tier_chunks"] for row in rows}):
        line = [row for row in rows if row["tier_chunks"] == tier]
        label = f"tier of {tier:,} chunks" if tier else "no tier"
        axes.plot(
            [row["pool_chunks"] for row in line],
            [100 * row["hit_rate"] for row in line],
            marker="o",
            label=label,
        )
    axes.set_xscale("log", base=2)
    axes.set_xlabel(f"chunks in the pool ({CHUNK_SIZE} tokens each)")
    axes.set_ylabel("prompt tokens found, %")
    axes.set_title(f"{result['trace']}, {result['num_requests']:,} requests")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def first_token(core: EngineCore, prompt: list[int]) -> tuple[float, int]:
    """Seconds from a request to its first token, and its cached tokens."""
    began = time.perf_counter()
    sampling = SamplingParams(max_tokens=1, temperature=0.0, seed=0)
    core.add(EngineRequest(request_id="r", prompt_token_ids=prompt, sampling=sampling))
    cached = 0
    while core.has_work():
        for delta in core.step():
            cached = delta.num_cached_tokens
    return time.perf_counter() - began, cached


def empty_pool(core: EngineCore) -> None:
    """Evict everything to the tier, and wait until it is written."""
    core.packs.cache.tree.evict(core.info.num_chunks)
    while core.is_moving_chunks():
        core.move_chunks()


def measure_first_token(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds to the first token: cold, from the pool, and from the tier."""
    rng = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {"cold": [], "pool": [], "tier": []}
    num_chunks = 2 * (arguments.shared // CHUNK_SIZE + 2)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        core = build_engine(
            EngineConfig.from_flat(
                model=arguments.model, num_chunks=num_chunks, cache_tier_dir=folder
            )
        )
        try:
            for _ in range(arguments.rounds + 1):
                shared = rng.integers(3, core.info.vocab_size, arguments.shared).tolist()
                for kind in seconds:
                    if kind == "tier":
                        empty_pool(core)
                    own = rng.integers(3, core.info.vocab_size, QUESTION_TOKENS).tolist()
                    taken, cached = first_token(core, shared + own)
                    assert (cached > 0) == (kind != "cold"), f"{kind}: {cached} tokens cached"
                    seconds[kind].append(taken)
        finally:
            core.close()
    medians = {kind: statistics.median(values[1:]) for kind, values in seconds.items()}
    return {
        "model": arguments.model,
        "shared_tokens": arguments.shared,
        "rounds": arguments.rounds,
        "first_token_seconds": {kind: round(value, 4) for kind, value in medians.items()},
        "tier_over_pool": round(medians["tier"] / medians["pool"], 2),
        "cold_over_tier": round(medians["cold"] / medians["tier"], 2),
    }


def numbers(text: str) -> list[int]:
    return [int(value) for value in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", type=Path, help="Mooncake's hashed trace, JSONL")
    parser.add_argument("--limit", type=int, default=0, help="requests of the trace; 0 is all")
    parser.add_argument("--pools", type=numbers, default=[8192, 16384, 32768, 65536, 131072])
    parser.add_argument("--tiers", type=numbers, default=[131072, 1048576])
    parser.add_argument("--read-seconds", type=float, default=0.0015)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--shared", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--directory", type=Path, help="where the tier's folder is made")
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    base = {
        "command": " ".join(["python benchmarks/tier.py", *sys.argv[1:]]),
        "version": chunkllama.__version__,
        "machine": cpu_name(),
        "python": platform.python_version(),
    }
    if arguments.trace is not None:
        result = {**base, **measure_trace(arguments)}
        if arguments.save:
            path = new_result("tier-trace")
            path.write_text(json.dumps(result, indent=2) + "\n")
            plot(result, path.with_suffix(".png"))
    else:
        result = {**base, **measure_first_token(arguments)}
        print(json.dumps(result, indent=2))
        if arguments.save:
            path = new_result("tier-first-token")
            path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
