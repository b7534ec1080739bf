"""POST /v1/messages and /v1/messages/count_tokens: request schemas of Anthropic's Messages API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from chunkllama_server.api.schema.base import (
    MAX_TOKENS,
    MOST_STOPS,
    MOST_TOOLS,
    RequestModel,
    StopString,
)
from chunkllama_server.api.schema.chat import Name
from chunkllama_server.api.schema.past import as_block

TEXT_BLOCKS = frozenset(("text",))
# Blocks that are refused in the turn to be answered, and named in the prompt in earlier turns.
MEDIA_BLOCKS = frozenset(("image", "document"))
KNOWN_BLOCKS = TEXT_BLOCKS | MEDIA_BLOCKS | {"thinking", "tool_use", "tool_result", "search_result"}
MAX_CACHE_MARKS = 4
_OWN_TYPES = frozenset(("custom",))  # of tools that the client runs


class CacheControl(RequestModel):
    """The end of a prefix that is kept."""

    type: Literal["ephemeral"] = Field(description="Honoured.")
    ttl: Literal["5m", "1h"] | None = Field(
        default=None, description="Honoured: the least time the prefix is kept. Default 5m."
    )


class ContentBlock(RequestModel):
    """One block of a message's content, of the system prompt or of a tool's result."""

    type: str = Field(
        max_length=64,
        description="Honoured: text, thinking, tool_use, tool_result, search_result, and document "
        "where it is text. Other documents and image are refused in the turn to be answered and "
        "named in the prompt where they are history; other types are left out and named.",
    )
    text: str | None = Field(default=None, description="Honoured.")
    thinking: str | None = Field(default=None, description="Honoured through the template.")
    signature: str | None = Field(default=None, description="Ignored: thoughts are not verified.")
    id: str | None = Field(default=None, max_length=256, description="Honoured: of a tool_use.")
    name: str | None = Field(default=None, max_length=256, description="Honoured: of a tool_use.")
    input: Any = Field(
        default=None, description="Honoured: an object. What is not is repaired or kept as text."
    )
    tool_use_id: str | None = Field(
        default=None, max_length=256, description="Honoured: required for tool_result."
    )
    content: (
        str
        | Annotated[list[ContentBlock], Field(max_length=1024, fail_fast=True)]
        | dict[str, Any]
        | None
    ) = Field(default=None, description="Honoured: of a result, text or blocks.")
    is_error: bool | None = Field(
        default=None, description='Honoured: the result then begins with "Error:".'
    )
    cache_control: CacheControl | None = Field(
        default=None,
        description="Honoured: a prefix to keep ends after the block, exact to the token.",
    )
    citations: Any = Field(default=None, description="Ignored: no citations are made.")
    source: Any = Field(
        default=None,
        description="Honoured: of type text or content, and of a search_result; else refused with "
        "its block.",
    )
    title: str | None = Field(default=None, description="Honoured: stands before the text.")
    context: str | None = Field(default=None, description="Honoured: stands before the text.")
    caller: Any = Field(default=None, description="Ignored.")

    _read = model_validator(mode="before")(as_block)

    def is_skipped(self) -> bool:
        return self.type not in KNOWN_BLOCKS


class MessageTurn(RequestModel):
    """One message of a conversation."""

    role: Literal["user", "assistant", "system"] = Field(description="Honoured.")
    content: str | Annotated[list[ContentBlock], Field(max_length=4096, fail_fast=True)] | None = (
        Field(
            default=None,
            description="Honoured: text or blocks; null and no blocks are an empty text. A last "
            "message of the assistant is continued.",
        )
    )


class ToolDefinition(RequestModel):
    """A tool the model may call."""

    type: str | None = Field(
        default=None,
        max_length=64,
        description="Honoured: custom or absent. Tools that Anthropic's servers run are left out "
        "and named in the header of ignored fields.",
    )
    name: Name = Field(description="Honoured. A tool that is left out needs none.")
    description: str | None = Field(default=None, description="Honoured through the template.")
    input_schema: dict[str, Any] | None = Field(
        default=None, description="Honoured: a JSON schema, which forced calls obey."
    )
    strict: bool | None = Field(
        default=None,
        description="Honoured for forced calls: refuses a schema that cannot be enforced in full.",
    )
    cache_control: CacheControl | None = Field(
        default=None, description="Honoured: a prefix to keep ends after the tool."
    )
    input_examples: list[Any] | None = Field(default=None, description="Ignored and named.")
    defer_loading: bool | None = Field(default=None, description="Ignored and named.")
    allowed_callers: list[str] | None = Field(
        default=None,
        max_length=64,
        fail_fast=True,
        description="Ignored: only the model calls tools.",
    )
    eager_input_streaming: bool | None = Field(
        default=None, description="Ignored: arguments stream as they are generated."
    )

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, data: Any) -> Any:
        """Read nothing but the type of a tool that is left out: its members are its own."""
        kind = data.get("type") if isinstance(data, dict) else None
        if not isinstance(kind, str) or kind in _OWN_TYPES:
            return data
        return {"type": kind, "name": "left_out"}

    def is_skipped(self) -> bool:
        return self.type is not None and self.type not in _OWN_TYPES


class ToolChoice(RequestModel):
    """Which tools the answer may or must call."""

    type: Literal["auto", "any", "tool", "none"] = Field(
        description="Honoured: any and tool are forced by a grammar."
    )
    name: Name | None = Field(default=None, description="Honoured: required for tool.")
    disable_parallel_tool_use: bool | None = Field(
        default=None, description="Honoured: true allows one call."
    )


class ThinkingConfig(RequestModel):
    """Whether the answer begins with thoughts."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"] = Field(
        description="Honoured where the model has thoughts; absent is disabled."
    )
    budget_tokens: int | None = Field(
        default=None,
        ge=1,
        le=1 << 24,
        description="Honoured: thoughts end after this many tokens; required for enabled.",
    )
    display: Literal["summarized", "omitted"] | None = Field(
        default=None,
        description="Honoured: omitted leaves the text of the thoughts out; they are not "
        "summarised.",
    )


