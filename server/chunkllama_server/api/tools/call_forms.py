"""The forms in which models write one call: here a JSON object, and a name before its arguments.

Calls with a tag for each parameter are in `parameter_call`, Python calls in `python_call`. A form
takes text and gives back what follows the call. Its arguments come as JSON text in pieces that are
never revised.
"""

from __future__ import annotations

import ast
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from chunkllama_server.api.tools.brackets import SPACE, ObjectReader

# Parameters of each function by its name, as its JSON schema; {} where it has none.
Functions = Mapping[str, Mapping[str, Any]]

_NAME_KEYS = frozenset(("name", "function", "tool_name", "tool", "function_name", "action"))
_ARGUMENT_KEYS = frozenset(
    (
        *("arguments", "parameters", "args", "kwargs", "params"),
        *("input", "tool_input", "action_input"),
    )
)
_WRAPPERS = frozenset(("function", "tool_call", "function_call"))
_LIST_WRAPPERS = frozenset(("tool_calls", "function_calls", "calls"))
_CALL_KEYS = (
    _NAME_KEYS
    | _ARGUMENT_KEYS
    | _WRAPPERS
    | _LIST_WRAPPERS
    | {"type", "id", "index", "tool_call_id", "call_id"}
)


def resolve_name(name: str, functions: Functions) -> str | None:
    """The function that a written name means: exact, or behind a namespace."""
    if name in functions:
        return name
    name = name.strip().removesuffix("()").removesuffix(".call")
    last = name.rpartition(".")[2]
    return name if name in functions else last if last in functions else None


class CallForm(ABC):
    """One call as it is read.

    Attributes:
        name: the function; None until it is known.
        is_complete: the call has ended.
        is_other: the text is no call.
        is_wrapper: the text only leads to a list of calls, which follows it.
    """

    is_wrapper = False

    def __init__(self, functions: Functions, name: str | None = None, raw: str = "") -> None:
        self.name = name
        self.is_complete = False
        self.is_other = False
        self._functions = functions
        self._written: list[str] = []
        # In pieces, since joining them at each would copy a long call again and again.
        self._read = [raw]

    @property
    def raw(self) -> str:
        """The text read so far."""
        return "".join(self._read)

    def _split(self, text: str, end: int) -> str:
        """Note ``text`` up to ``end`` as read; returns the rest."""
        self._read.append(text[:end])
        return text[end:]

    @abstractmethod
    def feed(self, text: str) -> str:
        """Consume up to the call's end; returns what follows it."""

    def take_arguments(self) -> str:
        """JSON text of the arguments that has come since the last call."""
        written, self._written = "".join(self._written), []
        return written

    def finish(self) -> str:
        """End the call where no text follows; returns text that belongs behind it after all."""
        return ""

    def cut(self) -> None:  # noqa: B027 - most forms have written what is certain
        """Write what is certain of a call that is cut, because it can be nothing else."""


class NamedCall(CallForm):
    """A name, which has been read, and then its arguments as a JSON object."""

    def __init__(self, functions: Functions, name: str, raw: str) -> None:
        super().__init__(functions, name, raw)
        self._object = ObjectReader()
        self._written.append(self._object.feed("{"))

    def feed(self, text: str) -> str:
        for position, char in enumerate(text):
            if char == "<" and not self._object.in_string:
                self._written.append(self._object.end())
                self.is_complete = True
                return self._split(text, position)
            self._written.append(self._object.feed(char))
            if self._object.is_complete:
                self.is_complete = True
                return self._split(text, position + 1)
        return self._split(text, len(text))


