"""Run batch jobs: lines in the order of their prefixes, in the gaps of other requests."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chunkllama.logger import init_logger
from chunkllama_server.api.batch.lines import CheckedFile, Line, check_file, read_body
from chunkllama_server.api.batch.results import add_usage, write_results
from chunkllama_server.api.batch.store import ENDED, FileStore, StoredBatch
from chunkllama_server.api.schema.batch import BatchError, BatchObject, LineResult

logger = init_logger(__name__)

_GAP_SECONDS = 0.02  # between two looks for a gap
_RETRY_STATUSES = frozenset((429, 503, 529))
_MAX_RETRY_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer of a route to a line."""

    status: int
    headers: dict[str, str]
    body: Any


# Calls a route for a tenant: tenant, path, body, request id.
Call = Callable[[str, str, dict[str, Any], str], Awaitable[Reply]]


@dataclass(slots=True)
class _Job:
    record: StoredBatch
    task: asyncio.Task[None] | None = None
    done: set[int] = field(default_factory=set)
    is_cancelled: bool = False
    running: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def value(self) -> BatchObject:
        return self.record.value


class BatchRunner:
    """Runs jobs, each in a task of its own.

    Args:
        store: holds files, records and results.
        call: answers one line.
        has_gap: whether a request could start at once.
        max_running: lines of all jobs that run at once.
        max_lines: of a file.
    """

    def __init__(
        self,
        store: FileStore,
        call: Call,
        has_gap: Callable[[], bool],
        max_running: int,
        max_lines: int,
    ) -> None:
        self.store = store
        self._call = call
        self._has_gap = has_gap
        self._max_running = max_running
        self._max_lines = max_lines
        self._num_running = 0
        self._jobs: dict[str, _Job] = {}

    async def resume(self) -> None:
        """Continue the jobs of an earlier process."""
        if not self.store.folder.is_dir():
            return
        with contextlib.suppress(Exception):  # open() has logged why
            await asyncio.to_thread(self.store.open)
        for record in self.store.batches:
            if record.value["status"] not in ENDED:
                self.start(record)

    def start(self, record: StoredBatch) -> None:
        """Run a job in the background."""
        job = _Job(record, is_cancelled=record.value["status"] == "cancelling")
        self._jobs[record.id] = job
        job.task = asyncio.create_task(self._run(job))

    async def cancel(self, record: StoredBatch) -> None:
        """End a job: its running lines are aborted, its results so far are kept."""
        job = self._jobs.get(record.id)
        if job is None or record.value["status"] not in ("validating", "in_progress"):
            return
        self._enter(job, "cancelling")
        job.is_cancelled = True
        for task in job.running:
            task.cancel()

    async def close(self) -> None:
        """End all tasks; the jobs continue in the next process."""
        jobs = list(self._jobs.values())
        for job in jobs:
            if job.task is not None:
                job.task.cancel()
        await asyncio.gather(*(job.task for job in jobs if job.task), return_exceptions=True)
        self.store.close()

    # -- one job ------------------------------------------------------------------------------

    def _enter(self, job: _Job, status: Any) -> None:
        """Change a job's status, on disk too."""
        job.value["status"] = status
        stamp = f"{status}_at"
        if stamp in job.value:
            job.value[stamp] = self.store.now()  # type: ignore[literal-required]
        self.store.put_batch(job.record)

    async def _run(self, job: _Job) -> None:
        try:
            await self._run_to_end(job)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            logger.error("batch %s failed", job.record.id, exc_info=error)
            self._fail(job, "internal", "The batch could not be run; see the server's log")
        finally:
            self._jobs.pop(job.record.id, None)

    def _fail(self, job: _Job, code: str, message: str) -> None:
        self._say(job, code, message)
        with contextlib.suppress(OSError):
            self._enter(job, "failed")

    def _say(self, job: _Job, code: str, message: str, line: int | None = None) -> None:
        error: BatchError = {"code": code, "line": line, "message": message, "param": None}
        job.value["errors"] = {"object": "list", "data": [error]}

    async def _run_to_end(self, job: _Job) -> None:
        record, value = job.record, job.value
        path = self.store.file_path(record.tenant, value["input_file_id"])
        if path is None:
            self._fail(job, "file_not_found", "The input file has been deleted or has expired")
            return
        checked = await asyncio.to_thread(check_file, path, value["endpoint"], self._max_lines)
        value["request_counts"]["total"] = len(checked.lines)
        if checked.errors:
            value["errors"] = {"object": "list", "data": checked.errors}
            self._enter(job, "failed")
            return
        await asyncio.to_thread(self._count, job)
        if value["status"] == "validating":
            self._enter(job, "in_progress")
        if not job.is_cancelled and value["status"] == "in_progress":
            await self._run_lines(job, checked, path)
        await self._finish(job, checked)

    def _count(self, job: _Job) -> None:
        """Count the results of an earlier process."""
        counts = job.value["request_counts"]
        counts["completed"] = counts["failed"] = 0
        usage = job.value["usage"]
        usage["input_tokens"] = usage["output_tokens"] = usage["total_tokens"] = 0
        usage["input_tokens_details"]["cached_tokens"] = 0
        usage["output_tokens_details"]["reasoning_tokens"] = 0
        for entry in self.store.read_results(job.record):
            self._note(job, entry.number, entry.result)

    def _note(self, job: _Job, number: int, result: LineResult) -> None:
        job.done.add(number)
        answer = result["response"]
        is_answered = answer is not None and answer["status_code"] == 200
        job.value["request_counts"]["completed" if is_answered else "failed"] += 1
        if answer is not None and is_answered:
            add_usage(job.value["usage"], answer["body"])

    async def _run_lines(self, job: _Job, checked: CheckedFile, path: Path) -> None:
        """Run the lines that have no result, neighbours in the prefix tree after one another."""
        seconds = job.value["expires_at"] - self.store.now()
        lines = sorted((line.order, line.number, line) for line in checked.lines)
        try:
            async with asyncio.timeout(max(seconds, 0)):
                for _, number, line in lines:
                    if number in job.done:
                        continue
                    await self._wait_for_gap(job)
                    if job.is_cancelled:
                        break
                    self._begin(job, line, path)
                while job.running:
                    await asyncio.wait(job.running)
        except TimeoutError:
            pass
        finally:
            for task in job.running:
                task.cancel()
            if job.running:
                await asyncio.wait(job.running)

    async def _wait_for_gap(self, job: _Job) -> None:
        while not job.is_cancelled and (
            self._num_running >= self._max_running or not self._has_gap()
        ):
            await asyncio.sleep(_GAP_SECONDS)

    def _begin(self, job: _Job, line: Line, path: Path) -> None:
        self._num_running += 1
        task = asyncio.create_task(self._run_line(job, line, path))
        job.running.add(task)
        task.add_done_callback(lambda done: self._ended(job, done))

    def _ended(self, job: _Job, task: asyncio.Task[None]) -> None:
        self._num_running -= 1
        job.running.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("a line of batch %s failed", job.record.id, exc_info=task.exception())

    async def _run_line(self, job: _Job, line: Line, path: Path) -> None:
        body = await asyncio.to_thread(read_body, path, line)
        request_id = f"batch_req_{uuid.uuid4().hex}"
        reply = await self._answer(job, body, request_id)
        result: LineResult = {
            "id": request_id,
            "custom_id": line.custom_id,
            "response": {
                "status_code": reply.status,
                "request_id": reply.headers.get("x-request-id", request_id),
                "body": reply.body,
            },
            "error": None,
        }
        # Not in a thread: a line is written and counted as one, whatever is cancelled.
        self.store.append_result(job.record, line.number, result)
        self._note(job, line.number, result)
        if self.store.room(job.record.tenant) < 0:
            job.is_cancelled = True
            message = "The results exceed the disk budget of this API key"
            self._say(job, "file_budget", message, line.number)

    async def _answer(self, job: _Job, body: dict[str, Any], request_id: str) -> Reply:
        """The route's answer; a server that is busy or restarting is asked again."""
        while True:
            reply = await self._call(job.record.tenant, job.value["endpoint"], body, request_id)
            if reply.status not in _RETRY_STATUSES:
                return reply
            seconds = float(reply.headers.get("retry-after", "1"))
            await asyncio.sleep(min(seconds, _MAX_RETRY_SECONDS))

    async def _finish(self, job: _Job, checked: CheckedFile) -> None:
        """Make the result files and end the job."""
        value = job.value
        is_expired = len(job.done) < len(checked.lines) and not job.is_cancelled
        ended = "expired" if is_expired else "completed"
        if job.is_cancelled and len(job.done) < len(checked.lines):
            ended = "failed" if value["errors"] is not None else "cancelled"
        if value["status"] != "cancelling":
            self._enter(job, "finalizing")
        reason = None if ended == "completed" else f"batch_{ended}"
        await asyncio.to_thread(write_results, self.store, job.record, checked.lines, reason)
        self._enter(job, ended)
        await asyncio.to_thread(self.store.drop_results, job.record)
        usage = value["usage"]
        logger.info(
            "batch %s: %s lines, %s prompt tokens, %s of them from the cache",
            job.record.id,
            len(job.done),
            usage["input_tokens"],
            usage["input_tokens_details"]["cached_tokens"],
        )
