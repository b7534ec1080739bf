"""Normalise wire messages into template messages.

A conversation's past is data: nothing in it is executed, so what cannot be read becomes text or is
left out, and its path is noted for a response header. Only the turn that is to be answered is
validated: media in it would be dropped silently otherwise.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from chunkllama.rests import rest
from chunkllama_server.api.common.text_service import Message
from chunkllama_server.api.schema.chat import ROLES, ChatMessage, ContentPart, MessageToolCall
from chunkllama_server.transport.body import parse_json
from chunkllama_server.transport.errors import ApiError, invalid

MEDIA_TYPES = frozenset(
    ("image_url", "input_audio", "file", "input_image", "input_file", "image", "audio", "video_url")
)
# Names, of a part's type or of a member, that other media have.
_MEDIA = re.compile(r"image|audio|video|media|file|document|pdf|photo|picture|speech|blob|embeds")
# Python literals are parsed by recursion in C; longer texts are kept as text.
_MAX_LITERAL_CHARS = 4096
_VALUE = "value"


@dataclass(slots=True)
class History:
    """Messages a template can read, and the paths of what was repaired to get them."""

    messages: list[Message] = field(default_factory=list)
    repairs: list[str] = field(default_factory=list)


def read_json_text(value: Any) -> Any:
    """A JSON text or plain data, checked like a body; ``ValueError`` for anything else."""
    try:
        text = value if isinstance(value, str) else json.dumps(value)
        return parse_json(text.encode())
    except (ApiError, TypeError, RecursionError, UnicodeError):
        raise ValueError("not a JSON text") from None


def _close_json(text: str) -> str:
    """A JSON text that was cut, with its open string and brackets closed."""
    closers: list[str] = []
    in_string = escaped = False
    for char in text:
        if escaped:
            escaped = False
        elif in_string:
            escaped = char == "\\"
            in_string = char != '"'
        elif char == '"':
            in_string = True
        elif char in "{[":
            closers.append("}" if char == "{" else "]")
        elif char in "}]" and closers:
            closers.pop()
    text = text[:-1] if escaped else text
    if in_string:
        return text + '"' + "".join(reversed(closers))
    text = text.rstrip().removesuffix(",")
    return text + ("null" if text.endswith(":") else "") + "".join(reversed(closers))


def _read_literal(text: str) -> Any:
    if len(text) > _MAX_LITERAL_CHARS:
        raise ValueError("too long")
    try:
        return ast.literal_eval(text.strip())
    except (SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError("not a literal") from None


def readable_arguments(given: Any) -> tuple[dict[str, Any], bool]:
    """A call's arguments as an object, and whether the text was one.

    A cut text is closed, a Python literal is read as one, anything else is kept as text under
    "value", so that the template prints it.
    """
    if given is None or (isinstance(given, str) and not given.strip()):
        return {}, given == ""
    try:
        parsed = read_json_text(given)
        if isinstance(parsed, dict) or parsed == []:  # PHP writes no arguments as an empty list
            return parsed or {}, True
        return ({} if parsed is None else {_VALUE: parsed}), False
    except ValueError:
        pass
    text = given if isinstance(given, str) else repr(given)
    for read in (lambda: _close_json(text), lambda: _read_literal(text)):
        try:
            parsed = read_json_text(read())
        except ValueError:
            continue
        if isinstance(parsed, dict):
            return parsed, False
    return {_VALUE: text}, False


def arguments_text(given: Any) -> str:
    """Arguments as a call's wire format has them: text."""
    return given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)


def _has_media(part: ContentPart) -> bool:
    """Whether a part without text is of media, by its type or by what it has."""
    members = {name: value for name, value in part if value is not None and name != "type"}
    inner = (name for value in members.values() if isinstance(value, dict) for name in value)
    return any(_MEDIA.search(name.lower()) for name in (part.type, *members, *inner))


