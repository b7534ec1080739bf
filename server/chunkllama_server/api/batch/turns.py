"""Begin lines of batches one at a time, in gaps of other requests, and store their answers."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from chunkllama.logger import init_logger
from chunkllama_server.api.batch.disk import encode_result
from chunkllama_server.api.batch.lines import Line, LineReader
from chunkllama_server.api.batch.records import StoredBatch
from chunkllama_server.api.batch.results import Tally, missing_bytes
from chunkllama_server.api.batch.store import FileStore
from chunkllama_server.api.schema.batch import LineAnswer, LineResult

logger = init_logger(__name__)

_GAP_SECONDS = 0.01  # between two looks for a gap
_STOP_SECONDS = 0.25  # in which a job that waits behind others notices that it is stopped
_RETRY_STATUSES = frozenset((429, 503, 529))
_MAX_RETRY_SECONDS = 30.0
_LEAST_BEGUN = 8  # lines of a job, of which some wait to be tried again, at any bound of lines


async def to_end(work: Coroutine[Any, Any, None]) -> None:
    """Run work to its end; a cancellation takes effect behind it."""
    task = asyncio.ensure_future(work)
    is_cancelled = False
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            is_cancelled = True
    task.result()
    if is_cancelled:
        raise asyncio.CancelledError


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer of a route to a line; the body is JSON."""

    status: int
    headers: dict[str, str]
    body: bytes


# Calls a route: tenant, path, body, request id, and what is called when the engine has the request.
Call = Callable[[str, str, dict[str, Any], str, Callable[[], None]], Awaitable[Reply]]


class LineJob(Protocol):
    """What running lines needs of their job."""

    record: StoredBatch
    tally: Tally
    is_stopped: bool
    running: set[asyncio.Task[None]]
    asking: asyncio.Lock

    def fail(self, code: str, message: str, line: int | None = None) -> None: ...


