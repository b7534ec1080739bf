"""Adapt a conversation to what a chat template can express, so that no text of it is dropped.

Where a template has no form for something, the nearest form it has is used: a tool's result is a
user message, a system message in the middle is a user message, calls are text. The words for tools
are those of Hermes function calling, which small chat models (SmolLM2 among them) are trained on.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from chunkllama.errors import InvalidRequestError
from chunkllama.text.template_capabilities import NAMED_ID, Message, TemplateCapabilities

_INSTRUCTIONS = (
    "You have access to these functions:\n<tools>\n{tools}\n</tools>\n\n"
    "To call a function, answer with its name and arguments as JSON inside tool_call tags:\n"
    '<tool_call>\n{{"name": "function name", "arguments": {{...}}}}\n</tool_call>'
)
_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")
_JOINED = "\n\n"
_INSTRUCTING = ("system", "developer")


def plain_messages(messages: list[Message]) -> list[Message]:
    """Messages of a chat completion with text content, and arguments of calls as objects.

    Raises:
        InvalidRequestError: a message has no role, or a part that is no text.
    """
    return [_plain(index, message) for index, message in enumerate(messages)]


def template_tool(function: Mapping[str, Any]) -> dict[str, Any]:
    """A tool with the members that templates read without asking whether they are there."""
    shown = {
        "name": function["name"],
        "description": function.get("description") or "",
        "parameters": function.get("parameters") or {"type": "object", "properties": {}},
    }
    return {"type": "function", "function": shown}


def _plain(index: int, message: Message) -> Message:
    if not isinstance(message.get("role"), str):
        raise InvalidRequestError("a message needs a role", f"messages[{index}].role")
    plain = {**message, "content": _text(message.get("content"), f"messages[{index}].content")}
    calls = []
    for number, call in enumerate(message.get("tool_calls") or ()):
        function = dict(call["function"])
        arguments = function.get("arguments")
        try:
            parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
        except (ValueError, RecursionError):
            parsed = {"value": arguments}
        function["arguments"] = parsed if isinstance(parsed, dict) else {}
        calls.append({"id": f"call_{number}", "type": "function", **call, "function": function})
    plain.pop("tool_calls", None)
    return {**plain, "tool_calls": calls} if calls else plain


def _text(content: Any, path: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [content]
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        raise InvalidRequestError("content is text or a list of text parts", path)
    return "\n".join(part["text"] for part in parts)


def adapt(
    messages: list[Message], tools: list[dict[str, Any]] | None, able: TemplateCapabilities
) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """The messages and tools in the forms the template has.

    Args:
        messages: text content, object arguments.
    """
    if not able.developer:
        messages = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
    if tools and not able.tools:
        messages, tools = describe_tools(messages, tools), None
    messages = _adapt_calls(_with_names(messages), able)
    if not able.tool_results:
        messages = [_result_as_user(m) if m["role"] == "tool" else m for m in messages]
    if able.call_ids == "named":
        messages = _with_named_ids(messages)
    elif able.call_ids == "short":
        messages = [_with_ids(message, _short_id) for message in messages]
    messages = _adapt_system(messages, able)
    if not able.first_answer:
        messages = _with_first_user(messages)
    if not able.repeated_roles:
        messages = _merge_repeated(messages)
    if not able.system_optional and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": ""}, *messages]
    if not able.empty_text:
        messages = [
            m if m["content"] or "tool_calls" in m else {**m, "content": " "} for m in messages
        ]
    if tools and not able.bare_tools:
        tools = [_with_described_parameters(tool) for tool in tools]
    if able.content == "parts":
        messages = [
            {**m, "content": [{"type": "text", "text": m["content"]}] if m["content"] else []}
            for m in messages
        ]
    return messages, tools


def _with_described_parameters(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool whose parameters have the members that the template prints without asking."""
    function = tool["function"]
    parameters = {"required": [], **function["parameters"]}
    properties = parameters.get("properties")
    if isinstance(properties, Mapping):
        parameters["properties"] = {
            name: {"type": "any", "description": "", **schema}
            if isinstance(schema, dict)
            else schema
            for name, schema in properties.items()
        }
    return {**tool, "function": {**function, "parameters": parameters}}


