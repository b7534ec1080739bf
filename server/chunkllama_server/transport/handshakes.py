"""Count connections that have not finished their TLS handshake, which asyncio keeps to itself.

asyncio calls a protocol once the handshake is over and gives it a minute. Until then a connection
holds a descriptor and memory, so it has a slot of the connection table from the moment in which it
is accepted, and as long as headers may take.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

from chunkllama_server.transport.connections import ConnectionTable


class _Handshake:
    """A connection that has been accepted and whose protocol has not begun."""

    def __init__(self, sock: socket.socket, table: ConnectionTable, peer: str) -> None:
        self._socket = sock
        self._descriptor = sock.fileno()
        self._table = table
        limits = table.limits
        seconds = limits.header_seconds
        if not table.admit(self, peer):
            seconds = min(seconds, limits.reserved_seconds)
        self._deadline = asyncio.get_running_loop().time() + seconds

    def abort(self) -> None:
        """End the connection; asyncio closes the socket when it reads that."""
        self._table.end_handshake(self._descriptor)
        with contextlib.suppress(OSError):  # it has ended already
            self._socket.shutdown(socket.SHUT_RDWR)

    def check_writes(self, now: float) -> None:
        """Forget a connection that asyncio has closed, end one that takes too long."""
        if self._socket.fileno() == -1:
            self._table.end_handshake(self._descriptor)
        elif now > self._deadline:
            self.abort()


class HandshakeListener(socket.socket):
    """A listening socket whose connections are counted until their protocol begins.

    Args:
        listening: is taken over.
        table: of the server.
    """

    def __init__(self, listening: socket.socket, table: ConnectionTable) -> None:
        family, kind, proto = listening.family, listening.type, listening.proto
        timeout = listening.gettimeout()
        super().__init__(family, kind, proto, fileno=listening.detach())
        self.settimeout(timeout)
        self._table = table

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept a connection and give it a slot."""
        sock, address = super().accept()
        table = self._table
        table.end_handshake(sock.fileno())  # of a connection that has been closed
        peer = address[0] if isinstance(address, tuple) else ""
        table.handshakes[sock.fileno()] = _Handshake(sock, table, peer)
        return sock, address
