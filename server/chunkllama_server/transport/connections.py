"""Which connections a server keeps: a cap, a share for each peer, reserved slots for health checks.

A connection beyond the cap, or beyond its peer's share of it, gets a reserved slot: for a second it
may send a health check, which is answered; anything else is answered 503. So no number of idle
connections hides the server from its supervisor. Bytes that a peer does not read are watched here
too, because asyncio keeps a closing connection until its last byte is read.
"""

from __future__ import annotations

import asyncio
import ipaddress
import resource
from collections import Counter, OrderedDict
from dataclasses import dataclass, replace
from typing import Any, Protocol

from chunkllama.logger import init_logger
from chunkllama_server.config.limits import LimitsConfig

logger = init_logger(__name__)

HEALTH_PATHS = frozenset({"/health", "/health/live", "/health/ready"})
# Beside connections: the engine's socket, model files, log, listening sockets, imports.
_OWN_DESCRIPTORS = 64
_MAX_DESCRIPTORS = 65_536
_ACCEPT_LOG_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLimits:
    """Limits of one connection, in seconds, bytes and counts, and of all together.

    Attributes:
        header_seconds: from the connection (or the first byte of a later request) to complete
            headers.
        body_seconds: from complete headers to a complete body, beside the time that its bytes take
            at ``body_rate``.
        body_rate: bytes a second at which a body must arrive at least.
        write_seconds: without the peer reading a byte of what waits for it; then the connection is
            aborted.
        half_close_seconds: between interim responses to a peer that closed its sending side, until
            the response begins; it may have left altogether, which looks the same until then.
        linger_seconds, linger_bytes: how much of a body, or of what follows headers that cannot be
            parsed, is read and dropped behind a refusal, so that the refusal can be read; not over
            TLS.
        send_buffer_bytes: kernel memory for unread bytes.
        max_header_bytes: request line and headers together (handed to h11).
        max_headers: number of headers.
        max_body_chunks: chunks of a body, beyond one for each KiB.
        max_connections: open connections; more go to the reserved slots.
        max_peer_connections: of one ``peer_of``; more go to the reserved slots. None is three
            quarters of ``max_connections``.
        reserved_connections: slots for health checks.
        reserved_seconds: to send one.
    """

    header_seconds: float = 10.0
    body_seconds: float = 30.0
    body_rate: int = 16 << 10
    write_seconds: float = 30.0
    half_close_seconds: float = 1.0
    linger_seconds: float = 10.0
    linger_bytes: int = 256 << 20
    send_buffer_bytes: int = 128 << 10
    max_header_bytes: int = 32 * 1024
    max_headers: int = 100
    max_body_chunks: int = 4096
    max_connections: int = 4096
    max_peer_connections: int | None = None
    reserved_connections: int = 512
    reserved_seconds: float = 1.0


def http_limits(settings: LimitsConfig) -> HttpLimits:
    """Take the limits of connections from the settings."""
    return HttpLimits(
        header_seconds=settings.header_timeout_seconds,
        body_seconds=settings.body_timeout_seconds,
        body_rate=settings.min_body_rate,
        write_seconds=settings.stream_stall_seconds,
        half_close_seconds=settings.half_close_seconds,
        linger_seconds=settings.linger_seconds,
        linger_bytes=settings.linger_bytes,
        send_buffer_bytes=settings.send_buffer_bytes,
        max_header_bytes=settings.max_header_bytes,
        max_headers=settings.max_headers,
        max_body_chunks=settings.max_body_chunks,
        max_connections=settings.max_connections,
        max_peer_connections=settings.max_peer_connections,
        reserved_connections=settings.reserved_connections,
        reserved_seconds=settings.reserved_seconds,
    )


def peer_of(address: str) -> str:
    """The part of an address that belongs to one client: of IPv6 the network of 64 bits.

    A client has all addresses of its network, and would otherwise have as many shares. IPv4 in
    IPv6 is IPv4; an address of one link alone says which machine it is.
    """
    try:
        found = ipaddress.IPv6Address(address)
    except ValueError:
        return address
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return address if found.is_link_local else found.packed[:8].hex(":", 2)


class Connection(Protocol):
    """What the table needs of a connection."""

    def abort(self) -> None: ...
    def check_writes(self, now: float) -> None: ...


