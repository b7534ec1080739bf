"""Measure what a replica on Ray costs, and how long a stream pauses when its replica is lost.

    python benchmarks/cluster.py --save

Needs the extra ``chunkllama[ray]``. One engine process behind ``ProcessEngineClient`` and one
replica behind ``ClusterEngineClient`` answer the same greedy requests in turn, ``--rounds`` times;
the other one is idle meanwhile. The processor time is that of this process, the front end. A hop is
a call of the replica's actor and its answer.

Then one of two replicas is killed, or stopped, under a greedy stream, ``--failovers`` times each:
the longest time between two tokens, and whether the answer is that of a run without it. A stopped
replica is lost after ``HANG_SECONDS``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import platform
import random
import signal
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from machine import cpu_name

import chunkllama
from chunkllama.cluster.connect import ClusterPlan, start_cluster
from chunkllama.config import EngineConfig
from chunkllama.engine.client import EngineClient
from chunkllama.engine.process import ProcessEngineClient
from chunkllama.messages import EngineRequest
from chunkllama.sampling_params import SamplingParams

RESULTS = Path(__file__).parent / "results"
TOKENS = 96
HOPS = 300
# What a replica may cost: least rate against the socket by streams, and time of a hop.
LEAST_RATES = {"streams_8": 0.85, "streams_16": 0.9}
MOST_HOP_MS = 3.0
HANG_SECONDS = 5.0
MOST_PAUSES = {"SIGKILL": 5.0, "SIGSTOP": HANG_SECONDS + 5.0}
FAILOVER_TOKENS = 200


async def answer(client: EngineClient, prompt: list[int]) -> tuple[float, int]:
    """Run one request; returns seconds to the first token, and tokens."""
    sampling = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    request = EngineRequest(
        request_id=os.urandom(6).hex(), prompt_token_ids=prompt, sampling=sampling
    )
    began, first, tokens = time.perf_counter(), 0.0, 0
    async for delta in client.generate(request):
        first = first or time.perf_counter() - began
        tokens += sum(len(choice.token_ids) for choice in delta.choices)
    return first, tokens


async def measure(client: EngineClient, prefix: list[int], streams: int) -> dict[str, float]:
    """Run ``streams`` requests with one prefix at once."""
    prompts = [prefix + [random.randrange(1000, 40_000) for _ in range(16)] for _ in range(streams)]
    began, used = time.perf_counter(), time.process_time()
    answers = await asyncio.gather(*(answer(client, prompt) for prompt in prompts))
    elapsed, used = time.perf_counter() - began, time.process_time() - used
    tokens = sum(count for _, count in answers)
    return {
        "output_tokens_per_s": round(tokens / elapsed, 1),
        "front_cpu_us_per_token": round(1e6 * used / tokens, 1),
        "first_token_p50_ms": round(1e3 * statistics.median(first for first, _ in answers), 1),
    }


async def hop_p50_ms() -> float:
    """Median time of a call to a replica's actor."""
    import ray

    from chunkllama.cluster.replica import NAMESPACE

    (name,) = [
        actor["name"]
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["namespace"] == NAMESPACE
    ]
    host = ray.get_actor(name, NAMESPACE)
    times = []
    for _ in range(HOPS):
        began = time.perf_counter()
        await host.pid.remote()
        times.append(time.perf_counter() - began)
    return round(1e3 * statistics.median(times), 2)


def make_plan(config: EngineConfig, num_replicas: int) -> ClusterPlan:
    return ClusterPlan(
        address="auto",
        deploys=True,
        version=chunkllama.__version__,
        config=config,
        min_replicas=num_replicas,
        max_replicas=num_replicas,
        max_failovers=2,
        spill_requests=8,
        index_chunks=10_000,
        hang_seconds=HANG_SECONDS,
        drain_seconds=5.0,
    )


async def stream(
    client: EngineClient, prompt: list[int], on_token: Callable[[int], Awaitable[None]]
) -> tuple[list[int], float]:
    """Run one greedy request; returns its tokens and the longest time between two deltas."""
    sampling = SamplingParams(temperature=0.0, max_tokens=FAILOVER_TOKENS, ignore_eos=True)
    request = EngineRequest(
        request_id=os.urandom(6).hex(), prompt_token_ids=prompt, sampling=sampling
    )
    tokens: list[int] = []
    longest, last = 0.0, math.inf
    async for delta in client.generate(request):
        longest, last = max(longest, time.perf_counter() - last), time.perf_counter()
        tokens += [token for choice in delta.choices for token in choice.token_ids]
        await on_token(len(tokens))
    return tokens, longest


