"""POST /v1/messages: answers, events and errors of Anthropic's Messages API."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

StopReason = Literal[
    "end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"
]


class CacheCreation(TypedDict):
    """Tokens added to the cache, by how long they are kept at least."""

    ephemeral_5m_input_tokens: int
    ephemeral_1h_input_tokens: int


class OutputTokenKinds(TypedDict):
    """Kinds of output tokens."""

    thinking_tokens: int


class MessageDeltaUsage(TypedDict):
    """Token counts at the end of a stream.

    The prompt has ``input_tokens + cache_creation_input_tokens + cache_read_input_tokens`` tokens.
    """

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: OutputTokenKinds


class MessageUsage(MessageDeltaUsage):
    """Token counts of a message."""

    cache_creation: CacheCreation
    service_tier: Literal["standard"]


class TextBlock(TypedDict):
    """Text of the answer."""

    type: Literal["text"]
    text: str
    citations: None


class ThinkingBlock(TypedDict):
    """Thoughts; the signature is a hash of the text and is not verified when it is sent back."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseBlock(TypedDict):
    """A tool call."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


AnswerBlock = TextBlock | ThinkingBlock | ToolUseBlock


class AnthropicMessage(TypedDict):
    """Answer to POST /v1/messages."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[AnswerBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class TextDelta(TypedDict):
    """More text."""

    type: Literal["text_delta"]
    text: str


class ThinkingDelta(TypedDict):
    """More of the thoughts."""

    type: Literal["thinking_delta"]
    thinking: str


class SignatureDelta(TypedDict):
    """The end of the thoughts."""

    type: Literal["signature_delta"]
    signature: str


class InputJsonDelta(TypedDict):
    """More of a call's input, as JSON text."""

    type: Literal["input_json_delta"]
    partial_json: str


class MessageEnd(TypedDict):
    """Why the answer ended."""

    stop_reason: StopReason
    stop_sequence: str | None


class AnthropicEvent(TypedDict):
    """One event of a stream; the members depend on its type."""

    type: Literal[
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
        "ping",
        "error",
    ]
    message: NotRequired[AnthropicMessage]
    index: NotRequired[int]
    content_block: NotRequired[AnswerBlock]
    delta: NotRequired[TextDelta | ThinkingDelta | SignatureDelta | InputJsonDelta | MessageEnd]
    usage: NotRequired[MessageDeltaUsage]
    error: NotRequired[AnthropicErrorDetail]


class AnthropicErrorDetail(TypedDict):
    """What went wrong; the message begins with the field's path where there is one."""

    type: str
    message: str


class AnthropicErrorBody(TypedDict):
    """Every refusal and failure below /v1/messages."""

    type: Literal["error"]
    error: AnthropicErrorDetail
    request_id: str | None


class MessageTokensCount(TypedDict):
    """Answer to POST /v1/messages/count_tokens."""

    input_tokens: int


class AnthropicModel(TypedDict):
    """A served model, for clients that send ``anthropic-version``."""

    type: Literal["model"]
    id: str
    display_name: str
    created_at: str
    lifecycle: Literal["active"]
    max_input_tokens: int
    max_tokens: int


class AnthropicModelList(TypedDict):
    """The served models, for clients that send ``anthropic-version``."""

    data: list[AnthropicModel]
    first_id: str | None
    last_id: str | None
    has_more: bool
