"""Ollama's API: request and answer schemas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NotRequired

from pydantic import AliasChoices, Field
from typing_extensions import TypedDict

from chunkllama_server.api.schema.base import (
    MAX_SEED,
    MAX_TOKENS,
    MOST_STOPS,
    MOST_TOOLS,
    RequestModel,
    StopString,
)
from chunkllama_server.api.schema.chat import CalledFunction, ChatTool

_STAYS = "Ignored: the server's settings decide, and the model stays loaded."


class OllamaOptions(RequestModel):
    """Options of a model, with Ollama's names."""

    own_limits: ClassVar[Mapping[str, str]] = {"stop": "max_stop_chars"}

    num_predict: int | None = Field(
        default=None,
        ge=-2,
        le=MAX_TOKENS,
        description="Honoured: tokens of the answer; 0, -1 and -2 are no limit but the context. "
        "Default -1.",
    )
    temperature: float | None = Field(
        default=None,
        ge=0,
        le=2,
        description="Honoured: 0 is greedy. Default: the model's, else 0.8.",
    )
    top_k: int | None = Field(
        default=None,
        ge=-1,
        le=MAX_TOKENS,
        description="Honoured. Default: the model's, else 40.",
    )
    top_p: float | None = Field(
        default=None, ge=0, le=1, description="Honoured. Default: the model's, else 0.9."
    )
    min_p: float | None = Field(default=None, ge=0, le=1, description="Honoured.")
    seed: int | None = Field(
        default=None,
        ge=-MAX_SEED - 1,
        le=MAX_SEED,
        description="Honoured: -1 is another one for each request.",
    )
    stop: (
        StopString
        | Annotated[list[StopString], Field(max_length=MOST_STOPS, fail_fast=True)]
        | None
    ) = Field(
        default=None,
        description="Honoured: strings of 1 to 256 characters, together up to the setting "
        "max_stop_chars.",
    )
    repeat_penalty: float | None = Field(
        default=None,
        gt=0,
        le=100,
        description="Honoured: over prompt and answer. Default: the model's, else 1.",
    )
    presence_penalty: float | None = Field(default=None, ge=-2, le=2, description="Honoured.")
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2, description="Honoured.")
    repeat_last_n: int | None = Field(
        default=None, description="Ignored and named: penalties look at the whole text."
    )
    mirostat: int | None = Field(default=None, description="Ignored and named, unless 0.")
    mirostat_tau: float | None = Field(default=None, description="Ignored.")
    mirostat_eta: float | None = Field(default=None, description="Ignored.")
    typical_p: float | None = Field(default=None, description="Ignored and named.")
    tfs_z: float | None = Field(default=None, description="Ignored and named.")
    penalize_newline: bool | None = Field(default=None, description="Ignored.")
    num_ctx: int | None = Field(default=None, description=_STAYS)
    num_keep: int | None = Field(default=None, description=_STAYS)
    num_batch: int | None = Field(default=None, description=_STAYS)
    num_gpu: int | None = Field(default=None, description=_STAYS)
    main_gpu: int | None = Field(default=None, description=_STAYS)
    num_thread: int | None = Field(default=None, description=_STAYS)
    low_vram: bool | None = Field(default=None, description=_STAYS)
    use_mmap: bool | None = Field(default=None, description=_STAYS)
    use_mlock: bool | None = Field(default=None, description=_STAYS)
    numa: bool | None = Field(default=None, description=_STAYS)


class OllamaRequest(RequestModel):
    """What all requests have."""

    model: str = Field(
        min_length=1,
        description="Honoured: a served model name, with or without :latest; another is 404.",
    )
    keep_alive: float | int | str | None = Field(default=None, description=_STAYS)
    options: OllamaOptions | None = Field(default=None, description="Honoured.")


class OllamaGeneration(OllamaRequest):
    """What requests that generate have."""

    refuses_binding: ClassVar[bool] = True

    keep_alive: float | int | str | None = Field(
        default=None,
        description="Honoured: 0 without a prompt is answered as unloading. The model stays loaded "
        "in any case.",
    )
    stream: bool | None = Field(default=None, description="Honoured. Default true.")
    format: Literal["", "json"] | dict[str, Any] | None = Field(
        default=None, description="Honoured: json, or a JSON schema of the answer."
    )
    think: bool | Literal["low", "medium", "high"] | None = Field(
        default=None,
        description="Honoured: true and a level are refused where the model has no thoughts.",
    )
    logprobs: bool | None = Field(default=None, description="Ignored and named.")
    top_logprobs: int | None = Field(default=None, description="Ignored and named.")


class OllamaCall(RequestModel):
    """A tool call of an earlier answer."""

    id: str | None = Field(default=None, max_length=256, description="Honoured.")
    type: str | None = Field(default=None, max_length=64, description="Ignored.")
    function: CalledFunction = Field(description="Honoured through the template.")


