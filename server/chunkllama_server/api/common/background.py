"""Run responses in the background: their events are logged, so that any client can follow them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field

from chunkllama_server.api.schema.response_object import Response
from chunkllama_server.transport.errors import ApiError

_RETRY_AFTER = 5


class EventLog:
    """Events of one response; an event's index is its sequence number."""

    def __init__(self) -> None:
        self.events: list[bytes] = []
        self._is_finished = False
        self._changed = asyncio.Event()

    def add(self, event: bytes) -> None:
        """Append an event and wake the followers."""
        self.events.append(event)
        self._wake()

    def finish(self) -> None:
        """End the log; followers end after its last event."""
        self._is_finished = True
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def follow(self, after: int | None = None) -> AsyncGenerator[bytes, None]:
        """Yield the events, then new ones as they come, until the log is finished.

        Args:
            after: sequence number of the last event that the client has.
        """
        index = 0 if after is None else after + 1
        while True:
            changed = self._changed
            while index < len(self.events):
                yield self.events[index]
                index += 1
            if self._is_finished:
                return
            await changed.wait()


@dataclass(slots=True)
class RunningResponse:
    """A response that runs in the background.

    Attributes:
        snapshot: the response as it is now.
        on_cancelled: ends and stores the response; returns its last event.
        settle: gives back the tokens that were charged and not used, at its end.
    """

    snapshot: Callable[[], Response]
    on_cancelled: Callable[[], Awaitable[bytes]]
    settle: Callable[[], None] = lambda: None
    log: EventLog = field(default_factory=EventLog)
    task: asyncio.Task[None] | None = None


class BackgroundResponses:
    """The responses that run in the background, by tenant and id.

    Args:
        max_running: at most so many at once.
        num_tenants: if there are several, each has at most half of the places.
    """

    def __init__(self, max_running: int, num_tenants: Callable[[], int] = lambda: 1) -> None:
        self._max_running = max_running
        self._num_tenants = num_tenants
        self._running: dict[tuple[str, str], RunningResponse] = {}

    def __len__(self) -> int:
        return len(self._running)

    def check_room(self, tenant: str) -> None:
        """Refuse one more response where as many run as may.

        Raises:
            ApiError: 429.
        """
        own = sum(owner == tenant for owner, _ in self._running)
        share = -(-self._max_running // 2) if self._num_tenants() > 1 else self._max_running
        if len(self._running) >= self._max_running:
            message = (
                f"{len(self._running)} background responses are running, the server runs at most "
                f"{self._max_running} at once"
            )
        elif own >= share:
            message = (
                f"{own} background responses of this key are running, the server runs at most "
                f"{share} of one key at once"
            )
        else:
            return
        raise ApiError(429, message, "background", "background_limit", retry_after=_RETRY_AFTER)

    def start(
        self,
        tenant: str,
        response_id: str,
        running: RunningResponse,
        events: AsyncGenerator[bytes, None],
    ) -> None:
        """Run a response to its end, whether or not a client follows.

        Raises:
            ApiError: 429 where as many run as may; others may have begun since the last check.
        """
        self.check_room(tenant)
        key = (tenant, response_id)
        self._running[key] = running
        running.task = asyncio.create_task(self._run(key, running, events))

    def get(self, tenant: str, response_id: str) -> RunningResponse | None:
        """Return a running response of this tenant."""
        return self._running.get((tenant, response_id))

    async def cancel(self, tenant: str, response_id: str) -> bool:
        """End a running response; returns False when there is none."""
        running = self.get(tenant, response_id)
        if running is None or running.task is None:
            return False
        running.task.cancel()
        await asyncio.wait({running.task})
        return True

    async def close(self) -> None:
        """End all running responses."""
        for tenant, response_id in list(self._running):
            await self.cancel(tenant, response_id)

    async def _run(
        self, key: tuple[str, str], running: RunningResponse, events: AsyncGenerator[bytes, None]
    ) -> None:
        try:
            async with contextlib.aclosing(events):
                async for event in events:
                    running.log.add(event)
        except asyncio.CancelledError:
            running.log.add(await running.on_cancelled())
        finally:
            del self._running[key]
            running.settle()
            running.log.finish()