class Turn:
    """The turn of one line, from the gap until the engine has its request, and its place among
    those that run, until it leaves."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._has_ended = asyncio.Event()
        self._has_left = False
        turns.is_taken = True
        turns.num_running += 1

    def end(self) -> None:
        """Let the next line look for a gap; again has no effect."""
        if not self._has_ended.is_set():
            self._has_ended.set()
            self._turns.is_taken = False

    def leave(self) -> None:
        """End the turn and give the place back; again has no effect."""
        self.end()
        if not self._has_left:
            self._has_left = True
            self._turns.num_running -= 1

    async def wait(self) -> None:
        await self._has_ended.wait()


class Turns:
    """Gives the lines of all jobs their turns, one at a time and in the order of asking.

    A line counts in the engine's queue only once its prompt is tokenized. Without turns, all lines
    that are begun until then would find the same gap.

    Args:
        has_gap: whether a request could start at once.
        max_running: returns how many lines may run at once now.

    Attributes:
        num_running: lines that run, or have their turn.
        is_taken: a line has its turn.
    """

    def __init__(self, has_gap: Callable[[], bool], max_running: Callable[[], int]) -> None:
        self._has_gap = has_gap
        self.max_running = max_running
        self._waiting: deque[asyncio.Event] = deque()
        self.num_running = 0
        self.is_taken = False

    async def take(self, job: LineJob) -> Turn | None:
        """Wait for a turn; None if the job is stopped meanwhile.

        A job asks for one turn at a time, however many of its lines are to be tried again.
        """
        async with job.asking:
            is_first = asyncio.Event()
            self._waiting.append(is_first)
            self._waiting[0].set()
            try:
                while not job.is_stopped:
                    if not is_first.is_set():  # the first alone looks for a gap
                        with contextlib.suppress(TimeoutError):
                            async with asyncio.timeout(_STOP_SECONDS):
                                await is_first.wait()
                        continue
                    is_free = not self.is_taken and self.num_running < self.max_running()
                    if is_free and self._has_gap():
                        return Turn(self)
                    await asyncio.sleep(_GAP_SECONDS)
            finally:
                self._waiting.remove(is_first)
                if self._waiting:
                    self._waiting[0].set()
        return None


class LineRunner:
    """Runs the lines of jobs.

    Args:
        store: gets the results.
        call: answers one line.
        turns: when a line is begun.
    """

    def __init__(self, store: FileStore, call: Call, turns: Turns) -> None:
        self._store = store
        self._call = call
        self._turns = turns

    async def run(self, job: LineJob, lines: list[Line], reader: LineReader) -> None:
        """Run lines until they have results or the job is stopped; cancelled, it ends them."""
        try:
            for line in lines:
                await self._wait_for_begun(job)
                turn = await self._turns.take(job)
                if turn is None:
                    break
                self._begin(job, line, reader, turn)
                await turn.wait()
            while job.running:
                await asyncio.wait(job.running)
        finally:
            for task in job.running:
                task.cancel()
            if job.running:
                await asyncio.wait(job.running)

    async def _wait_for_begun(self, job: LineJob) -> None:
        """Wait until few lines of the job have been begun: those that wait to be tried again hold
        no place, and are bounded all the same."""
        while not job.is_stopped:
            if len(job.running) < max(self._turns.max_running(), _LEAST_BEGUN):
                return
            await asyncio.wait(
                job.running, timeout=_STOP_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )

    def _begin(self, job: LineJob, line: Line, reader: LineReader, turn: Turn) -> None:
        task = asyncio.create_task(self._run_line(job, line, reader, turn))
        job.running.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            turn.leave()  # a task that is cancelled at once has done nothing
            job.running.discard(task)

        task.add_done_callback(ended)

    async def _run_line(self, job: LineJob, line: Line, reader: LineReader, turn: Turn) -> None:
        request_id = f"batch_req_{uuid.uuid4().hex}"
        result = LineResult(request_id, line.custom_id)
        try:
            answer = await self._answer(job, line, reader, request_id, turn)
            if answer is None:
                return
            result.response = answer
        except Exception as error:
            logger.error("batch %s: line %s failed", job.record.id, line.number, exc_info=error)
            message = "The line could not be run; see the server's log"
            result.error = {"code": "internal_error", "message": message}
        await to_end(self._add(job, line, result))

    async def _read(self, job: LineJob, line: Line, reader: LineReader) -> dict[str, Any] | None:
        """The line's body; None, and the job fails, where the file is gone."""
        try:
            return await self._store.work(reader.body, line)
        except FileNotFoundError:
            message = "The input file has been deleted or has expired"
            job.fail("file_not_found", message, line.number)
            return None

    async def _answer(
        self, job: LineJob, line: Line, reader: LineReader, request_id: str, turn: Turn | None
    ) -> LineAnswer | None:
        """The route's answer, None where the job has failed or is stopped; a server that is busy
        or restarting is asked again, and until then other lines have the place."""
        while turn is not None:
            try:
                body = await self._read(job, line, reader)
                if body is None:
                    return None
                tenant, path = job.record.tenant, reader.endpoint
                reply = await self._call(tenant, path, body, request_id, turn.end)
            finally:
                turn.leave()
            if reply.status not in _RETRY_STATUSES:
                answer_id = reply.headers.get("x-request-id", request_id)
                return LineAnswer(reply.status, answer_id, msgspec.Raw(reply.body))
            del body  # a line that waits takes little memory
            seconds = float(reply.headers.get("retry-after", "1"))
            await asyncio.sleep(min(seconds, _MAX_RETRY_SECONDS))
            turn = await self._turns.take(job)
        return None

    async def _add(self, job: LineJob, line: Line, result: LineResult) -> None:
        """Store and count a result."""
        encoded = encode_result(line.number, result)
        # It lies on the disk twice while the job's files are made of it.
        more = 2 * len(encoded) - missing_bytes(line)
        if not self._store.grow(job.record, more):
            message = "The results exceed the disk budget of this API key"
            job.fail("file_budget", message, line.number)
            return
        try:
            await self._store.append_result(job.record, encoded)
        except OSError as error:
            logger.error("batch %s: a result cannot be stored: %s", job.record.id, error)
            job.fail("disk_error", "A result could not be stored on this server", line.number)
            return
        job.tally.add(line.number, result)