class JsonCall(CallForm):
    """``{"name": ..., "arguments" | "parameters": ...}``, perhaps inside ``{"type": "function",
    "function": ...}`` or with the function's name as the only key.

    The arguments end with their own bracket, so a missing outer brace does not swallow what
    follows. A member that no call has makes the text another object, unless it stands behind the
    arguments, which may have been sent.
    """

    def __init__(self, functions: Functions) -> None:
        super().__init__(functions)
        self._depth = 0
        self._base = 1
        self._quote = ""
        self._is_escaped = False
        self._is_closing = False
        self._key = ""
        # What has been read of the current key or value.
        self._part: list[str] = []
        self._object: ObjectReader | None = None
        self._has_arguments = False
        # A function was named; ``name`` waits until nothing can make the text another object.
        self._named: str | None = None

    def feed(self, text: str) -> str:
        for position, char in enumerate(text):
            if self._ends_before(char):
                self._end_early()
                return self._split(text, position)
            if self._object is not None:
                self._read_arguments(self._object, char)
            else:
                self._step(char)
            if self.is_complete or self.is_other:
                return self._split(text, position + 1)
        return self._split(text, len(text))

    def _ends_before(self, char: str) -> bool:
        """Whether the call ends here although its bracket is not closed."""
        if self._object is not None:
            return char == "<" and not self._object.in_string
        if self._quote or char in SPACE:
            return False
        if char == "<" and self._depth:
            return True
        if self._is_closing:
            return char not in ",}]"
        # Behind the arguments nothing but another member may stand: "{" begins another call.
        is_member = self._depth != self._base or self._key or not self._has_arguments
        return char == "{" and not is_member and not "".join(self._part).strip(SPACE)

    def _end_early(self) -> None:
        if self._object is not None:
            self._written.append(self._object.end())
            self._object = None
        self._complete()

    def finish(self) -> str:
        self.name = self._named
        return ""

    def _complete(self) -> None:
        self.is_complete = True
        self.name = self._named
        if not self._has_arguments:
            self._written.append("{}")

    def _step(self, char: str) -> None:
        self._part.append(char)
        if self._quote:
            if self._is_escaped:
                self._is_escaped = False
            elif char == "\\":
                self._is_escaped = True
            elif char == self._quote:
                self._quote = ""
        elif char in "\"'":
            self._quote = char
        elif char in "{[":
            self._open(char)
        elif char in "}]":
            self._close()
        elif self._depth == self._base and char == ":":
            self._begin_value()
        elif self._depth == self._base and char == ",":
            self._end_value()
            self._part = []
            self._is_closing = False

    def _open(self, char: str) -> None:
        is_value = self._depth == self._base and bool(self._key)
        if is_value and char == "{" and self._is_argument_key and not self._has_arguments:
            self._object = ObjectReader()
            self._add_arguments(self._object.feed(char))
            return
        self._depth += 1
        if self._depth == 1 or (is_value and char == "{" and self._key in _WRAPPERS):
            self._base = self._depth
            self._part = []
            self._key = ""
        elif is_value and char == "[" and self._key in _LIST_WRAPPERS and self.name is None:
            self.is_complete = self.is_wrapper = True

    def _add_arguments(self, written: str) -> None:
        self._has_arguments = True
        self.name = self._named
        self._written.append(written)

    def _set_name(self, name: str) -> None:
        self._named = name
        if self._has_arguments:
            self.name = name

    def _read_arguments(self, arguments: ObjectReader, char: str) -> None:
        self._written.append(arguments.feed(char))
        if arguments.is_complete:
            self._object = None
            self._key = ""
            self._is_closing = True

    def _close(self) -> None:
        if self._depth == self._base:
            self._end_value()
        self._depth -= 1
        if self._depth <= 0:
            self._complete()
        elif self._depth < self._base:
            self._base = self._depth
            self._key = ""
            self._is_closing = True

    @property
    def _is_argument_key(self) -> bool:
        return self._key in _ARGUMENT_KEYS or (self._key != "" and self._key == self._named)

    def _begin_value(self) -> None:
        self._key = _read_text("".join(self._part[:-1])) or ""
        self._part = []
        if self._key in _CALL_KEYS:
            return
        if self._named is None and self._key in self._functions:
            self._set_name(self._key)
        elif not self._has_arguments:
            self.is_other = True

    def _end_value(self) -> None:
        value = "".join(self._part[:-1]).strip(SPACE)
        if self._key in _NAME_KEYS and self._named is None:
            written = _read_text(value)
            name = None if written is None else resolve_name(written, self._functions)
            if name is not None:
                self._set_name(name)
            elif written is not None:
                self.is_other = True
        elif self._is_argument_key and not self._has_arguments:
            self._add_arguments(_object_text(value))
        self._key = ""


def _read_text(text: str) -> str | None:
    """A JSON or Python string, None for anything else."""
    text = text.strip(SPACE)
    for read in (json.loads, ast.literal_eval):
        if read is ast.literal_eval and not text.startswith("'"):
            break
        try:
            value = read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        return value if isinstance(value, str) else None
    return None


def _object_text(value: str) -> str:
    """Arguments given as a string that holds an object; {} for what is no object."""
    text = (_read_text(value) or "").strip(SPACE)
    if not text.startswith("{"):
        return "{}"
    reader, written = ObjectReader(), ""
    for char in text:
        if reader.is_complete:
            break
        written += reader.feed(char)
    return written + ("" if reader.is_complete else reader.end())
