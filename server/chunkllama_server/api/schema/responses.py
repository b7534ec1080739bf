"""POST /v1/responses: request schemas."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from chunkllama_server.api.schema.base import (
    MAX_TOKENS,
    GenerationFields,
    PromptCacheBreakpoint,
    RequestModel,
)
from chunkllama_server.api.schema.chat import Label, Name, ReasoningEffort, ServiceTier
from chunkllama_server.api.schema.past import as_conversation, as_item, as_part

_OWN_TYPES = frozenset(("function", "custom", "namespace"))  # of tools that the client runs


class InputPart(RequestModel):
    """One part of a message item's content."""

    type: str = Field(
        description="Honoured: texts and refusals. Media are refused in the turn to be answered "
        "and named in the prompt where they are history; other types keep their text.",
    )
    text: str | None = Field(default=None, description="Honoured.")
    refusal: str | None = Field(default=None, description="Honoured.")
    prompt_cache_breakpoint: PromptCacheBreakpoint | None = Field(
        default=None, description="Honoured: a reusable prefix ends here, exact to the token."
    )
    annotations: Any = Field(default=None, description="Ignored.")
    logprobs: Any = Field(default=None, description="Ignored.")
    image_url: Any = Field(default=None, description="Refused with its part.")
    file_id: Any = Field(default=None, description="Refused with its part.")
    input_audio: Any = Field(default=None, description="Refused with its part.")
    detail: Any = Field(default=None, description="Refused with its part.")

    _read = model_validator(mode="before")(as_part)


class InputItem(RequestModel):
    """An item of the input: a message, a function call, its output, or reasoning."""

    type: str | None = Field(
        default="message",
        description="Honoured: messages, their parts, calls, outputs of calls, reasoning, "
        "compaction, additional_tools, and item_reference to an item of a stored response or of "
        "its input. Items of other types are left out and named.",
    )
    role: str | None = Field(
        default=None,
        description="Honoured: required for a message; as the role of a message of chat.",
    )
    content: str | Annotated[list[InputPart], Field(max_length=1024, fail_fast=True)] | None = (
        Field(default=None, description="Honoured: required for a message.")
    )
    tool_calls: list[Any] | None = Field(
        default=None, max_length=4096, description="Honoured: calls of a message, as in chat."
    )
    call_id: str | None = Field(default=None, description="Honoured for calls.")
    name: str | None = Field(default=None, description="Honoured for a function call.")
    namespace: str | None = Field(default=None, description="Honoured for a call: of its tool.")
    tools: Any = Field(
        default=None,
        description="Honoured for additional_tools: offered beside those of the body, also in what "
        "continues the conversation. Those that cannot be offered are left out and named.",
    )
    arguments: Any = Field(default=None, description="Honoured for a function call.")
    input: Any = Field(default=None, description="Honoured for a custom tool's call.")
    action: Any = Field(default=None, description="Honoured for a shell or computer call.")
    operation: Any = Field(default=None, description="Honoured for an apply_patch call.")
    output: Any = Field(default=None, description="Honoured for a call's output: text or parts.")
    id: str | None = Field(default=None, description="Honoured for an item_reference.")
    status: str | None = Field(default=None, description="Ignored.")
    phase: str | None = Field(default=None, description="Ignored.")
    summary: Any = Field(default=None, description="Ignored.")
    encrypted_content: Any = Field(
        default=None, description="Honoured for a compaction; ignored for reasoning."
    )

    _read = model_validator(mode="before")(as_item)


class TextFormat(RequestModel):
    """The format of the answer's text."""

    type: Literal["text", "json_object", "json_schema"] = Field(description="Honoured.")
    name: Label | None = Field(default=None, description="Validated.")
    description: str | None = Field(default=None, description="Ignored.")
    schema_: dict[str, Any] | None = Field(
        default=None, alias="schema", description="Honoured: required for json_schema."
    )
    strict: bool | None = Field(
        default=None, description="Honoured: as strict of a response format of chat."
    )


class TextOptions(RequestModel):
    """Options of the answer's text."""

    format: TextFormat | None = Field(default=None, description="Honoured.")
    verbosity: Literal["low", "medium", "high"] | None = Field(
        default=None, description="Validated."
    )


class ResponseTool(RequestModel):
    """A function or custom tool the model may call, or a namespace of them."""

    type: str = Field(
        max_length=64,
        description="Honoured: function, custom, whose input is free text, and namespace. A tool "
        "of another type is left out and named in the header of ignored fields.",
    )
    name: str | None = Field(default=None, description="Honoured.")
    description: str | None = Field(default=None, description="Honoured through the template.")
    parameters: dict[str, Any] | None = Field(default=None, description="Honoured.")
    strict: bool | None = Field(
        default=None, description="Honoured for forced calls: as strict of a response format."
    )
    format: dict[str, Any] | None = Field(
        default=None,
        description="Honoured for forced calls: the input of a custom tool matches a regular "
        "expression, or a Lark grammar if it is the only tool that may be called. Else shown to "
        "the model, and named.",
    )
    tools: Annotated[list[ResponseTool], Field(max_length=128, fail_fast=True)] | None = Field(
        default=None,
        description="Honoured for a namespace: the model knows its tools by both names, as "
        "namespace__name, and calls have the namespace apart.",
    )

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, data: Any) -> Any:
        """Read nothing but the type of a tool that is left out: its members are its own."""
        kind = data.get("type") if isinstance(data, dict) else None
        return {"type": kind} if isinstance(kind, str) and kind not in _OWN_TYPES else data

    def is_skipped(self) -> bool:
        return self.type not in _OWN_TYPES or (self.type == "namespace" and not self.tools)


