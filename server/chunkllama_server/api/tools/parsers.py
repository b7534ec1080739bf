"""Tool calls read out of the model's text as it streams: Llama 3 JSON, Hermes tags, and forced
JSON.

A parser gets complete characters and gives back what is content and what is part of a call. A
call's name comes first, then its arguments in pieces; text that turns out to be no call becomes
content.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Protocol

_SPACE = " \t\r\n"
_ARGUMENT_KEYS = ("arguments", "parameters")
_CALL_KEYS = frozenset(("name", "type", "function", "id", "index", *_ARGUMENT_KEYS))
_FENCES = ("```json", "```")


@dataclass(frozen=True, slots=True)
class CallDelta:
    """Part of call number ``index``; ``name`` is set on its first part alone."""

    index: int
    name: str | None
    arguments: str


@dataclass(slots=True)
class Parsed:
    """What some text meant."""

    content: str = ""
    calls: list[CallDelta] = field(default_factory=list)


class OutputParser(Protocol):
    """Splits one choice's text into content and tool calls."""

    def feed(self, text: str) -> Parsed:
        """Take the next text."""
        ...

    def finish(self) -> Parsed:
        """Return the text that was held back; no text follows."""
        ...


class PlainText:
    """All text is content."""

    def feed(self, text: str) -> Parsed:
        return Parsed(text)

    def finish(self) -> Parsed:
        return Parsed()


class _CallObject:
    """Reads one call object a character at a time.

    The object is ``{"name": ..., "arguments" | "parameters": ...}``, perhaps inside ``{"type":
    "function", "function": ...}``. The arguments end with their own bracket, so a missing outer
    brace does not swallow what follows.
    """

    def __init__(self) -> None:
        self.raw = ""
        self.name: str | None = None
        self.is_complete = False
        # A member that no call has was read.
        self.is_other = False
        self._depth = 0
        self._base = 1
        self._in_string = False
        self._escaped = False
        self._is_closing = False
        self._key = ""
        self._part_start = 0
        self._arguments_start: int | None = None
        self._arguments_end: int | None = None
        self._num_given = 0

    def feed(self, text: str) -> str:
        """Consume up to the object's end; returns what follows it."""
        for position, char in enumerate(text):
            if self._is_closing and char not in _SPACE and char not in ",}]":
                self.is_complete = True
                return text[position:]
            self.raw += char
            self._step(char)
            if self.is_complete:
                return text[position + 1 :]
        return ""

    def _step(self, char: str) -> None:
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
            return
        if char == '"':
            self._in_string = True
        elif char in "{[":
            self._open(char)
        elif char in "}]":
            self._close()
        elif self._depth == self._base and char == ":":
            self._begin_value()
        elif self._depth == self._base and char == ",":
            self._end_value()
            self._part_start = len(self.raw)
            self._is_closing = False

    def _open(self, char: str) -> None:
        self._depth += 1
        is_wrapped = char == "{" and self._key == "function" and self._depth == self._base + 1
        if self._depth == 1 or is_wrapped:
            self._base = self._depth
            self._part_start = len(self.raw)
            self._key = ""

    def _close(self) -> None:
        if self._depth == self._base:
            self._end_value()
        self._depth -= 1
        if self._depth == 0:
            self.is_complete = True
        elif self._depth < self._base:
            self._base = self._depth
            self._is_closing = True
        elif self._depth == self._base and self._reads_arguments:
            self._arguments_end = len(self.raw)
            self._is_closing = True

    @property
    def _reads_arguments(self) -> bool:
        return self._key in _ARGUMENT_KEYS and self._arguments_end is None

    def _begin_value(self) -> None:
        self._key = _loads(self.raw[self._part_start : -1]) or ""
        self._part_start = len(self.raw)
        self.is_other = self.is_other or self._key not in _CALL_KEYS
        # The first of two counts: it may have been sent already.
        if self._key in _ARGUMENT_KEYS and self._arguments_start is None:
            self._arguments_start = self._part_start

    def _end_value(self) -> None:
        if self._key == "name":
            self.name = _loads(self.raw[self._part_start : -1])
        elif self._reads_arguments:
            self._arguments_end = len(self.raw) - 1
        self._key = ""

    def take_arguments(self) -> str:
        """Argument text that has come since the last call; JSON text even if the value is a
        string."""
        if self._arguments_start is None:
            return "{}" if self.is_complete else ""
        value = self.raw[self._arguments_start : self._arguments_end].lstrip(_SPACE)
        if value.startswith("{"):
            shown = value.rstrip(_SPACE) if self._arguments_end else value
        elif self._arguments_end is None:
            return ""
        else:
            shown = _loads(value) or "{}"
        new, self._num_given = shown[self._num_given :], len(shown)
        return new


