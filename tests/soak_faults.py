"""What a soak does to the engine process, and what else it opens and sends to the server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
from soak_client import MODEL, Answer, ask
from soak_server import Server

FAULTS = ("kill", "stop", "memory", "raise", "spin")
DEFAULT_FAULTS = FAULTS[:4]  # a loop without end takes ten times engine_hang_seconds to be noticed
_MARKS = ("step:raise", "commit:raise", "step:memory", "send:kill", "step:spin")
POISON = [
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n{,}",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b"Content-Length: 12\r\n\r\n" + b'{"model":[]}',
    b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"BREW /pot HTTP/9.9\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\n" + b"x: y\r\n" * 200 + b"\r\n",
    b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"",
]
REFUSALS = (400, 404, 405, 408, 413, 431, 503)
_HUNGRY = {"model": MODEL, "max_tokens": 1, "prompt_logprobs": 20, "ignore_eos": True}


class FaultInjector:
    """Ends engine processes of one server.

    ``kill`` is SIGKILL at any moment, or between the commit of tokens and their sending; ``stop``
    is SIGSTOP; ``raise`` an exception in a step or at its commit; ``memory`` takes from the process
    the address space that it does not use yet, and asks for what needs more; ``spin`` is a loop
    without end in a step.

    Args:
        marks: an empty folder; the server was started with ``variables(marks)``.
    """

    def __init__(self, server: Server, marks: Path, rng: random.Random) -> None:
        self._server = server
        self._marks = marks
        self._rng = rng

    @staticmethod
    def variables(marks: Path) -> dict[str, str]:
        """The environment in which a server fails when a file is created in ``marks``."""
        entries = (f"{mark}@file={marks / mark.replace(':', '-')}" for mark in _MARKS)
        return {"CHUNKLLAMA_TEST_MODE": "1", "CHUNKLLAMA_FAULTS": ",".join(entries)}

    async def end(self, engine: psutil.Process, kind: str, is_over: Callable[[], bool]) -> str:
        """End ``engine`` and wait until another process is ready; returns what was done.

        Args:
            is_over: there will be no more steps, in which a process could fail.
        """
        restarts = await self._restarts()
        what = self._harm(engine, kind)
        if kind == "memory" and not await self._starve(restarts):
            what = self._mark("step:memory")  # it had reserved enough: a MemoryError is planted
        while await self._restarts() <= restarts and not is_over():
            await asyncio.sleep(0.02)
        for mark in self._marks.iterdir():  # the process ended before it came there
            mark.unlink(missing_ok=True)
        await self._server.wait_ready()
        return what

    async def _restarts(self) -> float:
        return (await self._server.metrics())["engine_restarts_total"]

    def _harm(self, engine: psutil.Process, kind: str) -> str:
        if kind == "raise":
            return self._mark(self._rng.choice(("step:raise", "commit:raise")))
        if kind == "spin":
            return self._mark("step:spin")
        if kind == "kill" and self._rng.random() < 0.3:
            return self._mark("send:kill")
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if kind == "memory":
                size = engine.memory_info().vms
                resource.prlimit(engine.pid, resource.RLIMIT_AS, (size, size))
            else:
                os.kill(engine.pid, signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
        return kind

    def _mark(self, mark: str) -> str:
        (self._marks / mark.replace(":", "-")).touch()
        return mark

    async def _starve(self, restarts: float) -> bool:
        """Send what needs memory; True if the process has ended of it."""
        prompts = [[self._rng.randrange(32, 127) for _ in range(900)] for _ in range(3)]
        # one may be answered by the next process, or be what ended this one: either is right
        await asyncio.gather(
            *(
                ask(self._server.port, "/v1/completions", {**_HUNGRY, "prompt": prompt}, Answer())
                for prompt in prompts
            )
        )
        return await self._restarts() > restarts


async def send_poison(port: int, raw: bytes) -> str:
    """Send what no client sends; returns a line if the answer is not a refusal."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(raw)
        async with asyncio.timeout(1.0):
            status = await reader.readline() if raw else b""
    except (TimeoutError, ConnectionError):
        status = b""
    finally:
        writer.transport.abort()
    if status and int(status.split()[1]) not in REFUSALS:
        return f"fuzzer: {status!r} for {raw[:60]!r}"
    return ""


async def stay_idle(port: int, greets: bool) -> None:
    """Keep a connection open that sends nothing, or nothing after one request, until cancelled.

    The server closes it at its limits; another one is opened then.
    """
    while True:
        with contextlib.suppress(ConnectionError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                if greets:
                    writer.write(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
                await reader.read()
            finally:
                writer.transport.abort()
