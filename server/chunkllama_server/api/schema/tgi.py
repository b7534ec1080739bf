"""The API of Hugging Face's Text Generation Inference: request and answer schemas."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from chunkllama_server.api.schema.base import (
    MAX_SEED,
    MAX_STOPS,
    MAX_TOKENS,
    RequestModel,
    StopString,
)


class TgiGrammar(RequestModel):
    """A constraint on the answer."""

    type: Literal["json", "json_object", "json_schema", "regex"] = Field(description="Honoured.")
    value: Any = Field(default=None, description="Honoured: a JSON schema or an expression.")


class TgiParameters(RequestModel):
    """Parameters of a generation."""

    max_new_tokens: int | None = Field(
        default=None, ge=1, le=MAX_TOKENS, description="Honoured. Default 100."
    )
    min_new_tokens: int | None = Field(default=None, ge=0, le=MAX_TOKENS, description="Honoured.")
    max_length: Any = Field(
        default=None, description="Refused: it counts the prompt; send max_new_tokens."
    )
    min_length: Any = Field(
        default=None, description="Refused: it counts the prompt; send min_new_tokens."
    )
    do_sample: bool | None = Field(
        default=None,
        description="Honoured: without it, and without top_k and a temperature and top_p other "
        "than 1, the answer is greedy.",
    )
    temperature: float | None = Field(default=None, gt=0, le=2, description="Honoured.")
    top_k: int | None = Field(default=None, ge=1, le=MAX_TOKENS, description="Honoured.")
    top_p: float | None = Field(default=None, gt=0, le=1, description="Honoured.")
    repetition_penalty: float | None = Field(default=None, gt=0, le=100, description="Honoured.")
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2, description="Honoured.")
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED, description="Honoured.")
    stop: Annotated[list[StopString], Field(max_length=MAX_STOPS, fail_fast=True)] | None = Field(
        default=None,
        description="Honoured: strings which the text ends with; up to the setting "
        "max_stop_strings.",
    )
    return_full_text: bool | None = Field(
        default=None, description="Honoured: the text begins with the prompt."
    )
    details: bool | None = Field(
        default=None, description="Honoured: tokens with their log-probabilities."
    )
    decoder_input_details: bool | None = Field(
        default=None, description="Honoured with details: tokens of the prompt; not in a stream."
    )
    truncate: int | None = Field(
        default=None, ge=1, le=MAX_TOKENS, description="Honoured: keeps the prompt's last N tokens."
    )
    grammar: TgiGrammar | None = Field(default=None, description="Honoured.")
    best_of: int | None = Field(default=None, ge=1, le=1, description="Honoured: 1.")
    top_n_tokens: int | None = Field(default=None, description="Ignored and named, unless 0.")
    typical_p: float | None = Field(default=None, description="Ignored and named.")
    watermark: bool | None = Field(default=None, description="Ignored and named, unless false.")
    early_stopping: Any = Field(
        default=None, description="Ignored and named, unless false: of beam search."
    )
    length_penalty: Any = Field(default=None, description="Ignored and named: of beam search.")
    diversity_penalty: Any = Field(default=None, description="Ignored and named: of beam search.")
    adapter_id: str | None = Field(default=None, description="Refused.")


class TgiRequest(RequestModel):
    """Body of POST /generate and /generate_stream."""

    refuses_binding: ClassVar[bool] = True

    inputs: str = Field(min_length=1, description="Honoured: the prompt, continued as it is.")
    parameters: TgiParameters | None = Field(default=None, description="Honoured.")


_Texts = Annotated[list[str], Field(min_length=1, max_length=2048, fail_fast=True)]


class TeiEmbedRequest(RequestModel):
    """Body of POST /embed, of Text Embeddings Inference."""

    inputs: str | _Texts = Field(description="Honoured: up to 2048 texts.")
    normalize: bool | None = Field(
        default=None, description="Honoured: false gives vectors as the model has them."
    )
    truncate: bool | None = Field(
        default=None, description="Honoured: true cuts texts beyond the context."
    )
    truncation_direction: Literal["Right", "right"] | None = Field(
        default=None, description="Honoured: texts are cut at their end."
    )
    dimensions: int | None = Field(
        default=None,
        ge=1,
        le=2**20,
        description="Honoured: the first so many values; not without normalize.",
    )
    encoding_format: Literal["float"] | None = Field(default=None, description="Honoured.")
    prompt_name: str | None = Field(default=None, description="Refused.")


class TgiCompatRequest(TgiRequest):
    """Body of POST /, which huggingface_hub uses."""

    stream: bool | None = Field(default=None, description="Honoured.")


class TgiToken(TypedDict):
    """A generated token."""

    id: int
    text: str
    logprob: float
    special: bool


class TgiPrefillToken(TypedDict):
    """A token of the prompt; the first has no log-probability."""

    id: int
    text: str
    logprob: float | None


TgiFinish = Literal["length", "eos_token", "stop_sequence"]


class TgiDetails(TypedDict):
    """How a whole answer was generated."""

    finish_reason: TgiFinish
    generated_tokens: int
    seed: int | None
    prefill: list[TgiPrefillToken]
    tokens: list[TgiToken]


class TgiAnswer(TypedDict):
    """Answer to POST /generate."""

    generated_text: str
    details: NotRequired[TgiDetails]


class TgiStreamDetails(TypedDict):
    """How a streamed answer was generated."""

    finish_reason: TgiFinish
    generated_tokens: int
    seed: int | None
    input_length: int


class TgiEvent(TypedDict):
    """An event of a stream: one token; the last one has the whole text."""

    index: int
    token: TgiToken
    generated_text: str | None
    details: TgiStreamDetails | None


class TgiInfo(TypedDict):
    """Answer to GET /info."""

    model_id: str
    model_sha: str | None
    model_dtype: str
    model_device_type: str
    model_pipeline_tag: str
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_total_tokens: int
    validation_workers: int
    max_client_batch_size: int
    router: str
    version: str
    sha: str | None
    docker_label: str | None


class TgiError(TypedDict):
    """Every refusal and failure of these paths."""

    error: str
    error_type: str