async def lose_replicas(config: EngineConfig, count: int) -> dict[str, Any]:
    """Lose a replica under a stream, ``count`` times in each way."""
    import ray

    from chunkllama.cluster.replica import NAMESPACE

    client = await start_cluster(make_plan(config, 2))
    result: dict[str, Any] = {}
    try:
        for how in MOST_PAUSES:
            pauses, equal = [], 0
            for _ in range(count):
                while len(client.replicas) < 2:
                    await asyncio.sleep(0.1)
                prompt = [random.randrange(1000, 40_000) for _ in range(200)]

                lost: list[str] = []

                async def lose(done: int, how: str = how, lost: list[str] = lost) -> None:
                    if done >= 30 and not lost:
                        lost += [each for each in client.replicas if client.routing.load(each)]
                        pid = await ray.get_actor(lost[0], NAMESPACE).pid.remote()
                        os.kill(pid, signal.Signals[how])

                async def wait(done: int) -> None:
                    pass

                expected, _ = await stream(client, prompt, wait)
                tokens, pause = await stream(client, prompt, lose)
                pauses.append(round(pause, 2))
                equal += tokens == expected
            result[how] = {"pauses_s": pauses, "equal": f"{equal} of {count}"}
            print(how, json.dumps(result[how]), flush=True)
    finally:
        await client.close()
    return result


async def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure both in turn; returns the medians of each."""
    config = EngineConfig.from_flat(
        model=args.model, threads=args.threads, num_chunks=256, log_level="error"
    )
    cluster = await start_cluster(make_plan(config, 1))
    socket = await ProcessEngineClient.start(config)
    clients: dict[str, EngineClient] = {"socket": socket, "cluster": cluster}
    prefix = [random.randrange(1000, 40_000) for _ in range(256)]
    result: dict[str, Any] = {"hop_p50_ms": await hop_p50_ms()}
    try:
        for client in clients.values():
            await measure(client, prefix, 2)
        for streams in args.streams:
            runs: dict[str, list[dict[str, float]]] = {name: [] for name in clients}
            for _ in range(args.rounds):
                for name, client in clients.items():
                    runs[name].append(await measure(client, prefix, streams))
            medians = {
                name: {key: statistics.median(each[key] for each in found) for key in found[0]}
                for name, found in runs.items()
            }
            rates = [
                cluster["output_tokens_per_s"] / socket["output_tokens_per_s"]
                for socket, cluster in zip(runs["socket"], runs["cluster"], strict=True)
            ]
            result[f"streams_{streams}"] = {
                **medians,
                "rate_against_socket": round(statistics.median(rates), 3),
            }
            print(streams, json.dumps(result[f"streams_{streams}"]), flush=True)
    finally:
        await socket.close()
        await cluster.close()
    if args.failovers:
        result["failovers"] = await lose_replicas(config, args.failovers)
    return result


def is_within_limits(result: dict[str, Any]) -> bool:
    """Whether a replica costs no more than it may, and its loss."""
    rates = all(
        result[name]["rate_against_socket"] >= least
        for name, least in LEAST_RATES.items()
        if name in result
    )
    pauses = all(
        max(found["pauses_s"]) < MOST_PAUSES[how]
        for how, found in result.get("failovers", {}).items()
    )
    return rates and pauses and result["hop_p50_ms"] < MOST_HOP_MS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--streams", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--failovers", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write results/cluster.json")
    args = parser.parse_args()
    random.seed(1)
    result = asyncio.run(run(args))
    record = {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": cpu_name(),
        "python": platform.python_version(),
        **result,
        "limits": {
            "rate_against_socket": LEAST_RATES,
            "hop_p50_ms": MOST_HOP_MS,
            "pauses_s": MOST_PAUSES,
        },
        "is_within_limits": is_within_limits(result),
    }
    print(json.dumps(record, indent=1))
    if args.save:
        (RESULTS / "cluster.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
