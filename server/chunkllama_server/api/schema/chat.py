"""POST /v1/chat/completions: request schemas."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, PrivateAttr, StringConstraints, field_validator, model_validator

from chunkllama_server.api.schema.base import (
    MAX_TOKENS,
    PromptCacheBreakpoint,
    RequestModel,
    SamplingFields,
)
from chunkllama_server.api.schema.past import as_message, as_messages, as_part

# What MCP allows as the name of a tool, and the parsers of calls read.
Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
# Of a schema, which only the client reads: generic classes have names like "Page[Item]".
Label = Annotated[str, StringConstraints(max_length=256)]
ROLES = ("developer", "system", "user", "assistant", "tool", "function")
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
ServiceTier = Literal["auto", "default", "flex", "scale", "priority", "fast"]


class ContentPart(RequestModel):
    """One part of a message's content."""

    type: str = Field(
        description="Honoured: text and refusal. Media are refused in the turn to be answered and "
        "named in the prompt where they are history; other types keep their text.",
    )
    text: str | None = Field(default=None, description="Honoured.")
    refusal: str | None = Field(default=None, description="Honoured.")
    prompt_cache_breakpoint: PromptCacheBreakpoint | None = Field(
        default=None, description="Honoured: a reusable prefix ends here, exact to the token."
    )
    image_url: Any = Field(default=None, description="Refused with its part.")
    input_audio: Any = Field(default=None, description="Refused with its part.")
    file: Any = Field(default=None, description="Refused with its part.")

    _read = model_validator(mode="before")(as_part)


class CalledFunction(RequestModel):
    """The function of an earlier tool call."""

    name: str | None = Field(default=None, description="Honoured.")
    arguments: Any = Field(
        default=None,
        description="Honoured: JSON text of an object. What is not is repaired or kept as text.",
    )


class MessageToolCall(RequestModel):
    """A tool call an assistant message made."""

    id: str | None = Field(default=None, description="Honoured through the template.")
    type: str | None = Field(
        default="function",
        description="Honoured: a call of another type is shown as a function call.",
    )
    function: CalledFunction | None = Field(
        default=None, description="Honoured through the template."
    )
    custom: Any = Field(default=None, description="Honoured through the template: name and input.")


class ChatMessage(RequestModel):
    """One message of a conversation."""

    role: str = Field(
        description="Honoured: system, developer (system where the template lacks it), user, "
        "assistant, tool, function. Another role is a user's in the past, and refused in the turn "
        "to be answered.",
    )
    content: str | Annotated[list[ContentPart], Field(max_length=1024, fail_fast=True)] | None = (
        Field(default=None, description="Honoured: text, or text parts. null is an empty text.")
    )
    name: str | None = Field(default=None, description="Honoured through the template.")
    tool_calls: list[MessageToolCall] | None = Field(
        default=None, max_length=4096, fail_fast=True, description="Honoured through the template."
    )
    tool_call_id: str | None = Field(
        default=None, description="Honoured: required for role tool where no call is open."
    )
    function_call: CalledFunction | None = Field(
        default=None, description="Honoured (deprecated): one tool call."
    )
    refusal: str | None = Field(default=None, description="Honoured: stands for a missing content.")
    reasoning_content: str | None = Field(
        default=None, description="Honoured through the template."
    )
    audio: Any = Field(default=None, description="Ignored and named: its transcript is not known.")
    annotations: Any = Field(default=None, description="Ignored: links of OpenAI's answers.")

    _read = model_validator(mode="before")(as_message)
    # Where the message comes from, if not from messages[i]: named in errors and repairs.
    _origin: str = PrivateAttr(default="")

    @property
    def origin(self) -> str:
        return self._origin

    def from_path(self, path: str) -> ChatMessage:
        """The message, with the path that errors and repairs name."""
        self._origin = path
        return self


class InputFormat(NamedTuple):
    """What the input of a custom tool obeys."""

    syntax: Literal["lark", "regex"]
    definition: str


