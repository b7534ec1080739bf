"""Measure what an engine crash costs: the pause of live streams, the memory of a standby process.

    python benchmarks/restart.py --save

Starts its own server, without and with ``--standby``. In each, SIGKILL ends the engine process
``--kills`` times while ``--streams`` greedy streams run; the pause is the longest time between two
events of a stream. Memory is the proportional set size (PSS) of each process, which counts pages
that several processes share, such as libraries and mapped weights, once in all.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from pathlib import Path
from typing import Any

import psutil
from machine import describe_run
from servers import started_server

RESULTS = Path(__file__).parent / "results"


def engines(pid: int) -> list[psutil.Process]:
    """The engine processes of a server, the oldest first; the first one serves."""
    found = [
        child
        for child in psutil.Process(pid).children()
        if child.status() != psutil.STATUS_ZOMBIE and "chunkllama.engine.process" in child.cmdline()
    ]
    return sorted(found, key=lambda process: process.create_time())


def settle(pid: int, count: int) -> list[float]:
    """Wait until ``count`` engine processes have loaded; returns MiB of API process and engines.

    A process has loaded when its memory has not changed for two seconds.
    """
    last: list[float] = []
    while True:
        family = [psutil.Process(pid), *engines(pid)]
        now = [process.memory_full_info().pss / 2**20 for process in family]
        is_still = len(now) == len(last) and all(
            abs(a - b) < 1 for a, b in zip(now, last, strict=True)
        )
        if is_still and len(now) == count + 1:
            return [round(value) for value in now]
        last = now
        time.sleep(2.0)


async def read_stream(port: int, number: int, tokens: int, counts: list[int]) -> float:
    """Read a stream to its end; returns its longest pause in seconds."""
    body = json.dumps(
        {"model": "m", "prompt": [100 + number, 7, 9], "max_tokens": tokens, "temperature": 0,
         "ignore_eos": True, "stream": True}
    ).encode()  # fmt: skip
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    writer.write(
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    last, longest, ended = 0.0, 0.0, False
    while line := await reader.readline():
        ended = ended or line.startswith(b"data: [DONE]")
        if not line.startswith(b"data: "):
            continue
        now = time.monotonic()
        longest = max(longest, now - last) if last else 0.0
        last = now
        counts[number] += 1
    writer.close()
    if not ended:
        raise SystemExit("a stream was lost")
    return longest


async def crash(port: int, pid: int, options: argparse.Namespace) -> float:
    """Kill the engine under load; returns the longest pause of any stream."""
    counts = [0] * options.streams
    streams = [
        asyncio.create_task(read_stream(port, number, options.tokens, counts))
        for number in range(options.streams)
    ]
    while min(counts) < 10:
        await asyncio.sleep(0.001)
    engines(pid)[0].kill()
    return max(await asyncio.gather(*streams))


def measure(options: argparse.Namespace, *flags: str) -> dict[str, Any]:
    """Memory after the start and after the load, pauses of the kills."""
    count = 2 if flags else 1
    chunks = ("--num-chunks", str(options.num_chunks))
    with started_server(options.model, *chunks, *flags) as (port, pid):
        started = settle(pid, count)
        pauses = []
        for _ in range(options.kills):
            pauses.append(round(asyncio.run(crash(port, pid, options)), 3))
            loaded = settle(pid, count)
    names = ["api", "engine", "standby"]
    return {
        "pss_mib_started": dict(zip(names, started, strict=False)),
        "pss_mib_after_load": dict(zip(names, loaded, strict=False)),
        "pause_seconds": pauses,
        "median_pause_seconds": statistics.median(pauses),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--num-chunks", type=int, default=512)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--note", default="", help="kept in the result, e.g. what else ran")
    parser.add_argument("--save", action="store_true", help="write results/restart.json")
    options = parser.parse_args()
    results = {"restart": measure(options), "standby": measure(options, "--standby")}
    print(json.dumps(results, indent=1))
    if options.save:
        record = {
            **describe_run(),
            "note": options.note,
            **{name: getattr(options, name) for name in ("model", "num_chunks", "streams")},
            **results,
        }
        (RESULTS / "restart.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
