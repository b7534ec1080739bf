"""Read several streams of output at once, in order of arrival."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from chunkllama.text.output_processor import OutputDelta

Pieces = AsyncGenerator[list[OutputDelta], None]

# Streams that run at once, so that the prompts of one request do not fill the engine's queue.
MAX_AT_ONCE = 64


async def merged(streams: Sequence[Pieces]) -> AsyncGenerator[tuple[int, list[OutputDelta]], None]:
    """Yield lists of pieces with the number of their stream.

    The error of one stream ends all; closing the generator closes them.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for pieces in only:
                yield 0, pieces
        return
    slots = asyncio.Semaphore(MAX_AT_ONCE)
    queue: asyncio.Queue[tuple[int, list[OutputDelta] | Exception | None]] = asyncio.Queue(
        maxsize=1
    )

    async def pump(number: int, stream: Pieces) -> None:
        try:
            async with slots, aclosing(stream):
                async for pieces in stream:
                    await queue.put((number, pieces))
            await queue.put((number, None))
        except Exception as error:
            await queue.put((number, error))

    tasks = [asyncio.ensure_future(pump(i, stream)) for i, stream in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            number, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield number, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
