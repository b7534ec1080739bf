"""Threads that work on a folder of files, all of whose work ends before the folder is released."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from chunkllama.logger import init_logger

logger = init_logger(__name__)

T = TypeVar("T")


class DiskThreads:
    """One thread for work in order, and those of the event loop for the rest."""

    def __init__(self) -> None:
        self._working: set[asyncio.Future[Any]] = set()
        self._in_turn = ThreadPoolExecutor(1, thread_name_prefix="files")

    def begin(self, call: Callable[[], T], *, in_turn: bool = False) -> asyncio.Future[T]:
        """Start a call, which goes on though its caller is cancelled.

        Args:
            in_turn: behind what was started so before.
        """
        context = contextvars.copy_context()  # with the tenant, for the log
        threads = self._in_turn if in_turn else None
        future = asyncio.get_running_loop().run_in_executor(threads, context.run, call)
        self._working.add(future)
        future.add_done_callback(self._working.discard)
        return asyncio.shield(future)

    def leave(self, call: Callable[[], None]) -> None:
        """Start a call in turn; a failure is logged."""
        self.begin(call, in_turn=True).add_done_callback(_log_failure)

    async def close(self) -> None:
        """Wait for all that has been started."""
        while self._working:
            await asyncio.wait(self._working)
        self._in_turn.shutdown()


def _log_failure(done: asyncio.Future[None]) -> None:
    if not done.cancelled() and (error := done.exception()) is not None:
        logger.error("files_dir: a file cannot be removed: %s", error)