def describe_tools(messages: list[Message], tools: list[dict[str, Any]]) -> list[Message]:
    """The conversation with the tools described at the end of its system message."""
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    text = _INSTRUCTIONS.format(tools=listed)
    if messages and messages[0]["role"] == "system":
        first = {**messages[0], "content": _join(messages[0]["content"], text)}
        return [first, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _join(*texts: str) -> str:
    return _JOINED.join(text for text in texts if text)


def _with_names(messages: list[Message]) -> list[Message]:
    """Results with the name of their call, which templates may print instead of its id.

    One with the id of no call answers the first that has no result yet.
    """
    named: list[Message] = []
    called: dict[str, str] = {}
    open_ids: dict[str, None] = {}  # in the order of their calls
    for message in messages:
        if "tool_calls" in message:
            open_ids = dict.fromkeys(call["id"] for call in message["tool_calls"])
            called |= {call["id"]: call["function"]["name"] for call in message["tool_calls"]}
        elif message["role"] == "tool":
            answered = message.get("tool_call_id")
            if answered not in called and open_ids:
                answered = next(iter(open_ids))
            if answered is not None:
                open_ids.pop(answered, None)
            if answered in called:
                message = {"name": called[answered], **message}
        named.append(message)
    return named


def _adapt_calls(messages: list[Message], able: TemplateCapabilities) -> list[Message]:
    adapted: list[Message] = []
    position = 0
    while position < len(messages):
        message = messages[position]
        position += 1
        calls = message.get("tool_calls")
        is_split = bool(calls and message["content"]) and not able.text_beside_calls
        if not calls:
            is_orphan = message["role"] == "tool" and not _follows_call(adapted)
            is_user = is_orphan and not (able.lone_results and able.repeated_roles)
            adapted.append(_result_as_user(message) if is_user else message)
        elif not able.tool_calls:
            adapted.append(_calls_as_text(message))
        elif not able.repeated_roles and (is_split or _goes_on(messages, position)):
            # Roles alternate, and calls do not count as an answer: as text they do, and the results
            # of calls that are text are a user's turn.
            adapted.append(_calls_as_text(message))
            end = _end_of_results(messages, position)
            adapted += [_result_as_user(result) for result in messages[position:end]]
            position = end
        else:
            if is_split:
                adapted.append({"role": "assistant", "content": message["content"]})
                message = {**message, "content": ""}
            message = _with_arguments(message, able)
            if len(calls) > 1 and not able.parallel_calls:
                end = _end_of_results(messages, position)
                adapted += _one_call_each(message, messages[position:end])
                position = end
            else:
                adapted.append(message)
    return adapted


def _follows_call(messages: list[Message]) -> bool:
    """Whether a result may stand behind these messages."""
    return bool(messages) and (messages[-1]["role"] == "tool" or "tool_calls" in messages[-1])


def _goes_on(messages: list[Message], position: int) -> bool:
    """Whether the user goes on behind calls at ``position`` without an answer to their results."""
    end = _end_of_results(messages, position)
    return end < len(messages) and messages[end]["role"] != "assistant"


def _end_of_results(messages: list[Message], position: int) -> int:
    while position < len(messages) and messages[position]["role"] == "tool":
        position += 1
    return position


def _calls_as_text(message: Message) -> Message:
    calls = [
        f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"
        for call in message["tool_calls"]
    ]
    text = "\n".join([message["content"], *calls] if message["content"] else calls)
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**rest, "content": text}


def _with_arguments(message: Message, able: TemplateCapabilities) -> Message:
    if able.arguments == "object":
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": calls}


