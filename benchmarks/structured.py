"""Measure the cost of a JSON schema: the same requests with and without, alternating.

    python benchmarks/structured.py --url http://127.0.0.1:8000 --save

Every answer has exactly ``--tokens`` tokens: the schema is a list of objects too long to complete
earlier. Sampling is at temperature 1; a round sends the requests without a schema, with
one, with bounded strings, and with everything bounded, in an order reversed from round to round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
import sys
import time
from pathlib import Path

from compare import version
from machine import cpu_name

from chunkllama_server.bench.client import Endpoint, Outcome

RESULTS = Path(__file__).parent / "results"


def schema(text: dict[str, int], number: dict[str, int], tags: dict[str, int]) -> dict:
    """Return the schema of a long list of objects whose strings, numbers and lists have these
    bounds.
    """
    pet = {
        "name": {"type": "string", **text},
        "age": {"type": "integer", **number},
        "kind": {"enum": ["cat", "dog", "bird"]},
        "tags": {"type": "array", "items": {"type": "string", **text}, **tags},
    }
    items = {
        "type": "object",
        "properties": pet,
        "required": [*pet],
        "additionalProperties": False,
    }
    return {"type": "array", "minItems": 50, "items": items}


def response_format(*bounds: dict[str, int]) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "pets", "schema": schema(*bounds)}}


TEXT, AGE, TAGS = {"maxLength": 24}, {"minimum": 0, "maximum": 120}, {"maxItems": 4}
FORMATS = {
    "plain": {},
    "schema": {"response_format": response_format({}, {}, {})},
    "bounded strings": {"response_format": response_format(TEXT, {}, {})},
    "all bounded": {"response_format": response_format(TEXT, AGE, TAGS)},
}


async def run_load(endpoint: Endpoint, options: argparse.Namespace, body: dict) -> float:
    """Measure output tokens per second of ``--requests`` requests, ``--concurrency`` at once."""
    outcomes: list[Outcome] = []
    numbers = iter(range(options.requests))

    async def worker() -> None:
        for number in numbers:
            message = {"role": "user", "content": f"List the pets of house {number} as JSON."}
            request = {"messages": [message], "seed": number, **body}
            outcomes.append(
                await endpoint.stream("/v1/chat/completions", request, Outcome(0, 0, 0.0))
            )

    started = time.monotonic()
    await asyncio.gather(*(worker() for _ in range(options.concurrency)))
    seconds = time.monotonic() - started
    wrong = [o.error or f"{o.completion_tokens} tokens" for o in outcomes]
    wrong = [text for text in wrong if text != f"{options.tokens} tokens"]
    if wrong:
        raise SystemExit(f"{len(wrong)} answers are not as asked for, the first: {wrong[0]}")
    return sum(o.completion_tokens for o in outcomes) / seconds


async def measure(options: argparse.Namespace) -> dict[str, object]:
    endpoint = Endpoint(options.url)
    _, models = await endpoint.get("/v1/models")
    plain = {
        "model": json.loads(models)["data"][0]["id"],
        "max_tokens": options.tokens,
        "min_tokens": options.tokens,
        "ignore_eos": True,
        "temperature": 1.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    bodies = {name: {**plain, **extra} for name, extra in FORMATS.items()}
    rates: dict[str, list[float]] = {name: [] for name in bodies}
    for body in bodies.values():  # the schemas' compilation and the shared prefix
        await run_load(endpoint, options, body)
    for turn in range(options.rounds):
        for name in list(bodies)[:: -1 if turn % 2 else 1]:
            rates[name].append(await run_load(endpoint, options, bodies[name]))
    costs = {
        name: statistics.median(1 - s / p for s, p in zip(rate, rates["plain"], strict=True))
        for name, rate in rates.items()
    }
    return {
        "version": await version(endpoint),
        "tokens_per_s": {name: [round(r, 1) for r in rate] for name, rate in rates.items()},
        "median_cost": {name: round(cost, 4) for name, cost in costs.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", action="store_true", help="write results/structured.json")
    options = parser.parse_args()
    result = asyncio.run(measure(options))
    for name, rate in result["tokens_per_s"].items():
        cost = result["median_cost"][name]
        print(f"{name}: {statistics.median(rate):.0f} tok/s, cost {cost:.1%}")
    if options.save:
        record = {
            "command": " ".join(["python", *sys.argv]),
            "machine": cpu_name(),
            "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d"),
            **{n: getattr(options, n) for n in ("requests", "concurrency", "tokens", "rounds")},
            **result,
        }
        (RESULTS / "structured.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
