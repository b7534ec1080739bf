"""Refuse requests that name another host, on a server that only this machine may reach.

A web page can point a DNS name of its own at 127.0.0.1 and then read a loopback server through the
visitor's browser (DNS rebinding). Such a request carries the page's name in its Host header.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from chunkllama_server.transport.errors import ApiError


def is_loopback(host: str) -> bool:
    """Whether a listening address is reachable from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_allowed_host(header: bytes, names: Collection[str]) -> bool:
    """Whether a Host header names this machine.

    An IP address, localhost, a name without a dot (which cannot be registered) and ``names`` do.
    """
    text = header.decode("latin-1").strip().lower()
    if text.startswith("["):
        name = text[1:].partition("]")[0]
    else:
        name = text.rpartition(":")[0] if text.rpartition(":")[2].isdecimal() else text
        name = (name or text).rstrip(".")
    if "." not in name and ":" not in name:
        return True
    if name.endswith(".localhost") or name in names:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class HostCheckMiddleware:
    """Answers 403 to requests whose Host header is not ``is_allowed_host``."""

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self._app = app
        self._names = frozenset(name.lower() for name in names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            hosts = [value for name, value in scope["headers"] if name == b"host"]
            if not all(is_allowed_host(host, self._names) for host in hosts):
                error = ApiError(
                    403,
                    "The Host header names another server; add the name to allowed_hosts",
                    code="host_not_allowed",
                )
                await error.response(scope)(scope, receive, send)
                return
        await self._app(scope, receive, send)
