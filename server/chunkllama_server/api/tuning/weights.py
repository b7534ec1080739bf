"""Find out which weights are served: their digest, which takes minutes for large ones."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from chunkllama_server.api.batch.store import FileStore
from chunkllama_server.api.tuning.examples import StoppedError
from chunkllama_server.api.tuning.jobs import JobStore


class ServedWeights:
    """Identifies the weights that are served, for jobs, once.

    Args:
        store: calls the digest in one of its threads.
        jobs: note the digest.
        digest: of the weights; called with a function that it calls often and that raises
            ``StoppedError`` when the server ends.
    """

    def __init__(
        self, store: FileStore, jobs: JobStore, digest: Callable[[Callable[[], None]], str]
    ) -> None:
        self._store = store
        self._jobs = jobs
        self._digest = digest
        self._task: asyncio.Task[None] | None = None
        self._is_closed = threading.Event()

    async def identify(self) -> None:
        """Let the jobs, which have been read, know the weights.

        Raises:
            ConfigError: the weights cannot be read.
            StoppedError: the server ends.
        """
        if self._jobs.weights is not None:
            return
        if self._task is None:
            self._task = asyncio.create_task(self._identify())
        await asyncio.shield(self._task)  # a caller that leaves does not end it for others

    def close(self) -> None:
        """End the digest that is being computed."""
        self._is_closed.set()

    async def _identify(self) -> None:
        try:
            self._jobs.identify(await self._store.work(self._digest, self._check_open))
        finally:
            self._task = None

    def _check_open(self) -> None:
        if self._is_closed.is_set():
            raise StoppedError