class OutputFormat(RequestModel):
    """The format of the answer."""

    type: Literal["json_schema"] = Field(description="Honoured.")
    schema_: dict[str, Any] = Field(
        alias="schema", description="Honoured: the output validates against it."
    )


class OutputConfig(RequestModel):
    """Options of the answer."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(
        default=None, description="Honoured through a template that knows it, with thinking."
    )
    format: OutputFormat | None = Field(default=None, description="Honoured.")


class MessageMetadata(RequestModel):
    """What the client says of its user."""

    user_id: str | None = Field(default=None, max_length=512, description="Validated.")


class CountTokensRequest(RequestModel):
    """Body of POST /v1/messages/count_tokens."""

    own_limits: ClassVar[Mapping[str, str]] = {"tools": "max_tools"}

    model: str = Field(
        default="",
        description="Honoured: a served model name; another is 404. Absent: the served model.",
    )
    messages: list[MessageTurn] = Field(
        min_length=1, max_length=4096, fail_fast=True, description="Honoured."
    )
    system: str | Annotated[list[ContentBlock], Field(max_length=1024, fail_fast=True)] | None = (
        Field(default=None, description="Honoured: text, or text blocks.")
    )
    tools: Annotated[list[ToolDefinition], Field(max_length=MOST_TOOLS, fail_fast=True)] | None = (
        Field(default=None, description="Honoured: up to the setting max_tools.")
    )
    tool_choice: ToolChoice | None = Field(default=None, description="Honoured.")
    thinking: ThinkingConfig | None = Field(default=None, description="Honoured.")
    output_config: OutputConfig | None = Field(default=None, description="Honoured.")
    output_format: OutputFormat | None = Field(
        default=None, description="Honoured (deprecated): output_config.format."
    )
    cache_control: CacheControl | None = Field(
        default=None, description="Honoured: as at the last block of the request."
    )
    speed: Literal["standard", "fast"] | None = Field(
        default=None, description="Ignored: there is one speed."
    )
    context_management: Any = Field(
        default=None, description="Ignored and named: the whole conversation is read."
    )
    container: Any = Field(default=None, description="Refused.")
    mcp_servers: Any = Field(default=None, description="Refused.")


class MessagesRequest(CountTokensRequest):
    """Body of POST /v1/messages."""

    refuses_binding: ClassVar[bool] = True
    own_limits: ClassVar[Mapping[str, str]] = {
        **CountTokensRequest.own_limits,
        "stop_sequences": "max_stop_chars",
    }

    max_tokens: int = Field(
        ge=0,
        le=MAX_TOKENS,
        description="Honoured: required. What does not fit the context ends the answer with "
        "model_context_window_exceeded. 0 stores the prompt and answers nothing.",
    )
    stream: bool | None = Field(default=None, description="Honoured.")
    stop_sequences: (
        Annotated[list[StopString], Field(max_length=MOST_STOPS, fail_fast=True)] | None
    ) = Field(
        default=None,
        description="Honoured: strings of 1 to 256 characters, together up to the setting "
        "max_stop_chars.",
    )
    temperature: float | None = Field(
        default=None, ge=0, le=2, description="Honoured: 0 is greedy. Default 1 or the model's."
    )
    top_p: float | None = Field(default=None, ge=0, le=1, description="Honoured.")
    top_k: int | None = Field(default=None, ge=0, le=MAX_TOKENS, description="Honoured: 0 is off.")
    metadata: MessageMetadata | None = Field(default=None, description="Validated.")
    service_tier: Literal["auto", "standard_only"] | None = Field(
        default=None, description="Validated: there is one tier."
    )
    inference_geo: str | None = Field(
        default=None, max_length=64, description="Ignored: the server is where it is."
    )
    diagnostics: Any = Field(
        default=None,
        description="Ignored and named: the header x-chunkllama-explain says why a prompt was not "
        "cached.",
    )
