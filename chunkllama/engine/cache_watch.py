"""Readers of the cache's events, each with a bounded buffer between it and the engine.

A reader first gets all that is stored, then every change. A restarted engine has an empty cache,
which readers get as another snapshot. Each output of events (server-sent events, a message queue)
is one reader.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable

import msgspec

from chunkllama.cache_messages import CacheEvent, CacheEvents, ChunkStored, WatchCache
from chunkllama.errors import EngineDeadError, RequestFailedError

CacheStream = AsyncGenerator[CacheEvents, None]


class _Reader:
    """One reader.

    Args:
        max_waiting: changes that may wait for it.
        with_contents: it gets the tokens of stored chunks.

    Attributes:
        has_snapshot: the engine has sent it what is stored; changes before that are not for it.
        num_waiting: changes in ``batches``.
        error: why it gets nothing more.
    """

    def __init__(self, max_waiting: int, with_contents: bool) -> None:
        self.max_waiting = max_waiting
        self.with_contents = with_contents
        self.batches: deque[CacheEvents] = deque()
        self.arrived = asyncio.Event()
        self.has_snapshot = False
        self.num_waiting = 0
        self.error: Exception | None = None

    def put_snapshot(self, batch: CacheEvents) -> None:
        """Replace what waits by everything that is stored."""
        self.batches.clear()
        self.batches.append(self._allowed(batch))
        self.num_waiting = 0
        self.arrived.set()

    def put(self, batch: CacheEvents) -> bool:
        """Add changes; False, and nothing is added, if too many wait already."""
        total = self.num_waiting + len(batch.events)
        if self.num_waiting and total > self.max_waiting:
            return False
        self.batches.append(self._allowed(batch))
        self.num_waiting = total
        self.arrived.set()
        return True

    def _allowed(self, batch: CacheEvents) -> CacheEvents:
        """Return what the reader may see: other readers' events may hold tokens."""
        if self.with_contents:
            return batch
        return CacheEvents(watch_id=batch.watch_id, events=[*map(_without_contents, batch.events)])

    def end(self, error: Exception) -> None:
        self.batches.clear()
        self.error = error
        self.arrived.set()


class CacheWatchers:
    """Hands each event of the engine to every reader.

    Args:
        send: sends a message to the engine; it is lost while the engine is being restarted.
        on_dropped: called for each reader that is dropped because it reads too slowly.
    """

    def __init__(self, send: Callable[[WatchCache], None], on_dropped: Callable[[], None]) -> None:
        self._send = send
        self._readers: dict[int, _Reader] = {}
        self._last_id = 0
        self._on_dropped = on_dropped
        self._closed: EngineDeadError | None = None

    def __len__(self) -> int:
        """Return the number of readers."""
        return len(self._readers)

    async def watch(self, max_waiting: int, *, with_contents: bool = False) -> CacheStream:
        """Yield everything stored now, then changes as they happen.

        A batch with a ``watch_id`` is everything stored; it replaces all batches before it.

        Args:
            max_waiting: changes that may wait for the reader; beyond, it is dropped.
            with_contents: yield the tokens of stored chunks, too.

        Raises:
            RequestFailedError: the reader was too slow.
            EngineDeadError: the engine was closed.
        """
        if self._closed is not None:
            raise self._closed
        self._last_id += 1
        watch_id, reader = self._last_id, _Reader(max_waiting, with_contents)
        self._readers[watch_id] = reader
        try:
            self._ask(watch_id)
            while True:
                while reader.batches:
                    batch = reader.batches.popleft()
                    if not batch.watch_id:
                        reader.num_waiting -= len(batch.events)
                    yield batch
                if reader.error is not None:
                    raise reader.error
                reader.arrived.clear()
                await reader.arrived.wait()
        finally:
            self._remove(watch_id)

    def deliver(self, batch: CacheEvents) -> None:
        """Hand a message of the engine to those it is for."""
        if batch.watch_id:
            reader = self._readers.get(batch.watch_id)
            if reader is not None:
                reader.has_snapshot = True
                reader.put_snapshot(batch)
            return
        for watch_id, reader in list(self._readers.items()):
            if reader.has_snapshot and not reader.put(batch):
                self._on_dropped()
                message = f"the reader is too slow: {reader.num_waiting} events wait for it"
                reader.end(RequestFailedError(message, "slow_reader"))
                self._remove(watch_id)

    def went_down(self) -> None:
        """The engine process has ended, and its cache with it."""
        for watch_id, reader in self._readers.items():
            reader.has_snapshot = False
            reader.put_snapshot(CacheEvents(watch_id=watch_id, events=[]))

    def came_up(self) -> None:
        """Another engine process runs: let it send what the readers wait for."""
        for watch_id in self._readers:
            self._ask(watch_id)

    def close(self, error: EngineDeadError) -> None:
        """End every reader's stream, and those that begin later."""
        self._closed = error
        for reader in self._readers.values():
            reader.end(error)
        self._readers.clear()

    def _ask(self, watch_id: int) -> None:
        with_contents = any(reader.with_contents for reader in self._readers.values())
        self._send(WatchCache(watch_id=watch_id, with_contents=with_contents))

    def _remove(self, watch_id: int) -> None:
        """Stop the engine's events with the last reader."""
        if self._readers.pop(watch_id, None) is not None and not self._readers:
            self._send(WatchCache(watch_id=0))


def _without_contents(event: CacheEvent) -> CacheEvent:
    if isinstance(event, ChunkStored) and event.contents is not None:
        return msgspec.structs.replace(event, contents=None)
    return event
