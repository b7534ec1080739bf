"""Refuse requests that the queue has no place for, before anything of their bodies is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from chunkllama.errors import OverloadedError
from chunkllama_server.transport.errors import as_api_error
from chunkllama_server.transport.request_context import request_info

# Requests to these need a place, but for Ollama's without a prompt or a text, which are few.
QUEUED_PATHS: Final = frozenset(
    (
        *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"),
        *("/v1/messages", "/", "/generate", "/generate_stream", "/embed"),
        *("/api/chat", "/api/generate", "/api/embed", "/api/embeddings"),
    )
)


class FullQueueMiddleware:
    """Answers 429 where the queue is full for a request of its tenant, whatever it asks for.

    To read a request's body and to find its tokens costs several times as much as this refusal, and
    under an overload nearly every request is refused.

    Args:
        root_path: that paths may begin with.
        check: raises an error where no request of a tenant would be taken.
        on_rejection: called with the tenant and the reason.
    """

    def __init__(
        self,
        app: ASGIApp,
        root_path: str,
        check: Callable[[str], None],
        on_rejection: Callable[[str, str], None],
    ) -> None:
        self._app = app
        self._paths = QUEUED_PATHS | {f"{root_path}{path}" for path in QUEUED_PATHS}
        self._check = check
        self._on_rejection = on_rejection

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in self._paths:
            tenant = request_info(scope).tenant
            try:
                self._check(tenant)
            except OverloadedError as error:
                self._on_rejection(tenant, "queue")
                await as_api_error(error).response(scope)(scope, receive, send)
                return
        await self._app(scope, receive, send)
