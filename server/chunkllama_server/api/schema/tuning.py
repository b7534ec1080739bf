"""/v1/fine_tuning/jobs: request and answer schemas."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import TypedDict

from chunkllama_server.api.schema.base import RequestModel

_KEY_CHARS, _VALUE_CHARS = 64, 512  # of metadata
Auto = Literal["auto"]


class Hyperparameters(RequestModel):
    """How long and how fast to train."""

    n_epochs: Auto | Annotated[int, Field(ge=1, le=50)] = Field(
        default="auto", description="Honoured: passes over the file; auto is 3."
    )
    batch_size: Auto | Annotated[int, Field(ge=1, le=256)] = Field(
        default="auto", description="Honoured: lines of an optimizer step; auto is 4."
    )
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=1000)] = Field(
        default="auto", description="Honoured: times 2e-4; auto is 1."
    )


class SupervisedMethod(RequestModel):
    """Options of the method supervised."""

    hyperparameters: Hyperparameters | None = Field(default=None, description="Honoured.")


class TuningMethod(RequestModel):
    """How to train."""

    type: Literal["supervised"] = Field(
        description="Honoured: supervised. dpo and reinforcement are refused."
    )
    supervised: SupervisedMethod | None = Field(default=None, description="Honoured.")
    dpo: Any = Field(default=None, description="Refused.")
    reinforcement: Any = Field(default=None, description="Refused.")


class LoraOptions(RequestModel):
    """The adapter to train, of all linear layers."""

    rank: int = Field(default=8, ge=1, le=128, description="Honoured.")
    alpha: float = Field(
        default=16.0, gt=0, le=1e6, description="Honoured: its part is multiplied by alpha / rank."
    )


class FineTuningRequest(RequestModel):
    """Body of POST /v1/fine_tuning/jobs."""

    model: str = Field(description="Honoured: a served name of the model.")
    training_file: str = Field(
        max_length=128, description="Honoured: an uploaded file of purpose fine-tune."
    )
    hyperparameters: Hyperparameters | None = Field(
        default=None, description="Honoured (deprecated): those of method.supervised come first."
    )
    method: TuningMethod | None = Field(default=None, description="Honoured.")
    suffix: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9._-]{1,64}$",
        description="Honoured: part of the trained model's name.",
    )
    seed: int | None = Field(
        default=None,
        ge=0,
        le=2**31 - 1,
        description="Honoured: of the adapter's first values and the order of the lines; 0 if "
        "absent.",
    )
    lora: LoraOptions | None = Field(default=None, description="Honoured.")
    metadata: (
        dict[
            Annotated[str, Field(max_length=_KEY_CHARS)],
            Annotated[str, Field(max_length=_VALUE_CHARS)],
        ]
        | None
    ) = Field(default=None, max_length=16, description="Honoured: returned with the job.")
    validation_file: str | None = Field(default=None, description="Refused.")
    integrations: Any = Field(default=None, description="Refused.")


class TuningError(TypedDict):
    """Why a job has failed."""

    code: str
    message: str
    param: str | None


class ChosenHyperparameters(TypedDict):
    """The numbers that a job runs with."""

    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float


class ChosenSupervised(TypedDict):
    """Options of the method supervised."""

    hyperparameters: ChosenHyperparameters


class ChosenMethod(TypedDict):
    """The method that a job runs with."""

    type: Literal["supervised"]
    supervised: ChosenSupervised


JobStatus = Literal[
    "validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"
]


class FineTuningJob(TypedDict):
    """A fine-tuning job."""

    id: str
    object: Literal["fine_tuning.job"]
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: JobStatus
    hyperparameters: ChosenHyperparameters
    method: ChosenMethod
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    error: TuningError | None
    seed: int
    user_provided_suffix: str | None
    integrations: list[Any]
    metadata: dict[str, str] | None


class JobList(TypedDict):
    """The key's jobs, newest first."""

    object: Literal["list"]
    data: list[FineTuningJob]
    has_more: bool


class StepMetrics(TypedDict):
    """What an optimizer step gave: means over its trained tokens, before the step."""

    step: int
    total_steps: int
    train_loss: float
    train_mean_token_accuracy: float


class TuningEvent(TypedDict):
    """What has happened to a job."""

    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: StepMetrics | None


class EventList(TypedDict):
    """Events of a job, newest first."""

    object: Literal["list"]
    data: list[TuningEvent]
    has_more: bool


class CheckpointMetrics(TypedDict):
    """The last step before a checkpoint."""

    step: int
    train_loss: float
    train_mean_token_accuracy: float


class Checkpoint(TypedDict):
    """A model that a job has made."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"]
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: CheckpointMetrics
    step_number: int


class CheckpointList(TypedDict):
    """Models of a job that can be requested."""

    object: Literal["list"]
    data: list[Checkpoint]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedModel(TypedDict):
    """A fine-tuned model that was deleted."""

    id: str
    object: Literal["model"]
    deleted: bool
