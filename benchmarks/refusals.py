"""Measure how long 10,000 malformed requests wait for their refusals.

    python benchmarks/refusals.py --save

One request after the other, each on a connection of its own, timed by the client from connecting
to the last byte of the answer. Another tenant streams all the while; its time per token is compared
with that before and after.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

from hostile_server import ATTACKER, HOST, Probe, attacked_server, polled_health
from machine import cpu_name
from malformed_requests import malformed_requests

from chunkllama import __version__

RESULTS = Path(__file__).parent / "results"
QUIET_TOKENS = 200
NUM_SHOWN = 10


async def ask(port: int, request: bytes) -> tuple[int, float]:
    """Send one request; returns the status, 0 when none came, and the seconds it took."""
    began = time.monotonic()
    status = 0
    reader, writer = await asyncio.open_connection(HOST, port, limit=1 << 20)
    try:
        writer.write(request)
        writer.write_eof()
        async with asyncio.timeout(60):
            answer = await reader.read()
        if answer.startswith(b"HTTP/1.1 100"):
            answer = answer.partition(b"\r\n\r\n")[2]
        status = int(answer.split(b" ", 2)[1]) if answer else 0
    except OSError:
        pass  # a reset without an answer
    finally:
        writer.transport.abort()
    return status, time.monotonic() - began


async def run(port: int, options: argparse.Namespace) -> dict[str, Any]:
    key = f"\r\nAuthorization: Bearer {ATTACKER}\r\n".encode()
    statuses: Counter[int] = Counter()
    unanswered: list[str] = []
    refusals: list[float] = []
    slowest: list[tuple[float, int, int, str]] = []
    async with Probe(port) as probe, polled_health(port) as health:
        await probe.wait_for(QUIET_TOKENS, 120)
        first = len(probe.arrivals)
        for request in malformed_requests(options.seed, options.count):
            status, seconds = await ask(port, request.replace(b"\r\n", key, 1))
            statuses[status] += 1
            if status == 0:
                unanswered.append(request[:60].decode("latin-1"))
            if status >= 400:
                refusals.append(1000 * seconds)
                beginning = request[:60].decode("latin-1")
                slowest.append((round(1000 * seconds, 1), status, len(request), beginning))
                slowest = sorted(slowest, reverse=True)[:NUM_SHOWN]
        last = len(probe.arrivals)
        await probe.wait_for(last + QUIET_TOKENS, 120)
        errors, times = probe.errors, probe.arrivals
        checks = health.answers
    refusals.sort()
    quiet = [b - a for a, b in [*pairwise(times[20:first]), *pairwise(times[last + 1 :])]]
    beside = [b - a for a, b in pairwise(times[first:last])]
    return {
        "requests": options.count,
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "unanswered": len(unanswered),
        "first_unanswered": unanswered[:NUM_SHOWN],
        "server_errors": sum(count for status, count in statuses.items() if status >= 500),
        "refusals": len(refusals),
        "refusal_ms": {
            "p50": round(refusals[len(refusals) // 2], 2),
            "p90": round(refusals[int(0.9 * len(refusals))], 2),
            "p99": round(refusals[int(0.99 * len(refusals))], 2),
            "worst": round(refusals[-1], 1),
        },
        "slowest": [
            dict(zip(("ms", "status", "bytes", "request"), row, strict=True)) for row in slowest
        ],
        "probe": {
            "quiet_ms_per_token": round(1000 * statistics.fmean(quiet), 2),
            "beside_ms_per_token": round(1000 * statistics.fmean(beside), 2),
            "worst_gap_ms": round(1000 * max(beside), 1),
            "errors": errors,
        },
        "health_failures": sum(not is_ok for *_, is_ok in checks),
        "worst_health_ms": round(1000 * max(seconds for _, seconds, _ in checks), 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", action="store_true", help="write results/refusals.json")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with attacked_server("--num-chunks", "800") as port:
        result = asyncio.run(run(port, options))
    print(json.dumps(result, indent=1))
    if options.save:
        document = {
            "command": " ".join(["python benchmarks/refusals.py", *sys.argv[1:]]),
            "machine": cpu_name(),
            "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d"),
            "version": __version__,
            "load_before": round(load, 2),
            "target_p99_ms": 20,
            **result,
        }
        (RESULTS / "refusals.json").write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
