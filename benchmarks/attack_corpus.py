"""Measure what 200 hostile requests, one at a time, cost another tenant's tokens.

    python benchmarks/attack_corpus.py --save

Starts a server with two tenants. One streams without a pause; the other sends each request of
``attack_requests.py`` and leaves it when it is answered, or after ``--seconds``. The probe's time
per output token while a request runs is divided by the median of the times in the pauses between
requests. ``/health/live`` is polled all the while. A window is at least ``--tokens`` tokens long;
the spread of the pauses shows how much of a ratio is noise of the machine. A request whose ratio is
over the target is sent ``--repeats`` times in all, and its row is the median one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import platform
import statistics
import sys
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from attack_requests import Attack, attacks
from hostile_server import HOST, Health, Probe, attacked_server, head, polled_health
from machine import cpu_name

from chunkllama import __version__

RESULTS = Path(__file__).parent / "results"
TARGET = 1.5
FLAGS = ("--num-chunks", "800", "--trust-request-chat-template")


class Sent:
    """An attack in progress; ``status`` is 0 until it is answered, ``ended`` None while it runs."""

    def __init__(self, port: int, attack: Attack) -> None:
        self.status = 0
        self.ended: float | None = None
        self._task = asyncio.create_task(self._run(port, attack))

    async def _run(self, port: int, attack: Attack) -> None:
        with contextlib.suppress(OSError, EOFError):
            reader, writer = await asyncio.open_connection(HOST, port, limit=1 << 20)
            try:
                writer.write(head("POST", attack.path, len(attack.body)) + attack.body)
                self.status = int((await reader.readuntil(b"\r\n")).split(b" ", 2)[1])
                while await reader.read(1 << 16):
                    pass
            finally:
                writer.transport.abort()
        self.ended = time.monotonic()

    async def leave(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


async def pause(probe: Probe, options: argparse.Namespace) -> float:
    """Time per token while nothing else runs; two tokens pass first."""
    first = len(probe.arrivals) + 2
    if not await probe.wait_for(first + options.tokens, 60):
        raise SystemExit("the probe gets no tokens although nothing else runs")
    return (probe.arrivals[first + options.tokens - 1] - probe.arrivals[first - 1]) / options.tokens


async def measure(port: int, attack: Attack, probe: Probe, health: Health, seconds: float,
                  tokens: int) -> dict[str, Any]:  # fmt: skip
    """One request's row: the probe's time per token, its worst gap, the worst health check."""
    began, first = time.monotonic(), len(probe.arrivals)
    num_checks = len(health.answers)
    sent = Sent(port, attack)
    await probe.wait_for(first + tokens, 20)
    while sent.ended is None and time.monotonic() - began < seconds:
        await asyncio.sleep(0.005)
    count = len(probe.arrivals)
    await probe.wait_for(count + 1, 20)
    ended = sent.ended
    await sent.leave()
    times = probe.arrivals[first - 1 :]
    gaps = [b - a for a, b in pairwise(times)]
    while len(health.answers) < num_checks + 2:  # the one that is under way, too
        await asyncio.sleep(0.005)
    checks = health.answers[num_checks:]
    return {
        "kind": attack.kind,
        "name": attack.name,
        "status": sent.status,
        "seconds": None if ended is None else round(ended - began, 3),
        "ms_per_token": round(1000 * sum(gaps) / len(gaps), 2) if gaps else None,
        "worst_gap_ms": round(1000 * max(gaps), 1) if gaps else None,
        "worst_health_ms": round(1000 * max(lag for _, lag, _ in checks), 1),
        "health_failures": sum(not is_ok for *_, is_ok in checks),
    }


async def run(
    port: int, options: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[float], list[str]]:
    """Rows of the requests, seconds per token in the pauses, errors of the probe's streams."""
    rows, pauses = [], []
    async with Probe(port) as probe, polled_health(port) as health:
        await probe.wait_for(100, 60)
        chosen = [a for a in attacks() if options.kind in ("", a.kind)]
        for number, attack in enumerate(chosen):
            tries: list[dict[str, Any]] = []
            while len(tries) < (options.repeats if tries and is_over(tries[0], pauses) else 1):
                pauses.append(await pause(probe, options))
                row = await measure(port, attack, probe, health, options.seconds, options.tokens)
                tries.append(row)
                if options.verbose:
                    print(number, row, f"pause {1000 * pauses[-1]:.1f} ms", flush=True)
            rows.append(median_row(tries))
    return rows, pauses, probe.errors


