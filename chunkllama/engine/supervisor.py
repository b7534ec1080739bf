"""An engine process that is restarted when it ends or hangs; its requests continue.

A request is continued as its prompt and the tokens delivered so far. A request that was in the
running step of two engine processes that ended, without a token between, is a suspect: suspects are
continued one at a time, and one that ends the process alone is failed.

    process ends or hangs -> kill, count the crash against the requests of the running step
                          -> back off (only after processes that committed no step)
                          -> start, or take the standby process, which has loaded its model
                          -> no suspects: submit every live request
                             suspects: submit one; when it gains a token, the next; then the others
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from chunkllama.adapter_messages import AdapterInfo, LoadAdapter, UnloadAdapter
from chunkllama.cache_messages import CacheCommand
from chunkllama.config import EngineConfig
from chunkllama.engine.client import MessageClient, seed_source
from chunkllama.engine.pin_records import PinRecords
from chunkllama.engine.process import EngineProcess
from chunkllama.engine.replay import Stream
from chunkllama.errors import ChunkLlamaError, ConfigError, EngineDeadError
from chunkllama.logger import init_logger
from chunkllama.messages import (
    CommandReply,
    EngineErrorInfo,
    EngineRequest,
    EngineStats,
    FromEngine,
    ToEngine,
    TokenDelta,
)

logger = init_logger(__name__)

Started = tuple[EngineProcess, list[FromEngine]]

_SUSPECT_CRASHES = 2
_MAX_BARREN = 5  # restarts without a committed step, within _BARREN_WINDOW seconds
_BARREN_WINDOW = 600.0
_MAX_BACK_OFF = 8.0
_RESTORE_SECONDS = 30.0  # at least, for one adapter


class SupervisedEngineClient(MessageClient):
    """An engine in a child process that is restarted.

    Args:
        config: of every process that is started.
        process: the first one.
        hang_seconds: without progress and processor time, this long is a hang.
        standby: keep another process ready, with weights and pool of its own.

    Attributes:
        on_restarting: gets True when the process has ended, and False when another one runs.
        on_death: called when restarting has been abandoned.
        restarts, hangs, replays: processes restarted, those of them that hung, and requests
            continued in another process, since the start.
    """

    def __init__(
        self,
        config: EngineConfig,
        process: EngineProcess,
        hang_seconds: float,
        standby: bool = False,
    ) -> None:
        super().__init__()
        self._config = config
        self._process = process
        self._hang_seconds = hang_seconds
        self._keeps_spare = standby
        self._spare: asyncio.Task[Started] | None = None
        self._is_up = True
        self._barren: deque[float] = deque()
        self._pins = PinRecords(config.cache.chunk_size)
        self._trial: Stream | None = None
        self._restores_pins: asyncio.Task[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self.restarts = 0
        self.hangs = 0
        self.replays = 0
        self.on_restarting: Callable[[bool], None] = lambda _: None
        self.on_death: Callable[[], None] = lambda: None

    @classmethod
    async def start(
        cls, config: EngineConfig, hang_seconds: float = 30.0, *, standby: bool = False
    ) -> SupervisedEngineClient:
        """Spawn the engine and wait until its model is loaded; see ``EngineProcess.start``.

        A standby process is spawned then; it does not delay the start.
        """
        process, first = await EngineProcess.start(config, hang_seconds)
        client = cls(config, process, hang_seconds, standby)
        client.draw_seed = seed_source(config.model.seed)
        client._dispatch(first)
        # Requests were accepted for this pool; what is left of memory may be less by now.
        cache = config.cache.model_copy(update={"num_chunks": client.info.num_chunks})
        client._config = config.model_copy(update={"cache": cache})
        client._start_spare()
        client._task = asyncio.create_task(client._supervise())
        return client

    @property
    def pid(self) -> int:
        """Process id of the present engine."""
        return self._process.child.pid

    async def stats(
        self, *, include_tree: bool = False, include_tenants: bool = False
    ) -> EngineStats:
        if not self._is_up and self._dead is None:
            raise EngineDeadError("the engine is being restarted")
        return await super().stats(include_tree=include_tree, include_tenants=include_tenants)

    async def _ask(self, make: Callable[[int], ToEngine]) -> CommandReply:
        if not self._is_up and self._dead is None:
            raise EngineDeadError("the engine is being restarted")
        return await super()._ask(make)

    async def close(self) -> None:
        self.on_death = lambda: None
        self.on_restarting = lambda _: None
        dead = EngineDeadError("the engine was closed")
        self._dead = self._dead or dead
        if self._is_up:
            await self._process.stop()
        elif self._task is not None:
            self._task.cancel()
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)
        if self._spare is not None:
            self._spare.cancel()
            (ended,) = await asyncio.gather(self._spare, return_exceptions=True)
            if not isinstance(ended, BaseException):  # it had started
                await ended[0].kill()
                ended[0].close()
        self._fail_all(dead)

    # -- messages -----------------------------------------------------------------------------

    def _send(self, message: ToEngine) -> None:
        if self._is_up:
            self._process.send([message])

    def _submit(self, stream: Stream) -> None:
        """Now, or with the others when the engine runs and no suspect is alone in it."""
        if self._is_up and self._trial is None:
            self._process.send(stream.state.submission())

    def _deliver(self, stream: Stream, delta: TokenDelta) -> None:
        stream.state.record(delta)
        super()._deliver(stream, delta)
        if stream is self._trial and (stream.state.gained or not stream.state.is_live):
            self._end_trial()

    def _forget(self, stream: Stream) -> None:
        super()._forget(stream)
        self._pins.add(stream.state)
        if stream is self._trial:
            self._end_trial()

    def _take_reply(self, reply: CommandReply) -> None:
        for pin in reply.ended_pins:
            self._pins.remove(pin)
            for stream in self._streams.values():
                stream.state.end_pin(pin)
        super()._take_reply(reply)

    def _live(self) -> list[Stream]:
        return [stream for stream in self._streams.values() if stream.state.is_live]

    # -- supervision --------------------------------------------------------------------------

    async def _supervise(self) -> None:
        while True:
            reason = await self._serve()
            if self._dead is not None:  # closing
                self._process.close()
                return
            try:
                self._went_down(reason)
                started = await self._restart()
                if started is not None:
                    self._came_up(*started)
            except Exception:  # unexpected; otherwise the streams would never end
                logger.exception("the engine process cannot be restarted")
                started = None
            if started is None:
                self._fail_all(EngineDeadError("the engine process has ended too often"))
                self.on_death()
                return

    async def _serve(self) -> str:
        """Read messages until the process ends or hangs; returns why, with the process gone."""
        process = self._process
        reading = asyncio.create_task(self._read(process))
        watching = asyncio.create_task(process.wait_hang(self._hang_seconds))
        try:
            await asyncio.wait({reading, watching}, return_when=asyncio.FIRST_COMPLETED)
            hung = watching.done()
            code = await process.kill()
            await reading  # what the process has sent before its end is used
        finally:
            reading.cancel()
            watching.cancel()
        if hung:
            self.hangs += 1
            return f"the engine process made no progress for {self._hang_seconds:g} s"
        return f"the engine process has ended (exit code {code})"

    async def _read(self, process: EngineProcess) -> None:
        try:
            while True:
                self._dispatch(await process.receive())
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        except Exception:  # a bug; another process gets the requests
            logger.exception("a message of the engine process cannot be used")

    def _went_down(self, reason: str) -> None:
        journal = self._process.journal
        in_step, steps = set(journal.running_requests()), journal.steps
        self._process.close()
        self._is_up = False
        self.restarts += 1
        if self._restores_pins is not None:
            self._restores_pins.cancel()
        self.on_restarting(True)
        self._fail_stats(EngineDeadError("the engine is being restarted"))
        self.cache_watchers.went_down()
        live = self._live()
        logger.error("%s; restarting it, %d live requests continue", reason, len(live))
        now = time.monotonic()
        while self._barren and self._barren[0] < now - _BARREN_WINDOW:
            self._barren.popleft()
        if steps:
            self._barren.clear()
        else:
            self._barren.append(now)
        self.replays += len(live)
        for stream in live:
            stream.state.submitted = False
            if stream.state.request.request_id in in_step:
                stream.state.count_crash()
        trial, self._trial = self._trial, None
        if trial is not None and in_step == {trial.state.request.request_id}:
            self._barren.clear()  # its cause is known and gone
            self._fail_poison(trial)

    def _fail_poison(self, stream: Stream) -> None:
        request_id = stream.state.request.request_id
        logger.error("request %s ends the engine process: failed", request_id)
        error = EngineErrorInfo(
            kind="failed",
            message="the engine process ended repeatedly while it computed this request",
            code="engine_poison_request",
        )
        self._deliver(stream, TokenDelta(request_id=request_id, choices=[], error=error))

    async def _start_process(self) -> Started:
        return await EngineProcess.start(self._config, self._hang_seconds)

    def _start_spare(self) -> None:
        if self._keeps_spare:
            self._spare = asyncio.create_task(self._start_process())

    async def _take_spare(self) -> Started | None:
        """The standby process, if it has not ended."""
        spare, self._spare = self._spare, None
        if spare is None:
            return None
        try:
            process, first = await spare
        except (ConfigError, OSError) as error:
            logger.error("the standby process did not start: %s", error)
            return None
        if process.child.poll() is None:
            return process, first
        process.close()
        return None

    async def _restart(self) -> Started | None:
        """Another engine process, or None after too many that did nothing."""
        while len(self._barren) <= _MAX_BARREN:
            if self._barren:
                await asyncio.sleep(min(2.0 ** (len(self._barren) - 1), _MAX_BACK_OFF))
            try:
                started = await self._take_spare() or await self._start_process()
                await self._restore_adapters(started[0])
                return started
            except (ConfigError, OSError) as error:  # OSError: no descriptor, no process
                logger.error("the engine process cannot be restarted: %s", error)
                self._barren.append(time.monotonic())
        return None

    async def _restore_adapters(self, process: EngineProcess) -> None:
        """Load into a process what its predecessor had, before any request is submitted.

        An adapter that cannot be read any more is dropped: requests that use it are refused.

        Raises:
            ConfigError: the process has ended, or does not answer; it is gone.
        """
        missing = dict(enumerate(self.adapters.values()))
        for number, info in missing.items():
            process.send([LoadAdapter(command_id=number, name=info.name, folder=info.folder)])
        try:
            while missing:
                async with asyncio.timeout(max(self._hang_seconds, _RESTORE_SECONDS)):
                    messages = await process.receive()
                for reply in messages:
                    if isinstance(reply, CommandReply) and reply.command_id in missing:
                        self._restored(process, missing.pop(reply.command_id), reply)
        except BaseException as error:
            await process.kill()
            process.close()
            if isinstance(error, TimeoutError | asyncio.IncompleteReadError | ConnectionError):
                raise ConfigError("it ended, or hung, while it loaded adapters") from None
            raise

    def _restored(self, process: EngineProcess, was: AdapterInfo, reply: CommandReply) -> None:
        """Note that an adapter is loaded again, if it is the same one."""
        reason = reply.error
        if reply.adapter is not None:
            if reply.adapter.digest == was.digest:
                return
            process.send([UnloadAdapter(command_id=-1, name=was.name)])
            reason = f"{was.folder} has changed"
        logger.error("adapter %s is not loaded again: %s", was.name, reason)
        del self.adapters[was.name]

    def _came_up(self, process: EngineProcess, first: list[FromEngine]) -> None:
        self._process = process
        self._is_up = True
        self._dispatch(first)
        self._start_spare()
        logger.info("the engine process runs again")
        process.send([CacheCommand(command_id=-1, action="forget_prompts")])
        if self._tenants is not None:
            process.send([self._tenants])
        process.send([*self._files.values(), *self._tunings_again()])
        self.cache_watchers.came_up()
        self.on_restarting(False)
        self._submit_waiting()
        pins = self._pins.requests()
        if pins:
            self._restores_pins = asyncio.create_task(self._restore_pins(pins))

    def _submit_waiting(self) -> None:
        """Submit one suspect, or without suspects every live request, the oldest first."""
        waiting = [stream for stream in self._live() if not stream.state.submitted]
        suspects = [s for s in waiting if s.state.crashes >= _SUSPECT_CRASHES]
        if suspects:
            self._trial = max(suspects, key=lambda stream: stream.state.crashes)
            self._process.send(self._trial.state.submission())
            return
        messages = [message for stream in waiting for message in stream.state.submission()]
        if messages:  # in one frame: shared prefixes are then computed once
            self._process.send(messages)

    def _end_trial(self) -> None:
        """The suspect has gained a token or ended: it is none."""
        assert self._trial is not None
        self._trial.state.crashes = 0
        self._trial = None
        if self._is_up:
            self._submit_waiting()

    async def _restore_pins(self, requests: list[EngineRequest]) -> None:
        for request in requests:
            try:
                async for _ in self.generate(request):
                    pass
            except ChunkLlamaError as error:
                logger.warning("a pinned prompt could not be restored: %s", error)