def _one_call_each(message: Message, results: list[Message]) -> list[Message]:
    """Each call in a message of its own, followed by its result."""
    pairs: list[Message] = []
    by_id: dict[str | None, list[Message]] = {}
    for result in results:
        by_id.setdefault(result.get("tool_call_id"), []).append(result)
    for number, call in enumerate(message["tool_calls"]):
        content = message["content"] if number == 0 else ""
        pairs.append({**message, "content": content, "tool_calls": [call]})
        pairs += by_id.pop(call["id"], ())
    return pairs + [result for result in results if result.get("tool_call_id") in by_id]


def _result_as_user(message: Message) -> Message:
    text = f"<tool_response>\n{message['content']}\n</tool_response>"
    return {"role": "user", "content": text}


def _short_id(call_id: str) -> str:
    if _SHORT_ID.fullmatch(call_id):
        return call_id
    return hashlib.sha256(call_id.encode("utf-8", "surrogatepass")).hexdigest()[:9]


def _with_ids(message: Message, renamed: Callable[[str], str]) -> Message:
    changed = dict(message)
    if "tool_call_id" in message:
        changed["tool_call_id"] = renamed(message["tool_call_id"])
    if "tool_calls" in message:
        calls = [{**call, "id": renamed(call["id"])} for call in message["tool_calls"]]
        changed["tool_calls"] = calls
    return changed


def _with_named_ids(messages: list[Message]) -> list[Message]:
    """Calls and results with ids that have the call's name, numbered in the whole conversation."""
    named: dict[str, str] = {}
    changed, number = [], 0
    for message in messages:
        for call in message.get("tool_calls", ()):
            name = call["function"]["name"]
            named[call["id"]] = NAMED_ID.format(name=name, number=number)
            number += 1
        changed.append(_with_ids(message, lambda call_id: named.get(call_id, call_id)))
    return changed


def _adapt_system(messages: list[Message], able: TemplateCapabilities) -> list[Message]:
    """System messages where the template has them; others are part of the user's turn."""
    if able.system and able.system_anywhere:
        return messages
    num_leading = 0
    while num_leading < len(messages) and messages[num_leading]["role"] == "system":
        num_leading += 1
    rest = [
        {"role": "user", "content": m["content"]} if m["role"] == "system" else m
        for m in messages[num_leading:]
    ]
    text = _join(*(message["content"] for message in messages[:num_leading]))
    if not num_leading:
        return rest
    if able.system:
        return [{**messages[0], "content": text}, *rest]
    if rest and rest[0]["role"] == "user":
        return [{**rest[0], "content": _join(text, rest[0]["content"])}, *rest[1:]]
    return [{"role": "user", "content": text}, *rest]


def _with_first_user(messages: list[Message]) -> list[Message]:
    """The conversation with a user's turn at its beginning, behind the system messages.

    It is empty before an answer; where there are system messages alone, it is the last of them.
    """
    roles = [message["role"] for message in messages]
    num_leading = next((i for i, r in enumerate(roles) if r not in _INSTRUCTING), len(roles))
    if num_leading == len(messages):
        return [*messages[:-1], *({**message, "role": "user"} for message in messages[-1:])]
    if roles[num_leading] == "user":
        return messages
    first = {"role": "user", "content": ""}
    return [*messages[:num_leading], first, *messages[num_leading:]]


def _merge_repeated(messages: list[Message]) -> list[Message]:
    """Consecutive user messages as one, and consecutive assistant messages."""
    turns: list[list[Message]] = []
    for message in messages:
        last = turns[-1][-1] if turns else None
        is_repeated = (
            last is not None
            and last["role"] == message["role"]
            and message["role"] in ("user", "assistant")
            and "tool_calls" not in last
        )
        if is_repeated:
            turns[-1].append(message)
        else:
            turns.append([message])
    return [_merged(turn) for turn in turns]


def _merged(turn: list[Message]) -> Message:
    """Messages of one role as one: joined at once, since two at a time would copy the text of the
    first with each.
    """
    if len(turn) == 1:
        return turn[0]
    fields = {key: value for message in turn for key, value in message.items()}
    return {**fields, "content": _join(*(message["content"] for message in turn))}
