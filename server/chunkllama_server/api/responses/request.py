"""A Responses API request as the chat completion it amounts to."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from chunkllama_server.api.responses.followed import Followed
from chunkllama_server.api.responses.items import compacted_text
from chunkllama_server.api.responses.tools import (
    ADDITIONAL_TOOLS,
    OfferedTool,
    ToolReader,
    chat_tool_choice,
    chat_tools,
    function_name,
)
from chunkllama_server.api.schema.base import SamplingFields
from chunkllama_server.api.schema.chat import (
    CalledFunction,
    ChatCompletionRequest,
    ChatMessage,
    ContentPart,
    JsonSchemaFormat,
    MessageToolCall,
    ResponseFormat,
)
from chunkllama_server.api.schema.responses import (
    InputItem,
    InputPart,
    ResponseRequest,
    ResponseToolChoice,
)
from chunkllama_server.transport.errors import invalid

LOGPROBS = "message.output_text.logprobs"
FindItem = Callable[[str], Mapping[str, Any] | None]


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """What a request amounts to.

    Attributes:
        conversation: the messages without the instructions.
        tools: that the model may call.
        kept_tools: those of the conversation's items, for what continues it.
    """

    chat: ChatCompletionRequest
    conversation: list[ChatMessage]
    tools: list[OfferedTool]
    kept_tools: list[dict[str, Any]]


class _InputReader:
    """Turns input items into chat messages; consecutive calls are one assistant message.

    Args:
        find_item: a stored item by its id, for item references.
        tools: takes what items offer.
    """

    def __init__(self, find_item: FindItem, tools: ToolReader) -> None:
        self.messages: list[ChatMessage] = []
        self.repairs: list[str] = []
        self._find_item = find_item
        self._tools = tools
        self._reasoning = ""

    def read(self, item: InputItem, path: str) -> None:
        kind = item.type or "message"
        if kind == "message":
            self._add_message(item, path)
        elif kind == "reasoning":
            self._reasoning += _reasoning_text(item)
        elif kind == "item_reference":
            self._follow(item, path)
        elif kind == "compaction":
            self._add_compaction(item, path)
        elif kind == "function_call" or (kind.endswith("_call") and item.call_id is not None):
            self._add_call(item, kind, path)
        elif kind.endswith("_call_output"):
            self._add_output(item, kind, path)
        elif kind == ADDITIONAL_TOOLS:
            if not self._tools.add(item.tools, f"{path}.tools"):
                self.repairs.append(f"{path}.tools")
        else:
            self.repairs.append(path)

    def _add(self, message: ChatMessage, path: str) -> None:
        if message.role == "assistant" and self._reasoning:
            message = message.model_copy(update={"reasoning_content": self._reasoning})
        self._reasoning = ""
        self.messages.append(message.from_path(path))

    def _add_message(self, item: InputItem, path: str) -> None:
        if item.role is None:
            raise invalid("A message needs a role", f"{path}.role")
        is_answer = item.role == "assistant"
        calls = item.tool_calls if is_answer else None
        if not is_answer and "content" not in item.model_fields_set:
            raise invalid("A message needs content", f"{path}.content")
        content: Any = item.content
        if isinstance(content, list):
            content = [_chat_part(part) for part in content]
        self._add(ChatMessage(role=item.role, content=content, tool_calls=calls or None), path)

    def _add_call(self, item: InputItem, kind: str, path: str) -> None:
        arguments = item.arguments
        if kind != "function_call":
            given = next((v for v in (item.input, item.action, item.operation) if v), None)
            arguments = {"input": given} if isinstance(given, str) else given or arguments
        name = function_name(item.namespace, item.name or "")
        if not name and kind != "function_call":
            name = kind.removesuffix("_call")
        if not name or (arguments is None and kind == "function_call"):
            self.repairs.append(path)
        function = CalledFunction(name=name, arguments=arguments)
        call = MessageToolCall(id=item.call_id, function=function)
        last = self.messages[-1] if self.messages else None
        if last is not None and last.role == "assistant":
            if last.tool_calls is None:
                self.messages[-1] = last.model_copy(update={"tool_calls": [call]})
            else:
                last.tool_calls.append(call)  # in place: an input may be thousands of calls
        else:
            self._add(ChatMessage(role="assistant", content=None, tool_calls=[call]), path)

    def _add_compaction(self, item: InputItem, path: str) -> None:
        text = compacted_text(item.encrypted_content)
        if text is None:
            self.repairs.append(path)
        else:
            self._add(ChatMessage(role="developer", content=text), path)

    def _add_output(self, item: InputItem, kind: str, path: str) -> None:
        content: Any = item.output
        if isinstance(content, list):
            parts = [_as_part(part) for part in content]
            content = [_chat_part(part) for part in parts if part is not None]
            if len(content) < len(parts):
                self.repairs.append(f"{path}.output")
        elif content is not None and not isinstance(content, str):
            content = json.dumps(content, ensure_ascii=False)
        message = ChatMessage(role="tool", tool_call_id=item.call_id, content=content)
        self._add(message, path)

    def _follow(self, item: InputItem, path: str) -> None:
        found = self._find_item(item.id) if item.id is not None else None
        if found is None:
            raise invalid(
                f"No stored response has the item {str(item.id)[:100]!r}; send the item", path
            )
        self.read(InputItem.model_validate(found), path)


def _reasoning_text(item: InputItem) -> str:
    parts = item.content if isinstance(item.content, list) else []
    return "".join(part.text or "" for part in parts)


def _as_part(value: Any) -> InputPart | None:
    if isinstance(value, str):
        return InputPart(type="text", text=value)
    if isinstance(value, dict) and not {"type", "text"} & value.keys():  # a shell's output
        return InputPart(type="text", text=json.dumps(value, ensure_ascii=False))
    try:
        return InputPart.model_validate(value)
    except ValidationError:
        return None


def _chat_part(part: InputPart) -> ContentPart:
    is_text = part.type in ("input_text", "output_text", "text")
    return ContentPart(
        type="text" if is_text else part.type,
        text=part.text,
        refusal=part.refusal,
        prompt_cache_breakpoint=part.prompt_cache_breakpoint,
    )


def _input_messages(
    given: str | list[InputItem] | None, find_item: FindItem, tools: ToolReader
) -> tuple[list[ChatMessage], list[str]]:
    """Chat messages of the input, and the paths of items that were left out or repaired.

    Raises:
        ApiError: 400 for a message without role or content, or a reference to no stored item.
    """
    if given is None:
        return [], []
    if isinstance(given, str):
        return [ChatMessage(role="user", content=given).from_path("input")], []
    reader = _InputReader(find_item, tools)
    for index, item in enumerate(given):
        reader.read(item, f"input[{index}]")
    return reader.messages, reader.repairs


def _response_format(body: ResponseRequest) -> ResponseFormat | None:
    given = body.text.format if body.text is not None else None
    if given is None:
        return None
    if given.type != "json_schema":
        return ResponseFormat(type=given.type)
    if given.schema_ is None:
        raise invalid("json_schema needs a schema", "text.format.schema")
    schema = JsonSchemaFormat(schema=given.schema_, strict=given.strict)
    return ResponseFormat(type="json_schema", json_schema=schema)


def read_request(body: ResponseRequest, followed: Followed) -> ReadRequest:
    """The chat completion that answers a request after what it follows.

    Raises:
        ApiError: 400 naming the field; 413 for too much that it refers to.
    """
    if body.background and body.store is False:
        raise invalid("A background response is read from the store; leave store out", "background")
    system = []
    if body.instructions is not None:
        instructions = ChatMessage(role="system", content=body.instructions)
        system = [instructions.from_path("instructions")]
    offered = ToolReader(body.tools or (), followed.tools())
    given, repairs = _input_messages(body.input, followed.items().find, offered)
    conversation = [*followed.messages(), *given]
    messages = [*system, *conversation]
    if not messages:
        raise invalid("The input has no message", "input")
    tools = offered.offered()
    choice: Any = body.tool_choice
    if isinstance(choice, ResponseToolChoice):
        choice = chat_tool_choice(choice, tools)
    shared = {
        name: getattr(body, name)
        for name in SamplingFields.model_fields.keys() & ResponseRequest.model_fields.keys()
        if name not in ("stream_options", "stream")
    }
    wants_logprobs = LOGPROBS in (body.include or ()) or bool(body.top_logprobs)
    chat = ChatCompletionRequest.model_construct(
        **shared,
        messages=messages,
        max_completion_tokens=body.max_output_tokens,
        tools=chat_tools(tools) or None,
        tool_choice=choice,
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=_response_format(body),
        reasoning_effort=body.reasoning.effort if body.reasoning is not None else None,
        logprobs=wants_logprobs,
        top_logprobs=body.top_logprobs if wants_logprobs else None,
        service_tier=body.service_tier,
        metadata=body.metadata,
        chat_template_kwargs=body.chat_template_kwargs,
    )
    chat.repairs.extend(repairs)
    return ReadRequest(chat, conversation, tools, offered.kept)
