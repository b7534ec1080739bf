"""An engine in a thread of the caller's process, with the calls of ``EngineClient``."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from chunkllama.engine.client import MessageClient
from chunkllama.errors import EngineDeadError
from chunkllama.logger import init_logger
from chunkllama.messages import FromEngine, Shutdown, ToEngine

if TYPE_CHECKING:
    from chunkllama.engine.core import EngineCore

logger = init_logger(__name__)

_EXIT_SECONDS = 10.0  # that a program without ``close`` waits at its end for the engine's step


class _QueueChannel:
    """The engine's end in process: a thread-safe inbox, an event-loop callback as outbox."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, deliver: Callable[[list[FromEngine]], None]
    ) -> None:
        self.inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        self._loop = loop
        self._deliver = deliver

    def receive(self, seconds: float | None) -> list[ToEngine]:
        messages: list[ToEngine] = []
        with contextlib.suppress(queue.Empty):
            messages.append(self.inbox.get(block=seconds != 0.0, timeout=seconds))
        while not self.inbox.empty():
            messages.append(self.inbox.get())
        return messages

    def send(self, messages: list[FromEngine]) -> None:
        try:
            self._loop.call_soon_threadsafe(self._deliver, messages)
        except RuntimeError:  # the loop is closed: there is no one to serve
            raise SystemExit(0) from None


class InProcessEngineClient(MessageClient):
    """An engine in a thread of this process: for notebooks, tests and single-process servers."""

    def __init__(self, core: EngineCore) -> None:
        super().__init__()
        self._info = core.info
        self._loop = asyncio.get_running_loop()
        self._channel = _QueueChannel(self._loop, self._dispatch)
        self._thread = threading.Thread(target=self._run, args=(core,), name="engine", daemon=True)
        self._thread.start()
        # A thread that returns from torch to an interpreter that has ended aborts the process. A
        # step that does not end must not keep the process, though.
        atexit.register(self._stop, _EXIT_SECONDS)

    def _run(self, core: EngineCore) -> None:
        from chunkllama.engine.loop import run_engine_loop

        try:
            run_engine_loop(core, self._channel)
        except Exception as error:  # a bug; callers that wait for tokens get an error
            logger.exception("the engine has failed")
            dead = EngineDeadError(f"the engine has failed: {error!r}")
            self._loop.call_soon_threadsafe(self._fail_all, dead)

    def _send(self, message: ToEngine) -> None:
        self._channel.inbox.put(message)

    def _stop(self, seconds: float | None = None) -> None:
        """End the thread after its present step; wait for that at most so long."""
        self._send(Shutdown())
        self._thread.join(seconds)

    async def close(self) -> None:
        await asyncio.to_thread(self._stop)
        atexit.unregister(self._stop)
        self._fail_all(EngineDeadError("the engine was closed"))
