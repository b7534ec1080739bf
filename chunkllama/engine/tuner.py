"""Train an adapter between the steps of an engine, in the time that its requests leave.

A training is a series of short pieces of work (``tuning/passes.py``). After each step as many of
them run as fit below the ceiling, together with a step as long as recent ones; without requests one
runs at a time, so that a request waits for one piece at most. Weights are loaded and files written
in threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import torch

from chunkllama.errors import ConfigError
from chunkllama.logger import init_logger
from chunkllama.model_spec import ModelSpec
from chunkllama.tuning.files import StepResult
from chunkllama.tuning.folder import read_examples
from chunkllama.tuning.load import load_trainer
from chunkllama.tuning.passes import Piece
from chunkllama.tuning.trainer import Trainer
from chunkllama.tuning_messages import StartTuning, TuningProgress

logger = init_logger(__name__)

_WAIT_SECONDS: Final = 0.01  # for a thread, while no request runs
_STEP_DECAY: Final = 0.9  # by which the longest step counts less with each one after it
_PIECE_DECAY: Final = 0.95  # the same for the longest piece of a kind, done or put off
_MARGIN: Final = 1.1  # a piece may take longer than the longest of its kind


class StepBudget:
    """How long the pieces after a step may take.

    Args:
        ceiling: seconds that a step and they may take together.
        clock: seconds.
    """

    def __init__(self, ceiling: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._ceiling = ceiling
        self._clock = clock
        self._step = 0.0
        self._pieces: dict[Piece, float] = {}
        self._began = self._ended = clock()
        self._piece_began = 0.0

    def begin(self) -> None:
        """Begin a turn; what lies between the last one's end and now is a step."""
        self._began = self._clock()
        self._step = max(self._began - self._ended, _STEP_DECAY * self._step)

    def end(self) -> None:
        """End a turn."""
        self._ended = self._clock()

    def fits(self, piece: Piece) -> bool:
        """Whether a piece would end in time, if the next step takes as long as recent ones."""
        spent = self._clock() - self._began
        expected = _MARGIN * self._pieces.get(piece, 0.0)
        return self._step + spent + expected <= self._ceiling

    def put_off(self, piece: Piece) -> None:
        """Note that a piece is not done now; one that never fits is tried once in a while."""
        self._pieces[piece] = _PIECE_DECAY * self._pieces.get(piece, 0.0)

    def begin_piece(self) -> None:
        self._piece_began = self._clock()

    def end_piece(self, piece: Piece) -> None:
        seconds = self._clock() - self._piece_began
        self._pieces[piece] = max(seconds, _PIECE_DECAY * self._pieces.get(piece, 0.0))


@dataclass(slots=True)
class _Run:
    """A job that is being loaded or trained.

    Attributes:
        loading: its trainer, until it is loaded.
        pieces: its work, of which ``next_piece`` comes next.
        reports: that have not been sent.
    """

    command: StartTuning
    budget: StepBudget
    loading: Future[Trainer] | None = None
    trainer: Trainer | None = None
    pieces: Iterator[Piece] = field(default_factory=lambda: iter(()))
    next_piece: Piece = "wait"
    reports: list[TuningProgress] = field(default_factory=list)

    def note(self, step: StepResult) -> None:
        """Report a step that is done."""
        self._report(step.step, step.loss, step.accuracy, step.num_tokens)

    def begin(self, trainer: Trainer) -> None:
        """Train from where the last state ends."""
        self.trainer = trainer
        self.pieces = trainer.work()
        self.next_piece = next(self.pieces)
        self._report(len(trainer.steps))

    def _report(
        self,
        step: int,
        loss: float | None = None,
        accuracy: float | None = None,
        num_tokens: int = 0,
    ) -> None:
        assert self.trainer is not None
        self.reports.append(
            TuningProgress(
                job_id=self.command.job_id,
                state="running",
                step=step,
                total_steps=self.trainer.total_steps,
                loss=loss,
                accuracy=accuracy,
                num_tokens=num_tokens,
                run=self.command.run,
            )
        )

    def end(self, state: Literal["succeeded", "failed"], error: str = "") -> TuningProgress:
        """Return the report of the job's end."""
        command = self.command
        return TuningProgress(job_id=command.job_id, state=state, error=error, run=command.run)


