"""Fine-tuning jobs on disk, a folder for each, which outlive the server.

    <files_dir>/tuning/<id>/job.json       the job
    <files_dir>/tuning/<id>/events.jsonl   what has happened to it, a line each
    <files_dir>/tuning/<id>/...            see ``chunkllama/tuning/folder.py``

The lock of the file store guards them as well.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import msgspec

from chunkllama.logger import init_logger
from chunkllama.tuning.folder import ADAPTER, EXAMPLES, STATE, replace_file
from chunkllama.tuning_messages import TuningOptions
from chunkllama_server.api.schema.tuning import FineTuningJob, JobStatus, StepMetrics, TuningEvent

logger = init_logger(__name__)

ENDED: Final = frozenset(("succeeded", "failed", "cancelled"))
_RECORD, _EVENTS = "job.json", "events.jsonl"
_MAX_ENDED: Final = 100


class JobFailedError(Exception):
    """Why a job fails: a code, a line, and the field of the request."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


class StoredJob(msgspec.Struct):
    """A job's record.

    Attributes:
        serial: counts jobs in the order in which they were made.
        weights: digest of the weights that it trains an adapter of; "": of those that are served
            next, as in records of a version that did not note it.
        num_targets: tokens that are trained in an epoch; 0 until the file is read.
        is_deleted: its model was deleted.
    """

    tenant: str
    value: FineTuningJob
    options: TuningOptions
    serial: int
    weights: str = ""
    num_targets: int = 0
    is_deleted: bool = False


@dataclass(eq=False, slots=True)
class Job:
    """A job and its folder; its events are read when they are asked for."""

    record: StoredJob
    folder: Path

    @property
    def id(self) -> str:
        return self.record.value["id"]

    @property
    def value(self) -> FineTuningJob:
        return self.record.value

    @property
    def tenant(self) -> str:
        return self.record.tenant

    @property
    def has_ended(self) -> bool:
        return self.value["status"] in ENDED

    @property
    def needs_weights(self) -> bool:
        """Whether it trains an adapter or has a model."""
        return self.model is not None or not self.has_ended

    @property
    def adapter(self) -> Path:
        """Folder of the trained adapter."""
        return self.folder / ADAPTER

    @property
    def model(self) -> str | None:
        """Name of the trained model, while it can be requested."""
        return None if self.record.is_deleted else self.value["fine_tuned_model"]


