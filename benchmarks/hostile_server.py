"""A server under attack: start it, stream as a probe tenant, poll its health."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import TracebackType

from servers import HOST, started_server

MODEL = "smollm2-135m-instruct"
PROBE, ATTACKER = "probe-key", "attacker-key"
POLL_SECONDS = 0.05
_MAX_ERRORS = 10


@contextlib.contextmanager
def attacked_server(*flags: str, model: str = MODEL, seconds: float = 180.0) -> Iterator[int]:
    """Serve with a key for the probe and one for the attacker while the block runs; yields the
    port.
    """
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder, "keys")
        keys.write_text(f"probe:{PROBE}\nattacker:{ATTACKER}\n")
        own = (
            *("--served-model-name", "alias", "--api-key-file", str(keys)),
            *("--files-dir", str(Path(folder, "files"))),  # no other server holds its lock
        )
        with started_server(model, *own, *flags, seconds=seconds) as (port, _):
            yield port


def head(method: str, path: str, length: int = 0, key: str = ATTACKER) -> bytes:
    """Return the request line and headers of a request with a JSON body."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {HOST}", f"Authorization: Bearer {key}"]
    lines += ["Connection: close", "Content-Type: application/json", f"Content-Length: {length}"]
    return "\r\n".join([*lines, "", ""]).encode()


class Probe:
    """One stream after the other of a tenant that asks for nothing special.

    Attributes:
        arrivals: times of the tokens, in monotonic seconds.
        errors: of streams that ended without ``[DONE]``.
    """

    def __init__(self, port: int, tokens: int = 4000) -> None:
        self._port = port
        self._tokens = tokens
        self.arrivals: list[float] = []
        self.errors: list[str] = []
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Probe:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def wait_for(self, count: int, seconds: float) -> bool:
        """Wait until ``count`` tokens have come in all; False when the time is over."""
        end = time.monotonic() + seconds
        while len(self.arrivals) < count:
            if len(self.errors) >= _MAX_ERRORS:
                raise SystemExit(f"the probe's streams fail: {self.errors[-1]}")
            if time.monotonic() > end:
                return False
            await asyncio.sleep(0.002)
        return True

    async def _run(self) -> None:
        body = (
            b'{"model":"m","prompt":"The weather","max_tokens":%d,"ignore_eos":true,'
            b'"temperature":0,"stream":true}' % self._tokens
        )
        while True:
            try:
                await self._stream(body)
            except (OSError, EOFError) as error:
                self.errors.append(f"{type(error).__name__}: {error}"[:200])
                await asyncio.sleep(0.1)

    async def _stream(self, body: bytes) -> None:
        reader, writer = await asyncio.open_connection(HOST, self._port)
        try:
            writer.write(head("POST", "/v1/completions", len(body), PROBE) + body)
            status = (await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)[1]
            if status != b"200":
                raise EOFError(f"status {status.decode()}")
            is_done = False
            async for line in reader:
                if line.startswith(b"data: [DONE]"):
                    is_done = True
                elif line.startswith(b"data: "):
                    self.arrivals.append(time.monotonic())
            if not is_done:
                raise EOFError("the stream ended early")
        finally:
            writer.close()


class Health:
    """Asks ``/health/live`` twenty times a second.

    Attributes:
        answers: (time, seconds until the answer, whether it was 200).
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self.answers: list[tuple[float, float, bool]] = []

    async def run(self) -> None:
        while True:
            began = time.monotonic()
            is_ok = False
            with contextlib.suppress(OSError, EOFError, TimeoutError):
                async with asyncio.timeout(10):
                    reader, writer = await asyncio.open_connection(HOST, self._port)
                    writer.write(head("GET", "/health/live"))
                    is_ok = b" 200 " in await reader.readuntil(b"\r\n")
                    writer.close()
            seconds = time.monotonic() - began
            self.answers.append((began, seconds, is_ok))
            await asyncio.sleep(max(0.0, POLL_SECONDS - seconds))


@contextlib.asynccontextmanager
async def polled_health(port: int) -> AsyncIterator[Health]:
    """Poll the server's health while the block runs."""
    health = Health(port)
    task = asyncio.create_task(health.run())
    try:
        yield health
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
