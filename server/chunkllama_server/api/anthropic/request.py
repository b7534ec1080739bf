"""A request of Anthropic's Messages API as the chat completion it amounts to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from chunkllama_server.api.anthropic.conversation import MessageReader
from chunkllama_server.api.schema.anthropic import (
    MAX_CACHE_MARKS,
    CacheControl,
    CountTokensRequest,
    MessagesRequest,
    ToolDefinition,
)
from chunkllama_server.api.schema.chat import (
    CacheMark,
    ChatCompletionRequest,
    ChatTool,
    FunctionDefinition,
    JsonSchemaFormat,
    NamedFunction,
    NamedToolChoice,
    ResponseFormat,
)
from chunkllama_server.transport.errors import invalid

_SECONDS = {None: 300.0, "5m": 300.0, "1h": 3600.0}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
# Fields of the chat completion by the name that the client knows, for errors.
_SPELLED = {
    "tool_choice.function.name": "tool_choice.name",
    "response_format": "output_config.format",
    "response_format.json_schema.schema": "output_config.format.schema",
    "max_completion_tokens": "max_tokens",
    "thinking_token_budget": "thinking.budget_tokens",
    "reasoning_effort": "output_config.effort",
    "stop": "stop_sequences",
}


@dataclass(slots=True)
class ChatOf:
    """A chat completion, and how errors and headers name its parts.

    Attributes:
        spelled: fields of the chat by the client's names.
        ignored: paths without effect, beside those that the schema knows.
    """

    chat: ChatCompletionRequest
    spelled: Mapping[str, str]
    ignored: list[str] = field(default_factory=list)


def as_chat(
    body: CountTokensRequest, *, has_thoughts: bool, thinks_between_tools: bool = False
) -> ChatOf:
    """The chat completion that answers this request.

    Args:
        has_thoughts: whether the model thinks before it answers.
        thinks_between_tools: the budget of thoughts is that of several answers, and may be larger
            than this one.

    Raises:
        ApiError: 400 naming the field.
    """
    reader = MessageReader()
    reader.read_system(body.system)
    reader.read_messages(body.messages)
    if not reader.messages:
        raise invalid("The conversation has no message", "messages")
    tools = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(body.tools or ())]
    choice = body.tool_choice
    thinks = _thinking(body, has_thoughts)
    if isinstance(body, MessagesRequest) and not thinks_between_tools:
        _check_budget(body)
    chat = ChatCompletionRequest.model_construct(
        model=body.model,
        messages=reader.messages,
        tools=tools or None,
        tool_choice=_tool_choice(body),
        parallel_tool_calls=None if choice is None else not choice.disable_parallel_tool_use,
        response_format=_response_format(body),
        thinking_token_budget=thinks.budget,
        reasoning_effort=thinks.effort,
        continue_final_message=reader.continues or None,
        add_generation_prompt=False if reader.continues else None,
        **(_sampling(body) if isinstance(body, MessagesRequest) else {}),
    )
    chat.repairs.extend(reader.repairs)
    chat.mark_cache(_cache_marks(body, reader))
    spelled = dict(_SPELLED)
    if body.output_format is not None:
        spelled["response_format.json_schema.schema"] = "output_format.schema"
    for index in range(len(tools)):
        spelled[f"tools[{index}].function"] = f"tools[{index}]"
        spelled[f"tools[{index}].function.parameters"] = f"tools[{index}].input_schema"
    return ChatOf(chat, spelled, thinks.ignored)


def _sampling(body: MessagesRequest) -> dict[str, Any]:
    return {
        "max_completion_tokens": body.max_tokens,
        "stream": body.stream,
        "stop": body.stop_sequences or None,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
    }


def _tool(tool: ToolDefinition, path: str) -> ChatTool:
    """A tool of the chat; one that is left out keeps its place, so that errors name the right
    one."""
    if tool.type == "function":
        text = "Tools of type function are of OpenAI's API; send name, description and input_schema"
        raise invalid(text, f"{path}.type")
    if tool.is_skipped():
        return ChatTool(type=tool.type or "")
    function = FunctionDefinition.model_construct(
        name=tool.name,
        description=tool.description,
        parameters=tool.input_schema,
        strict=tool.strict,
    )
    return ChatTool(type="function", function=function)


def _tool_choice(body: CountTokensRequest) -> Any:
    choice = body.tool_choice
    if choice is None:
        return None
    if choice.type in ("any", "tool") and body.tools and all(t.is_skipped() for t in body.tools):
        raise invalid("All tools of the request are run by Anthropic's servers", "tool_choice")
    if choice.type != "tool":
        return _CHOICES[choice.type]
    if choice.name is None:
        raise invalid("A tool choice of type tool needs a name", "tool_choice.name")
    return NamedToolChoice(
        type="function", function=NamedFunction.model_construct(name=choice.name)
    )


def _response_format(body: CountTokensRequest) -> ResponseFormat | None:
    given = body.output_config.format if body.output_config is not None else None
    if given is not None and body.output_format is not None:
        raise invalid("Send output_config.format or output_format, not both", "output_format")
    given = given or body.output_format
    if given is None:
        return None
    return ResponseFormat(type="json_schema", json_schema=JsonSchemaFormat(schema=given.schema_))


@dataclass(frozen=True, slots=True)
class _Thinking:
    effort: Any = None
    budget: int | None = None
    ignored: list[str] = field(default_factory=list)


def _thinking(body: CountTokensRequest, has_thoughts: bool) -> _Thinking:
    """Whether the answer thinks: only if it is asked to, as Anthropic's clients expect."""
    config = body.thinking
    effort = body.output_config.effort if body.output_config is not None else None
    wants = config is not None and config.type != "disabled"
    if config is not None and config.type == "enabled" and config.budget_tokens is None:
        raise invalid("Thinking of type enabled needs budget_tokens", "thinking.budget_tokens")
    if not has_thoughts:
        return _Thinking(effort, ignored=["thinking"] if wants else [])
    if config is None or not wants:
        return _Thinking("none")
    # An effort sets the switch of templates that have one.
    default = "medium" if config.type == "enabled" else None
    return _Thinking(effort or default, config.budget_tokens)


