"""A thread pool that divides its time among tenants."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Work:
    """What a thread is to do.

    Attributes:
        timer: runs out when the work becomes overdue.
    """

    tenant: str
    call: Callable[[], Any]
    future: asyncio.Future[Any]
    timer: asyncio.TimerHandle | None = None
    is_overdue: bool = False


class FairPool:
    """Runs each tenant's work in order of arrival; the tenant served least is next.

    A tenant's service is its thread time divided by its share; one without work earns no credit.
    Used from one event loop.

    A thread cannot be stopped. Work that takes longer than ``patience`` is overdue: a spare thread
    takes the place of its own, and other work of its tenant does not begin until it ends. At most
    ``num_threads`` of a tenant are overdue, and ``num_threads + num_spare`` of all.

    Args:
        num_threads: worker threads.
        name: prefix of their names.
        share: of a tenant, relative to others.
        clock: seconds of the worker thread that reads it.
        num_spare: most threads that take the place of others.
        patience: seconds.
        begin_thread: called in each thread before its first work.
    """

    def __init__(
        self,
        num_threads: int,
        name: str,
        share: Callable[[str], float],
        clock: Callable[[], float] = time.thread_time,
        num_spare: int = 0,
        patience: float = math.inf,
        begin_thread: Callable[[], None] | None = None,
    ) -> None:
        self._executor = ThreadPoolExecutor(num_threads + num_spare, name, begin_thread)
        self._num_threads = num_threads
        self._num_spare = num_spare
        self._share = share
        self._clock = clock
        self._patience = patience
        self._queues: dict[str, deque[_Work]] = {}
        self._service: dict[str, float] = {}
        self._running: Counter[str] = Counter()
        self._overdue: Counter[str] = Counter()
        self._last = 0.0  # service of the tenant that started last

    async def run(self, tenant: str, call: Callable[[], T]) -> T:
        """Return ``call()``; cancelling takes work that has not begun out of the queue."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        if tenant not in self._queues and not self._running[tenant]:
            self._service[tenant] = max(self._service.get(tenant, 0.0), self._last)
        work = _Work(tenant, call, future)
        self._queues.setdefault(tenant, deque()).append(work)
        self._start_next()
        try:
            return await future
        except asyncio.CancelledError:
            self._drop(work)
            raise

    def _drop(self, work: _Work) -> None:
        """Take work out of its queue, which is not looked at while its tenant has overdue work."""
        queue = self._queues.get(work.tenant)
        if queue is not None and work in queue:
            queue.remove(work)
            if not queue:
                del self._queues[work.tenant]

    def num_overdue(self, tenant: str | None = None) -> int:
        """How much work of a tenant, or of all, is overdue."""
        return self._overdue.total() if tenant is None else self._overdue[tenant]

    def _has_thread(self) -> bool:
        spare = min(self._num_spare, self._overdue.total())
        return self._running.total() < self._num_threads + spare

    def _start_next(self) -> None:
        while self._has_thread():
            ready = [tenant for tenant in self._queues if not self._overdue[tenant]]
            if not ready:
                return
            tenant = min(ready, key=lambda name: self._service[name])
            queue = self._queues[tenant]
            work = queue.popleft()
            if not queue:
                del self._queues[tenant]
            if not work.future.done():
                self._last = self._service[tenant]
                self._start(work)

    def _start(self, work: _Work) -> None:
        loop = work.future.get_loop()
        self._running[work.tenant] += 1
        if self._patience < math.inf:
            work.timer = loop.call_later(self._patience, self._pass_over, work)

        def run() -> None:
            started, result, error = self._clock(), None, None
            try:
                result = work.call()
            except BaseException as raised:  # delivered to the caller
                error = raised
            seconds = self._clock() - started
            try:
                loop.call_soon_threadsafe(self._done, work, seconds, result, error)
            except RuntimeError:
                return  # the loop was closed meanwhile

        self._executor.submit(run)

    def _pass_over(self, work: _Work) -> None:
        """Note that work is overdue, whether its caller still waits for it or not."""
        work.is_overdue = True
        self._overdue[work.tenant] += 1
        self._start_next()

    def _done(self, work: _Work, seconds: float, result: Any, error: BaseException | None) -> None:
        if work.timer is not None:
            work.timer.cancel()
        self._running[work.tenant] -= 1
        self._overdue[work.tenant] -= work.is_overdue
        self._service[work.tenant] += seconds / self._share(work.tenant)
        if not work.future.done():
            if error is None:
                work.future.set_result(result)
            else:
                work.future.set_exception(error)
        self._start_next()

    def close(self) -> None:
        """Start nothing more; the threads end after their present work."""
        self._queues.clear()
        self._executor.shutdown(wait=False, cancel_futures=True)
