"""uvicorn's h11 protocol with the limits it lacks: arrival time, header count, connections.

uvicorn 0.54 never times out a client that sends slowly or nothing, and its own concurrency limit
counts idle connections, so these are kept here, below ASGI, where they can be seen.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

_BUSY_BODY = (
    b'{"error":{"message":"Too many connections","type":"server_error",'
    b'"param":null,"code":"too_many_connections"}}'
)
_SLOW_BODY = (
    b'{"error":{"message":"The request arrived too slowly","type":"invalid_request_error",'
    b'"param":null,"code":"request_timeout"}}'
)


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


def _raw_response(status: bytes, body: bytes) -> bytes:
    return (
        b"HTTP/1.1 " + status + b"\r\ncontent-type: application/json\r\nretry-after: 1\r\n"
        b"connection: close\r\ncontent-length: " + str(len(body)).encode() + b"\r\n\r\n" + body
    )


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
            transport.write(_raw_response(b"503 Service Unavailable", _BUSY_BODY))
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
        if self.transport.is_closing():
            self._stop_clock()
        elif self.conn.their_state is h11.SEND_BODY:
            if self.cycle is not cycle:
                self._check_headers()
                self._expect(self.limits.body_seconds)
        elif self.conn.their_state in (h11.DONE, h11.MUST_CLOSE, h11.CLOSED):
            if self.cycle is not cycle:
                self._check_headers()
            self._stop_clock()

    def _check_headers(self) -> None:
        if len(self.headers) > self.limits.max_headers:
            self.logger.warning("closing a connection: %d headers", len(self.headers))
            self.transport.abort()

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
            self.transport.write(_raw_response(b"408 Request Timeout", _SLOW_BODY))
        self.transport.close()


def make_protocol(limits: HttpLimits) -> type[LimitedH11Protocol]:
    """A protocol class for ``uvicorn.Config(http=...)``."""
    return type("ConfiguredH11Protocol", (LimitedH11Protocol,), {"limits": limits})
