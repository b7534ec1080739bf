"""Measure what 200 hostile requests, one at a time, cost another tenant's tokens.

    python benchmarks/attack_corpus.py --save

Starts a server with two tenants. One streams without a pause; the other sends each request of
``attack_requests.py`` and leaves it when it is answered, or after ``--seconds``. The probe's time
per output token while a request runs is divided by that of pauses around it, as ``slowdown.py``
says; a request that is sent again differs where the server would remember it. ``/health/live`` is
polled all the while. Windows without any request are judged in the same way (``controls``): how
many of them are over the target is what the machine does.
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
from slowdown import CLEAR, MOST, Slowdown, Try

from chunkllama import __version__

RESULTS = Path(__file__).parent / "results"
TARGET = 1.5
CONTROL_EVERY = 5  # requests
MOST_PAUSES = 4  # one after the other
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


class Pauses:
    """Pauses of the probe, one after the other.

    Attributes:
        seconds: per token, of each.
    """

    def __init__(self, probe: Probe, options: argparse.Namespace) -> None:
        self._probe = probe
        self._options = options
        self.seconds: list[float] = []

    async def take(self) -> float:
        """Take one, or the last of several while what ran before still slows the probe."""
        for _ in range(MOST_PAUSES):
            self.seconds.append(await pause(self._probe, self._options))
            if self.seconds[-1] <= CLEAR * statistics.median(self.seconds):
                break
        return self.seconds[-1]


async def measure(
    port: int, attack: Attack | None, probe: Probe, health: Health, options: argparse.Namespace
) -> dict[str, Any]:
    """One window: the probe's time per token, its worst gap, the worst health check.

    Args:
        attack: sent at its begin; None: a window without one.
    """
    began, first = time.monotonic(), len(probe.arrivals)
    num_checks = len(health.answers)
    sent = None if attack is None else Sent(port, attack)
    await probe.wait_for(first + options.tokens, 20)
    while time.monotonic() - began < options.seconds and (sent is None or sent.ended is None):
        await asyncio.sleep(0.005)
    count = len(probe.arrivals)
    await probe.wait_for(count + 1, 20)
    ended = None if sent is None else sent.ended
    if sent is not None:
        await sent.leave()
    times = probe.arrivals[first - 1 :]
    gaps = [b - a for a, b in pairwise(times)]
    while len(health.answers) < num_checks + 2:  # the one that is under way, too
        await asyncio.sleep(0.005)
    checks = health.answers[num_checks:]
    return {
        "status": 0 if sent is None else sent.status,
        "seconds": None if ended is None else round(ended - began, 3),
        "seconds_per_token": sum(gaps) / len(gaps) if gaps else math.inf,
        "worst_gap_ms": round(1000 * max(gaps), 1) if gaps else None,
        "worst_health_ms": round(1000 * max(lag for _, lag, _ in checks), 1),
        "health_failures": sum(not is_ok for *_, is_ok in checks),
    }


async def run(
    port: int, options: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[float], list[str]]:
    """Rows of the requests and of the controls, seconds per token in the pauses, errors of the
    probe's streams."""
    corpora = [attacks(number) for number in range(MOST)]
    places = [i for i, a in enumerate(corpora[0]) if options.kind in ("", a.kind)]
    places = [i for i in places if options.name in corpora[0][i].name]
    async with Probe(port) as probe, polled_health(port) as health:
        pauses = Pauses(probe, options)

        async def judged(place: int | None) -> dict[str, Any]:
            found, tries = Slowdown(TARGET), []
            while not found.is_settled:
                attack = None if place is None else corpora[len(tries)][place]
                before = await pauses.take()
                row = await measure(port, attack, probe, health, options)
                beside = row["seconds_per_token"]
                found.ratios.append(Try(before, beside, await pauses.take()).ratio)
                tries.append(row)
                if options.verbose:
                    name = "" if attack is None else f"{attack.kind}: {attack.name}"
                    print(place, name, f"{found.ratios[-1]:.2f}", row, flush=True)
            return row_of(tries, found)

        await probe.wait_for(100, 60)
        rows, controls = [], []
        for count, place in enumerate(places):
            attack = corpora[0][place]
            rows.append({"kind": attack.kind, "name": attack.name, **await judged(place)})
            if count % CONTROL_EVERY == 0:
                controls.append(await judged(None))
    return rows, controls, pauses.seconds, probe.errors


def row_of(tries: list[dict[str, Any]], found: Slowdown) -> dict[str, Any]:
    """The row of one request sent several times; what failed in any of them counts."""
    return {
        "ratio": round(found.ratio, 2),
        "ratios": [round(ratio, 2) for ratio in found.ratios],
        "is_over": found.is_over,
        "status": max(row["status"] for row in tries),
        "seconds": tries[0]["seconds"],
        "worst_gap_ms": max(row["worst_gap_ms"] or math.inf for row in tries),
        "worst_health_ms": max(row["worst_health_ms"] for row in tries),
        "health_failures": sum(row["health_failures"] for row in tries),
    }


def summarize(
    rows: list[dict[str, Any]],
    controls: list[dict[str, Any]],
    pauses: list[float],
    errors: list[str],
) -> dict[str, Any]:
    """Count what is over the target, and say how much of it the machine does."""
    by_kind: defaultdict[str, list[float]] = defaultdict(list)
    for row in rows:
        by_kind[row["kind"]].append(row["ratio"])
    median = statistics.median(pauses)
    noise = sorted(p / median for p in pauses)
    first_ratios = [row["ratios"][0] for row in controls]
    return {
        "median_ms_per_token": round(1000 * median, 2),
        "pauses": {
            "p90": round(noise[int(0.9 * len(noise))], 2),
            "worst": round(noise[-1], 2),
            "over_target": sum(p > TARGET for p in noise),
        },
        "controls": {
            "windows": len(controls),
            "median_of_first_tries": round(statistics.median(first_ratios), 2),
            "worst_of_first_tries": max(first_ratios),
            "over_target": sum(row["is_over"] for row in controls),
        },
        "ratio_by_kind": {
            kind: {"median": round(statistics.median(found), 2), "worst": max(found)}
            for kind, found in sorted(by_kind.items())
        },
        "requests": len(rows),
        "over_target": sum(row["is_over"] for row in rows),
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
    parser.add_argument("--kind", default="", help="run the requests of one kind alone")
    parser.add_argument("--name", default="", help="run those whose names contain this alone")
    parser.add_argument("--verbose", action="store_true", help="print each request's row")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with attacked_server(*FLAGS) as port:
        rows, controls, pauses, errors = asyncio.run(run(port, options))
    summary = summarize(rows, controls, pauses, errors)
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
            "control_rows": controls,
        }
        (RESULTS / "attack-corpus.json").write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
