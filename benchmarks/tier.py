"""Measure what a cache tier on disk saves, in a simulation of a trace and in a real engine.

    python benchmarks/tier.py --save
    python benchmarks/tier.py --rows 16 --bits 2 --save
    python benchmarks/tier.py --trace conversation_trace.jsonl --save

With ``--trace``: Mooncake's hashed trace, replayed by ``chunkllama.simulation`` with memory for so
many tokens in bfloat16: all of it a pool, a pool in int8, half of it a pool and half a tier of 4 or
2 bits, and all of it a pool beside a tier on disk. What is reported is the share of the prompt
tokens that are found. Chunks are the trace's blocks of 512 tokens, steps take 10 ms and 20 us a
token, so that the server keeps up, and ``--read-seconds`` is the time of reading a chunk. Without:
the time to the first token of a prompt of ``--shared`` tokens and 32 others on the model's engine,
in turns cold, from the pool, and from the tier after the pool was emptied. With ``--rows``: the
same for so many prompts at once, and until their answers of ``--answer-tokens`` have ended, from a
tier in memory of ``--bits``.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import cpu_name, new_result

import chunkllama
from chunkllama.backends.kivi import KiviCodec
from chunkllama.config import EngineConfig
from chunkllama.engine.build import build_engine
from chunkllama.engine.core import EngineCore
from chunkllama.messages import EngineRequest
from chunkllama.model_spec import kv_row_elements
from chunkllama.sampling_params import SamplingParams
from chunkllama.simulation.capacity import summarize
from chunkllama.simulation.cost_model import StepCost
from chunkllama.simulation.engine import make_limits
from chunkllama.simulation.replay import Replay
from chunkllama.simulation.trace import MOONCAKE_BLOCK, TraceRequest, read_trace

CHUNK_SIZE = 64
HEAD_DIM = 128  # of the model whose memory the trace takes
COST = StepCost(step=0.01, token=2e-5)
QUESTION_TOKENS = 32


def replay(
    requests: list[TraceRequest],
    pool: int,
    tier: int,
    first: int,
    bits: int,
    read_seconds: float,
) -> dict[str, Any]:
    """Replay a trace with one pool and one tier, both in chunks.

    Args:
        first: chunks of the tier that a prompt's first block takes.
        bits: that the others are rounded to; 0: none.
    """
    limits = make_limits(max_model_len=1 << 20, max_waiting=1 << 20, max_num_batched_tokens=8192)
    run = Replay(
        limits,
        pool,
        MOONCAKE_BLOCK,
        COST.seconds,
        tier_chunks=tier,
        read_seconds=read_seconds,
        tier_options={"first": first, "bits": bits},
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


def layouts(memory: int, on_disk: int) -> dict[str, tuple[int, int, int, int]]:
    """Blocks in the pool and in a tier, how many a prompt's first one takes there, rounded up, and
    the bits of the others, in memory for so many blocks of bfloat16."""
    whole = 2 * CHUNK_SIZE * HEAD_DIM * 2
    in_int8 = 2 * CHUNK_SIZE * kv_row_elements(HEAD_DIM, "int8")
    half = memory // 2
    found = {
        "pool": (memory, 0, 1, 0),
        "pool in int8": (memory * whole // in_int8, 0, 1, 0),
    }
    for bits in (4, 2):
        packed = KiviCodec(bits, (1, 2, 1, CHUNK_SIZE, HEAD_DIM), torch.bfloat16).num_bytes
        first = -(
            -(whole + (MOONCAKE_BLOCK // CHUNK_SIZE - 1) * packed)
            * CHUNK_SIZE
            // (MOONCAKE_BLOCK * packed)
        )
        found[f"half a pool, half a tier of {bits} bits"] = (
            half,
            half * whole // packed,
            first,
            bits,
        )
    found[f"pool, and {on_disk * MOONCAKE_BLOCK:,} tokens on disk"] = memory, on_disk, 1, 0
    return found


def measure_trace(arguments: argparse.Namespace) -> dict[str, Any]:
    """Hit rates of every layout of every size of memory."""
    requests = read_trace(arguments.trace, _no_text, limit=arguments.limit or None)
    rows = []
    for memory in arguments.memory:
        for name, sizes in layouts(
            memory // MOONCAKE_BLOCK, arguments.on_disk // MOONCAKE_BLOCK
        ).items():
            row = replay(requests, *sizes, arguments.read_seconds)
            rows.append({"memory_tokens": memory, "layout": name, **row})
            print(json.dumps(rows[-1]), flush=True)
    return {
        "trace": arguments.trace.name,
        "num_requests": len(requests),
        "chunk_size": MOONCAKE_BLOCK,
        "read_seconds": arguments.read_seconds,
        "replays": rows,
    }


def _no_text(entry: dict[str, Any]) -> list[int]:
    raise ValueError("the trace has texts; give a hashed one")


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw hit rate against memory, a line for each layout."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    rows = result["replays"]
    for name in dict.fromkeys(row["layout"] for row in rows):
        line = [row for row in rows if row["layout"] == name]
        memory, rates = zip(
            *((row["memory_tokens"] / 1e6, 100 * row["hit_rate"]) for row in line), strict=True
        )
        axes.plot(memory, rates, marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("memory, in million tokens of bfloat16")
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
    """Evict everything to the tier, no faster than it is written."""
    for _ in range(0, core.info.num_chunks, 16):
        core.packs.cache.tree.evict(16)
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


def answer_rows(core: EngineCore, prompts: list[list[int]], num_tokens: int) -> tuple[float, ...]:
    """Answer prompts that arrive together.

    Returns:
        Seconds until each has its first token, seconds until all have ended, and cached tokens.
    """
    began = time.perf_counter()
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, seed=0, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        core.add(EngineRequest(request_id=str(i), prompt_token_ids=prompt, sampling=sampling))
    cached: dict[str, int] = {}
    first_at = 0.0
    while core.has_work():
        for delta in core.step():
            if delta.request_id not in cached:
                cached[delta.request_id] = delta.num_cached_tokens
                first_at = time.perf_counter() - began
    return first_at, time.perf_counter() - began, sum(cached.values())


def measure_rows(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of rows that share a prefix: computed, from the pool, and from few bits in memory."""
    rng = np.random.default_rng(0)
    kinds = ("cold", "pool", "tier")
    seconds: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    own_chunks = -(-(QUESTION_TOKENS + arguments.answer_tokens) // CHUNK_SIZE) + 1
    num_chunks = 2 * (arguments.shared // CHUNK_SIZE + arguments.rows * own_chunks)
    core = build_engine(
        EngineConfig.from_flat(
            model=arguments.model,
            num_chunks=num_chunks,
            cache_tier_memory="1GiB",
            cache_tier_bits=arguments.bits,
        )
    )
    try:
        tokens = partial(rng.integers, 3, core.info.vocab_size)
        for _ in range(arguments.rounds + 1):
            shared = tokens(arguments.shared).tolist()
            for kind in kinds:
                if kind == "tier":
                    empty_pool(core)
                prompts = [shared + tokens(QUESTION_TOKENS).tolist() for _ in range(arguments.rows)]
                first, whole, cached = answer_rows(core, prompts, arguments.answer_tokens)
                expected = arguments.rows * arguments.shared
                assert kind == "cold" or cached >= expected, f"{kind}: {cached} tokens cached"
                seconds[kind].append((first, whole))
        stats = core.stats()
        chunk_bytes = core.packs.io.stored_bytes
    finally:
        core.close()
    result: dict[str, Any] = {
        "model": arguments.model,
        "rows": arguments.rows,
        "shared_tokens": arguments.shared,
        "own_tokens": QUESTION_TOKENS,
        "answer_tokens": arguments.answer_tokens,
        "bits": arguments.bits,
        "rounds": arguments.rounds,
        "tier_chunks": stats.tier_chunks,
        "tier_bytes": stats.tier_memory_bytes,
        "tokens_over_pool": round(stats.tier_chunks * chunk_bytes / stats.tier_memory_bytes, 2),
    }
    for at, name in enumerate(("first_tokens", "answers")):
        medians = {
            kind: statistics.median(v[at] for v in values[1:]) for kind, values in seconds.items()
        }
        result[f"{name}_seconds"] = {kind: round(value, 4) for kind, value in medians.items()}
        result[f"{name}_tier_over_pool"] = round(medians["tier"] / medians["pool"], 3)
    return result


def numbers(text: str) -> list[int]:
    return [int(value) for value in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", type=Path, help="Mooncake's hashed trace, JSONL")
    parser.add_argument("--limit", type=int, default=0, help="requests of the trace; 0 is all")
    parser.add_argument("--memory", type=numbers, default=[1 << n for n in range(20, 25)])
    parser.add_argument("--on-disk", type=int, default=1 << 26, help="tokens")
    parser.add_argument("--read-seconds", type=float, default=0.003)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--shared", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=0, help="prompts at once; 0: one, from files")
    parser.add_argument("--answer-tokens", type=int, default=32)
    parser.add_argument("--bits", type=int, choices=[2, 4], default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--directory", type=Path, help="where the tier's folder is made")
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    base = {
        "command": " ".join(["python benchmarks/tier.py", *(Path(x).name for x in sys.argv[1:])]),
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
        measure = measure_rows if arguments.rows else measure_first_token
        result = {**base, **measure(arguments)}
        print(json.dumps(result, indent=2))
        if arguments.save:
            path = new_result("tier-rows" if arguments.rows else "tier-first-token")
            path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
