"""uvicorn's h11 protocol with the limits it lacks: arrival time, header count, connections, unread
bytes.

uvicorn 0.54 never times out a client that sends slowly or nothing, or that does not read, and its
own concurrency limit counts idle connections, so these are kept here, below ASGI, where they can be
seen.
"""

from __future__ import annotations

import asyncio
import socket
import uuid
from http import HTTPStatus
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from chunkllama_server.transport.connections import HEALTH_PATHS, ConnectionTable, HttpLimits
from chunkllama_server.transport.error_shapes import error_shape
from chunkllama_server.transport.errors import ApiError, invalid
from chunkllama_server.transport.handshakes import HandshakeListener
from chunkllama_server.transport.header_buffer import HeaderBuffer
from chunkllama_server.transport.paths import canonical_path

__all__ = ["HttpLimits", "LimitedH11Protocol", "counting_listener", "make_protocol"]


# The interim response that clients skip most widely.
_CONTINUE = h11.InformationalResponse(status_code=100, headers=[], reason="Continue")
_KEEP_ALIVE_SECONDS = 5
_SMALL_CHUNKS = "The body has too many small chunks"
_LARGE_HEADERS = "The headers are too large"
_CHUNKED = b"\r\ntransfer-encoding: chunked\r\n"


class _LingeringTransport:
    """A transport whose ``close`` first lets the protocol drop the rest of a request.

    Closing with unread bytes makes the kernel send a reset, which discards the response at the
    client before it is read.
    """

    def __init__(self, inner: asyncio.Transport, protocol: LimitedH11Protocol) -> None:
        self._inner = inner
        self._protocol = protocol

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def is_closing(self) -> bool:
        return self._protocol.is_lingering or self._inner.is_closing()

    def close(self) -> None:
        if not self._protocol.is_lingering and not self._protocol.begin_linger():
            self._inner.close()


class _StreamingConnection(h11.Connection):
    """h11 with less work for each part of a stream, and a limit on the chunks of a body.

    A body of very many small chunks is refused: each costs as much to read as a large one.

    Args:
        limits: of headers, and of the chunks of a body, beyond one for each KiB.

    Attributes:
        num_bytes: of the body so far.
        has_small_chunks: it has refused one.
    """

    _receive_buffer: HeaderBuffer

    def __init__(self, limits: HttpLimits) -> None:
        super().__init__(h11.SERVER, limits.max_header_bytes)
        self._receive_buffer = HeaderBuffer(limits.max_header_bytes, limits.max_headers)
        self._max_chunks = limits.max_body_chunks
        self._num_chunks = 0
        self.num_bytes = 0
        self._sends_chunks = False
        self.has_small_chunks = False

    @property
    def refused_path(self) -> str:
        """Path of a request whose headers it has refused."""
        return self._receive_buffer.refused_path

    @property
    def has_large_headers(self) -> bool:
        """It has refused headers, or the trailers of a body."""
        return self._receive_buffer.is_exceeded

    def send(self, event: h11.Event) -> bytes | None:  # type: ignore[override] # h11 overloads it
        """Return the bytes of an event; a part of a chunked body skips h11's state machine.

        A stream sends one part for each token, and h11 takes 6 us for it.
        """
        if self._sends_chunks and type(event) is h11.Data and event.data:
            return b"%x\r\n%b\r\n" % (len(event.data), event.data)
        output: bytes | None = super().send(event)
        if type(event) is h11.Response:
            self._sends_chunks = _CHUNKED in (output or b"").lower()
        elif type(event) is h11.EndOfMessage:
            self._sends_chunks = False
        return output

    def next_event(self) -> Any:
        event = super().next_event()
        if type(event) is h11.Data:
            self._num_chunks += 1
            self.num_bytes += len(event.data)
            if self._num_chunks > self._max_chunks + self.num_bytes // 1024:
                self.has_small_chunks = True
                raise h11.RemoteProtocolError(_SMALL_CHUNKS)
        elif type(event) is h11.Request:
            self._num_chunks = self.num_bytes = 0
        return event