class JobStore:
    """Jobs of all tenants.

    Args:
        folder: of the file store.
        now: Unix time in whole seconds.

    Attributes:
        weights: digest of the weights that are served, once it is known; jobs of others stay as
            they are until a server has those.
    """

    def __init__(self, folder: Path, now: Callable[[], int]) -> None:
        self._folder = folder / "tuning"
        self._now = now
        self._jobs: dict[str, Job] = {}
        self._serial = 0
        self.weights: str | None = None

    def is_of_model(self, job: Job) -> bool:
        """Whether a job is one of the model that is served."""
        return job.record.weights == self.weights

    def __iter__(self) -> Iterator[Job]:
        return iter(list(self._jobs.values()))

    def of(self, tenant: str) -> list[Job]:
        """The tenant's jobs, newest first."""
        return [job for job in self if job.tenant == tenant][::-1]

    def get(self, job_id: str, tenant: str) -> Job | None:
        job = self._jobs.get(job_id)
        return job if job is not None and job.tenant == tenant else None

    def made_by(self, model: str, tenant: str) -> Job | None:
        """The tenant's job that has made a model."""
        return next((job for job in self.of(tenant) if job.model == model), None)

    def read(self) -> None:
        """Read all jobs; one that cannot be read is left out, its data stay."""
        found = []
        for path in self._folder.glob(f"*/{_RECORD}"):
            try:
                record = msgspec.json.decode(path.read_bytes(), type=StoredJob)
            except (OSError, msgspec.MsgspecError) as error:
                logger.warning("files_dir: %s is left out, its data is kept: %s", path, error)
                continue
            found.append(Job(record, path.parent))
        for job in sorted(found, key=lambda job: job.record.serial):
            self._jobs[job.id] = job
            self._serial = max(self._serial, job.record.serial)

    def identify(self, weights: str) -> None:
        """Note which weights are served.

        Args:
            weights: their digest.
        """
        self.weights = weights
        for job in self:
            job.record.weights = job.record.weights or weights
        others = [job for job in self if not self.is_of_model(job)]
        if count := sum(job.needs_weights for job in others):
            logger.info(
                "fine-tuning: %d jobs of another model than the one served stay as they are, and "
                "what they have made is not served, until that model is served again",
                count,
            )

    def add(self, tenant: str, value: FineTuningJob, options: TuningOptions) -> Job:
        """Store a new job and remove the oldest of many that have ended without a model; the
        weights that are served are known.

        Raises:
            OSError: it cannot be written.
        """
        assert self.weights is not None
        ended = [job for job in self.of(tenant) if job.has_ended and job.model is None]
        for old in ended[_MAX_ENDED:]:
            del self._jobs[old.id]
            shutil.rmtree(old.folder, ignore_errors=True)
        self._serial += 1
        folder = self._folder / value["id"]
        job = Job(StoredJob(tenant, value, options, self._serial, self.weights), folder)
        try:
            folder.mkdir(mode=0o700, parents=True)
            self.write(job)
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._jobs[job.id] = job
        return job

    def write(self, job: Job) -> None:
        """Store what a job has become.

        Raises:
            OSError: it cannot be written.
        """
        replace_file(job.folder / _RECORD, iter([msgspec.json.encode(job.record)]))

    def enter(
        self, job: Job, status: JobStatus, *, model: str | None = None, at_any_rate: bool = False
    ) -> None:
        """Change a job's status, on disk too; if it cannot be written, the job stays as it was.

        Args:
            model: that the job has made.
            at_any_rate: change it in memory also if it cannot be written.

        Raises:
            OSError: it cannot be written.
        """
        former = job.value.copy()
        job.value["status"] = status
        if status in ENDED:
            job.value["finished_at"] = self._now()
            job.value["estimated_finish"] = None
        if status == "succeeded":
            job.value["trained_tokens"] = job.record.num_targets * job.record.options.n_epochs
            job.value["fine_tuned_model"] = model
        try:
            self.write(job)
        except OSError:
            if not at_any_rate:
                job.value.update(former)
            raise

    def note(
        self,
        job: Job,
        message: str,
        level: Literal["info", "warn", "error"] = "info",
        data: StepMetrics | None = None,
    ) -> None:
        """Add an event."""
        event: TuningEvent = {
            "id": f"ftevent-{uuid.uuid4().hex[:24]}",
            "object": "fine_tuning.job.event",
            "created_at": self._now(),
            "level": level,
            "message": message,
            "type": "message" if data is None else "metrics",
            "data": data,
        }
        with contextlib.suppress(OSError), (job.folder / _EVENTS).open("ab") as file:
            file.write(msgspec.json.encode(event) + b"\n")

    def events(self, job: Job) -> list[TuningEvent]:
        """What has happened to a job, oldest first."""
        path, found = job.folder / _EVENTS, []
        if path.exists():
            for line in path.read_bytes().splitlines():
                with contextlib.suppress(msgspec.MsgspecError):  # it was cut by a process's end
                    found.append(msgspec.json.decode(line, type=TuningEvent))
        return found

    def forget_steps(self, job: Job, first: int) -> None:
        """Drop the events of steps that are done again.

        Args:
            first: of these steps.
        """
        events = self.events(job)
        kept = [each for each in events if each["data"] is None or each["data"]["step"] < first]
        if len(kept) < len(events):
            lines = (msgspec.json.encode(event) + b"\n" for event in kept)
            replace_file(job.folder / _EVENTS, lines)

    def drop_work(self, job: Job) -> None:
        """Remove what only a training needs, and an adapter that is no model."""
        for name in (STATE, EXAMPLES):
            (job.folder / name).unlink(missing_ok=True)
            (job.folder / f"{name}.new").unlink(missing_ok=True)  # of a process that has ended
        shutil.rmtree(job.folder / f"{ADAPTER}.new", ignore_errors=True)
        if job.model is None:
            shutil.rmtree(job.adapter, ignore_errors=True)

    def drop_adapter(self, job: Job) -> None:
        """Remove the trained adapter, of which the job says so from now on.

        Raises:
            OSError: it cannot be removed or the job not be written; both can be tried again.
        """
        if job.adapter.exists():  # first: this makes room for the record on a full disk
            shutil.rmtree(job.adapter)
        job.record.is_deleted = True
        try:
            self.write(job)
        except OSError:
            job.record.is_deleted = False
            raise


def folder_bytes(path: Path) -> int:
    """Bytes below a folder, beside record and events, of which a tenant cannot make room."""
    num_bytes = 0
    for folder, _, names in os.walk(path):
        for name in names:
            if name not in (_RECORD, _EVENTS):
                with contextlib.suppress(FileNotFoundError):  # the engine replaces files
                    num_bytes += (Path(folder) / name).stat().st_size
    return num_bytes
