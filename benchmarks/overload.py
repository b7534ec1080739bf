"""Offer a server ten times what it can answer: how fast it refuses, how much it still answers.

    python benchmarks/overload.py --save

Starts its own server. Each round measures the peak (as many clients as the server runs sequences,
each sending its next request after an answer), then the goodput (answers per second) and the time
until a 429 while requests arrive at ten times that rate, each on a connection of its own. Client
and server share the machine; the delay of the client's own timer is recorded beside the times.
Targets: P99 of the refusals below 50 ms, goodput at least 90% of the peak.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

from machine import describe_run
from servers import started_server

RESULTS = Path(__file__).parent / "results"
NUM_SEQS, NUM_WAITING = 64, 64


@dataclass
class Load:
    """What one phase has seen.

    Attributes:
        answered: 200 within the phase.
        refusals: seconds from connecting to the 429.
        lags: seconds by which the client's timer was late.
        other: statuses that are neither: 503 beyond the limits of connections, 0 without an answer.
    """

    seconds: float
    answered: int = 0
    late: int = 0
    refusals: list[float] = field(default_factory=list)
    lags: list[float] = field(default_factory=list)
    other: list[int] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return self.answered / self.seconds


class Exchange(asyncio.Protocol):
    """One request on a connection of its own; ``status`` is set when the answer is whole."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._answer = b""
        self.began = time.monotonic()
        self.status: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._answer += data

    def connection_lost(self, error: Exception | None) -> None:
        parts = self._answer.split(None, 2)
        self.status.set_result(int(parts[1]) if len(parts) > 1 else 0)


class Client:
    """Sends completions of ``tokens`` tokens to a server."""

    def __init__(self, port: int, model: str, tokens: int) -> None:
        self._port = port
        self._body = {"model": model, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        self._number = 0

    async def _send(self, load: Load, ends: float) -> None:
        self._number += 1
        prompt = [self._number % 199 + 100, self._number % 30_011 + 100, 7]
        body = json.dumps({**self._body, "prompt": prompt}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\n"
            "Content-Type: application/json\r\nConnection: close\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        loop, exchange = asyncio.get_running_loop(), Exchange(head.encode() + body)
        await loop.create_connection(lambda: exchange, "127.0.0.1", self._port)
        status = await exchange.status
        now = time.monotonic()
        if status == 429:
            load.refusals.append(now - exchange.began)
        elif status == 200:
            load.answered += now < ends
            load.late += now >= ends
        else:
            load.other.append(status)

    async def peak(self, seconds: float) -> Load:
        """``NUM_SEQS`` clients, each with its next request after an answer."""
        load, ends = Load(seconds), time.monotonic() + seconds

        async def user() -> None:
            while time.monotonic() < ends:
                await self._send(load, ends)

        await asyncio.gather(*(user() for _ in range(NUM_SEQS)))
        return load

    async def offer(self, rate: float, seconds: float) -> Load:
        """Requests at ``rate`` per second, also if some fail; waits for the last answer."""
        load, began = Load(seconds), time.monotonic()
        ends, sent = began + seconds, 0
        tasks: set[asyncio.Task[None]] = set()
        while (now := time.monotonic()) < ends:
            while sent < (now - began) * rate:
                task = asyncio.create_task(self._send(load, ends))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                sent += 1
            await asyncio.sleep(0.005)
            load.lags.append(time.monotonic() - now - 0.005)
        await asyncio.gather(*tasks)
        return load


def quantile(values: list[float], part: float) -> float:
    return sorted(values)[int(part * (len(values) - 1))] if values else 0.0


async def measure(port: int, options: argparse.Namespace) -> list[dict[str, float]]:
    client = Client(port, "m", options.tokens)
    await client.peak(4.0)  # first uses
    rows = []
    for _ in range(options.rounds):
        peak = await client.peak(options.seconds)
        if not peak.answered:
            raise SystemExit(f"no answer within {options.seconds:g} s; raise --seconds")
        over = await client.offer(options.times * peak.rate, options.seconds)
        if peak.other or peak.refusals:
            raise SystemExit(f"{len(peak.other + peak.refusals)} requests failed at the peak")
        row = {
            "peak_per_s": round(peak.rate, 1),
            "offered_per_s": round(options.times * peak.rate, 1),
            "goodput_per_s": round(over.rate, 1),
            "goodput_of_peak": round(over.rate / peak.rate, 3),
            "num_refusals": len(over.refusals),
            "num_other_statuses": len(over.other),
            "refusal_p50_ms": round(1000 * quantile(over.refusals, 0.5), 1),
            "refusal_p99_ms": round(1000 * quantile(over.refusals, 0.99), 1),
            "client_lag_p99_ms": round(1000 * quantile(over.lags, 0.99), 1),
        }
        print(row, flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, default=40, help="of an answer")
    parser.add_argument("--times", type=float, default=10.0, help="the peak rate, offered")
    parser.add_argument("--seconds", type=float, default=12.0, help="of a phase")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--note", default="", help="kept in the result, e.g. what else ran")
    parser.add_argument("--save", action="store_true", help="write results/overload.json")
    options = parser.parse_args()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    # The queue is as long as the batch.
    places = ("--max-num-seqs", str(NUM_SEQS), "--max-waiting", str(NUM_WAITING))
    with started_server(options.model, *places, "--num-chunks", "600") as (port, _):
        rounds = asyncio.run(measure(port, options))
    medians = {name: statistics.median(row[name] for row in rounds) for name in rounds[0]}
    print(
        f"peak {medians['peak_per_s']:.0f}/s; at {options.times:g} times "
        f"{medians['goodput_per_s']:.0f}/s, {medians['goodput_of_peak']:.0%}; "
        f"refusals p99 {medians['refusal_p99_ms']:.0f} ms"
    )
    if options.save:
        record = {
            **describe_run(),
            "note": options.note,
            "max_num_seqs": NUM_SEQS,
            "max_waiting": NUM_WAITING,
            "tokens": options.tokens,
            "medians": medians,
            "rounds": rounds,
        }
        (RESULTS / "overload.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