def _check_budget(body: MessagesRequest) -> None:
    """Refuse thoughts that leave no token for the answer, as Anthropic's service does.

    Raises:
        ApiError: 400.
    """
    config = body.thinking
    budget = None if config is None or config.type != "enabled" else config.budget_tokens
    if budget is not None and 0 < body.max_tokens <= budget:
        raise invalid(
            f"Must be less than max_tokens {body.max_tokens}, got {budget}",
            "thinking.budget_tokens",
        )


def _cache_marks(body: CountTokensRequest, reader: MessageReader) -> list[CacheMark]:
    """The last mark of those kept for an hour and the last of all: they hold all prefixes.

    Raises:
        ApiError: 400 for too many marks, or a longer time behind a shorter one.
    """
    found: list[tuple[str, CacheControl, CacheMark]] = []
    shown = [(i, tool) for i, tool in enumerate(body.tools or ()) if not tool.is_skipped()]
    for number, (index, tool) in enumerate(shown):
        if tool.cache_control is not None:
            control = tool.cache_control
            mark = CacheMark(seconds=_SECONDS[control.ttl], tool=number)
            found.append((f"tools[{index}].cache_control", control, mark))
    found += [
        (path, control, reader.mark(place, _SECONDS[control.ttl]))
        for path, control, place in reader.controls
    ]
    if body.cache_control is not None and reader.last_place is not None:
        control = body.cache_control
        mark = reader.mark(reader.last_place, _SECONDS[control.ttl])
        found.append(("cache_control", control, mark))
    if len(found) > MAX_CACHE_MARKS:
        raise invalid(
            f"At most {MAX_CACHE_MARKS} blocks may have cache_control, found {len(found)}",
            found[MAX_CACHE_MARKS][0],
        )
    for (_, _, earlier), (path, _, later) in pairwise(found):
        if later.seconds > earlier.seconds:
            raise invalid("A cache_control of 1h must come before those of 5m", f"{path}.ttl")
    marks = [mark for _, _, mark in found]
    longest = [mark for mark in marks if mark.seconds == _SECONDS["1h"]]
    last = dict.fromkeys([*longest[-1:], *marks[-1:]])
    return list(last)