class ResponseToolChoice(RequestModel):
    """One function, or a subset of the tools."""

    type: Literal["function", "custom", "allowed_tools"] = Field(description="Honoured.")
    name: Name | None = Field(default=None, description="Honoured.")
    namespace: str | None = Field(
        default=None,
        description="Honoured: of the tool. Needed where several namespaces have the name.",
    )
    mode: Literal["auto", "required"] | None = Field(default=None, description="Honoured.")
    tools: list[dict[str, Any]] | None = Field(
        default=None,
        min_length=1,
        max_length=128,
        fail_fast=True,
        description="Honoured: functions by name, and namespace.",
    )


class Reasoning(RequestModel):
    """Reasoning options."""

    effort: ReasoningEffort | None = Field(
        default=None, description="Honoured: as reasoning_effort of a chat completion."
    )
    summary: Literal["auto", "concise", "detailed"] | None = Field(
        default=None, description="Validated: thoughts are sent whole, not summarised."
    )
    generate_summary: Any = Field(default=None, description="Ignored (deprecated).")


class ResponseStreamOptions(RequestModel):
    """Options of a streamed response."""

    include_obfuscation: bool | None = Field(
        default=None, description="Ignored: no padding is sent."
    )


class ResponseRequest(GenerationFields):
    """Body of POST /v1/responses."""

    model: str = Field(
        default="",
        description="Honoured: a served model name; another is 404. Absent: the served model.",
    )
    input: str | Annotated[list[InputItem], Field(max_length=4096, fail_fast=True)] | None = Field(
        default=None,
        description="Honoured: text, or items. Optional, or empty, after a previous response.",
    )
    _read_past = field_validator("input", mode="before")(as_conversation)
    instructions: str | None = Field(
        default=None,
        description="Honoured: a system message; not carried over to the next response.",
    )
    max_output_tokens: int | None = Field(
        default=None, ge=16, le=MAX_TOKENS, description="Honoured: null is the rest of the context."
    )
    previous_response_id: str | None = Field(
        default=None,
        max_length=128,
        description="Honoured: continues a stored response. An empty text is none.",
    )
    store: bool | None = Field(
        default=None, description="Honoured: default true; bounded by count, bytes and age."
    )
    stream: bool | None = Field(default=None, description="Honoured.")
    stream_options: ResponseStreamOptions | None = Field(default=None, description="Validated.")
    text: TextOptions | None = Field(default=None, description="Honoured.")
    tools: Annotated[list[ResponseTool], Field(max_length=128, fail_fast=True)] | None = Field(
        default=None, description="Honoured: functions."
    )
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | None = Field(
        default=None, description="Honoured."
    )
    parallel_tool_calls: bool | None = Field(
        default=None, description="Honoured: false allows one call."
    )
    max_tool_calls: int | None = Field(
        default=None,
        ge=1,
        le=MAX_TOKENS,
        description="Validated: counts built-in tools, of which there are none.",
    )
    temperature: float | None = Field(
        default=None, ge=0, le=2, description="Honoured: 0 is greedy."
    )
    top_p: float | None = Field(default=None, ge=0, le=1, description="Honoured.")
    top_logprobs: int | None = Field(
        default=None, ge=0, le=20, description="Honoured with include message.output_text.logprobs."
    )
    include: list[str] | None = Field(
        default=None,
        max_length=16,
        description="Honoured: message.output_text.logprobs; other values have nothing to add.",
    )
    reasoning: Reasoning | None = Field(default=None, description="Honoured.")
    thinking_token_budget: int | None = Field(
        default=None, ge=0, le=1 << 24, description="Honoured: as in a chat completion."
    )
    metadata: dict[str, str] | None = Field(
        default=None,
        max_length=16,
        description="Validated: keys up to 64, values up to 512 characters.",
    )
    service_tier: ServiceTier | None = Field(
        default=None, description="Honoured: a priority class."
    )
    truncation: Literal["auto", "disabled"] | None = Field(
        default=None,
        description="Validated (deprecated): a prompt that is too long is 400 either way.",
    )
    safety_identifier: str | None = Field(default=None, max_length=64, description="Validated.")
    user: str | None = Field(default=None, max_length=512, description="Validated (deprecated).")
    background: bool | None = Field(
        default=None, description="Honoured: runs without a connection; needs store."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="Honoured: as in chat."
    )
    conversation: Any = Field(default=None, description="Refused.")
    context_management: Any = Field(default=None, description="Refused.")
    prompt: Any = Field(default=None, description="Refused.")
    moderation: Any = Field(default=None, description="Refused.")