class _Normaliser:
    def __init__(self, messages: list[ChatMessage]) -> None:
        self.history = History()
        self._messages = messages
        # An answer at the end is to be continued: it answers what stands before it.
        answers = [i for i, message in enumerate(messages[:-1]) if message.role == "assistant"]
        self._turn_start = answers[-1] + 1 if answers else 0
        self._open_ids: Counter[str] = Counter()  # in the order of their calls

    def run(self) -> History:
        for index, message in enumerate(self._messages):
            rest()
            self.history.messages.append(self._message(index, message))
        return self.history

    def _note(self, path: str) -> None:
        self.history.repairs.append(path)

    def _message(self, index: int, message: ChatMessage) -> Message:
        path = message.origin or f"messages[{index}]"
        role = self._role(index, message, path)
        calls = self._calls(message, path) if role == "assistant" else []
        is_refused = index >= self._turn_start and role not in ("assistant", "tool")
        content = self._content(message, path, refuse_media=is_refused)
        if content is None and not calls:
            is_missing = "content" not in message.model_fields_set
            is_missing &= role not in ("assistant", "tool")  # a tool may return nothing
            if is_missing and index >= self._turn_start:
                raise invalid("A message needs content", f"{path}.content")
            self._note(f"{path}.content")
        entry: Message = {"role": role, "content": content or ""}
        if calls:
            entry["tool_calls"] = calls
        if role == "tool":
            entry["tool_call_id"] = self._result_id(index, message, path)
        for name in ("name", "reasoning_content"):
            value = getattr(message, name)
            if value is not None:
                entry[name] = value
        return entry

    def _role(self, index: int, message: ChatMessage, path: str) -> str:
        if message.role in ROLES:
            return "tool" if message.role == "function" else message.role
        if index >= self._turn_start:
            raise invalid(
                f"The role {message.role[:64]!r} is none of {', '.join(ROLES)}", f"{path}.role"
            )
        self._note(f"{path}.role")
        return "user"

    def _content(self, message: ChatMessage, path: str, *, refuse_media: bool) -> str | None:
        if isinstance(message.content, list):
            texts = [
                self._part(part, f"{path}.content[{index}]", refuse_media)
                for index, part in enumerate(message.content)
            ]
            return "\n".join(text for text in texts if text is not None)
        return message.content if message.content is not None else message.refusal

    def _part(self, part: ContentPart, path: str, refuse_media: bool) -> str | None:
        text = part.refusal if part.type == "refusal" else part.text
        is_media = part.type in MEDIA_TYPES or (text is None and _has_media(part))
        if is_media and refuse_media:
            raise invalid(f"Content of type {part.type[:64]!r} is not supported; send text", path)
        if part.type in ("text", "refusal") and text is not None:
            return text
        self._note(path)
        if text is not None:
            return text
        return f"[{part.type[:32]}]" if is_media else None

    def _calls(self, message: ChatMessage, path: str) -> list[dict[str, Any]]:
        calls = [
            self._call(call, f"{path}.tool_calls[{index}]", index)
            for index, call in enumerate(message.tool_calls or ())
        ]
        legacy = message.function_call
        if legacy is not None:
            arguments = self._arguments(legacy.arguments, f"{path}.function_call.arguments")
            function = {"name": legacy.name or "", "arguments": arguments}
            calls.append({"id": "call_0", "type": "function", "function": function})
        self._open_ids = Counter(call["id"] for call in calls)
        return calls

    def _call(self, call: MessageToolCall, path: str, index: int) -> dict[str, Any]:
        function = call.function
        if function is not None and function.name is not None:
            name = function.name
            arguments = self._arguments(function.arguments, f"{path}.function.arguments")
        else:
            self._note(path)
            custom = call.custom if isinstance(call.custom, dict) else {}
            given = function.arguments if function is not None else custom.get("input")
            name = str(custom.get("name") or call.type)
            arguments = {"input": given} if isinstance(given, str) else readable_arguments(given)[0]
        call_id = call.id
        if call_id is None:
            self._note(f"{path}.id")
            call_id = f"call_{index}"
        return {
            "id": call_id,
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }

    def _arguments(self, given: Any, path: str) -> dict[str, Any]:
        arguments, was_object = readable_arguments(given)
        if not was_object:
            self._note(path)
        return arguments

    def _result_id(self, index: int, message: ChatMessage, path: str) -> str:
        given = message.tool_call_id
        if given is None and message.role == "tool":
            is_missing = "tool_call_id" not in message.model_fields_set and not self._open_ids
            if is_missing and index >= self._turn_start:
                raise invalid("A tool message needs tool_call_id", f"{path}.tool_call_id")
            self._note(f"{path}.tool_call_id")
        if given is None:
            given = next(iter(self._open_ids), "call_0")
        if given in self._open_ids:
            self._open_ids[given] -= 1
            if not self._open_ids[given]:
                del self._open_ids[given]
        return given


def normalise(messages: list[ChatMessage]) -> History:
    """Template messages of a conversation: text content, object arguments, ids in place.

    Raises:
        ApiError: 400 for what the turn to be answered has: media, an unknown role, a message
            without content, or a result without tool_call_id where no call is open.
    """
    return _Normaliser(messages).run()
