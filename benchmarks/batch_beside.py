"""Measure the time to first token of online requests beside a running batch and without one.

    python benchmarks/batch_beside.py --save

Starts its own server. A pair is the same arrivals twice, without and with a batch whose lines never
run out; every second pair has the batch first. Online requests arrive at random times (exponential
pauses, the same in both halves), with a system prompt that is cached and a question that is not.
The lines of the batch stand over 16 system prompts in shuffled order. Client and server share the
machine. Target: median of the pairs' ratios of P50 at most 1.2.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import openai
from machine import describe_run
from servers import HOST, started_server

from chunkllama_server.bench.client import Endpoint, Outcome

RESULTS = Path(__file__).parent / "results"
CHAT = "/v1/chat/completions"
PREFIXES = 16
WORDS = ("river", "lake", "stone", "paper", "window", "garden", "silver", "market", "winter")
MODEL = "m"


def text(seed: str, words: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def messages(system: str, question: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": question}]


class Load:
    """The two loads of one server."""

    def __init__(self, port: int, options: argparse.Namespace) -> None:
        self._options = options
        self._online = Endpoint(f"http://{HOST}:{port}/v1")
        self._client = openai.AsyncOpenAI(base_url=f"http://{HOST}:{port}/v1", api_key="none")
        self._number = 0

    async def online(self, requests: int, seed: int) -> list[float]:
        """Times to first token, in seconds, of requests that arrive as the seed says."""
        chance = random.Random(seed)
        tasks = []
        for _ in range(requests):
            await asyncio.sleep(chance.expovariate(self._options.rate))
            self._number += 1
            question = text(f"online {self._number}", self._options.question_words)
            body = {
                "model": MODEL,
                "messages": messages(text("online", self._options.prefix_words), question),
                "max_tokens": self._options.answer_tokens,
                "min_tokens": self._options.answer_tokens,  # no special token before the text
                "temperature": 0,
                "stream": True,
            }
            outcome = Outcome(0, 0, 0.0)
            tasks.append(asyncio.create_task(self._online.stream(CHAT, body, outcome)))
        outcomes = await asyncio.gather(*tasks)
        failed = [outcome.error for outcome in outcomes if outcome.error]
        if failed:
            raise SystemExit(f"{len(failed)} requests failed, the first: {failed[0]}")
        return [outcome.ttft for outcome in outcomes]

    async def begin(self, lines: int) -> str:
        """Start a batch; returns its id when some of its lines have been answered."""
        self._number += 1
        rows = [
            {
                "custom_id": str(number),
                "method": "POST",
                "url": CHAT,
                "body": {
                    "model": MODEL,
                    "messages": messages(
                        text(f"batch {number % PREFIXES}", self._options.prefix_words),
                        text(f"batch {self._number} {number}", self._options.question_words // 4),
                    ),
                    "max_tokens": self._options.line_tokens,
                    "ignore_eos": True,
                },
            }
            for number in range(lines)
        ]
        random.Random(self._number).shuffle(rows)
        content = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        stored = await self._client.files.create(file=("in.jsonl", content), purpose="batch")
        batch = await self._client.batches.create(
            input_file_id=stored.id, endpoint=CHAT, completion_window="24h"
        )
        while (await self._client.batches.retrieve(batch.id)).request_counts.completed < 8:
            await asyncio.sleep(0.1)
        return batch.id

    async def end(self, batch_id: str) -> int:
        """Cancel a batch; returns how many of its lines were answered.

        Raises:
            SystemExit: it ended before it was cancelled.
        """
        batch = await self._client.batches.cancel(batch_id)
        if batch.status != "cancelling":
            raise SystemExit(f"the batch is {batch.status}; raise --lines")
        while batch.status != "cancelled":
            await asyncio.sleep(0.1)
            batch = await self._client.batches.retrieve(batch_id)
        await self._client.files.delete(batch.input_file_id)
        return batch.request_counts.completed


async def measure(port: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    load = Load(port, options)
    await load.online(4, 0)  # first uses
    rows = []
    for pair in range(options.pairs):
        row: dict[str, Any] = {}
        for beside in (False, True) if pair % 2 == 0 else (True, False):
            if beside:
                batch_id, began = await load.begin(options.lines), time.monotonic()
            times = await load.online(options.requests, pair + 1)
            if beside:
                row["lines_per_s"] = await load.end(batch_id) / (time.monotonic() - began)
            name = "beside" if beside else "alone"
            row[f"{name}_p50_ms"] = statistics.median(times) * 1000
            row[f"{name}_ms"] = [round(seconds * 1000, 1) for seconds in sorted(times)]
        row["ratio"] = row["beside_p50_ms"] / row["alone_p50_ms"]
        rows.append(row)
        print(
            f"pair {pair + 1}: P50 {row['alone_p50_ms']:.0f} ms alone, "
            f"{row['beside_p50_ms']:.0f} ms beside ({row['ratio']:.2f}), "
            f"{row['lines_per_s']:.1f} lines/s",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--requests", type=int, default=30, help="online, in each half of a pair")
    parser.add_argument("--rate", type=float, default=1.0, help="online requests per second")
    parser.add_argument("--lines", type=int, default=3000, help="of a batch")
    parser.add_argument("--prefix-words", type=int, default=400)
    parser.add_argument("--question-words", type=int, default=200, help="a quarter for lines")
    parser.add_argument("--answer-tokens", type=int, default=32)
    parser.add_argument("--line-tokens", type=int, default=64)
    parser.add_argument("--note", default="", help="kept in the result, e.g. what else ran")
    parser.add_argument("--save", action="store_true", help="write results/batch-beside.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        flags = ("--files-dir", f"{folder}/files")
        with started_server(options.model, *flags) as (port, _):
            rows = asyncio.run(measure(port, options))
    ratio = statistics.median(row["ratio"] for row in rows)
    print(f"median ratio {ratio:.2f}")
    if options.save:
        record = {
            **describe_run(),
            "note": options.note,
            "median_ratio": round(ratio, 3),
            "pairs": [
                {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}
                for row in rows
            ],
        }
        (RESULTS / "batch-beside.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
