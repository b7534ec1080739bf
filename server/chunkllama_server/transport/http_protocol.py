"""uvicorn's h11 protocol with the limits it lacks: arrival time, header count, connections.

uvicorn 0.54 never times out a client that sends slowly or nothing, and its own concurrency limit
counts idle connections, so these are kept here, below ASGI, where they can be seen.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLimits:
    """Limits of one connection, in seconds and counts, and of all together.

    Attributes:
        header_seconds: from the connection (or the first byte of a later request) to complete
        headers.
        body_seconds: from complete headers to a complete body.
        max_header_bytes: request line and headers together (handed to h11).
        max_headers: number of headers.
        max_connections: open connections; more are answered 503 and closed.
    """

    header_seconds: float = 10.0
    body_seconds: float = 30.0
    max_header_bytes: int = 32 * 1024
    max_headers: int = 100
    max_connections: int = 4096


def _raw_response(status: bytes, message: str, code: str) -> bytes:
    error_type = "server_error" if status.startswith(b"5") else "invalid_request_error"
    error = {"message": message, "type": error_type, "param": None, "code": code}
    body = json.dumps({"error": error}).encode()
    headers = [
        "content-type: application/json",
        f"content-length: {len(body)}",
        f"x-request-id: req_{uuid.uuid4().hex}",
        "connection: close",
    ]
    if status[:3] in (b"408", b"503"):
        headers.append("retry-after: 1")
    return b"HTTP/1.1 " + status + "\r\n".join(["", *headers, "", ""]).encode() + body


class LimitedH11Protocol(H11Protocol):
    """One connection; ``limits`` is set by the subclass ``make_protocol`` returns."""

    limits: HttpLimits

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = h11.Connection(h11.SERVER, self.limits.max_header_bytes)
        self._arrival: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            transport.write(
                _raw_response(
                    b"503 Service Unavailable", "Too many connections", "too_many_connections"
                )
            )
            transport.close()
            return
        self._expect(self.limits.header_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._arrival is None and self.conn.their_state is h11.IDLE:
            self._expect(self.limits.header_seconds)
        super().data_received(data)

    def handle_events(self) -> None:
        cycle = self.cycle
        super().handle_events()
        is_new = self.cycle is not cycle
        if is_new:
            self._check_headers()
        if self.transport.is_closing() or self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._stop_clock()
        elif is_new and self.conn.their_state is h11.SEND_BODY:
            self._expect(self.limits.body_seconds)

    def send_400_response(self, msg: str) -> None:
        """Refuse what h11 cannot parse with the usual error body."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # else an answer has begun
            self.transport.write(_raw_response(b"400 Bad Request", msg, "bad_request"))
        self.transport.close()

    def _check_headers(self) -> None:
        """Refuse what h11 lets through: it measures headers only while they are incomplete."""
        names = [name for name, _ in self.headers]
        size = sum(len(name) + len(value) + 4 for name, value in self.headers)
        if len(names) > self.limits.max_headers or size > self.limits.max_header_bytes:
            self._refuse(b"431 Request Header Fields Too Large", "The headers are too large")
        elif b"content-length" in names and b"transfer-encoding" in names:
            self._refuse(b"400 Bad Request", "Content-Length excludes Transfer-Encoding")

    def _refuse(self, status: bytes, message: str) -> None:
        """Answer in place of the application, whose task has not run yet, and close."""
        self.cycle.disconnected = True
        self.cycle.message_event.set()
        self.transport.write(_raw_response(status, message, "bad_request"))
        self.transport.close()

    def _expect(self, seconds: float) -> None:
        self._stop_clock()
        self._arrival = self.loop.call_later(seconds, self._too_slow)

    def _stop_clock(self) -> None:
        if self._arrival is not None:
            self._arrival.cancel()
            self._arrival = None

    def _too_slow(self) -> None:
        self._arrival = None
        if self.transport.is_closing():
            return
        if self.conn.their_state is h11.SEND_BODY:
            is_unanswered = not self.cycle.response_started
        else:
            is_unanswered = bool(self.conn.trailing_data[0])
        if is_unanswered:
            self.transport.write(
                _raw_response(
                    b"408 Request Timeout", "The request arrived too slowly", "request_timeout"
                )
            )
        self.transport.close()


def make_protocol(limits: HttpLimits) -> type[LimitedH11Protocol]:
    """A protocol class for ``uvicorn.Config(http=...)``."""
    return type("ConfiguredH11Protocol", (LimitedH11Protocol,), {"limits": limits})
