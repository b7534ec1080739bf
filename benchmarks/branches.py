"""Compare 16 branches of one request with 16 requests that share the same prompt.

    python benchmarks/branches.py --save

Starts its own server. A pair is the same work twice: one streamed completion with ``parallel``, and
as many streamed completions of the same prompt and leads; every second pair has them in the other
order. The prompt is cached before. The time of a step is the median time between two arrivals of
text of one branch or request. Target: median of the pairs' ratios at most 1.15. Client and server
share the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import httpx
from machine import describe_run
from servers import HOST, started_server

RESULTS = Path(__file__).parent / "results"
WORDS = ("river", "lake", "stone", "paper", "window", "garden", "silver", "market", "winter")


async def arrivals(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[int, list[float]]:
    """Times at which each branch's text arrived; a request without branches is branch 0."""
    times: dict[int, list[float]] = {}
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                choice = json.loads(line[6:])["choices"][0]
                if choice["text"]:
                    times.setdefault(choice.get("branch", 0), []).append(time.monotonic())
    return times


def step_ms(answers: list[dict[int, list[float]]]) -> float:
    gaps = [
        after - before
        for answer in answers
        for times in answer.values()
        # The lead and the first token come before all branches decode.
        for before, after in itertools.pairwise(times[2:])
    ]
    return statistics.median(gaps) * 1000


async def measure(port: int, options: argparse.Namespace) -> list[dict[str, float]]:
    words = random.Random(1).choices(WORDS, k=options.prompt_tokens)
    prompt = " ".join(words)
    rows = []
    async with httpx.AsyncClient(base_url=f"http://{HOST}:{port}", timeout=600) as client:
        shared = {"model": "m", "prompt": prompt, "temperature": 0, "ignore_eos": True}
        counted = await client.post("/v1/completions", json={**shared, "max_tokens": 1})
        num_tokens = counted.json()["usage"]["prompt_tokens"]
        print(f"{num_tokens} shared tokens", flush=True)
        for pair in range(options.pairs):
            leads = [f" branch {pair} {number}:" for number in range(options.branches)]
            limited = {**shared, "max_tokens": options.tokens}
            forked = {**limited, "parallel": {"branches": leads, "join_tokens": 0}}
            row: dict[str, float] = {"prompt_tokens": num_tokens}
            for kind in ("branches", "requests") if pair % 2 == 0 else ("requests", "branches"):
                bodies = [forked]
                if kind == "requests":
                    bodies = [{**limited, "prompt": prompt + lead} for lead in leads]
                row[kind] = step_ms(await asyncio.gather(*(arrivals(client, b) for b in bodies)))
            row["ratio"] = row["branches"] / row["requests"]
            rows.append(row)
            print(
                f"pair {pair + 1}: {row['branches']:.1f} ms a step with branches, "
                f"{row['requests']:.1f} ms with requests ({row['ratio']:.2f})",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--branches", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=2048, help="about")
    parser.add_argument("--tokens", type=int, default=64, help="of each branch")
    parser.add_argument("--save", action="store_true", help="write results/branches.json")
    options = parser.parse_args()
    with started_server(options.model) as (port, _):
        rows = asyncio.run(measure(port, options))
    ratio = statistics.median(row["ratio"] for row in rows)
    print(f"median ratio {ratio:.2f}")
    if options.save:
        record = {
            **describe_run(),
            "median_ratio": round(ratio, 3),
            "pairs": [{key: round(value, 3) for key, value in row.items()} for row in rows],
        }
        (RESULTS / "branches.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
