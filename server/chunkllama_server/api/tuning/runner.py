"""Run fine-tuning jobs: check their files, train one after the other, and serve what they make."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

from chunkllama.engine.commands import TuningClient
from chunkllama.errors import ConfigError, InvalidRequestError
from chunkllama.logger import init_logger
from chunkllama.tuning.folder import Example, write_examples
from chunkllama.tuning_messages import StartTuning, TuningOptions, TuningProgress
from chunkllama_server.api.batch.store import FileStore
from chunkllama_server.api.schema.tuning import FineTuningJob
from chunkllama_server.api.tuning.examples import StoppedError
from chunkllama_server.api.tuning.jobs import Job, JobFailedError, JobStore, folder_bytes
from chunkllama_server.api.tuning.models import TunedModels
from chunkllama_server.api.tuning.weights import ServedWeights
from chunkllama_server.config.tuning import TuningConfig

logger = init_logger(__name__)

_WATCH_SECONDS: Final = 1.0  # between two looks for the folder, for jobs and for keys that are gone
_MAX_STEPS: Final = 10_000  # of a job: each is an event
_REVOKED: Final = "The API key of this job has been removed from the server"
_NO_ROOM: Final = "The files of this API key and of this job take more than its room; delete some"


class TuningRunner:
    """Runs jobs, one at a time, the keys in turns.

    Args:
        store: of uploaded files; its lock guards the jobs.
        engine: trains and serves.
        read: reads and checks a training file, in a thread, until its second argument is true.
        settings: limits.
        is_known: whether a tenant has a key.
        digest: as of ``ServedWeights``.
    """

    def __init__(
        self,
        store: FileStore,
        engine: TuningClient,
        read: Callable[[Path, Callable[[], bool]], list[Example]],
        settings: TuningConfig,
        is_known: Callable[[str], bool],
        digest: Callable[[Callable[[], None]], str],
    ) -> None:
        self.store = store
        self.jobs = JobStore(store.folder, store.now)
        self.weights = ServedWeights(store, self.jobs, digest)
        self._engine = engine
        self._read = read
        self._settings = settings
        self._is_known = is_known
        self._is_open = False
        self._opening = asyncio.Lock()
        self._wake = asyncio.Event()
        self._running: Job | None = None
        self._outcome: asyncio.Future[str] | None = None
        self._started: tuple[float, int] = (0.0, 0)  # when, and after which step
        self._turns: Counter[str] = Counter()  # number of each key's last one
        self._models = TunedModels(engine)
        self._stop_reading = threading.Event()  # the training file of the running job
        self._task: asyncio.Task[None] | None = None
        engine.on_tuning = self._take

    async def resume(self) -> None:
        """Continue the jobs of an earlier process, as soon as the folder is free."""
        self._task = asyncio.create_task(self._work())

    async def open(self) -> None:
        """Read the jobs; the file store is open."""
        async with self._opening:
            if self._is_open:
                return
            await self.store.work(self.jobs.read)
            self._is_open = True
            for job in self.jobs:
                self._charge(job, job.folder)
                if job.model is not None:
                    self._models.own(job.model, job.tenant)
            self._wake.set()

    async def close(self) -> None:
        """End all tasks; the jobs continue in the next process."""
        self.weights.close()
        self._stop_reading.set()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    # -- jobs ---------------------------------------------------------------------------------

    def add(self, tenant: str, value: FineTuningJob, options: TuningOptions) -> Job:
        """Store a new job, which runs when it is its turn; the weights are identified.

        Raises:
            OSError: it cannot be written.
        """
        job = self.jobs.add(tenant, value, options)
        self.jobs.note(job, "Created fine-tuning job")
        self._wake.set()
        return job

    def cancel(self, job: Job) -> None:
        """End a job that has not ended.

        Raises:
            OSError: it cannot be written, and continues.
        """
        self.jobs.enter(job, "cancelled")
        self._interrupt(job)
        self.jobs.note(job, "The job was cancelled")
        self._drop_work(job)

    def pause(self, job: Job) -> None:
        """Stop a job until it is resumed; its last saved step stays.

        Raises:
            OSError: it cannot be written, and continues.
        """
        self.jobs.enter(job, "paused")
        self._interrupt(job)
        self.jobs.note(job, "The job was paused")

    def unpause(self, job: Job) -> None:
        """Let a paused job run when it is its turn."""
        self.jobs.enter(job, "queued" if job.record.num_targets else "validating_files")
        self.jobs.note(job, "The job was resumed")
        self._wake.set()

    def owner(self, model: str) -> str | None:
        """The tenant that a fine-tuned model belongs to; None: it is none."""
        return self._models.owner(model)

    async def delete(self, job: Job) -> None:
        """Delete the model of a job.

        Raises:
            InvalidRequestError: requests use it.
            EngineDeadError: the engine is being restarted.
            OSError: it cannot be removed; it is no longer served, and can be deleted again.
        """
        name = job.model
        assert name is not None
        await self._models.unload(name)
        try:
            self.jobs.drop_adapter(job)
        finally:
            self._charge(job, job.folder)
        self._models.disown(name)

    def _charge(self, job: Job, folder: Path) -> None:
        """Charge a job's owner for the files below a folder."""
        self.store.charge(job.tenant, job.id, folder_bytes(folder))

    def _charge_within(self, job: Job, folder: Path) -> None:
        """The same.

        Raises:
            JobFailedError: they exceed its room.
        """
        self._charge(job, folder)
        if self.store.room(job.tenant) < 0:
            raise JobFailedError("file_budget", _NO_ROOM)

    def _drop_work(self, job: Job) -> None:
        try:
            self.jobs.drop_work(job)
        except OSError as error:
            logger.error("job %s: its files cannot be removed: %s", job.id, error)
        self._charge(job, job.folder)

    def _interrupt(self, job: Job) -> None:
        if job is self._running:
            self._stop_reading.set()
            self._engine.stop_tuning(job.id)
            if self._outcome is not None and not self._outcome.done():
                self._outcome.cancel()

    # -- running ------------------------------------------------------------------------------

    async def _work(self) -> None:
        has_models = False
        while True:
            self._wake.clear()
            try:
                if self.store.is_open:
                    await self.open()
                    if any(job.needs_weights for job in self.jobs):
                        await self.weights.identify()
                    if not has_models:
                        await self._models.load_all(filter(self.jobs.is_of_model, self.jobs))
                        has_models = True
                    while (job := self._next()) is not None:
                        await self._run(job)
            except Exception as error:  # the next look may find what this one lacked
                self.store.note(f"fine-tuning jobs: {type(error).__name__}: {error}")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_WATCH_SECONDS):
                    await self._wake.wait()

    def _next(self) -> Job | None:
        """The oldest job of the key whose last turn is the longest ago."""
        waiting = [
            job
            for job in self.jobs
            if job.value["status"] in ("validating_files", "queued", "running")
            and self.jobs.is_of_model(job)
        ]
        return min(waiting, key=lambda job: self._turns[job.tenant], default=None)

    async def _run(self, job: Job) -> None:
        self._running = job
        self._turns[job.tenant] = max(self._turns.values(), default=0) + 1
        try:
            await self._run_to_end(job)
        except JobFailedError as error:
            self._fail(job, error)
        except OSError as error:
            logger.error("job %s: %s", job.id, error)
            self._fail(job, JobFailedError("disk_error", "The job's data could not be written"))
        except asyncio.CancelledError:
            if self._task is not None and self._task.cancelling():
                raise  # the server ends
        except Exception as error:
            logger.error("job %s failed", job.id, exc_info=error)
            self._fail(job, JobFailedError("internal", "The job failed; see the server's log"))
        finally:
            self._running = None

    def _fail(self, job: Job, error: JobFailedError) -> None:
        if job.has_ended:
            return
        job.value["error"] = {"code": error.code, "message": str(error), "param": error.param}
        try:
            self.jobs.enter(job, "failed", at_any_rate=True)
        except OSError as why:  # the next process tries it again
            logger.error("job %s cannot be written: %s", job.id, why)
        self.jobs.note(job, str(error), "error")
        self._drop_work(job)

    async def _run_to_end(self, job: Job) -> None:
        if not self._is_known(job.tenant):
            raise JobFailedError("key_revoked", _REVOKED)
        if job.value["status"] == "validating_files":
            await self._validate(job)
        if job.value["status"] not in ("queued", "running"):
            return  # it was paused or cancelled
        self.jobs.enter(job, "running")
        settings = self._settings
        self._outcome = asyncio.get_running_loop().create_future()
        self._engine.start_tuning(
            StartTuning(
                job_id=job.id,
                folder=str(job.folder.absolute()),
                options=job.record.options,
                max_step_seconds=settings.finetune_max_step_seconds,
                max_bytes=settings.finetune_memory,
                slice_tokens=settings.finetune_slice_tokens,
            )
        )
        try:
            error = await self._outcome
        finally:
            self._outcome = None
        if error:
            code = "finetune_memory" if error.startswith("finetune_memory") else "training_failed"
            raise JobFailedError(code, error)
        await self._serve(job)

    async def _validate(self, job: Job) -> None:
        path = self.store.file_path(job.tenant, job.value["training_file"])
        try:
            if path is None:
                raise FileNotFoundError
            stop = self._stop_reading = threading.Event()
            examples = await self.store.work(self._read, path, stop.is_set)
        except StoppedError:
            return
        except FileNotFoundError:
            raise JobFailedError(
                "file_not_found", "The training file has been deleted or has expired",
                "training_file",
            ) from None  # fmt: skip
        except InvalidRequestError as error:
            raise JobFailedError(
                error.code or "invalid_training_file", error.message, "training_file"
            ) from None
        options = job.record.options
        steps = options.n_epochs * -(-len(examples) // options.batch_size)
        if steps > _MAX_STEPS:
            raise JobFailedError(
                "too_many_steps",
                f"the job would take {steps} steps, at most {_MAX_STEPS}; raise batch_size or "
                "lower n_epochs",
                "hyperparameters",
            )
        await self.store.work(write_examples, job.folder, examples)
        if job.has_ended:
            self._drop_work(job)
            return
        self._charge_within(job, job.folder)
        if job.value["status"] != "validating_files":
            return
        job.record.num_targets = sum(len(example.targets) for example in examples)
        self.jobs.enter(job, "queued")
        self.jobs.note(
            job,
            f"Files validated: {len(examples)} conversations, {job.record.num_targets} trained "
            "tokens",
        )

    async def _serve(self, job: Job) -> None:
        """Serve the trained model under its name."""
        value = job.value
        name = f"ft:{value['model']}:{value['user_provided_suffix'] or ''}:{job.id[-8:]}"
        self._charge_within(job, job.adapter)  # what stays of the job
        self._models.own(name, job.tenant)
        refusal: Exception | None = None
        try:
            await self._models.load(job, name)
            if value["status"] == "running":  # not cancelled or paused meanwhile
                self.jobs.enter(job, "succeeded", model=name)
        except ConfigError as error:
            refusal = JobFailedError("adapter_refused", str(error))
        except OSError as error:
            refusal = error
        if job.model is None:
            await self._models.withdraw(name)
            self._charge(job, job.folder)
            if refusal is not None:
                raise refusal
            return
        self.jobs.note(job, f"New fine-tuned model created: {name}")
        self.jobs.note(job, "The job has successfully completed")
        self._drop_work(job)
        logger.info("job %s: %s is served", job.id, name)

    # -- messages of the engine ---------------------------------------------------------------

    def _take(self, progress: TuningProgress) -> None:
        if progress.state == "stopped":
            for ended in self.jobs:  # the engine may have written after the job's end
                if ended.id == progress.job_id and ended.has_ended:
                    self._drop_work(ended)
        job, outcome = self._running, self._outcome
        if job is None or job.id != progress.job_id or outcome is None or outcome.done():
            return
        match progress.state:
            case "running":
                try:
                    (self._began if progress.loss is None else self._stepped)(job, progress)
                except (OSError, JobFailedError) as error:
                    self._engine.stop_tuning(job.id)
                    outcome.set_exception(error)
            case "succeeded":
                outcome.set_result("")
            case "failed":
                outcome.set_result(progress.error or "The training failed")

    def _began(self, job: Job, progress: TuningProgress) -> None:
        self._started = (time.monotonic(), progress.step)
        self.jobs.forget_steps(job, progress.step + 1)
        message = "Fine-tuning job started"
        if progress.step:
            message = f"Training continues after step {progress.step} of {progress.total_steps}"
        self.jobs.note(job, message)

    def _stepped(self, job: Job, progress: TuningProgress) -> None:
        assert progress.loss is not None
        step, total = progress.step, progress.total_steps
        began, first = self._started
        seconds = (time.monotonic() - began) / max(step - first, 1)
        job.value["estimated_finish"] = self.store.now() + round(seconds * (total - step))
        self.jobs.note(
            job,
            f"Step {step}/{total}: training loss={progress.loss:.4f}",
            data={
                "step": step,
                "total_steps": total,
                "train_loss": progress.loss,
                "train_mean_token_accuracy": progress.accuracy or 0.0,
            },
        )
        if not self._is_known(job.tenant):
            raise JobFailedError("key_revoked", _REVOKED)
        self._charge_within(job, job.folder)
