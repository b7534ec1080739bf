"""Call a route of the application from inside the process, for a tenant and without its key."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Scope

# In a request's scope: the tenant that an internal request belongs to. A client cannot set it.
INTERNAL_TENANT = "chunkllama.internal_tenant"
# Called when the engine's queue has counted a request of the current task.
queued: ContextVar[Callable[[], None] | None] = ContextVar("queued", default=None)


async def call_route(
    app: ASGIApp,
    tenant: str,
    path: str,
    body: Any,
    request_id: str,
    on_queued: Callable[[], None] | None = None,
) -> tuple[int, dict[str, str], bytes]:
    """POST a body to a path; returns status, headers and the JSON answer as it is.

    It is not read here: ten megabytes of JSON would hold the event loop for 0.3 s.

    Cancelling the caller ends the request as a client that leaves does.

    Args:
        on_queued: called when the engine's queue has counted the request, or a part of it.
    """
    queued.set(on_queued)
    content = msgspec.json.encode(body)
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [
            (b"host", b"localhost"),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
            (b"x-request-id", request_id.encode()),
        ],
        "client": None,
        "server": ("localhost", 80),
        "state": {},
        INTERNAL_TENANT: tenant,
    }
    pending: list[Message] = [{"type": "http.request", "body": content, "more_body": False}]
    start: Message = {}
    parts: list[bytes] = []

    async def receive() -> Message:
        if pending:
            return pending.pop()
        await asyncio.Event().wait()  # the caller never leaves without being cancelled
        raise AssertionError

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            start.update(message)
        else:
            parts.append(message.get("body", b""))

    await app(scope, receive, send)
    headers = {name.decode().lower(): value.decode("latin-1") for name, value in start["headers"]}
    return start["status"], headers, b"".join(parts) or b"null"
