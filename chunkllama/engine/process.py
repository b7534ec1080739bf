"""The engine as a child process: spawned with one end of a socket pair, killed with its parent.

Frames hold msgpack. Imports no torch in the parent.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

import msgspec

from chunkllama.config import EngineConfig
from chunkllama.engine.child import (
    LENGTH,
    FrameSocket,
    begin_child,
    end_process,
    frame,
    start_child,
)
from chunkllama.engine.client import MessageClient, seed_source
from chunkllama.engine.faults import faults_from
from chunkllama.engine.journal import StepJournal
from chunkllama.errors import ChunkLlamaError, ConfigError, EngineDeadError
from chunkllama.logger import configure_logging, init_logger
from chunkllama.messages import AbortRequest, FromEngine, Shutdown, StartFailed, ToEngine
from chunkllama.resources import freeze_heap

if TYPE_CHECKING:
    from chunkllama.engine.core import MakeDigest

logger = init_logger(__name__)

_BUSY_WEIGHT = 0.1  # a step that uses processor time may take ten times as long
_MAX_TICK = 1.0  # seconds between two looks at the step loop
_TO_ENGINE = msgspec.msgpack.Decoder(list[ToEngine])
_FROM_ENGINE = msgspec.msgpack.Decoder(list[FromEngine])
_ENCODER = msgspec.msgpack.Encoder()


class EngineProcess:
    """A child process that has loaded its model: its handle, its socket, its step journal."""

    def __init__(
        self,
        child: subprocess.Popen[bytes],
        journal: StepJournal,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.child = child
        self.journal = journal
        self._reader = reader
        self._writer = writer

    @classmethod
    async def start(
        cls, config: EngineConfig, stopped_seconds: float = math.inf, module: str = __name__
    ) -> tuple[EngineProcess, list[FromEngine]]:
        """Spawn an engine, wait until its model is loaded; returns it and its first messages.

        Call it from the main thread: the parent-death signal is tied to the thread that forks.

        Args:
            stopped_seconds: kill it if a signal has stopped it for so long while it loads.
            module: whose ``main`` the process runs.

        Raises:
            ConfigError: the engine could not start; the message is one line for the user.
        """
        ours, theirs = socket.socketpair()
        with theirs, contextlib.ExitStack() as undo:  # no descriptor may be left to start a child
            undo.callback(ours.close)
            journal = StepJournal()
            undo.callback(journal.close)
            descriptors = [theirs.fileno(), journal.fileno()]
            child = start_child(module, descriptors, descriptors)
            undo.pop_all()
        with contextlib.suppress(ConnectionError):  # its end is found by the first read
            # Before anything is awaited: the engine loads while the caller's thread is busy.
            ours.sendall(frame(config.model_dump_json().encode()))
        writer: asyncio.StreamWriter | None = None
        watching = asyncio.create_task(_kill_if_stopped(child, stopped_seconds))
        try:
            reader, writer = await asyncio.open_unix_connection(sock=ours)
            first = await _read_messages(reader)
        except (asyncio.IncompleteReadError, ConnectionError):
            (writer or ours).close()
            code = await asyncio.to_thread(child.wait)
            journal.close()
            raise ConfigError(
                f"the engine process ended while starting (exit code {code})"
            ) from None
        except BaseException:
            (writer or ours).close()
            child.kill()
            child.wait()
            journal.close()
            raise
        finally:
            watching.cancel()
        if isinstance(first[0], StartFailed):
            writer.close()
            await asyncio.to_thread(child.wait)
            journal.close()
            raise ConfigError(first[0].message)
        return cls(child, journal, reader, writer), first

    def send(self, messages: list[ToEngine]) -> None:
        """Queue messages; lost if the process has ended."""
        if not self._writer.is_closing():
            self._writer.write(frame(_ENCODER.encode(messages)))

    async def receive(self) -> list[FromEngine]:
        """The next messages.

        Raises:
            IncompleteReadError, ConnectionError: the process has ended.
        """
        return await _read_messages(self._reader)

    async def wait_hang(self, seconds: float) -> None:
        """Return when the step loop has stood still for too long.

        Args:
            seconds: without progress and processor time.
        """
        tick = min(seconds / 4, _MAX_TICK)
        turns, cpu, stalled = -1, 0.0, 0.0
        last = time.monotonic()
        while stalled < seconds:
            await asyncio.sleep(tick)
            now = time.monotonic()
            # if this process itself was stopped or starved, so perhaps was the engine
            elapsed, last = min(now - last, 2 * tick), now
            if (seen := self.journal.turns) != turns:
                turns, stalled, cpu = seen, 0.0, self.cpu_seconds()
                continue
            used, cpu = cpu, self.cpu_seconds()
            stalled += elapsed * (_BUSY_WEIGHT if cpu > used else 1.0)
            # An idle loop waits for messages: this one has no effect but a turn.
            self.send([AbortRequest(request_id="")])

    async def stop(self) -> None:
        """Ask the process to end, and kill it if it does not."""
        if self.child.poll() is None:
            self.send([Shutdown()])
            try:
                async with asyncio.timeout(10):
                    await asyncio.to_thread(self.child.wait)
            except TimeoutError:
                await self.kill()

    async def kill(self) -> int:
        """Kill the process if it lives; returns its exit code."""
        self.child.kill()
        return await asyncio.to_thread(self.child.wait)

    def close(self) -> None:
        """Release the socket and the journal of a process that has ended."""
        self._writer.close()
        self.journal.close()

    def cpu_seconds(self) -> float:
        """Processor time of all its threads so far; 0 if the process has ended."""
        fields = _stat(self.child.pid)
        if not fields:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[bytes]:
    """The fields of ``/proc/PID/stat`` from the state on; [] if the process has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()
    except OSError:
        return []


