"""Read the server's state for all who look at it together, with pauses between two reads."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

T = TypeVar("T")
# Between two reads, as a multiple of the time that the last one took.
_PAUSE = 4.0


class SharedReads:
    """One read at a time; a caller joins the next one of its key that begins.

    So a result is never older than the call, and callers, however many, use at most a fifth of the
    time, or more where ``most_pause`` ends a pause early: metrics and dashboards are rendered on
    the event loop, where every stream waits for them.

    Args:
        clock: monotonic seconds.
        sleep: waits for so many.
        most_pause: seconds between two reads, however long the last one took.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        most_pause: float = math.inf,
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self._most_pause = most_pause
        self._next: dict[tuple[str, str | None], asyncio.Task[Any]] = {}
        self._turn = asyncio.Lock()
        self._not_before = 0.0

    async def get(self, name: str, view: str | None, read: Callable[[], Awaitable[T]]) -> T:
        """Return what ``read`` returns, called for this caller and others of ``name`` and ``view``.

        Args:
            view: the tenant whose part is read; None is all.
        """
        key = (name, view)
        task = self._next.get(key)
        if task is None:
            task = self._next[key] = asyncio.create_task(self._run(key, read))
            task.add_done_callback(_retrieve)  # all callers may have left
        result: T = await asyncio.shield(task)
        return result

    async def _run(self, key: tuple[str, str | None], read: Callable[[], Awaitable[T]]) -> T:
        async with self._turn:
            pause = self._not_before - self._clock()
            if pause > 0.0:
                await self._sleep(pause)
            del self._next[key]
            began = self._clock()
            try:
                return await read()
            finally:
                ended = self._clock()
                self._not_before = ended + min(_PAUSE * (ended - began), self._most_pause)


def _retrieve(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()
