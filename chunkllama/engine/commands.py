"""Commands to an engine: explanations, work on the cache, files of chunks."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final, Protocol

import msgspec

from chunkllama.adapter_messages import AdapterInfo, LoadAdapter, UnloadAdapter
from chunkllama.cache_messages import (
    CacheAction,
    CacheCommand,
    KeepSnapshot,
    LoadPack,
    WriteSnapshot,
)
from chunkllama.errors import ConfigError, EngineDeadError, InvalidRequestError
from chunkllama.messages import (
    CacheExplanation,
    CommandReply,
    ExplainPrompt,
    ToEngine,
)
from chunkllama.tuning_messages import StartTuning, StopTuning, TuningProgress

_MAX_TUNING_CRASHES: Final = 2  # of engine processes, without a step of the job between


class AdapterClient(Protocol):
    """Adapters of an engine."""

    @property
    def adapters(self) -> Mapping[str, AdapterInfo]:
        """Loaded adapters by name, also those of an engine that is being restarted."""
        ...

    async def load_adapter(self, name: str, folder: str) -> AdapterInfo:
        """Load an adapter; other requests run meanwhile.

        Raises:
            ConfigError: the folder cannot be used, or the name is in use; one line says why.
            EngineDeadError: the engine has ended or is being restarted.
        """
        ...

    async def unload_adapter(self, name: str) -> bool:
        """Forget an adapter and what is cached under it; False: there is none of this name.

        Raises:
            InvalidRequestError: unfinished requests use it.
            EngineDeadError: the engine has ended or is being restarted.
        """
        ...


class TuningClient(AdapterClient, Protocol):
    """Adapters of an engine, and trainings of further ones.

    Attributes:
        on_tuning: gets what becomes of them.
    """

    on_tuning: Callable[[TuningProgress], None]

    def start_tuning(self, command: StartTuning) -> None:
        """Train an adapter, also in engines that are started later."""
        ...

    def stop_tuning(self, job_id: str) -> None:
        """End a training; ``on_tuning`` hears of it when the engine has done so."""
        ...


class CommandClient(ABC):
    """Sends commands and hands each reply to the caller that waits for it."""

    def __init__(self) -> None:
        self.adapters: dict[str, AdapterInfo] = {}
        self._replies: dict[int, asyncio.Future[CommandReply]] = {}
        self._commands = 0
        self._dead: EngineDeadError | None = None
        self._files: dict[str, LoadPack | KeepSnapshot] = {}
        self._tunings: dict[str, StartTuning] = {}
        self._tuning_crashes: Counter[str] = Counter()
        self._tuning_runs = 0
        self.on_tuning: Callable[[TuningProgress], None] = lambda _: None

    @abstractmethod
    def _send(self, message: ToEngine) -> None: ...

    async def explain(
        self, prompt_token_ids: list[int], namespace: str = "", tenant: str = "", adapter: str = ""
    ) -> CacheExplanation:
        """As ``EngineClient.explain``."""
        reply = await self._ask(
            lambda command_id: ExplainPrompt(
                command_id=command_id,
                prompt_token_ids=prompt_token_ids,
                namespace=namespace,
                tenant=tenant,
                adapter=adapter,
            )
        )
        if reply.error:
            raise InvalidRequestError(reply.error, "model", "model_not_found")
        assert reply.explanation is not None
        return reply.explanation

    async def cache_command(
        self, action: CacheAction, *, chunk_id: int = -1, tenant: str = ""
    ) -> CommandReply:
        """As ``EngineClient.cache_command``; another engine process leaves out a dropped tenant of
        the packs that it loads."""
        if action == "drop_tenant":
            self._leave_out(tenant)
        return await self._ask(
            lambda command_id: CacheCommand(
                command_id=command_id, action=action, chunk_id=chunk_id, tenant=tenant
            )
        )

    def _leave_out(self, tenant: str) -> bool:
        """Leave a tenant out of the packs that are loaded from now on; whether one has it."""
        was_in = False
        for path, file in self._files.items():
            if isinstance(file, LoadPack) and tenant in file.namespaces:
                left = {name: each for name, each in file.namespaces.items() if name != tenant}
                self._files[path] = msgspec.structs.replace(file, namespaces=left)
                was_in = True
        return was_in

    async def load_adapter(self, name: str, folder: str) -> AdapterInfo:
        """As ``AdapterClient.load_adapter``."""
        reply = await self._ask(
            lambda command_id: LoadAdapter(command_id=command_id, name=name, folder=folder)
        )
        if reply.adapter is None:
            raise ConfigError(reply.error)
        return reply.adapter

    async def unload_adapter(self, name: str) -> bool:
        """As ``AdapterClient.unload_adapter``."""
        reply = await self._ask(lambda command_id: UnloadAdapter(command_id=command_id, name=name))
        if reply.error:
            raise InvalidRequestError(reply.error)
        self.adapters.pop(name, None)
        return reply.found

    def use_file(self, command: LoadPack | KeepSnapshot) -> None:
        """As ``EngineClient.use_file``."""
        self._files[command.path] = command
        if self._dead is None:
            self._send(command)

    def start_tuning(self, command: StartTuning) -> None:
        """As ``TuningClient.start_tuning``."""
        self._tuning_runs += 1
        command = msgspec.structs.replace(command, run=self._tuning_runs)
        self._tunings[command.job_id] = command
        if self._dead is None:
            self._send(command)

    def stop_tuning(self, job_id: str) -> None:
        """As ``TuningClient.stop_tuning``."""
        self._tunings.pop(job_id, None)
        self._tuning_crashes.pop(job_id, None)
        if self._dead is None:
            self._send(StopTuning(job_id=job_id))

    def _take_progress(self, progress: TuningProgress) -> None:
        if progress.state == "stopped":  # the job may have been started again since
            self.on_tuning(progress)
            return
        current = self._tunings.get(progress.job_id)
        if current is None or current.run != progress.run:
            return  # of a training that was stopped
        if progress.state != "running":
            del self._tunings[progress.job_id]
        if progress.state != "running" or progress.loss is not None:
            self._tuning_crashes.pop(progress.job_id, None)
        self.on_tuning(progress)

    def _tunings_again(self) -> list[StartTuning]:
        """Trainings for another engine process; those that seem to end each process fail."""
        for job_id, command in list(self._tunings.items()):
            self._tuning_crashes[job_id] += 1
            if self._tuning_crashes[job_id] > _MAX_TUNING_CRASHES:
                error = "the engine process ended repeatedly while it trained this job"
                self._take_progress(
                    TuningProgress(job_id=job_id, state="failed", error=error, run=command.run)
                )
        return [*self._tunings.values()]

    async def write_snapshot(self, seconds: float) -> bool:
        """As ``EngineClient.write_snapshot``."""
        reply = await self._ask(
            lambda command_id: WriteSnapshot(command_id=command_id, seconds=seconds)
        )
        return reply.found

    async def _ask(self, make: Callable[[int], ToEngine]) -> CommandReply:
        """Send a command and wait for its reply."""
        if self._dead is not None:
            raise self._dead
        self._commands += 1
        command_id = self._commands
        waiter: asyncio.Future[CommandReply] = asyncio.get_running_loop().create_future()
        self._replies[command_id] = waiter
        try:
            self._send(make(command_id))
            return await waiter
        finally:
            self._replies.pop(command_id, None)

    def _take_reply(self, reply: CommandReply) -> None:
        if reply.adapter is not None:  # also if the caller no longer waits: the engine has it
            self.adapters[reply.adapter.name] = reply.adapter
        waiter = self._replies.get(reply.command_id)
        if waiter is not None and not waiter.done():
            waiter.set_result(reply)

    def _fail_replies(self, error: EngineDeadError) -> None:
        for waiter in self._replies.values():
            if not waiter.done():
                waiter.set_exception(error)
