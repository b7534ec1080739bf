"""Measure what a replica on Ray costs: the same engine behind our own socket and behind a channel.

    python benchmarks/cluster.py --save

Needs the extra ``chunkllama[ray]``. One engine process behind ``ProcessEngineClient`` and one
replica behind ``ClusterEngineClient`` answer the same greedy requests in turn, ``--rounds`` times;
the other one is idle meanwhile. The processor time is that of this process, the front end. A hop is
a call of the replica's actor and its answer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import sys
import time
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
TOKENS = 48
HOPS = 300


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


async def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure both in turn; returns the medians of each."""
    config = EngineConfig.from_flat(
        model=args.model, threads=args.threads, num_chunks=256, log_level="error"
    )
    plan = ClusterPlan(
        address="auto",
        version=chunkllama.__version__,
        config=config,
        min_replicas=1,
        max_replicas=1,
        max_failovers=2,
        spill_requests=8,
        index_chunks=10_000,
        hang_seconds=30.0,
        drain_seconds=5.0,
    )
    cluster = await start_cluster(plan)
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
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--streams", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--rounds", type=int, default=5)
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
    }
    print(json.dumps(record, indent=1))
    if args.save:
        (RESULTS / "cluster.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
