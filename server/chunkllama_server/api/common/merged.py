"""Read several streams of output at once, in order of arrival."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from chunkllama.text.output_processor import OutputDelta

Pieces = AsyncGenerator[list[OutputDelta], None]
# Lists of pieces with the number of their stream: what has come since the last time, which is what
# one step brings several streams. To handle each by itself costs more than to make it.
Batches = AsyncGenerator[list[tuple[int, list[OutputDelta]]], None]

# Streams that run at once, so that the prompts of one request do not fill the engine's queue.
MAX_AT_ONCE = 64


class Merger:
    """Streams that are read at once; more may be added while they run."""

    def __init__(self) -> None:
        self._slots = asyncio.Semaphore(MAX_AT_ONCE)
        self._queue: asyncio.Queue[tuple[int, list[OutputDelta] | Exception | None]] = (
            asyncio.Queue(maxsize=2 * MAX_AT_ONCE)  # what a step brings, and ends
        )
        self._tasks: list[asyncio.Task[None]] = []

    def add(self, stream: Pieces) -> None:
        """Start a stream; its number is that of the streams before it."""
        self._tasks.append(asyncio.create_task(self._pump(len(self._tasks), stream)))

    async def _pump(self, number: int, stream: Pieces) -> None:
        try:
            async with self._slots, aclosing(stream):
                async for pieces in stream:
                    await self._queue.put((number, pieces))
            await self._queue.put((number, None))
        except Exception as error:
            await self._queue.put((number, error))

    async def outputs(self) -> Batches:
        """Yield what has come, at least one list of pieces at a time, until all streams have ended.

        The error of one stream ends all, after what came before it; closing the generator closes
        them.
        """
        num_ended = 0
        try:
            while num_ended < len(self._tasks):
                items = [await self._queue.get()]
                while not self._queue.empty():
                    items.append(self._queue.get_nowait())
                batch, error = [], None
                for number, item in items:
                    if isinstance(item, Exception):
                        error = item
                        break
                    if item is None:
                        num_ended += 1
                    else:
                        batch.append((number, item))
                if batch:
                    yield batch
                if error is not None:
                    raise error
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)


async def merged(streams: Sequence[Pieces]) -> Batches:
    """Yield the output of streams that are all known, as ``Merger.outputs`` does."""
    if len(streams) == 1:  # without a task
        async with aclosing(streams[0]) as only:
            async for pieces in only:
                yield [(0, pieces)]
        return
    merger = Merger()
    for stream in streams:
        merger.add(stream)
    async with aclosing(merger.outputs()) as outputs:
        async for batch in outputs:
            yield batch
