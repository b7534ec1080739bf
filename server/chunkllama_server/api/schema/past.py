"""Bring what clients send as a conversation's past into the forms that the schemas have.

Nothing in the past is executed, so a value of another type becomes text. What is no text at all is
marked, so that the normaliser leaves it out and names its place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

UNKNOWN = "unknown"


def as_text(value: Any) -> Any:
    """A value as text; None stays."""
    return value if value is None or isinstance(value, str) else json.dumps(value)


def as_part(data: Any) -> Any:
    """A content part: text alone is one, and a part without a type is text if it has some."""
    if isinstance(data, str):
        return {"type": "text", "text": data}
    if not isinstance(data, Mapping):
        return data
    if data.get("type") == "tool_result":
        return {"type": "text", "text": _texts(data.get("content"))}
    part = dict(data)
    text = part.get("text")
    if isinstance(text, Mapping) and isinstance(text.get("value"), str):
        text = text["value"]
    if "text" in part:
        part["text"] = as_text(text)
    if not isinstance(part.get("type"), str):
        part["type"] = UNKNOWN if text is None else "text"
    return part


def _texts(content: Any) -> str:
    """The text of blocks; what is not text is named."""
    if not isinstance(content, list):
        return as_text(content) or ""
    parts = [
        part if isinstance(part, Mapping) else {"text": part} for part in map(as_part, content)
    ]
    return "\n".join(as_text(part.get("text")) or f"[{part.get('type')}]" for part in parts)


def _is_part(value: Any) -> bool:
    if isinstance(value, Mapping):
        return not {"type", "text"}.isdisjoint(value)
    return isinstance(value, str | BaseModel)


def as_content(value: Any) -> Any:
    """Content of the past: text, or a list of parts; other data is its JSON text."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):
        return value if all(map(_is_part, value)) else json.dumps(value)
    return [value] if _is_part(value) else json.dumps(value)


def as_call(data: Any) -> Any:
    """A tool call of the past; what is none has a type that no call has."""
    if isinstance(data, BaseModel):
        return data
    if not isinstance(data, Mapping):
        return {"type": UNKNOWN}
    call = dict(data)
    if "id" in call:
        call["id"] = as_text(call["id"])
    call["type"] = as_text(call.get("type"))
    if call.get("function") is not None:
        call["function"] = as_function(call["function"])
    return call


def as_function(data: Any) -> Any:
    """The function of a call of the past."""
    if isinstance(data, Mapping):
        return {**data, "name": as_text(data.get("name"))}
    return data if isinstance(data, BaseModel) else None


def _move_blocks(message: dict[str, Any]) -> None:
    """Take calls and thoughts out of an answer's content, where Anthropic and Mistral have them."""
    content = message.get("content")
    blocks: dict[str, list[Mapping[str, Any]]] = {"tool_use": [], "thinking": []}
    others: list[Any] = []
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, Mapping) else None
        (blocks[kind] if kind in ("tool_use", "thinking") else others).append(part)
    if blocks["tool_use"]:
        calls = [
            {
                "id": call.get("id"),
                "function": {"name": call.get("name"), "arguments": call["input"]},
            }
            for call in blocks["tool_use"]
            if "input" in call
        ]
        message["tool_calls"] = message.get("tool_calls") or calls
    if blocks["thinking"]:
        thoughts = "".join(_texts(part.get("thinking")) for part in blocks["thinking"])
        message["reasoning_content"] = message.get("reasoning_content") or thoughts
    if any(blocks.values()):
        message["content"] = others or ""


def as_message(data: Any) -> Any:
    """A message of a conversation; the content of users and of the system is left to the schema,
    which refuses what is no text."""
    if not isinstance(data, Mapping):
        return data
    message = dict(data)
    role, content = message.get("role"), message.get("content")
    if role == "assistant":
        if isinstance(thoughts := message.get("reasoning"), str):  # named so by vLLM, OpenRouter
            del message["reasoning"]
            message["reasoning_content"] = message.get("reasoning_content") or thoughts
        _move_blocks(message)
        content = message.get("content")
    is_past = role in ("assistant", "tool", "function")
    if "content" in message and (is_past or (isinstance(content, Mapping) and _is_part(content))):
        message["content"] = as_content(content)
    for name in ("name", "tool_call_id", "reasoning_content", "refusal"):
        if message.get(name) is not None:
            message[name] = as_text(message[name])
    if message.get("tool_calls") is not None:
        calls = message["tool_calls"]
        message["tool_calls"] = list(map(as_call, calls if isinstance(calls, list) else [calls]))
    if message.get("function_call") is not None:
        message["function_call"] = as_function(message["function_call"])
    return message


def as_item(data: Any) -> Any:
    """An item of a response's input; a user's content is left to the schema, as of a message.

    Text alone is a user's message, null is left out.
    """
    if data is None:
        return {"type": UNKNOWN}
    if isinstance(data, str):
        return {"role": "user", "content": data}
    if not isinstance(data, Mapping):
        return data
    item = dict(data)
    if item.get("type") is not None:
        item["type"] = as_text(item["type"])
    if item.get("type") in (None, "message") and item.get("role") in ("tool", "function"):
        # A result in the shape of chat.
        return {
            "type": "function_call_output",
            "call_id": as_text(item.get("tool_call_id") or item.get("call_id")),
            "output": item.get("content"),
        }
    is_asked = item.get("type") in (None, "message") and item.get("role") != "assistant"
    content = item.get("content")
    if "content" in item and (not is_asked or (isinstance(content, Mapping) and _is_part(content))):
        item["content"] = as_content(content)
    for name in ("role", "call_id", "name", "id", "status", "phase"):
        if item.get(name) is not None:
            item[name] = as_text(item[name])
    return item