class FunctionDefinition(RequestModel):
    """A function the model may call."""

    name: Name = Field(description="Honoured.")
    description: str | None = Field(default=None, description="Honoured through the template.")
    parameters: dict[str, Any] | None = Field(
        default=None, description="Honoured: a JSON schema, which forced calls obey."
    )
    strict: bool | None = Field(
        default=None,
        description="Honoured for forced calls: as strict of a response format.",
    )
    # Of a custom tool of the Responses API, which is a function of one text here.
    _input_format: InputFormat | None = PrivateAttr(default=None)

    @property
    def input_format(self) -> InputFormat | None:
        return self._input_format

    def with_input(self, given: InputFormat) -> FunctionDefinition:
        """The function, with the format of its input."""
        self._input_format = given
        return self


class ChatTool(RequestModel):
    """A tool the model may call."""

    type: str = Field(
        max_length=64,
        description="Honoured: function. A tool of another type is left out and named in the "
        "header of ignored fields.",
    )
    function: FunctionDefinition | None = Field(default=None, description="Honoured.")
    custom: Any = Field(default=None, description="Ignored: left out with its tool.")

    def is_skipped(self) -> bool:
        return self.type != "function"


class NamedFunction(RequestModel):
    """The name of a function."""

    name: Name = Field(description="Honoured.")


class AllowedTools(RequestModel):
    """A subset of the tools."""

    mode: Literal["auto", "required"] = Field(description="Honoured.")
    tools: list[dict[str, Any]] = Field(
        min_length=1, max_length=128, fail_fast=True, description="Honoured: functions by name."
    )


class NamedToolChoice(RequestModel):
    """One function, or a subset of the tools."""

    type: Literal["function", "allowed_tools", "custom"] = Field(description="Honoured.")
    function: NamedFunction | None = Field(default=None, description="Honoured.")
    allowed_tools: AllowedTools | None = Field(default=None, description="Honoured.")
    custom: Any = Field(default=None, description="Refused.")


class JsonSchemaFormat(RequestModel):
    """A named JSON schema."""

    name: Label | None = Field(default=None, description="Validated.")
    description: str | None = Field(
        default=None, description="Ignored: the schema alone constrains."
    )
    schema_: dict[str, Any] | None = Field(
        default=None, alias="schema", description="Honoured: the output validates against it."
    )
    strict: bool | None = Field(
        default=None,
        description="Honoured: true refuses a schema that cannot be enforced in full; otherwise "
        "what cannot is named in a header, and objects that list their members are closed.",
    )


class ResponseFormat(RequestModel):
    """The format of the answer."""

    type: Literal["text", "json_object", "json_schema"] = Field(description="Honoured.")
    json_schema: JsonSchemaFormat | None = Field(default=None, description="Honoured.")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheMark:
    """The end of a prefix to keep, where a protocol marks more than content parts.

    Attributes:
        seconds: the least time it is kept.
        tool: index of the tool after which it ends; else it ends in a message.
        message, part: index of the message, and of the content part after which it ends.
        call: index of the message's tool call after which it ends.
        includes_tools: it ends behind the tools, wherever the template writes them.
    """

    seconds: float
    tool: int | None = None
    message: int = 0
    part: int | None = None
    call: int | None = None
    includes_tools: bool = False


