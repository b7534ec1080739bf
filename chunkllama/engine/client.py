"""The one door to an engine: the same calls whether it runs in this process or in another. Imports no torch."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from chunkllama.engine.messages import EngineReady, EngineRequest, EngineStats, TokenDelta


class EngineClient(Protocol):
    """Asynchronous access to an engine."""

    @property
    def info(self) -> EngineReady:
        """What the engine told of its model when it became ready."""
        ...

    @property
    def is_ready(self) -> bool:
        """The engine has loaded, lives, and answered within the watchdog's limit."""
        ...

    def generate(self, request: EngineRequest) -> AsyncIterator[TokenDelta]:
        """Stream the request's tokens; closing the iterator early aborts it.

        Raises (at the first ``anext``): InvalidRequestError, OverloadedError, RequestFailedError, EngineDeadError.
        """
        ...

    async def abort(self, request_id: str, index: int | None = None) -> None:
        """Stop a request (or one choice of it); its chunks are released within a step."""
        ...

    async def stats(self, *, include_tree: bool = False) -> EngineStats:
        """A fresh snapshot from the engine loop."""
        ...

    async def close(self) -> None:
        """End the engine; live requests end with EngineDeadError."""
        ...
