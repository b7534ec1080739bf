"""Charge each request by the sequences it makes before it enters the engine.

A refusal here costs microseconds; one in the engine waits for a step and weighs what is queued. A
request of n choices counts n times, because it occupies n places of the running batch and a copy of
its token list each.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import cast

from chunkllama.engine.client import EngineClient
from chunkllama.errors import OverloadedError
from chunkllama.messages import EngineReady, EngineRequest, EngineStats, TokenDelta

_RETRY_AFTER = 2


class ChargedEngine:
    """An engine that takes requests until ``max_sequences`` are running or waiting.

    The last one taken may exceed the limit: were it refused for its size, small requests would fill
    what is left and wait behind the large ones without end.
    """

    def __init__(self, engine: EngineClient, max_sequences: int) -> None:
        self._engine = engine
        self._max_sequences = max_sequences
        self.num_sequences = 0

    @property
    def info(self) -> EngineReady:
        return self._engine.info

    @property
    def is_ready(self) -> bool:
        return self._engine.is_ready

    async def generate(self, request: EngineRequest) -> AsyncIterator[TokenDelta]:
        """As ``EngineClient.generate``.

        Raises:
            OverloadedError: before the engine sees the request.
        """
        charge = max(request.sampling.num_sequences, request.sampling.beam_width)
        if self.num_sequences >= self._max_sequences:
            raise OverloadedError(
                f"{self.num_sequences} sequences are running or waiting, the server takes "
                f"{self._max_sequences}",
                _RETRY_AFTER,
            )
        self.num_sequences += charge
        try:
            deltas = cast(AsyncGenerator[TokenDelta, None], self._engine.generate(request))
            async with contextlib.aclosing(deltas):
                async for delta in deltas:
                    yield delta
        finally:
            self.num_sequences -= charge

    async def abort(self, request_id: str, index: int | None = None) -> None:
        await self._engine.abort(request_id, index)

    async def stats(self, *, include_tree: bool = False) -> EngineStats:
        return await self._engine.stats(include_tree=include_tree)

    async def close(self) -> None:
        await self._engine.close()
