"""Run batch jobs: lines in the order of their prefixes, in the gaps of other requests."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from chunkllama.logger import init_logger
from chunkllama_server.api.batch.lines import Line, LineReader, check_file
from chunkllama_server.api.batch.records import FILE_RECORD_BYTES, StoredBatch
from chunkllama_server.api.batch.results import (
    Kind,
    MadeFile,
    Tally,
    missing_bytes,
    read_tally,
    write_results,
)
from chunkllama_server.api.batch.store import FileStore
from chunkllama_server.api.batch.turns import Call, LineRunner, Turns
from chunkllama_server.api.schema.batch import BatchError, BatchObject
from chunkllama_server.config.limits import LimitsConfig
from chunkllama_server.transport.errors import ApiError

logger = init_logger(__name__)

_WATCH_SECONDS = 1.0  # between two looks for a free folder and for keys that are gone
_DISK_SECONDS = 30.0  # between two tries to write to a full disk
_OPEN_JOBS = 2  # of a key, whose lines are in memory
_REVOKED = "The API key of this batch has been removed from the server"
_INTERNAL = "The batch could not be run; see the server's log"
_NO_FILE = "The input file has been deleted or has expired"


@dataclass(eq=False, slots=True)
class Job:
    """A job that has not ended.

    Attributes:
        tally: its results so far.
        lines: of its input file, once there is room for all; those without a result are named in
            the error file.
        is_stopped: no further line is begun.
        running: tasks of its lines, those that wait to be tried again included.
        asking: held while one of its lines waits for a turn.
        may_begin: set when few earlier jobs of its key are left, and when it is stopped.
    """

    record: StoredBatch
    task: asyncio.Task[None] | None = None
    tally: Tally = field(default_factory=Tally)
    lines: list[Line] = field(default_factory=list)
    is_stopped: bool = False
    running: set[asyncio.Task[None]] = field(default_factory=set)
    asking: asyncio.Lock = field(default_factory=asyncio.Lock)
    may_begin: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def value(self) -> BatchObject:
        return self.record.value

    def stop(self) -> None:
        """Begin no further line, and end those that run."""
        self.is_stopped = True
        self.may_begin.set()
        for task in self.running - {asyncio.current_task()}:
            task.cancel()

    def fail(self, code: str, message: str, line: int | None = None) -> None:
        """Stop with an error; the first one counts."""
        if not self.is_stopped:
            self.say(code, message, line)
            self.stop()

    def say(self, code: str, message: str, line: int | None = None) -> None:
        error: BatchError = {"code": code, "line": line, "message": message, "param": None}
        self.value["errors"] = {"object": "list", "data": [error]}


class BatchRunner:
    """Runs jobs, each in a task of its own.

    Args:
        store: holds files, records and results.
        call: answers one line.
        has_gap: whether a request could start at once.
        is_known: whether a tenant has a key.
        max_running: returns how many lines of all jobs may run at once now.
        max_lines: of a file.
        limits: of a line's body.
    """

    def __init__(
        self,
        store: FileStore,
        call: Call,
        has_gap: Callable[[], bool],
        is_known: Callable[[str], bool],
        max_running: Callable[[], int],
        max_lines: int,
        limits: LimitsConfig,
    ) -> None:
        self.store = store
        self._lines = LineRunner(store, call, Turns(has_gap, max_running))
        self._is_known = is_known
        self._max_lines = max_lines
        self._limits = limits
        self._jobs: dict[str, Job] = {}
        self._in_order: dict[str, dict[str, Job]] = {}  # of a tenant, by id
        self._opening = asyncio.Lock()
        self._checking = asyncio.Lock()
        self._watching: asyncio.Task[None] | None = None

    async def resume(self) -> None:
        """Continue the jobs of an earlier process, as soon as the folder is free."""
        await self._look()
        self._watching = asyncio.create_task(self._watch())

    async def open(self) -> None:
        """Open the store, and continue the jobs that it has.

        Raises:
            ApiError: 503, the folder cannot be used.
        """
        async with self._opening:
            if self.store.is_open:
                return
            await asyncio.to_thread(self.store.open)
            for record in sorted(self.store.batches, key=lambda record: record.serial):
                if not record.has_ended:
                    self.start(record)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            await self._look()

    async def _look(self) -> None:
        """Take over a folder that has become free; stop the jobs of tenants without a key."""
        try:
            if not self.store.is_open and self.store.folder.is_dir():
                await self.open()
        except ApiError:
            pass  # the store has logged why
        except Exception as error:
            self.store.note(f"cannot be read: {type(error).__name__}: {error}")
        for job in self._jobs.values():
            if not self._is_known(job.record.tenant):
                job.fail("key_revoked", _REVOKED)

    def start(self, record: StoredBatch) -> None:
        """Run a job in the background."""
        is_stopped = record.value["status"] == "cancelling" or record.value["errors"] is not None
        job = Job(record)
        if is_stopped:
            job.stop()
        self._jobs[record.id] = job
        self._in_order.setdefault(record.tenant, {})[record.id] = job
        self._let_begin(record.tenant)
        job.task = asyncio.create_task(self._run(job))

    async def cancel(self, record: StoredBatch) -> None:
        """End a job: its running lines are aborted, its results so far are kept.

        Raises:
            OSError: the job is stopped, but a process that starts now would continue it.
        """
        job = self._jobs.get(record.id)
        if job is None or record.value["status"] not in ("validating", "in_progress"):
            return
        job.stop()
        before = job.value.copy()
        try:
            await self._enter(job, "cancelling")
        except OSError:
            if job.value["status"] == "cancelling":
                job.value.update(before)  # so that it can be tried again
            raise

    async def close(self) -> None:
        """End all tasks; the jobs continue in the next process."""
        tasks = [job.task for job in self._jobs.values() if job.task is not None]
        tasks += [self._watching] if self._watching is not None else []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.store.close()

    # -- one job ------------------------------------------------------------------------------

    async def _enter(self, job: Job, status: Any) -> None:
        """Change a job's status, on disk too.

        Raises:
            OSError: it cannot be written.
        """
        job.value["status"] = status
        stamp = f"{status}_at"
        if stamp in job.value:
            job.value[stamp] = self.store.now()  # type: ignore[literal-required]
        await self.store.write_batch(job.record)

    async def _run(self, job: Job) -> None:
        try:
            try:
                await self._wait_for_earlier(job)
                await self._run_to_end(job)
            except OSError as error:
                logger.error("batch %s: %s", job.record.id, error)
                job.fail("disk_error", "The batch's data could not be read or written")
            except Exception as error:
                logger.error("batch %s failed", job.record.id, exc_info=error)
                job.fail("internal", _INTERNAL)
            await self._finish(job)
        except Exception as error:
            logger.error("batch %s: no files of its results", job.record.id, exc_info=error)
            if not job.record.has_ended:
                job.say("internal", _INTERNAL)
                with contextlib.suppress(OSError):
                    await self._enter(job, "failed")
                    self.store.drop_results(job.record)
        finally:
            self._leave(job)

    def _leave(self, job: Job) -> None:
        """Forget a job that has ended; the next one of its key may begin."""
        tenant = job.record.tenant
        self._jobs.pop(job.record.id, None)
        own = self._in_order[tenant]
        own.pop(job.record.id, None)
        if own:
            self._let_begin(tenant)
        else:
            del self._in_order[tenant]

    def _let_begin(self, tenant: str) -> None:
        """Let the first jobs of a key begin: lines in memory are bounded."""
        for job in islice(self._in_order[tenant].values(), _OPEN_JOBS):
            job.may_begin.set()

    async def _wait_for_earlier(self, job: Job) -> None:
        """Wait until few jobs of the key are before this one, or until it expires."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(job.value["expires_at"] - self.store.now(), 0)):
                await job.may_begin.wait()

    async def _run_to_end(self, job: Job) -> None:
        """Check the input file and run the lines that have no result, until the job is over."""
        record, value = job.record, job.value
        work = self.store.work
        job.tally = await work(read_tally, self.store.results_path(record))
        num_lines = value["request_counts"]["total"]
        self._show(job, num_lines)
        path = self.store.file_path(record.tenant, value["input_file_id"])
        try:
            if path is None:
                raise FileNotFoundError
            reader = LineReader(path, value["endpoint"], self._limits)
            async with self._checking:  # one at a time: the keys that sort lines are large
                checked = await work(check_file, reader, self._max_lines)
        except FileNotFoundError:
            job.fail("file_not_found", _NO_FILE)
            return
        # A file that has passed once may not pass under the limits of a later process.
        self._show(job, max(num_lines, len(checked.lines)))
        is_over = job.is_stopped or value["status"] == "finalizing"
        if checked.errors and not is_over:
            value["errors"] = {"object": "list", "data": checked.errors}
            job.stop()
            if not job.tally.done:
                return
        if not await self._reserve(job, checked.lines):
            if not is_over:
                job.fail("file_budget", "The results would exceed the disk budget of this API key")
            return
        job.lines = checked.lines
        if job.is_stopped or is_over:
            return
        if value["status"] == "validating":
            await self._enter(job, "in_progress")
        await self._run_lines(job, reader)

    def _show(self, job: Job, num_lines: int) -> None:
        """Let the job's record show its tally from now on."""
        job.tally.counts["total"] = num_lines
        job.value["request_counts"] = job.tally.counts
        job.value["usage"] = job.tally.usage

    async def _reserve(self, job: Job, lines: list[Line]) -> bool:
        """Reserve room for the job's files; False if there is none.

        Each line without a result has at least an entry in the error file; what an answer takes
        comes later.
        """
        todo = _without_result(job, lines)
        least = await self.store.work(lambda: sum(map(missing_bytes, todo)))
        return self.store.grow(job.record, least + 2 * FILE_RECORD_BYTES)

    async def _run_lines(self, job: Job, reader: LineReader) -> None:
        """Run the lines that have no result, neighbours in the prefix tree after one another."""
        todo = _without_result(job, job.lines)
        seconds = job.value["expires_at"] - self.store.now()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(seconds, 0)):
                await self._lines.run(job, todo, reader)

    async def _finish(self, job: Job) -> None:
        """Make the result files and end the job; a full disk is tried again."""
        num_missing = max(job.tally.counts["total"] - len(job.tally.done), 0)
        ended = "completed"
        if job.value["errors"] is not None:
            ended = "failed"
        elif num_missing or not job.tally.done:
            ended = "cancelled" if job.is_stopped else "expired"
        reason = None if ended == "completed" else f"batch_{ended}"
        has_files = bool(job.tally.done or job.lines)
        while True:
            try:
                if has_files and job.value["status"] not in ("cancelling", "finalizing"):
                    await self._enter(job, "finalizing")
                await self._make_files(job, reason)
                await self._enter(job, ended)
                break
            except OSError as error:
                logger.error("batch %s: its results cannot be written: %s", job.record.id, error)
                await asyncio.sleep(_DISK_SECONDS)
        self.store.drop_results(job.record)
        usage = job.value["usage"]
        logger.info(
            "batch %s: %s lines, %s prompt tokens, %s of them from the cache",
            job.record.id,
            len(job.tally.done),
            usage["input_tokens"],
            usage["input_tokens_details"]["cached_tokens"],
        )

    async def _make_files(self, job: Job, reason: str | None) -> None:
        """Make files of the job's results.

        Raises:
            OSError: one cannot be written.
        """
        record, store = job.record, self.store
        stem = f"file-{record.id.removeprefix('batch_')}"

        def write(kind: Kind, blocks: Iterator[bytes]) -> int:
            return store.write_content(record.tenant, f"{stem}-{kind}", blocks)

        made: list[MadeFile] = await store.work(
            write_results, store.results_path(record), job.lines, reason, write
        )
        for kind, size in made:
            await store.adopt(
                record.tenant,
                f"{stem}-{kind}",
                f"{record.id}_{kind}.jsonl",
                size,
                "batch_output",
                record.output_seconds,
            )
            job.value[f"{kind}_file_id"] = f"{stem}-{kind}"  # type: ignore[literal-required]


def _without_result(job: Job, lines: list[Line]) -> list[Line]:
    return [line for line in lines if line.number not in job.tally.done]