class Prediction(RequestModel):
    """Text that much of the answer will equal, such as a file that is to be edited."""

    type: Literal["content"] = Field(description="Honoured.")
    content: str | Annotated[list[ContentPart], Field(max_length=1024, fail_fast=True)] = Field(
        description="Honoured: a text, or parts of one; parts that are no text are refused."
    )

    @field_validator("content")
    @classmethod
    def _check_content(cls, content: str | list[ContentPart]) -> str | list[ContentPart]:
        if not isinstance(content, str) and any(part.text is None for part in content):
            raise ValueError("a prediction is text")
        return content

    @property
    def text(self) -> str:
        """The whole text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text or "" for part in self.content)


class ChatCompletionRequest(SamplingFields):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(
        min_length=1, max_length=4096, fail_fast=True, description="Honoured."
    )
    logprobs: bool | None = Field(default=None, description="Honoured.")
    top_logprobs: int | None = Field(
        default=None, ge=0, le=20, description="Honoured: needs logprobs."
    )
    max_completion_tokens: int | None = Field(
        default=None, ge=1, le=MAX_TOKENS, description="Honoured: null is the rest of the context."
    )
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        le=MAX_TOKENS,
        description="Honoured (deprecated): max_completion_tokens wins.",
    )
    response_format: ResponseFormat | None = Field(default=None, description="Honoured.")
    tools: Annotated[list[ChatTool], Field(max_length=128, fail_fast=True)] | None = Field(
        default=None, description="Honoured."
    )
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = Field(
        default=None, description="Honoured: required and named calls are forced by a grammar."
    )
    parallel_tool_calls: bool | None = Field(
        default=None, description="Honoured: false allows one call."
    )
    functions: (
        Annotated[list[FunctionDefinition], Field(min_length=1, max_length=128, fail_fast=True)]
        | None
    ) = Field(default=None, description="Honoured (deprecated): tools, answered in the old shape.")
    function_call: Literal["none", "auto"] | NamedFunction | None = Field(
        default=None, description="Honoured (deprecated): tool_choice."
    )
    prediction: Prediction | None = Field(
        default=None,
        description="Honoured with speculation: guesses at the answer are taken from it.",
    )
    reasoning_effort: ReasoningEffort | None = Field(
        default=None,
        description="Honoured: none turns thoughts off; the others through a template that "
        "knows them.",
    )
    thinking_token_budget: int | None = Field(
        default=None,
        ge=0,
        le=1 << 24,
        description="Honoured: thoughts end after this many tokens; 0 turns them off.",
    )
    verbosity: Literal["low", "medium", "high"] | None = Field(
        default=None, description="Validated."
    )
    service_tier: ServiceTier | None = Field(
        default=None,
        description="Honoured: a priority class; flex waits behind, priority goes first.",
    )
    metadata: dict[str, str] | None = Field(
        default=None,
        max_length=16,
        description="Validated: keys up to 64, values up to 512 characters.",
    )
    safety_identifier: str | None = Field(default=None, max_length=64, description="Validated.")
    store: bool | None = Field(
        default=None, description="Ignored and named: completions are not stored."
    )
    modalities: list[Literal["text", "audio"]] | None = Field(
        default=None,
        max_length=16,
        fail_fast=True,
        description="Validated: text only, audio is refused.",
    )
    audio: Any = Field(default=None, description="Refused.")
    web_search_options: Any = Field(default=None, description="Refused.")
    moderation: Any = Field(default=None, description="Refused.")
    add_generation_prompt: bool | None = Field(default=None, description="Honoured. Default true.")
    continue_final_message: bool | None = Field(
        default=None, description="Honoured: the answer continues the last message."
    )
    echo: bool | None = Field(
        default=None, description="Honoured: the text of the message that is continued comes first."
    )
    add_special_tokens: bool | None = Field(
        default=None, description="Validated: the template writes special tokens; true is refused."
    )
    chat_template: str | None = Field(
        default=None,
        max_length=65536,
        description="Refused unless the operator trusts clients with it.",
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None,
        description="Honoured: variables that the template reads and the operator allows. Ignored "
        "and named if the template does not read them, refused if the operator does not allow "
        "them.",
    )
    documents: Any = Field(default=None, description="Refused.")
    _read_past = field_validator("messages", mode="before")(as_messages)
    # Items of a Responses request that were repaired or left out on the way here.
    _repairs: list[str] = PrivateAttr(default_factory=list)
    _cache_marks: tuple[CacheMark, ...] = PrivateAttr(default=())

    @property
    def repairs(self) -> list[str]:
        return self._repairs

    @property
    def cache_marks(self) -> tuple[CacheMark, ...]:
        """Ends of prefixes to keep; they stand beside those of content parts."""
        return self._cache_marks

    def mark_cache(self, marks: Iterable[CacheMark]) -> None:
        """Replace the ends of prefixes to keep."""
        self._cache_marks = tuple(marks)
