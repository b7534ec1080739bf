"""Messages about fine-tuning between an engine client and the engine loop."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

BASE_LEARNING_RATE: Final = 2e-4  # of a multiplier of 1


class TuningOptions(msgspec.Struct, kw_only=True, frozen=True):
    """How an adapter is trained.

    Attributes:
        batch_size: examples of an optimizer step.
        learning_rate: of AdamW, the same for all steps.
        seed: of the A matrices and of the order of the examples.
        rank, alpha: of the adapter; what it adds is multiplied by alpha / rank.
    """

    n_epochs: int = 3
    batch_size: int = 4
    learning_rate: float = BASE_LEARNING_RATE
    seed: int = 0
    rank: int = 8
    alpha: float = 16.0


class StartTuning(msgspec.Struct, kw_only=True, tag="start_tuning"):
    """Train an adapter between steps, from where a saved state ends.

    Attributes:
        folder: of the job; holds the examples, gets the state and the adapter.
        max_step_seconds: a step and the training after it take at most so long together.
        max_bytes: memory that training may take.
        slice_tokens: tokens of one piece of work.
        run: counts the trainings that a client has started; reports of a training have its number.
    """

    job_id: str
    folder: str
    options: TuningOptions
    max_step_seconds: float
    max_bytes: int
    slice_tokens: int
    run: int = 0


class StopTuning(msgspec.Struct, kw_only=True, tag="stop_tuning"):
    """End the training of a job; its saved state stays."""

    job_id: str


class TuningProgress(msgspec.Struct, kw_only=True, tag="tuning_progress"):
    """What has become of a job.

    Attributes:
        step: optimizer steps that are done.
        total_steps: of the whole job.
        loss: mean over the trained tokens of the last step, before it; None at the start.
        accuracy: share of them that the model found most probable.
        num_tokens: trained tokens of the last step.
        error: of a job that has failed, in one line.
        run: of the ``StartTuning`` that it belongs to; 0 in state "stopped".
    """

    job_id: str
    state: Literal["running", "succeeded", "failed", "stopped"]
    step: int = 0
    total_steps: int = 0
    loss: float | None = None
    accuracy: float | None = None
    num_tokens: int = 0
    error: str = ""
    run: int = 0
