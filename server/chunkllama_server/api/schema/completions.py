"""POST /v1/completions: request and response schemas."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from chunkllama_server.api.schema.base import MAX_TOKENS, SamplingFields, TokenIds
from chunkllama_server.api.schema.chat import ResponseFormat
from chunkllama_server.api.schema.chat_response import PromptLogprob
from chunkllama_server.api.schema.usage import CompletionUsage

NO_LIMIT = -1  # as max_tokens, where null is 16
PromptIds = Annotated[TokenIds, Field(min_length=1, max_length=2**20)]
Prompt = (
    str
    | PromptIds
    | Annotated[list[str], Field(min_length=1, max_length=1024, fail_fast=True)]
    | Annotated[list[PromptIds], Field(min_length=1, max_length=1024, fail_fast=True)]
)


class CompletionRequest(SamplingFields):
    """Body of POST /v1/completions."""

    prompt: Prompt | None = Field(
        default=None,
        description="Honoured: text, texts, token ids or lists of them. Default: the BOS token.",
    )
    best_of: int | None = Field(
        default=None, ge=0, le=20, description="Honoured: at least n, not with stream."
    )
    echo: bool | None = Field(default=None, description="Honoured: the prompt's text comes first.")
    logprobs: int | None = Field(
        default=None, ge=0, le=5, description="Honoured: with echo the prompt's tokens too."
    )
    max_tokens: int | None = Field(
        default=None,
        ge=NO_LIMIT,
        le=MAX_TOKENS,
        description="Honoured. Default 16; -1 is the rest of the context; 0 with echo scores a "
        "prompt.",
    )
    suffix: str | None = Field(default=None, description="Refused: needs an infill model.")
    response_format: ResponseFormat | None = Field(default=None, description="Honoured.")
    add_special_tokens: bool | None = Field(
        default=None, description="Honoured: whether text prompts begin with BOS. Default true."
    )


class CompletionLogprobs(TypedDict):
    """Log-probabilities by token, as parallel lists."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """One choice; index = prompt index * n + choice.

    ``branch``, in a stream, is the index of the parallel branch whose text it is.
    """

    text: str
    index: int
    finish_reason: Literal["stop", "length", "content_filter"] | None
    logprobs: CompletionLogprobs | None
    stop_reason: NotRequired[int | str]
    token_ids: NotRequired[list[int]]
    branch: NotRequired[int]
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[list[dict[str, PromptLogprob] | None]]


class Completion(TypedDict):
    """Answer to POST /v1/completions, and each event of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: str
    usage: NotRequired[CompletionUsage | None]
