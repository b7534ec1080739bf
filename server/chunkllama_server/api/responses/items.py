"""Input and output items of the Responses API: made, stored and read again."""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Mapping
from typing import Any, Literal, cast

from chunkllama_server.api.chat.history import readable_arguments
from chunkllama_server.api.common.response_store import item_id_in
from chunkllama_server.api.responses.tools import OfferedTool, function_name
from chunkllama_server.api.schema.chat import CalledFunction, ChatMessage, MessageToolCall
from chunkllama_server.api.schema.chat_response import ChatTokenLogprob
from chunkllama_server.api.schema.response_object import (
    CompactionItem,
    OutputCustomToolCall,
    OutputFunctionCall,
    OutputItem,
    OutputReasoning,
    OutputText,
)
from chunkllama_server.api.schema.responses import InputItem, ResponseRequest
from chunkllama_server.api.tools.raw_input import CUSTOM_INPUT

_ID_PREFIXES = {"message": "msg", "function_call": "fc", "reasoning": "rs", "compaction": "cmp"}
# Of the users' messages a compaction keeps so many characters, the newest first.
_KEPT_CHARS = 8192


def item_id(prefix: str) -> str:
    """A new id of an item."""
    return f"{prefix}_{uuid.uuid4().hex}"


def output_text(text: str, logprobs: list[ChatTokenLogprob]) -> OutputText:
    """A part of an answer's text."""
    return {
        "type": "output_text",
        "text": text,
        "annotations": [],
        "logprobs": cast(list[Any], logprobs),
    }


def reasoning_item(text: str, status: Literal["in_progress", "completed"]) -> OutputReasoning:
    """The model's thoughts."""
    return {
        "id": item_id("rs"),
        "type": "reasoning",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": text}] if text else [],
        "status": status,
    }


def opened_call(name: str, offered: OfferedTool | None, call_id: str) -> OutputItem:
    """A call that has just begun, without its arguments.

    Args:
        name: by which the model has called the tool.
        offered: the tool; None for a name that none has.
    """
    item: OutputFunctionCall | OutputCustomToolCall
    if offered is not None and offered.is_custom:
        item = {
            "id": item_id("ctc"),
            "type": "custom_tool_call",
            "call_id": call_id,
            "name": name,
            "input": "",
            "status": "in_progress",
        }
    else:
        item = {
            "id": item_id("fc"),
            "type": "function_call",
            "call_id": call_id,
            "name": name,
            "arguments": "",
            "status": "in_progress",
        }
    if offered is not None and offered.namespace is not None:
        item["name"], item["namespace"] = offered.tool.name or "", offered.namespace
    return item


def custom_input(arguments: str) -> str:
    """The text that a custom tool is called with; arguments that are cut are read so far."""
    read, _ = readable_arguments(arguments)
    value = read.get(CUSTOM_INPUT, read.get("value", ""))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def assistant_message(output: list[OutputItem]) -> ChatMessage:
    """Return the output as the message that a following response continues."""
    text, thoughts, calls = "", "", []
    for item in output:
        if item["type"] == "message":
            text += "".join(part["text"] for part in item["content"])
        elif item["type"] == "reasoning":
            thoughts += "".join(part["text"] for part in item["content"])
        elif item["type"] == "function_call":
            function = CalledFunction(name=_called(item), arguments=item["arguments"])
            calls.append(MessageToolCall(id=item["call_id"], function=function))
        elif item["type"] == "custom_tool_call":
            arguments = json.dumps({CUSTOM_INPUT: item["input"]}, ensure_ascii=False)
            function = CalledFunction(name=_called(item), arguments=arguments)
            calls.append(MessageToolCall(id=item["call_id"], function=function))
    # Not validated: a model may make more calls than a request may carry.
    return ChatMessage.model_construct(
        role="assistant",
        content=text,
        tool_calls=calls or None,
        reasoning_content=thoughts or None,
    )


def _called(item: OutputFunctionCall | OutputCustomToolCall) -> str:
    """The name by which the model has called a tool."""
    return function_name(item.get("namespace"), item["name"])


def input_items(body: ResponseRequest, response_id: str) -> list[dict[str, Any]]:
    """The request's input as stored items, each with an id, oldest first."""
    if isinstance(body.input, str):
        own_id = item_id_in(response_id, "msg", 0)
        return [_message("user", [{"type": "input_text", "text": body.input}], own_id)]
    return [_stored(item, response_id, index) for index, item in enumerate(body.input or ())]


def _message(role: str, content: list[dict[str, Any]], own_id: str) -> dict[str, Any]:
    return {
        "id": own_id,
        "type": "message",
        "role": role,
        "status": "completed",
        "content": content,
    }


def _stored(item: InputItem, response_id: str, index: int) -> dict[str, Any]:
    given = item.model_dump(by_alias=True, exclude_unset=True)
    kind = item.type or "message"
    own_id = item.id or item_id_in(response_id, _ID_PREFIXES.get(kind, "item"), index)
    if kind == "message":
        content = item.content
        is_answer = item.role == "assistant"
        text_type = "output_text" if is_answer else "input_text"
        parts: list[dict[str, Any]] = []
        if isinstance(content, str):
            parts.append({"type": text_type, "text": content})
        for part in content if isinstance(content, list) else ():
            plain = part.model_dump(by_alias=True, exclude_unset=True)
            parts.append({**plain, "type": text_type if part.type == "text" else part.type})
        if is_answer:
            parts = [{"annotations": [], "logprobs": [], **part} for part in parts]
        return _message(item.role or "user", parts, own_id)
    stored = {**given, "type": kind, "id": own_id}
    if kind == "reasoning":
        stored.setdefault("summary", [])
    elif kind.endswith(("_call", "_call_output")):
        stored.setdefault("status", "completed")
    return stored


def compaction(messages: list[ChatMessage], summary: str) -> CompactionItem:
    """A conversation in short: the summary, and what the user wrote last."""
    kept: list[str] = []
    room = _KEPT_CHARS
    for message in reversed(messages):
        text = _text_of(message)
        if message.role == "user" and text:
            if len(text) > room:
                break
            room -= len(text)
            kept.append(text)
    content = {"user": kept[::-1], "summary": summary}
    encoded = base64.urlsafe_b64encode(json.dumps(content).encode()).decode()
    return {"id": item_id("cmp"), "type": "compaction", "encrypted_content": encoded}


def _text_of(message: ChatMessage) -> str:
    content = message.content
    if isinstance(content, list):
        return "".join(part.text or "" for part in content)
    return content or ""


def compacted_text(encoded: Any) -> str | None:
    """What a compaction says, as text for the prompt; None if it was not made by this server."""
    try:
        content = json.loads(base64.urlsafe_b64decode(str(encoded)))
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, Mapping) or not isinstance(content.get("summary"), str):
        return None
    lines = [f"Summary of the conversation so far:\n{content['summary']}"]
    users = content.get("user")
    if isinstance(users, list) and users:
        lines.append("Messages of the user so far:")
        lines += [f"- {text}" for text in users if isinstance(text, str)]
    return "\n".join(lines)
