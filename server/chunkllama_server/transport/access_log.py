"""One log line a request: method, path without query, status, time; never a body or a key."""

from __future__ import annotations

import asyncio
import time

from fastapi import FastAPI
from starlette.types import Message, Receive, Scope, Send

from chunkllama.logger import init_logger, request_id_context
from chunkllama_server.transport.errors import ApiError

logger = init_logger(__name__)
# Probes and scrapers arrive every few seconds.
_QUIET = frozenset(
    (
        *("/health", "/health/live", "/health/ready", "/ping", "/metrics"),
        *("/dashboard", "/dashboard/data"),
    )
)


class AccessLog:
    """Log each request of the application when its response has ended.

    Attributes:
        app: what is wrapped.
    """

    def __init__(self, app: FastAPI) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].rstrip("/") in _QUIET:
            await self.app(scope, receive, send)
            return
        started = time.monotonic()
        status, request_id = 0, ""

        async def noting_send(message: Message) -> None:
            nonlocal status, request_id
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = dict(message.get("headers", ()))
                request_id = headers.get(b"x-request-id", b"").decode("latin-1")
            await send(message)

        try:
            await self.app(scope, receive, noting_send)
        except asyncio.CancelledError:
            # The server is exiting; uvicorn would log a traceback and answer a plain-text 500.
            if not status:
                error = ApiError(503, "The server is shutting down", code="draining", retry_after=2)
                await error.response(scope)(scope, receive, noting_send)
        finally:
            token = request_id_context.set(request_id)
            logger.info(
                "%s %s %s",
                scope["method"],
                scope["path"][:200],
                status or "gone",
                extra={"ms": round((time.monotonic() - started) * 1000)},
            )
            request_id_context.reset(token)