def is_over(row: dict[str, Any], pauses: list[float]) -> bool:
    """Whether the probe was slower than the target, by the pauses so far."""
    per_token = row["ms_per_token"]
    return per_token is None or per_token / 1000 > TARGET * statistics.median(pauses)


def median_row(tries: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of one request sent several times; what failed in any of them counts."""
    times = [row["ms_per_token"] or math.inf for row in tries]
    row = tries[times.index(statistics.median_low(times))]
    return row | {
        "tries_ms_per_token": [row["ms_per_token"] for row in tries],
        "status": max(tries, key=lambda row: row["status"])["status"],
        "worst_gap_ms": max(row["worst_gap_ms"] or math.inf for row in tries),
        "worst_health_ms": max(row["worst_health_ms"] for row in tries),
        "health_failures": sum(row["health_failures"] for row in tries),
    }


def summarize(rows: list[dict[str, Any]], pauses: list[float], errors: list[str]) -> dict[str, Any]:
    """Divide by the median of the pauses, and count what is over the target."""
    median = statistics.median(pauses)
    for row in rows:
        per_token = row["ms_per_token"]
        row["ratio"] = None if per_token is None else round(per_token / 1000 / median, 2)
    by_kind: defaultdict[str, list[float]] = defaultdict(list)
    for row in rows:
        by_kind[row["kind"]].append(float("inf") if row["ratio"] is None else row["ratio"])
    noise = sorted(p / median for p in pauses)
    return {
        "median_ms_per_token": round(1000 * median, 2),
        "pauses": {
            "p90": round(noise[int(0.9 * len(noise))], 2),
            "worst": round(noise[-1], 2),
            "over_target": sum(p > TARGET for p in noise),
        },
        "ratio_by_kind": {
            kind: {"median": round(statistics.median(found), 2), "worst": max(found)}
            for kind, found in sorted(by_kind.items())
        },
        "requests": len(rows),
        "over_target": sum(value > TARGET for found in by_kind.values() for value in found),
        "health_failures": sum(row["health_failures"] for row in rows),
        "worst_health_ms": max(row["worst_health_ms"] for row in rows),
        "probe_errors": errors,
        "unanswered": sum(row["status"] == 0 for row in rows),
        "server_errors": sum(row["status"] in (500, 502) for row in rows),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", action="store_true", help="write results/attack-corpus.json")
    parser.add_argument("--seconds", type=float, default=0.8, help="of one request, at most")
    parser.add_argument("--tokens", type=int, default=24, help="of the probe, in each window")
    parser.add_argument("--repeats", type=int, default=5, help="of a request over the target")
    parser.add_argument("--kind", default="", help="run the requests of one kind alone")
    parser.add_argument("--verbose", action="store_true", help="print each request's row")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with attacked_server(*FLAGS) as port:
        rows, pauses, errors = asyncio.run(run(port, options))
    summary = summarize(rows, pauses, errors)
    print(json.dumps(summary, indent=1))
    if options.save:
        document = {
            "command": " ".join(["python benchmarks/attack_corpus.py", *sys.argv[1:]]),
            "machine": cpu_name(),
            "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d"),
            "version": __version__,
            "load_before": round(load, 2),
            "server": " ".join(FLAGS),
            "target_ratio": TARGET,
            **summary,
            "rows": rows,
        }
        (RESULTS / "attack-corpus.json").write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
