"""A thread pool that divides its time among tenants."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class FairPool:
    """Runs each tenant's work in order of arrival; the tenant served least is next.

    A tenant's service is its thread time divided by its share; one without work earns no credit.
    Used from one event loop.

    Args:
        num_threads: worker threads.
        name: prefix of their names.
        share: of a tenant, relative to others.
        clock: seconds, read in the worker threads.
        num_spare: threads that ``stand_in`` may add.
    """

    def __init__(
        self,
        num_threads: int,
        name: str,
        share: Callable[[str], float],
        clock: Callable[[], float] = time.monotonic,
        num_spare: int = 0,
    ) -> None:
        self._executor = ThreadPoolExecutor(num_threads + num_spare, thread_name_prefix=name)
        self._num_spare = num_spare
        self._num_idle = num_threads
        self._share = share
        self._clock = clock
        self._queues: dict[str, deque[tuple[asyncio.Future[Any], Callable[[], Any]]]] = {}
        self._service: dict[str, float] = {}
        self._running: dict[str, int] = {}
        self._last = 0.0  # service of the tenant that started last

    async def run(self, tenant: str, work: Callable[[], T]) -> T:
        """Return ``work()``; cancelling takes work that has not begun out of the queue."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        if tenant not in self._queues and not self._running.get(tenant):
            self._service[tenant] = max(self._service.get(tenant, 0.0), self._last)
        self._queues.setdefault(tenant, deque()).append((future, work))
        self._start_next()
        return await future

    def stand_in(self, work: asyncio.Future[Any]) -> bool:
        """Let another thread take the place of the one that does ``work`` until that ends.

        Returns:
            False where all spare threads are in use.
        """
        if not self._num_spare:
            return False

        def end(_: asyncio.Future[Any]) -> None:
            self._num_spare += 1
            self._num_idle -= 1

        self._num_spare -= 1
        self._num_idle += 1
        work.add_done_callback(end)
        self._start_next()
        return True

    def _start_next(self) -> None:
        while self._num_idle > 0 and self._queues:
            tenant = min(self._queues, key=lambda name: self._service[name])
            queue = self._queues[tenant]
            future, work = queue.popleft()
            if not queue:
                del self._queues[tenant]
            if not future.done():
                self._last = self._service[tenant]
                self._start(tenant, future, work)

    def _start(self, tenant: str, future: asyncio.Future[Any], work: Callable[[], Any]) -> None:
        loop = future.get_loop()
        self._num_idle -= 1
        self._running[tenant] = self._running.get(tenant, 0) + 1

        def run() -> None:
            started, result, error = self._clock(), None, None
            try:
                result = work()
            except BaseException as raised:  # delivered to the caller
                error = raised
            seconds = self._clock() - started
            try:
                loop.call_soon_threadsafe(self._done, tenant, seconds, future, result, error)
            except RuntimeError:
                return  # the loop was closed meanwhile

        self._executor.submit(run)

    def _done(
        self,
        tenant: str,
        seconds: float,
        future: asyncio.Future[Any],
        result: Any,
        error: BaseException | None,
    ) -> None:
        self._num_idle += 1
        self._running[tenant] -= 1
        self._service[tenant] += seconds / self._share(tenant)
        if not future.done():
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)
        self._start_next()

    def close(self) -> None:
        """Start nothing more; the threads end after their present work."""
        self._queues.clear()
        self._executor.shutdown(wait=False, cancel_futures=True)