def _loads(text: str) -> str | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


class _CallWriter:
    """Numbers calls and turns objects into deltas; calls beyond ``max_calls`` are dropped."""

    def __init__(self, tool_names: Collection[str], max_calls: int | None) -> None:
        self._tool_names = tool_names
        self._max_calls = max_calls
        self._index = -1
        self._announced = False

    def write(self, call: _CallObject) -> list[CallDelta]:
        """New deltas of the current object; [] until its name is known to be a tool's."""
        if not self.knows(call):
            return []
        deltas = []
        if not self._announced:
            self._announced = True
            self._index += 1
            deltas.append(CallDelta(self._index, call.name, ""))
        arguments = call.take_arguments()
        if arguments:
            deltas.append(CallDelta(self._index, None, arguments))
        if call.is_complete:
            self._announced = False
        if self._max_calls is not None and self._index >= self._max_calls:
            return []
        return deltas

    def knows(self, call: _CallObject) -> bool:
        return call.name in self._tool_names

    def refuses(self, call: _CallObject) -> bool:
        """Whether the object can no longer become a call of a known tool."""
        if self.knows(call):
            return False
        return call.is_other or call.is_complete or call.name is not None


class JsonCalls:
    """Llama 3 style: the answer is one JSON object per call, or a JSON array of them.

    Args:
        tool_names: names that make an object a call.
        forced: a grammar guarantees calls, so nothing is content.
        max_calls: calls beyond this are dropped; None is no limit.
    """

    _TAGS = ("<|python_tag|>", "[TOOL_CALLS]")
    _SEPARATORS = _SPACE + "[],;"

    def __init__(
        self, tool_names: Collection[str], *, forced: bool = False, max_calls: int | None = None
    ) -> None:
        self._writer = _CallWriter(tool_names, max_calls)
        self._forced = forced
        self._call: _CallObject | None = None
        self._lead = ""
        self._has_calls = False
        self._is_content = False

    def feed(self, text: str) -> Parsed:
        parsed = Parsed()
        while text:
            if self._is_content:
                parsed.content += text
                break
            if self._call is None:
                text = self._find_call(text, parsed)
            else:
                text = self._read_call(self._call, text, parsed)
        return parsed

    def _find_call(self, text: str, parsed: Parsed) -> str:
        self._lead += text
        stripped = self._lead.lstrip(_SPACE)
        for tag in self._TAGS:
            if stripped and tag.startswith(stripped):
                return ""
            if stripped.startswith(tag):
                self._lead = ""
                return stripped.removeprefix(tag)
        stripped = _after_fence(stripped.lstrip(self._SEPARATORS))
        stripped = stripped.lstrip(self._SEPARATORS + ("`" if self._has_calls else ""))
        if stripped.startswith("{"):
            self._call = _CallObject()
            self._lead = self._lead[: -len(stripped)]
            return stripped
        if _FENCES[0].startswith(stripped):
            return ""
        self._is_content = not self._forced
        lead, self._lead = self._lead, ""
        if self._is_content:
            # Behind calls the brackets and fences of their list are no content.
            parsed.content += stripped if self._has_calls else lead
        return ""

    def _read_call(self, call: _CallObject, text: str, parsed: Parsed) -> str:
        rest = call.feed(text)
        parsed.calls += self._writer.write(call)
        if self._writer.refuses(call) and not self._forced:
            parsed.content += self._lead + call.raw
            self._is_content = True
        elif not call.is_complete:
            return rest
        self._has_calls = self._has_calls or self._writer.knows(call)
        self._call, self._lead = None, ""
        return rest

    def finish(self) -> Parsed:
        call, lead = self._call, self._lead
        self._call, self._lead = None, ""
        if self._forced or (call is not None and self._writer.knows(call)):
            return Parsed()
        content = lead + (call.raw if call is not None else "")
        if self._has_calls:
            content = content.strip(self._SEPARATORS + "`")
        return Parsed(content if content.strip(_SPACE) else "")