class Tuner:
    """Runs one job at a time.

    Args:
        model_path, spec, name: of the model.
        max_model_len: that it is served with.
        device: to train on.
        num_ranks: of the model; only one can train.
        has_weights: whether the folder's weights are those that are served.
    """

    def __init__(
        self,
        model_path: Path,
        spec: ModelSpec,
        name: str,
        max_model_len: int,
        device: torch.device,
        num_ranks: int = 1,
        clock: Callable[[], float] = time.monotonic,
        has_weights: bool = True,
    ) -> None:
        self._has_weights = has_weights
        self._model_path = model_path
        self._spec = spec
        self._name = name
        self._max_model_len = max_model_len
        self._device = device
        self._num_ranks = num_ranks
        self._clock = clock
        self._run: _Run | None = None
        self._ending: list[tuple[Future[None], TuningProgress]] = []  # sent when it is written
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tuning-load")

    @property
    def is_active(self) -> bool:
        """Whether ``turn`` has work."""
        return self._run is not None or bool(self._ending)

    def start(self, command: StartTuning) -> list[TuningProgress]:
        """Begin to load a job; ``turn`` reports how it goes on."""
        run = _Run(command, StepBudget(command.max_step_seconds, self._clock))
        if self._num_ranks > 1:
            return [run.end("failed", "fine-tuning needs tensor_parallel_size 1")]
        if not self._has_weights:
            return [run.end("failed", "fine-tuning needs load_format auto: these are random")]
        if self._run is not None:
            error = f"job {self._run.command.job_id} is running; one at a time is trained"
            return [run.end("failed", error)]
        writing = [write for write, _ in self._ending]
        run.loading = self._thread.submit(self._load, command, run.note, writing)
        self._run = run
        return []

    def stop(self, job_id: str) -> list[TuningProgress]:
        """End a job; its last state stays on the disk.

        Returns:
            That it is stopped; ``turn`` returns it instead if its state is still being written.
        """
        report = TuningProgress(job_id=job_id, state="stopped")
        if self._run is not None and self._run.command.job_id == job_id:
            return self._end(report)
        return [report]

    def turn(self, *, is_busy: bool) -> list[TuningProgress]:
        """Do some pieces of work.

        Args:
            is_busy: requests run or wait; otherwise at most one piece is done.

        Returns:
            Steps that are done, and the end of the job.
        """
        run = self._run
        if run is None:
            return self._written(_WAIT_SECONDS if self._ending and not is_busy else 0.0)
        end = None
        run.budget.begin()
        try:
            if self._advance(run, is_busy=is_busy):
                end = run.end("succeeded")
        except Exception as error:  # a bug or a full disk must not end the engine
            end = run.end("failed", _reason(error))
        earlier = self._written(0.0)
        ends = [] if end is None else self._end(end)
        run.budget.end()
        reports, run.reports = run.reports, []
        return [*earlier, *reports, *ends]

    def close(self) -> None:
        """End the job, whose last state stays, and wait for the threads."""
        if self._run is not None:
            self._end(TuningProgress(job_id=self._run.command.job_id, state="stopped"))
        wait([write for write, _ in self._ending])
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _end(self, report: TuningProgress) -> list[TuningProgress]:
        """End the job; returns the report, unless ``_written`` does once its files are written."""
        run, self._run = self._run, None
        assert run is not None
        if run.loading is not None:
            run.loading.cancel()
        if run.trainer is None:
            return [report]
        run.trainer.close(wait=False)
        writing = run.trainer.writing
        if writing is None or writing.done():
            return [report]
        self._ending.append((writing, report))
        return []

    def _written(self, seconds: float) -> list[TuningProgress]:
        """Return the reports of ended jobs whose files are written, after so long at most."""
        if seconds:
            wait([write for write, _ in self._ending], seconds)
        ended, self._ending = self._ending, []
        done = []
        for write, report in ended:
            if write.done():
                done.append(report)
            else:
                self._ending.append((write, report))
        return done

    def _load(
        self,
        command: StartTuning,
        on_step: Callable[[StepResult], None],
        writing: list[Future[None]],
    ) -> Trainer:
        wait(writing)  # by an earlier training of this folder
        folder = Path(command.folder)
        return load_trainer(
            model_path=self._model_path,
            spec=self._spec,
            name=self._name,
            max_model_len=self._max_model_len,
            device=self._device,
            examples=read_examples(folder),
            options=command.options,
            folder=folder,
            max_bytes=command.max_bytes,
            slice_tokens=command.slice_tokens,
            on_step=on_step,
        )

    def _advance(self, run: _Run, *, is_busy: bool) -> bool:
        """Do some pieces; returns whether there are no more."""
        if run.loading is not None:
            if not is_busy:
                wait([run.loading], _WAIT_SECONDS)
            if run.loading.done():
                loaded, run.loading = run.loading.result(), None
                run.begin(loaded)
            return False
        assert run.trainer is not None
        while True:
            piece, writing = run.next_piece, run.trainer.writing
            if piece == "wait" and writing is not None and not writing.done():
                if not is_busy:
                    wait([writing], _WAIT_SECONDS)
                return False
            if is_busy and not run.budget.fits(piece):
                run.budget.put_off(piece)
                return False
            run.budget.begin_piece()
            following = next(run.pieces, None)
            if self._device.type == "cuda":  # its calls return before the work is done
                torch.cuda.synchronize(self._device)
            run.budget.end_piece(piece)
            if following is None:
                return True
            run.next_piece = following
            if not is_busy:
                return False


def _reason(error: Exception) -> str:
    """Why a job has failed, in one line that its owner may read."""
    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "the device has too little memory beside the pool; lower kv_cache_memory"
    logger.error("a training has failed", exc_info=error)
    if isinstance(error, OSError):
        return f"a file cannot be written: {error.strerror}"
    return f"internal error: {type(error).__name__}"
