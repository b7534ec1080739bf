"""Monitor a server during a test: chunk occupancy from /metrics, memory of its processes."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from dataclasses import dataclass, field

import psutil

from chunkllama.errors import ConfigError
from chunkllama_server.bench.client import Endpoint

_SAMPLE = re.compile(
    rb'^chunkllama_(?:kv_chunks\{state="(\w+)"\}|requests_running) ([0-9.e+]+)$',
    re.MULTILINE,
)


@dataclass(slots=True)
class Monitor:
    """Samples a server while the block runs (``async with``).

    Args:
        endpoint: serves /metrics; ``occupancy`` stays empty without the gauges of this server.
        pid: the server's first process; None measures no memory.

    Attributes:
        occupancy: samples {"at": s, "free": chunks, "cached": ..., "running": requests}.
        peak_memory: bytes of the process tree (proportional set size), 0 without a pid.
    """

    endpoint: Endpoint
    pid: int | None = None
    interval: float = 0.5
    occupancy: list[dict[str, float]] = field(default_factory=list)
    peak_memory: int = 0
    _task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Monitor:
        if self.pid is not None and not psutil.pid_exists(self.pid):
            raise ConfigError(f"pid: no process {self.pid}")
        self._task = asyncio.create_task(self._sample_forever())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _sample_forever(self) -> None:
        started = time.monotonic()
        has_metrics = True
        while True:
            if has_metrics:
                sample = await self._read_metrics()
                has_metrics = bool(sample)
                if sample:
                    self.occupancy.append({"at": round(time.monotonic() - started, 3), **sample})
            if self.pid is not None:
                self.peak_memory = max(self.peak_memory, tree_memory(self.pid))
            await asyncio.sleep(self.interval)

    async def _read_metrics(self) -> dict[str, float]:
        try:
            status, body = await self.endpoint.get("/metrics")
        except (OSError, EOFError, ValueError):
            return {}
        if status != 200:
            return {}
        return {
            (match[1] or b"running").decode(): float(match[2]) for match in _SAMPLE.finditer(body)
        }


def tree_memory(pid: int) -> int:
    """Return bytes of a process and its descendants; shared pages count once."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                total += process.memory_full_info().pss
    return total