def _after_fence(text: str) -> str:
    """The text behind the beginning of a code fence."""
    for fence in _FENCES:
        if text.startswith(fence) and (fence == _FENCES[0] or not _FENCES[0].startswith(text)):
            return text.removeprefix(fence)
    return text


class HermesCalls:
    """Hermes style: content, and calls as ``<tool_call>{...}</tool_call>``, or a list of them."""

    _OPEN, _CLOSE = "<tool_call>", "</tool_call>"

    def __init__(self, tool_names: Collection[str], *, max_calls: int | None = None) -> None:
        self._writer = _CallWriter(tool_names, max_calls)
        self._text = ""
        self._call: _CallObject | None = None
        self._lead = ""
        self._after_call = False

    def feed(self, text: str) -> Parsed:
        parsed = Parsed()
        self._text += text
        while self._text and self._step(parsed):
            pass
        return parsed

    def _step(self, parsed: Parsed) -> bool:
        """Consume some of the text; False when more must come first."""
        if self._call is not None:
            return self._read_call(self._call, parsed)
        if self._lead:
            return self._begin_call(parsed)
        if self._after_call:
            return self._end_call()
        start = self._text.find(self._OPEN)
        if start >= 0:
            parsed.content += self._text[:start]
            self._text = self._text[start + len(self._OPEN) :]
            self._lead = self._OPEN
            return True
        held = _partial_suffix(self._text, self._OPEN)
        parsed.content += self._text[: len(self._text) - held]
        self._text = self._text[len(self._text) - held :]
        return False

    def _end_call(self) -> bool:
        """Behind a call: another of the same list, or the closing tag."""
        self._text = self._text.lstrip(_SPACE + ",]}`")
        if self._text.startswith("{"):
            self._after_call, self._call = False, _CallObject()
            return True
        if self._CLOSE.startswith(self._text):
            return False
        self._text = self._text.removeprefix(self._CLOSE).lstrip(_SPACE)
        self._after_call = False
        return True

    def _begin_call(self, parsed: Parsed) -> bool:
        stripped = _after_fence(self._text.lstrip(_SPACE)).lstrip(_SPACE + "[")
        if _FENCES[0].startswith(stripped):
            return False
        if stripped.startswith("{"):
            self._lead += self._text[: -len(stripped)]
            self._text = stripped
            self._call = _CallObject()
        else:
            parsed.content += self._lead
            self._lead = ""
        return True

    def _read_call(self, call: _CallObject, parsed: Parsed) -> bool:
        self._text = call.feed(self._text)
        parsed.calls += self._writer.write(call)
        if self._writer.refuses(call):
            parsed.content += self._lead + call.raw
            self._after_call, self._call, self._lead = False, None, ""
        elif call.is_complete:
            self._after_call, self._call, self._lead = True, None, ""
        return True

    def finish(self) -> Parsed:
        call = self._call
        known = call is not None and self._writer.knows(call)
        held = "" if known or self._after_call else self._lead + (call.raw if call else "")
        text = "" if self._after_call and self._CLOSE.startswith(self._text) else self._text
        self._call, self._lead, self._text = None, "", ""
        return Parsed(held + text)


def _partial_suffix(text: str, tag: str) -> int:
    """Length of the longest end of ``text`` that begins ``tag``."""
    for length in range(min(len(text), len(tag) - 1), 0, -1):
        if tag.startswith(text[-length:]):
            return length
    return 0
