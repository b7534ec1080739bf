"""What the host of an engine keeps of each front end, and of each request of theirs."""

from __future__ import annotations

import asyncio
import time

from chunkllama.cluster.messages import FromReplica
from chunkllama.messages import EngineRequest, TokenDelta


class Link:
    """The channel to one front end."""

    def __init__(self, front: str) -> None:
        self.front = front
        self.items: list[FromReplica] = []
        self.has_items = asyncio.Event()
        self.heard_at = time.monotonic()
        self.is_closed = False

    def put(self, item: FromReplica) -> None:
        """Queue an item, unless the last one has been queued."""
        if not self.is_closed:
            self.items.append(item)
            self.has_items.set()

    def engine_id(self, request_id: str) -> str:
        """Name a request in the engine, where a former channel's run of it may not have ended."""
        return f"{request_id}@{self.front}"


class Owner:
    """Whose request it is, and its choices that have not ended."""

    def __init__(self, link: Link, request: EngineRequest) -> None:
        sampling = request.sampling
        self.link = link
        self.request_id = request.request_id
        is_beam_search = sampling.beam_width > 1
        self.unfinished = set(range(sampling.n if is_beam_search else sampling.num_sequences))

    def take(self, delta: TokenDelta) -> bool:
        """Whether the request goes on after this delta."""
        if delta.error is not None:
            return False
        self.unfinished -= {c.index for c in delta.choices if c.finish_reason is not None}
        return bool(self.unfinished)
