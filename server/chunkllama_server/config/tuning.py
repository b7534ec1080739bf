"""Settings of fine-tuning."""

from __future__ import annotations

from pydantic import Field

from chunkllama.config import Bytes, ConfigGroup, limit


class TuningConfig(ConfigGroup):
    """Fine-tuning beside serving."""

    finetune: bool = Field(
        default=True,
        description="Serve /v1/fine_tuning/jobs, which train adapters between steps; needs "
        "batches, one engine (no cluster), tensor_parallel_size 1 and a load_format other than "
        "dummy.",
    )
    finetune_max_step_seconds: float = Field(
        default=0.1,
        gt=0,
        le=60,
        description="While requests run, training fits below this together with a step as long as "
        "recent ones: the ceiling of the time per output token. Steps that take as long by "
        "themselves leave no time to train.",
    )
    finetune_slice_tokens: int = Field(
        default=64,
        ge=8,
        le=4096,
        description="Tokens of one piece of training, a layer forward and backward; a request that "
        "comes while nothing else runs waits for one piece.",
    )
    finetune_memory: Bytes = limit(
        2 << 30, "bytes", "tenant", "200 finetune_memory",
        "Memory that a training may take: weights in the checkpoint's type, adapter, optimizer and "
        "activations. A job that needs more fails.",
    )  # fmt: skip
    finetune_jobs: int = limit(
        5, "jobs", "tenant", "429 too_many_jobs", "Fine-tuning jobs of a key that have not ended.",
        "At most {limit} jobs of a key run or wait; try again when one has ended", ge=1,
    )  # fmt: skip
    finetune_lines: int = limit(
        10_000, "lines", "tenant", "200 invalid_training_file", "Lines of a training file.", ge=1,
    )  # fmt: skip
    finetune_answers: int = limit(
        128, "answers", "tenant", "200 invalid_training_file",
        "Answers of a line that are trained; each renders its conversation twice.", ge=1,
    )  # fmt: skip
    finetune_tokens: int = limit(
        100_000_000, "tokens", "tenant", "200 invalid_training_file",
        "Tokens that a training file is rendered to; each trained answer counts its conversation "
        "twice more.",
        ge=1,
    )  # fmt: skip
