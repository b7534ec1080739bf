"""Stream with little overhead, because the client shares the machine with the server.

Uses asyncio streams, and implements the HTTP/1.1 that an OpenAI-compatible stream needs.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from chunkllama_server.transport.server_url import authorization, split_server_url


@dataclass(slots=True)
class Outcome:
    """Result of one request; times are monotonic seconds.

    Attributes:
        arrivals: arrival time of each event with text; the first is the first token.
        text: of the answer, for the next turn of a conversation.
        error: "" for a request that was answered.
    """

    tenant: int
    turn: int
    started: float
    ended: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    text: str = ""
    error: str = ""

    @property
    def ttft(self) -> float:
        """Return the time to first token."""
        return self.arrivals[0] - self.started

    @property
    def tpot(self) -> float:
        """Return the time per output token after the first."""
        return (self.arrivals[-1] - self.arrivals[0]) / max(self.completion_tokens - 1, 1)

    @property
    def latency(self) -> float:
        return self.ended - self.started


class Endpoint:
    """One OpenAI-compatible server.

    Args:
        url: with or without ``/v1``.
        api_keys: assigned to the tenants round-robin; empty sends none.

    Raises:
        ConfigError: the URL or a key cannot be used.
    """

    def __init__(self, url: str, api_keys: tuple[str, ...] = ()) -> None:
        parts = split_server_url(url)
        self._host = parts.hostname or ""
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._base = parts.path.rstrip("/").removesuffix("/v1")
        self._authorizations = tuple(map(authorization, api_keys))
        self.url = url

    async def stream(self, path: str, body: dict[str, Any], outcome: Outcome) -> Outcome:
        """Send one streaming request and record its progress in ``outcome``."""
        outcome.started = time.monotonic()
        try:
            async for event in self._events(path, body, outcome.tenant):
                _record(outcome, event)
            if not outcome.arrivals:
                outcome.error = outcome.error or "no token came"
        except (OSError, EOFError, ValueError) as error:
            outcome.error = str(error) or type(error).__name__
        except Exception as error:  # an unexpected answer fails its request, not the test
            outcome.error = f"unexpected answer: {error!r}"
        outcome.ended = time.monotonic()
        return outcome

    async def get(self, path: str) -> tuple[int, bytes]:
        """Return status and body of a GET.

        Raises:
            OSError, EOFError, ValueError: there was no HTTP answer.
        """
        reader, writer = await self._connect()
        try:
            writer.write(self._head("GET", path, 0, 0))
            status, chunked, length = await _read_head(reader)
            return status, b"".join([part async for part in _read_body(reader, chunked, length)])
        finally:
            writer.close()

    async def _events(
        self, path: str, body: dict[str, Any], tenant: int
    ) -> AsyncIterator[dict[str, Any]]:
        payload = json.dumps(body).encode()
        reader, writer = await self._connect()
        try:
            writer.write(self._head("POST", path, len(payload), tenant) + payload)
            status, chunked, length = await _read_head(reader)
            if status != 200:
                parts = [part async for part in _read_body(reader, chunked, length)]
                raise ValueError(
                    f"status {status}: {b''.join(parts)[:200].decode(errors='replace')}"
                )
            buffer = b""
            async for part in _read_body(reader, chunked, length):
                *lines, buffer = (buffer + part).split(b"\n")
                for line in lines:
                    if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                        yield json.loads(line[6:])
        finally:
            writer.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self._host, self._port, ssl=self._tls, limit=1 << 20)

    def _head(self, method: str, path: str, length: int, tenant: int) -> bytes:
        lines = [
            f"{method} {self._base}{path} HTTP/1.1",
            f"host: {self._host}:{self._port}",
            "connection: close",
            "content-type: application/json",
            f"content-length: {length}",
        ]
        if self._authorizations:
            value = self._authorizations[tenant % len(self._authorizations)]
            lines.append(f"authorization: {value}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode()


def _record(outcome: Outcome, event: dict[str, Any]) -> None:
    if "error" in event:
        error = event["error"]
        outcome.error = str(error.get("message", error) if isinstance(error, dict) else error)
    for choice in event.get("choices") or ():
        text = choice.get("text") or (choice.get("delta") or {}).get("content")
        if text:
            outcome.arrivals.append(time.monotonic())
            outcome.text += text
    if usage := event.get("usage"):
        outcome.prompt_tokens = usage["prompt_tokens"]
        outcome.completion_tokens = usage["completion_tokens"]
        details = usage.get("prompt_tokens_details") or {}
        outcome.cached_tokens = details.get("cached_tokens") or 0


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, bool, int | None]:
    """Read (status, chunked, content length) of a response."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
    fields = dict(line.split(":", 1) for line in head[1:] if ":" in line)
    length = fields.get("content-length")
    chunked = "chunked" in fields.get("transfer-encoding", "")
    _, status, *_ = head[0].split()
    return int(status), chunked, int(length) if length else None


async def _read_body(
    reader: asyncio.StreamReader, chunked: bool, length: int | None
) -> AsyncIterator[bytes]:
    if chunked:
        while size := int(await reader.readuntil(b"\r\n"), 16):
            yield (await reader.readexactly(size + 2))[:-2]
    elif length is not None:
        yield await reader.readexactly(length)
    else:
        while part := await reader.read(1 << 16):
            yield part