async def _kill_if_stopped(child: subprocess.Popen[bytes], seconds: float) -> None:
    """Kill a process that a signal has stopped for so long; waiting for a disk is no stop."""
    tick = min(seconds / 4, 1.0)
    stopped = 0.0
    while stopped < seconds:
        await asyncio.sleep(tick)
        stopped = stopped + tick if _stat(child.pid)[:1] == [b"T"] else 0.0
    logger.error("the engine process was stopped for %g s while it loaded: killed", seconds)
    child.kill()


class ProcessEngineClient(MessageClient):
    """An engine in a child process; when the process ends, so do its requests.

    ``SupervisedEngineClient`` restarts the process instead.
    """

    def __init__(self, process: EngineProcess) -> None:
        super().__init__()
        self._process = process
        self._reader_task: asyncio.Task[None] | None = None
        self.on_death: Callable[[], None] = lambda: None

    @classmethod
    async def start(cls, config: EngineConfig, module: str = __name__) -> ProcessEngineClient:
        """Spawn the engine and wait until its model is loaded; see ``EngineProcess.start``."""
        process, first = await EngineProcess.start(config, module=module)
        client = cls(process)
        client.draw_seed = seed_source(config.model.seed)
        client._dispatch(first)
        client._reader_task = asyncio.create_task(client._read())
        return client

    @property
    def pid(self) -> int:
        return self._process.child.pid

    def _send(self, message: ToEngine) -> None:
        self._process.send([message])

    async def _read(self) -> None:
        try:
            while True:
                self._dispatch(await self._process.receive())
        except Exception as error:
            if not isinstance(error, asyncio.IncompleteReadError | ConnectionError):
                # A bug; callers that wait for tokens get an error.
                logger.exception("a message of the engine process cannot be used")
            code = await self._process.kill()
            self._fail_all(EngineDeadError(f"the engine process has ended (exit code {code})"))
            self.on_death()

    async def close(self) -> None:
        self.on_death = lambda: None
        await self._process.stop()
        if self._reader_task is not None:
            await self._reader_task
        self._process.close()


async def _read_messages(reader: asyncio.StreamReader) -> list[FromEngine]:
    (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
    return _FROM_ENGINE.decode(await reader.readexactly(length))


class SocketChannel:
    """The engine's end: blocking reads when idle, a poll between steps when busy."""

    def __init__(self, sock: socket.socket) -> None:
        self._frames = FrameSocket(sock)

    def receive_config(self) -> bytes:
        """The first frame: the engine's configuration as JSON."""
        payload = self._frames.receive()
        if payload is None:
            raise SystemExit(0)
        return payload

    def receive(self, seconds: float | None) -> list[ToEngine]:
        messages: list[ToEngine] = []
        while True:
            while (payload := self._frames.take()) is not None:
                messages.extend(_TO_ENGINE.decode(payload))
            if not self._frames.is_readable(0.0 if messages else seconds):
                return messages
            if not self._frames.fill():
                return [*messages, Shutdown()]

    def send(self, messages: list[FromEngine]) -> None:
        try:
            self._frames.send(_ENCODER.encode(messages))
        except (BrokenPipeError, ConnectionResetError):
            raise SystemExit(0) from None


def main(make_digest: MakeDigest | None = None) -> NoReturn:
    """Entry point of the engine process; the arguments are SOCKET_FD PARENT_PID JOURNAL_FD."""
    code = 1
    try:
        code = _run(make_digest)
    except SystemExit:  # the API process has gone
        code = 0
    except BaseException:
        logger.exception("the engine process has failed")
    end_process(code)


def _lose_rank(reason: str) -> NoReturn:
    """End the process as a step that fails does: the parent starts another one."""
    logger.error("%s", reason)
    end_process(1)


def _run(make_digest: MakeDigest | None) -> int:
    """Load the model and serve the socket; returns the exit code."""
    descriptor, parent_pid, journal = map(int, sys.argv[1:])
    begin_child(parent_pid)
    channel = SocketChannel(socket.socket(fileno=descriptor))
    config = EngineConfig.model_validate_json(channel.receive_config())
    configure_logging(config.log.log_level, config.log.log_format)

    gc.disable()  # a tenth of the time in which torch is imported goes to collections
    from chunkllama.engine.build import build_engine
    from chunkllama.engine.loop import run_engine_loop

    gc.enable()
    try:
        faults = faults_from()
        core = build_engine(config, on_lost_rank=_lose_rank)
    except ChunkLlamaError as error:
        channel.send([StartFailed(message=str(error))])
        return 2
    core.journal, core.faults = StepJournal(journal), faults
    core.make_digest = make_digest
    freeze_heap()
    try:
        run_engine_loop(core, channel)
    except SystemExit:  # the API process has gone
        pass
    except Exception:
        logger.exception("a step has failed")
        return 1  # its threads end with it: the parent starts another process
    core.close()
    return 0


if __name__ == "__main__":
    main()
