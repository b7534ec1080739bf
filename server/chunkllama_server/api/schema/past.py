"""Bring what clients send as a conversation's past into the forms that the schemas have.

Nothing in the past is executed, so a value of another type becomes text. What is no text at all is
marked, so that the normaliser leaves it out and names its place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from chunkllama.rests import rest

UNKNOWN = "unknown"
_FLAT_NAMES = frozenset(("name", "toolName"))
_FLAT_ARGUMENTS = frozenset(("arguments", "args", "input", "parameters"))
# Roles as LangChain, Gemini and ShareGPT name them.
_ROLES = {"human": "user", **dict.fromkeys(("ai", "model", "gpt", "bot"), "assistant")}
# Parts of a message that stand among a response's items.
_PARTS = frozenset(("input_text", "input_image", "input_audio", "input_file", "text", "image_url"))


def as_text(value: Any) -> Any:
    """A value as text; None stays."""
    return value if value is None or isinstance(value, str) else json.dumps(value)


def as_part(data: Any) -> Any:
    """A content part: text alone is one, and a part without a type is text if it has some."""
    rest()
    if isinstance(data, str):
        return {"type": "text", "text": data}
    if not isinstance(data, Mapping):
        return data
    if (text := _held_text(data)) is not None:
        kept = {"prompt_cache_breakpoint": data.get("prompt_cache_breakpoint")}
        return {"type": "text", "text": text, **{k: v for k, v in kept.items() if v is not None}}
    part = dict(data)
    text = part.get("text")
    if isinstance(text, Mapping) and isinstance(text.get("value"), str):
        text = text["value"]
    if "text" in part:
        part["text"] = as_text(text)
    if not isinstance(part.get("type"), str):
        part["type"] = UNKNOWN if text is None else "text"
    return part


def _held_text(part: Mapping[str, Any]) -> str | None:
    """The text that a part holds in a member of its own: a tool's result, MCP's resources, data."""
    kind = part.get("type")
    if kind == "tool_result":
        return _texts(part.get("content"))
    if kind == "json":
        found = next((part[name] for name in ("json", "data", "value") if name in part), None)
        return None if found is None else as_text(found)
    held = part.get(kind) if kind == "resource" else None
    text = held.get("text") if isinstance(held, Mapping) else None
    return text if isinstance(text, str) else None


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


def as_block(data: Any) -> Any:
    """A block of Anthropic's messages; data that a tool returned becomes its JSON text."""
    if not isinstance(data, Mapping) or data.get("type") != "tool_result":
        return data
    content = data.get("content")
    if content is None or isinstance(content, str):
        return data
    if isinstance(content, list):
        parts = [{"type": "text", "text": p} if isinstance(p, str) else p for p in content]
        is_blocks = all(isinstance(part, Mapping) and "type" in part for part in parts)
        return {**data, "content": parts if is_blocks else as_text(content)}
    is_block = isinstance(content, Mapping) and isinstance(content.get("type"), str)
    return {**data, "content": [content] if is_block else as_text(content)}


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
    elif call.get("custom") is None and _FLAT_NAMES & call.keys():
        # The members of the function stand beside the id.
        name, arguments = _take(call, _FLAT_NAMES), _take(call, _FLAT_ARGUMENTS)
        call["type"] = "function"
        call["function"] = as_function({"name": name, "arguments": arguments})
    return call


def _take(call: dict[str, Any], names: frozenset[str]) -> Any:
    """Remove what goes by one of the names."""
    given = [call.pop(name) for name in names & call.keys()]
    return next((value for value in given if value is not None), None)


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


def _with_plain_role(data: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with a role as OpenAI writes it: some clients write "User", or "human"."""
    role = data.get("role")
    return {**data, "role": _plain_role(role)} if isinstance(role, str) else dict(data)


def _plain_role(role: str) -> str:
    role = role.strip().lower()
    return _ROLES.get(role, role)


def as_message(data: Any) -> Any:
    """A message of a conversation; the content of users and of the system is left to the schema,
    which refuses what is no text."""
    rest()
    if not isinstance(data, Mapping):
        return data
    message = _with_plain_role(data)
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


def as_conversation(data: Any) -> Any:
    """Messages or items; before the last answer, content that is no text becomes text.

    An answer at the end is to be continued, and what stands before it is not yet past.
    """
    if not isinstance(data, list):
        return data
    num_past = _num_past(data)
    return [*map(_as_past, data[:num_past]), *data[num_past:]]


def as_messages(data: Any) -> Any:
    """Messages of a conversation; null in its past is an empty one."""
    if not isinstance(data, list):
        return data
    empty = {"role": UNKNOWN, "content": None}
    num_past = _num_past(data)
    past = [empty if message is None else message for message in data[:num_past]]
    return as_conversation([*past, *data[num_past:]])


def _num_past(data: list[Any]) -> int:
    """The number of messages or items before the last answer."""
    return next((i for i in range(len(data) - 2, -1, -1) if _is_answer(data[i])), 0)


def _as_past(data: Any) -> Any:
    """A message or an item before the last answer; one that lacks its role or content is marked."""
    if isinstance(data, str):
        return {"role": "user", "content": data}
    if not isinstance(data, Mapping):
        return data
    item = dict(data)
    if "content" in item and not _has_parts(item["content"]):
        item["content"] = as_content(item["content"])
    if item.get("type") in (None, "message"):
        is_message = "content" in item or item.get("type") == "message" or not item
        if item.get("role") is None and is_message:
            item["role"] = UNKNOWN
        if item.get("role") is not None:
            item.setdefault("content", None)
    return item


def _has_parts(content: Any) -> bool:
    return isinstance(content, list) and any(map(_is_part, content))


def _is_answer(item: Any) -> bool:
    if not isinstance(item, Mapping):
        return False
    return _plain_role(str(item.get("role"))) == "assistant" or str(item.get("type")).endswith(
        "_call"
    )


def _typed(data: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of an item; members tell the type of one that has neither type nor role."""
    item = _with_plain_role(data)
    if item.get("type") is not None:
        item["type"] = as_text(item["type"])
    elif item.get("role") is None:
        if {name for name, value in item.items() if value is not None} == {"id"}:
            item["type"] = "item_reference"
        elif {"call_id", "output"} <= item.keys():
            item["type"] = "function_call_output"
        elif {"name", "arguments"} <= item.keys():
            item["type"] = "function_call"
    return item


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
    item = _typed(data)
    if item.get("type") in _PARTS and "role" not in item:
        return {"role": "user", "content": [data]}
    if item.get("type") == "output_text" and "role" not in item:
        return {"role": "assistant", "content": [data]}
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
    for name in ("role", "call_id", "name", "namespace", "id", "status", "phase"):
        if item.get(name) is not None:
            item[name] = as_text(item[name])
    return item