class LimitedH11Protocol(H11Protocol):
    """One connection; the subclass ``make_protocol`` returns sets ``limits``, ``table`` and
    ``own_root``, the root path that a proxy may have left in a path."""

    limits: HttpLimits
    table: ConnectionTable
    own_root: str
    conn: _StreamingConnection

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = _StreamingConnection(self.limits)
        self.is_lingering = False
        self._is_reserved = False
        self._arrival: asyncio.TimerHandle | None = None
        self._num_dropped = 0
        self._num_unread = 0
        self._read_at = 0.0
        self._body_at = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._raw_transport = transport
        super().connection_made(_LingeringTransport(transport, self))  # type: ignore[arg-type]
        sock = transport.get_extra_info("socket")
        if sock is not None:
            self.table.end_handshake(sock.fileno())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.limits.send_buffer_bytes)
        self._read_at = self.loop.time()
        self._is_reserved = not self.table.admit(self, self.client[0] if self.client else "")
        seconds = self.limits.header_seconds
        self._expect(min(seconds, self.limits.reserved_seconds) if self._is_reserved else seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        self.table.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.is_lingering:
            self._num_dropped += len(data)
            if self._num_dropped > self.limits.linger_bytes:
                self.abort()
            return
        if self.transport.is_closing():
            return
        if self._arrival is None and self.conn.their_state is h11.IDLE:
            self._expect(self.limits.header_seconds)
        super().data_received(data)

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """Keep the connection for the answer to a request that has arrived in full."""
        if self.is_lingering or self.scheme == "https" or self.cycle is None:
            return None
        if self.cycle.response_complete or self.cycle.more_body:
            return None
        self.cycle.keep_alive = False
        if not self.cycle.response_started:
            self._stop_clock()
            self._arrival = self.loop.call_later(self.limits.half_close_seconds, self._probe)
        return True

    def _should_upgrade(self) -> bool:
        """Speak HTTP/1.1 to a client that offers another protocol, too.

        uvicorn would log two lines for each such request.
        """
        return False

    def handle_events(self) -> None:
        cycle = self.cycle
        super().handle_events()
        is_new = self.cycle is not cycle
        if is_new and not self.transport.is_closing():  # else its body was refused already
            self._check_request()
        if self.is_lingering:
            return  # the clock is the linger's
        if self.transport.is_closing() or self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._stop_clock()
        elif is_new and self.conn.their_state is h11.SEND_BODY:
            self._body_at = self.loop.time()
            self._expect(self.limits.body_seconds)

    def shutdown(self) -> None:
        """End the connection for the end of the server, which waits for no rest of a request."""
        if not self.is_lingering:
            super().shutdown()
        if self.is_lingering:
            self._raw_transport.close()

    def send_400_response(self, msg: str) -> None:
        """Refuse what h11 cannot parse with the usual error body."""
        if self.conn.has_small_chunks:
            msg = _SMALL_CHUNKS
        error = invalid(msg, code="bad_request")
        if self.conn.has_large_headers:
            error = ApiError(431, _LARGE_HEADERS, code="bad_request")
        refusal = self._raw_response(error)
        if self.cycle is not None and not self.cycle.response_complete:
            self._end_cycle()  # it gets no more of its body
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # else an answer has begun
            self.transport.write(refusal)
        self.transport.close()

    def begin_linger(self) -> bool:
        """Stop sending and drop what still arrives of a request; False when nothing is to come."""
        unfinished = self.conn.their_state in (h11.SEND_BODY, h11.ERROR)
        if not unfinished or self._is_reserved or not self._raw_transport.can_write_eof():
            return False
        if self._raw_transport.is_closing():
            return False
        self.is_lingering = True
        self._raw_transport.write_eof()  # sent behind what waits to be written
        self._raw_transport.resume_reading()
        self._stop_clock()
        self._arrival = self.loop.call_later(self.limits.linger_seconds, self._raw_transport.close)
        return True

    def abort(self) -> None:
        """End the connection at once, dropping what the peer has not read."""
        self._raw_transport.abort()

    def check_writes(self, now: float) -> None:
        """Abort when bytes wait for the peer and it has read none for ``write_seconds``."""
        num_unread = self._raw_transport.get_write_buffer_size()
        if num_unread == 0 or num_unread < self._num_unread:
            self._read_at = now
        self._num_unread = num_unread
        if now - self._read_at > self.limits.write_seconds:
            self.abort()

    def _check_request(self) -> None:
        """Refuse what h11 lets through."""
        names = [name for name, _ in self.headers]
        if b"content-length" in names and b"transfer-encoding" in names:
            self._refuse(invalid("Content-Length excludes Transfer-Encoding", code="bad_request"))
        elif self._is_reserved and self.table.promote(self):
            self._is_reserved = False
        elif self._is_reserved and self._asks_for_health():
            self.cycle.keep_alive = False
        elif self._is_reserved:
            self._refuse(_too_many())

    def _asks_for_health(self) -> bool:
        path = canonical_path(self.scope["path"], self.own_root, keep_root=False)
        return path in HEALTH_PATHS

    def _refuse(self, error: ApiError) -> None:
        self._end_cycle()
        self.transport.write(self._raw_response(error))
        self.transport.close()

    def _raw_response(self, error: ApiError) -> bytes:
        """The refusal in the shape of the protocol whose path was asked, once that is known."""
        shape, request_id = None, f"req_{uuid.uuid4().hex}"
        if self.cycle is not None and not self.cycle.response_complete:
            path = canonical_path(self.scope["path"], self.own_root, keep_root=False)
            shape = error_shape(path, dict(self.headers))
        elif self.conn.refused_path:
            shape = error_shape(
                canonical_path(self.conn.refused_path, self.own_root, keep_root=False), {}
            )
        response = error.response({}) if shape is None else shape.response(error, request_id)
        headers = [*response.raw_headers, (b"x-request-id", request_id.encode())]
        if shape is not None and shape.id_header is not None:
            headers.append((shape.id_header.encode(), request_id.encode()))
        headers.append((b"connection", b"close"))
        status = HTTPStatus(response.status_code)
        lines = [b"HTTP/1.1 %d %b" % (status, status.phrase.encode())]
        lines += [b"%b: %b" % header for header in headers]
        return b"\r\n".join([*lines, b"", bytes(response.body)])

    def _end_cycle(self) -> None:
        """Answer in place of the application, whose task has not run yet."""
        self.cycle.disconnected = True
        self.cycle.message_event.set()

    def _expect(self, seconds: float) -> None:
        self._stop_clock()
        self._arrival = self.loop.call_later(seconds, self._too_slow)

    def _stop_clock(self) -> None:
        if self._arrival is not None:
            self._arrival.cancel()
            self._arrival = None

    def _probe(self) -> None:
        """Find out whether a peer that has closed its sending side still waits for its answer.

        The kernel of one that has left resets the connection at the first bytes. To a client of
        HTTP/1.0 none may be sent: its kernel is asked, and forgets the connection after a minute.
        """
        self._arrival = None
        if self.cycle.response_started or self.transport.is_closing():
            return
        sock = self.transport.get_extra_info("socket")
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.abort()
            return
        if self.conn.their_http_version == b"1.0":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
                sock.setsockopt(socket.IPPROTO_TCP, option, _KEEP_ALIVE_SECONDS)
        else:
            self.transport.write(self.conn.send(_CONTINUE) or b"")
        self._arrival = self.loop.call_later(self.limits.half_close_seconds, self._probe)

    def _too_slow(self) -> None:
        self._arrival = None
        if self.transport.is_closing():
            return
        if self._is_reserved:
            self.transport.write(self._raw_response(_too_many()))
            self.transport.close()
        elif self.conn.their_state is h11.SEND_BODY:
            self._check_body()
        else:
            if self.conn.trailing_data[0]:
                self.transport.write(self._raw_response(_slow()))
            self._raw_transport.close()

    def _check_body(self) -> None:
        """Refuse a body that arrives more slowly than at the least rate."""
        has_answer = self.cycle.response_started
        if self.flow.read_paused and not has_answer:  # the body waits for the application
            self._body_at += self.limits.body_seconds
            self._expect(self.limits.body_seconds)
            return
        bytes_seconds = self.conn.num_bytes / self.limits.body_rate
        left = self._body_at + self.limits.body_seconds + bytes_seconds - self.loop.time()
        if left > 0:
            self._expect(left)
        elif has_answer:
            self._raw_transport.close()
        else:
            self._refuse(_slow())


def _slow() -> ApiError:
    return ApiError(408, "The request arrived too slowly", code="request_timeout", retry_after=1)


def _too_many() -> ApiError:
    return ApiError(503, "Too many connections", code="too_many_connections", retry_after=1)


def counting_listener(sock: socket.socket, config: uvicorn.Config) -> socket.socket:
    """Return the listening socket in a form that counts handshakes, where there are any.

    Args:
        config: with a protocol of ``make_protocol``.
    """
    protocol: Any = config.http
    return HandshakeListener(sock, protocol.table) if config.ssl_certfile is not None else sock


def make_protocol(limits: HttpLimits, root_path: str = "") -> type[LimitedH11Protocol]:
    """A protocol class for ``uvicorn.Config(http=...)``, for one server.

    Args:
        root_path: that paths may begin with.
    """
    return type(
        "ConfiguredH11Protocol",
        (LimitedH11Protocol,),
        {"limits": limits, "table": ConnectionTable(limits), "own_root": root_path},
    )
