"""POST /v1/chat/completions: response and stream schemas."""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict

from chunkllama_server.api.schema.usage import CompletionUsage


class TopLogprob(TypedDict):
    """A likely token; ``bytes`` matter where a token splits a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(TypedDict):
    """A token's log-probability and those of the best tokens in its place."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """Log-probabilities of a choice's tokens."""

    content: list[ChatTokenLogprob] | None
    refusal: list[ChatTokenLogprob] | None


class FunctionCall(TypedDict):
    """A function to call; ``arguments`` is JSON text."""

    name: str
    arguments: str


class ToolCall(TypedDict):
    """A tool call the model made."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class ResponseMessage(TypedDict):
    """The answer of one choice."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]
    function_call: NotRequired[FunctionCall]


FinishReason = Literal["stop", "length", "tool_calls", "content_filter", "function_call"]


class ChatChoice(TypedDict):
    """One choice; ``stop_reason`` is the stop string or token that ended it, where one did."""

    index: int
    message: ResponseMessage
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None
    stop_reason: NotRequired[int | str]
    token_ids: NotRequired[list[int]]


class PromptLogprob(TypedDict):
    """A prompt token's log-probability, its rank (1 is best) and its text."""

    logprob: float
    rank: int | None
    decoded_token: str


class ChatCompletion(TypedDict):
    """Answer to POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: CompletionUsage
    service_tier: str | None
    system_fingerprint: str
    metadata: NotRequired[dict[str, str]]
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[list[dict[str, PromptLogprob] | None]]


class FunctionCallDelta(TypedDict):
    """Parts of a function call as they come."""

    name: NotRequired[str]
    arguments: NotRequired[str]


class ToolCallDelta(TypedDict):
    """A tool call as it comes: id, type and name first, then pieces of the arguments."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionCallDelta


class ChatDelta(TypedDict):
    """What a chunk adds to a message; the role comes first and once."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str | None]
    refusal: NotRequired[str | None]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallDelta]]
    function_call: NotRequired[FunctionCallDelta]


class ChatChunkChoice(TypedDict):
    """One choice's part of a chunk; ``finish_reason`` is null until the last.

    ``branch`` is the index of the parallel branch whose text it is.
    """

    index: int
    delta: ChatDelta
    finish_reason: FinishReason | None
    logprobs: ChatLogprobs | None
    stop_reason: NotRequired[int | str]
    token_ids: NotRequired[list[int]]
    branch: NotRequired[int]


class ChatCompletionChunk(TypedDict):
    """One event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    service_tier: str | None
    system_fingerprint: str
    usage: NotRequired[CompletionUsage | None]
    prompt_token_ids: NotRequired[list[int]]
