"""A Responses API request as the chat completion it amounts to."""

from __future__ import annotations

from typing import Any

from chunkllama_server.api.chat.prompt import parse_arguments
from chunkllama_server.api.common.response_store import ResponseStore
from chunkllama_server.api.schema.base import SamplingFields
from chunkllama_server.api.schema.chat import (
    AllowedTools,
    CalledFunction,
    ChatCompletionRequest,
    ChatMessage,
    ChatTool,
    ContentPart,
    FunctionDefinition,
    JsonSchemaFormat,
    MessageToolCall,
    NamedFunction,
    NamedToolChoice,
    ResponseFormat,
)
from chunkllama_server.api.schema.responses import (
    InputItem,
    InputPart,
    ResponseRequest,
    ResponseToolChoice,
)
from chunkllama_server.transport.errors import ApiError, invalid

LOGPROBS = "message.output_text.logprobs"


def _part_text(part: InputPart, path: str) -> str:
    if part.type in ("input_image", "input_file", "input_audio"):
        raise invalid(f"Content of type {part.type!r} is not supported; send text", path)
    text = part.refusal if part.type == "refusal" else part.text
    if text is None:
        raise invalid(f"A part of type {part.type!r} needs its text", path)
    return text


def _parts_text(parts: str | list[InputPart], path: str) -> str:
    if isinstance(parts, str):
        return parts
    return "\n".join(_part_text(part, f"{path}[{index}]") for index, part in enumerate(parts))


def _message(item: InputItem, path: str) -> ChatMessage:
    if item.role is None:
        raise invalid("A message needs a role", f"{path}.role")
    if item.content is None:
        raise invalid("A message needs content", f"{path}.content")
    if isinstance(item.content, str):
        return ChatMessage(role=item.role, content=item.content)
    parts = [
        ContentPart(
            type="text",
            text=_part_text(part, f"{path}.content[{index}]"),
            prompt_cache_breakpoint=part.prompt_cache_breakpoint,
        )
        for index, part in enumerate(item.content)
    ]
    if not parts:
        raise invalid("A message needs content", f"{path}.content")
    return ChatMessage(role=item.role, content=parts)


def _function_call(item: InputItem, path: str) -> MessageToolCall:
    for name in ("call_id", "name", "arguments"):
        if getattr(item, name) is None:
            raise invalid(f"A function call needs {name}", f"{path}.{name}")
    assert item.name is not None and item.arguments is not None and item.call_id is not None
    parse_arguments(item.arguments, f"{path}.arguments")
    function = CalledFunction(name=item.name, arguments=item.arguments)
    return MessageToolCall(id=item.call_id, function=function)


def input_messages(given: str | list[InputItem]) -> list[ChatMessage]:
    """Chat messages of the input; consecutive function calls are one assistant message.

    Raises:
        ApiError: 400 naming the item's field.
    """
    if isinstance(given, str):
        return [ChatMessage(role="user", content=given)]
    messages: list[ChatMessage] = []
    for index, item in enumerate(given):
        path = f"input[{index}]"
        if item.type == "message":
            messages.append(_message(item, path))
        elif item.type == "function_call":
            call = _function_call(item, path)
            last = messages[-1] if messages else None
            if last is not None and last.role == "assistant":
                calls = [*(last.tool_calls or ()), call]
                messages[-1] = last.model_copy(update={"tool_calls": calls})
            else:
                messages.append(ChatMessage(role="assistant", tool_calls=[call]))
        elif item.type == "function_call_output":
            if item.call_id is None:
                raise invalid("A function call's output needs call_id", f"{path}.call_id")
            if item.output is None:
                raise invalid("A function call's output needs output", f"{path}.output")
            output = _parts_text(item.output, f"{path}.output")
            messages.append(ChatMessage(role="tool", tool_call_id=item.call_id, content=output))
        elif item.type == "item_reference":
            raise invalid("Item references are not supported; send the item", path)
    return messages


def previous_messages(
    body: ResponseRequest, store: ResponseStore, tenant: str
) -> list[ChatMessage]:
    """The conversation of the response this one follows.

    Raises:
        ApiError: 404 when it is not, or no longer, stored.
    """
    if body.previous_response_id is None:
        return []
    stored = store.get(tenant, body.previous_response_id)
    if stored is None:
        raise ApiError(
            404,
            f"Response {body.previous_response_id!r} is not stored (any more)",
            "previous_response_id",
            "response_not_found",
        )
    return stored.messages


def _tools(body: ResponseRequest) -> list[ChatTool] | None:
    tools = []
    for index, tool in enumerate(body.tools or ()):
        if tool.type != "function":
            raise invalid(f"Tools of type {tool.type!r} are not supported", f"tools[{index}].type")
        if tool.name is None:
            raise invalid("A function needs a name", f"tools[{index}].name")
        function = FunctionDefinition(
            name=tool.name,
            description=tool.description,
            parameters=tool.parameters,
            strict=tool.strict,
        )
        tools.append(ChatTool(type="function", function=function))
    return tools or None


def _tool_choice(choice: ResponseToolChoice) -> NamedToolChoice:
    if choice.type == "function":
        if choice.name is None:
            raise invalid("A function choice needs a name", "tool_choice.name")
        return NamedToolChoice(type="function", function=NamedFunction(name=choice.name))
    if choice.tools is None:
        raise invalid("allowed_tools needs tools", "tool_choice.tools")
    tools = [{"type": "function", "function": {"name": t.get("name")}} for t in choice.tools]
    allowed = AllowedTools(mode=choice.mode or "auto", tools=tools)
    return NamedToolChoice(type="allowed_tools", allowed_tools=allowed)


def _response_format(body: ResponseRequest) -> ResponseFormat | None:
    given = body.text.format if body.text is not None else None
    if given is None:
        return None
    if given.type != "json_schema":
        return ResponseFormat(type=given.type)
    if given.schema_ is None:
        raise invalid("json_schema needs a schema", "text.format.schema")
    schema = JsonSchemaFormat(name=given.name or "schema", schema=given.schema_)
    return ResponseFormat(type="json_schema", json_schema=schema)


def as_chat(body: ResponseRequest, history: list[ChatMessage]) -> ChatCompletionRequest:
    """The chat completion that answers this request after ``history``.

    Raises:
        ApiError: 400 naming the field.
    """
    if body.background:
        raise invalid("Background responses are not supported", "background")
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options needs stream: true", "stream_options")
    system = []
    if body.instructions is not None:
        system = [ChatMessage(role="system", content=body.instructions)]
    messages = [*system, *history, *input_messages(body.input)]
    if not messages:
        raise invalid("The input has no message", "input")
    choice: Any = body.tool_choice
    if isinstance(choice, ResponseToolChoice):
        choice = _tool_choice(choice)
    shared = {
        name: getattr(body, name)
        for name in SamplingFields.model_fields.keys() & ResponseRequest.model_fields.keys()
        if name not in ("stream_options", "stream")
    }
    wants_logprobs = LOGPROBS in (body.include or ()) or bool(body.top_logprobs)
    return ChatCompletionRequest.model_construct(
        **shared,
        messages=messages,
        max_completion_tokens=body.max_output_tokens,
        tools=_tools(body),
        tool_choice=choice,
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=_response_format(body),
        reasoning_effort=body.reasoning.effort if body.reasoning is not None else None,
        logprobs=wants_logprobs,
        top_logprobs=body.top_logprobs if wants_logprobs else None,
        service_tier=body.service_tier,
        metadata=body.metadata,
    )