class ConnectionTable:
    """All connections of one server, each in an ordinary or a reserved slot.

    Attributes:
        handshakes: connections over TLS whose protocol has not begun, by their descriptor.
    """

    def __init__(self, limits: HttpLimits) -> None:
        self.limits = limits
        share = limits.max_peer_connections
        self._share = max(1, limits.max_connections * 3 // 4) if share is None else share
        self._peers: Counter[str] = Counter()
        self._ordinary: dict[Any, str] = {}
        self._reserved: OrderedDict[Any, str] = OrderedDict()
        self._sweep_timer: asyncio.TimerHandle | None = None
        self.handshakes: dict[int, Connection] = {}

    def __len__(self) -> int:
        return len(self._ordinary) + len(self._reserved)

    def admit(self, connection: Connection, peer: str) -> bool:
        """Give a new connection a slot; False is a reserved one.

        Args:
            peer: the address it comes from.
        """
        peer = peer_of(peer)
        self._start_sweeping()
        if self._has_room(peer):
            self._ordinary[connection] = peer
            self._peers[peer] += 1
            return True
        self._reserved[connection] = peer
        if len(self._reserved) > self.limits.reserved_connections:
            next(iter(self._reserved)).abort()
        return False

    def promote(self, connection: Connection) -> bool:
        """Move a connection with a request to an ordinary slot, if there is one by now."""
        peer = self._reserved[connection]
        if not self._has_room(peer):
            return False
        del self._reserved[connection]
        self._ordinary[connection] = peer
        self._peers[peer] += 1
        return True

    def leave(self, connection: Connection) -> None:
        """Forget a connection that has ended."""
        self._reserved.pop(connection, None)
        peer = self._ordinary.pop(connection, None)
        if peer is not None:
            self._peers[peer] -= 1
            if not self._peers[peer]:
                del self._peers[peer]

    def end_handshake(self, descriptor: int) -> None:
        """Forget the handshake of a connection, if it has one: its protocol takes over."""
        handshake = self.handshakes.pop(descriptor, None)
        if handshake is not None:
            self.leave(handshake)

    def _has_room(self, peer: str) -> bool:
        return len(self._ordinary) < self.limits.max_connections and self._peers[peer] < self._share

    def _start_sweeping(self) -> None:
        if self._sweep_timer is None:
            loop = asyncio.get_running_loop()
            period = min(1.0, self.limits.write_seconds / 4)
            self._sweep_timer = loop.call_later(period, self._sweep)

    def _sweep(self) -> None:
        self._sweep_timer = None
        now = asyncio.get_running_loop().time()
        for connection in [*self._ordinary, *self._reserved]:
            connection.check_writes(now)
        if len(self):
            self._start_sweeping()


def fit_to_descriptors(limits: HttpLimits, num_others: int = 0) -> HttpLimits:
    """Raise the process's descriptor limit as far as allowed, and cut the caps to what it holds.

    Args:
        num_others: connections of other ports that must always find a descriptor.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    if soft == resource.RLIM_INFINITY:
        return limits
    room = max(soft - _OWN_DESCRIPTORS - num_others, 8)
    if limits.max_connections + limits.reserved_connections <= room:
        return limits
    reserved = min(limits.reserved_connections, room // 4)
    fitted = replace(
        limits,
        max_connections=min(limits.max_connections, room - reserved),
        reserved_connections=reserved,
    )
    logger.warning(
        "the descriptor limit of %d allows %d connections instead of %d; raise it with "
        "ulimit -n or LimitNOFILE",
        soft,
        fitted.max_connections,
        limits.max_connections,
    )
    return fitted


def limit_accept_log(loop: asyncio.AbstractEventLoop) -> None:
    """Log a failing accept() as one line a minute; asyncio logs a traceback for each attempt."""
    last = -_ACCEPT_LOG_SECONDS

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal last
        if not str(context.get("message", "")).startswith("socket.accept()"):
            loop.default_exception_handler(context)
        elif loop.time() - last >= _ACCEPT_LOG_SECONDS:
            last = loop.time()
            logger.error("cannot accept connections: %s", context.get("exception"))

    loop.set_exception_handler(handle)