class OllamaMessage(RequestModel):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant", "tool"] = Field(description="Honoured.")
    content: str | None = Field(default=None, description="Honoured.")
    thinking: str | None = Field(default=None, description="Honoured through the template.")
    tool_calls: Annotated[list[OllamaCall], Field(max_length=4096, fail_fast=True)] | None = Field(
        default=None, description="Honoured through the template."
    )
    tool_name: str | None = Field(
        default=None, max_length=256, description="Honoured: whose result a tool message has."
    )
    tool_call_id: str | None = Field(default=None, max_length=256, description="Honoured.")
    images: list[Any] | None = Field(
        default=None,
        description="Refused in a message of the user in the turn to be answered; named in the "
        "prompt in earlier ones and in results of tools.",
    )


class OllamaChatRequest(OllamaGeneration):
    """Body of POST /api/chat."""

    own_limits: ClassVar[Mapping[str, str]] = {"tools": "max_tools"}

    messages: Annotated[list[OllamaMessage], Field(max_length=4096, fail_fast=True)] | None = Field(
        default=None,
        description="Honoured: without a message nothing is generated. A last message of the "
        "assistant is continued.",
    )
    tools: Annotated[list[ChatTool], Field(max_length=MOST_TOOLS, fail_fast=True)] | None = Field(
        default=None, description="Honoured: up to the setting max_tools."
    )


class OllamaGenerateRequest(OllamaGeneration):
    """Body of POST /api/generate."""

    prompt: str | None = Field(
        default=None,
        description="Honoured: a message of the user; without one nothing is generated.",
    )
    system: str | None = Field(default=None, description="Honoured: the system message.")
    raw: bool | None = Field(
        default=None, description="Honoured: the prompt is continued as it is."
    )
    images: list[Any] | None = Field(default=None, description="Refused.")
    suffix: str | None = Field(default=None, description="Refused.")
    template: str | None = Field(default=None, description="Refused.")
    context: list[Any] | None = Field(default=None, description="Refused.")


class OllamaEmbedRequest(OllamaRequest):
    """Body of POST /api/embed."""

    input: str | Annotated[list[str], Field(max_length=2048, fail_fast=True)] = Field(
        description="Honoured: up to 2048 texts."
    )
    truncate: bool | None = Field(
        default=None, description="Honoured: false refuses texts beyond the context."
    )
    dimensions: int | None = Field(
        default=None, ge=1, le=2**20, description="Honoured: the first so many values."
    )


class OllamaEmbeddingsRequest(OllamaRequest):
    """Body of POST /api/embeddings, the former path of /api/embed."""

    prompt: str | None = Field(
        default=None, description="Honoured: without one there is no embedding."
    )


class OllamaShowRequest(RequestModel):
    """Body of POST /api/show."""

    model: str = Field(
        min_length=1,
        validation_alias=AliasChoices("model", "name"),
        description="Honoured: a served model name; name is its older spelling.",
    )
    verbose: bool | None = Field(default=None, description="Ignored.")


class OllamaFunction(TypedDict):
    """A function to call."""

    name: str
    arguments: dict[str, Any]


class OllamaToolCall(TypedDict):
    """A tool call of the answer."""

    id: str
    function: OllamaFunction


class OllamaAnswerMessage(TypedDict):
    """An answer, or the next part of one."""

    role: Literal["assistant"]
    content: str
    thinking: NotRequired[str]
    tool_calls: NotRequired[list[OllamaToolCall]]


class OllamaCounts(TypedDict):
    """Counts and times of an answer; times are in nanoseconds."""

    total_duration: int
    load_duration: int
    prompt_eval_count: int
    prompt_eval_duration: int
    eval_count: int
    eval_duration: int


class OllamaPart(TypedDict):
    """A line of a stream, and the whole answer: the last line has counts and times."""

    model: str
    created_at: str
    done: bool
    done_reason: NotRequired[str]
    total_duration: NotRequired[int]
    load_duration: NotRequired[int]
    prompt_eval_count: NotRequired[int]
    prompt_eval_duration: NotRequired[int]
    eval_count: NotRequired[int]
    eval_duration: NotRequired[int]


class OllamaChatResponse(OllamaPart):
    """Answer to POST /api/chat."""

    message: OllamaAnswerMessage


class OllamaGenerateResponse(OllamaPart):
    """Answer to POST /api/generate."""

    response: str
    thinking: NotRequired[str]


class OllamaEmbedResponse(TypedDict):
    """Answer to POST /api/embed."""

    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class OllamaEmbedding(TypedDict):
    """Answer to POST /api/embeddings; it is not scaled to length 1, as that of /api/embed is."""

    embedding: list[float]


class OllamaDetails(TypedDict):
    """What is known of a model."""

    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class OllamaModel(TypedDict):
    """A served model; the size is not known here."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: OllamaDetails


class OllamaModels(TypedDict):
    """Answer to GET /api/tags."""

    models: list[OllamaModel]


class OllamaRunningModel(OllamaModel):
    """A served model, which is loaded and stays so; the size of its part on a GPU is not known."""

    expires_at: str
    size_vram: int
    context_length: int


class OllamaRunning(TypedDict):
    """Answer to GET /api/ps."""

    models: list[OllamaRunningModel]


class OllamaShown(TypedDict):
    """Answer to POST /api/show."""

    modelfile: str
    parameters: str
    template: str
    details: OllamaDetails
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class OllamaError(TypedDict):
    """Every refusal and failure below /api."""

    error: str
