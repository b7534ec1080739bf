"""Read a call that has a tag for each parameter, as Qwen3-Coder writes it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import regex

from chunkllama.text.partial_match import partial_end
from chunkllama_server.api.common.schema_references import follow
from chunkllama_server.api.common.schema_spelling import type_name
from chunkllama_server.api.tools.brackets import SPACE, ObjectReader
from chunkllama_server.api.tools.call_forms import CallForm, Functions, NamedCall

# Possessive, so that a tag that is not closed is read once.
_PARAMETER = regex.compile(r'<parameter(?:=|\s++name=)\s*+"?(?P<key>[^"<>\n]++)"?[^<>\n]*+>')
# A tag that is not closed within so many characters is none.
_MAX_TAG = 512
# A tag without a name, or one that is not closed; the value behind it is left out.
_BEGUN_PARAMETERS = ("<parameter=", "<parameter ")
_ENDS = ("</function>", "</invoke>")
# A value ends with its own tag; where that is missing, with the next tag of the call.
VALUE_ENDS = ("</parameter>", *_BEGUN_PARAMETERS, *_ENDS, "</tool_call>")
_VALUE_END = regex.compile("|".join(map(regex.escape, VALUE_ENDS)))
# So many characters at a text's end may be a line's end and the beginning of a tag.
_MAX_HELD = max(map(len, VALUE_ENDS))
# So far a JSON value is read behind a tag in one of its strings; then the tag is the end.
_MAX_BEHIND = 1 << 16
# A long text is read in pieces of so many characters: the rest is copied behind each value.
_PIECE = 1 << 12


class ParameterCall(CallForm):
    """``<function=name>`` or ``<invoke name="name">``, which has been read, then a tag for each
    parameter, or a JSON object, and the closing tag.

    Values that can only be text are written as they come, others when they end.
    """

    def __init__(self, functions: Functions, name: str, raw: str) -> None:
        super().__init__(functions, name, raw)
        self._text = ""
        self._value: _Text | _Json | None = None
        self._reads_strings = True
        self._num_given = 0
        self._named: NamedCall | None = None

    def feed(self, text: str) -> str:
        for start in range(0, len(text), _PIECE):
            piece = text[start : start + _PIECE]
            self._read.append(piece)
            self._text += piece
            self._run()
            if self.is_complete:
                raw = self.raw
                self._read = [raw[: len(raw) - len(self._text)]]
                return self._text + text[start + _PIECE :]
        return ""

    def _run(self) -> None:
        while not self.is_complete and self._step():
            pass

    def _step(self) -> bool:
        """Consume some of the text; False when more must come first."""
        if self._value is not None:
            return self._read_value(self._value)
        if self._named is not None:
            self._text = self._named.feed(self._text)
            self._written.append(self._named.take_arguments())
            if self._named.is_complete:
                self._named, self._num_given = None, -1
            return bool(self._text)
        self._text = self._text.lstrip(SPACE)
        if not self._text:
            return False
        if self._text[0] == "{" and self._num_given == 0:
            self._named = NamedCall(self._functions, self.name or "", "")
            self._text = self._text[1:]
            return True
        for tag in _ENDS:
            if self._text.startswith(tag):
                self._text = self._text[len(tag) :]
                return self._end()
        found = _parameter_tag(self._text)
        if found is not None and not found.partial:
            # Behind an object nothing can be added to it.
            self._begin_value(found["key"].strip() if self._num_given >= 0 else "")
            self._text = self._text[found.end() :]
            return True
        if found is not None or any(tag.startswith(self._text) for tag in _ENDS):
            return False
        for tag in _BEGUN_PARAMETERS:
            if self._text.startswith(tag):
                self._begin_value("")
                self._text = self._text[len(tag) :]
                return True
        return self._end()

    def _begin_value(self, key: str) -> None:
        parameters = self._functions.get(self.name or "", {})
        properties = parameters.get("properties") or {}
        schema = properties.get(key) if isinstance(properties, Mapping) else None
        texts: set[str] = set()
        allowed = _allowed_types(schema, parameters, set(), texts)
        if key and allowed == {"string"}:
            self._value = _Text(self._member(key))
        else:
            self._value = _Json(key, allowed, texts, reads_strings=self._reads_strings)

    def _member(self, key: str) -> str:
        """What is written before a value; it counts as given."""
        self._num_given += 1
        return ("{" if self._num_given == 1 else ", ") + f"{json.dumps(key)}: "

    def _read_value(self, value: _Text | _Json) -> bool:
        end = _VALUE_END.search(self._text)
        size = end.start() if end is not None else max(0, len(self._text) - _MAX_HELD)
        read, self._text = self._text[:size], self._text[size:]
        if isinstance(value, _Text):
            self._written.append(value.add(read, is_last=end is not None))
            if end is not None:
                self._leave_value()
            return end is not None
        value.add(read)
        if value.has_wrong_string():
            self._text = value.go_back() + self._text
            self._reads_strings = False
        elif end is None:
            return False
        elif value.is_inside():
            value.add_tag(end[0])
            self._text = self._text[len(end[0]) :]
            return True
        elif not value.is_whole():
            self._text = value.go_back() + self._text
            self._reads_strings = False
        self._end_json(value)
        return True

    def _end_json(self, value: _Json) -> None:
        if value.key:
            written = _value_text(value.text, value.allowed, value.texts)
            self._written.append(self._member(value.key) + written)
        self._leave_value()

    def _leave_value(self) -> None:
        self._value = None
        self._text = self._text.removeprefix("</parameter>")

    def _end(self) -> bool:
        if self._num_given >= 0:
            self._written.append("}" if self._num_given else "{}")
        self.is_complete = True
        return False

    def finish(self) -> str:
        value = self._value
        if isinstance(value, _Json) and value.has_tags:
            self._text = value.go_back() + self._text
            self._reads_strings = False
            self._end_json(value)
            self._run()
            return self._text if self.is_complete else self.finish()
        if isinstance(value, _Text):
            held = max(partial_end(self._text, tag) for tag in VALUE_ENDS)
            read = self._text[: len(self._text) - held]
            self._written.append(value.add(read.removesuffix("\n")))
        elif not self.is_complete and value is None and self._named is None:
            self._end()
        return ""


def _parameter_tag(text: str) -> regex.Match[str] | None:
    """A parameter's tag that a text begins with; partial where its end may still come."""
    found = _PARAMETER.match(text[:_MAX_TAG], partial=True)
    is_open = found is not None and found.partial and len(text) >= _MAX_TAG
    return None if is_open else found


class _Text:
    """A value that is text, written as JSON piece by piece.

    Args:
        before: stands before the value.
    """

    def __init__(self, before: str) -> None:
        self._before = before

    def add(self, text: str, *, is_last: bool = False) -> str:
        """The JSON text of the next piece; a line's end at either end of the value is left out."""
        if not text and not is_last:
            return ""
        before = ""
        if self._before:
            before, self._before = f'{self._before}"', ""
            text = text.removeprefix("\n")
        text = text.removesuffix("\n") if is_last else text
        return before + json.dumps(text, ensure_ascii=False)[1:-1] + ('"' if is_last else "")


# An escape, a quotation mark, or what no string of JSON has.
_IN_JSON = regex.compile(r'(?s:\\.)|["\x00-\x1f]')


class _Json:
    """A value that may be JSON: a tag inside one of its strings is no end.

    Whether it was a string is certain at its end alone, so the value may go back to its first tag.

    Attributes:
        key: the parameter; empty for a value that is left out.
        allowed: the JSON types that its schema allows; empty for all.
        texts: the texts that its schema lists.
    """

    def __init__(
        self, key: str, allowed: set[str], texts: set[str], *, reads_strings: bool
    ) -> None:
        self.key = key
        self.allowed = allowed
        self.texts = texts
        self._reads_strings = reads_strings and bool(key)
        self._pieces: list[str] = []
        self._num_chars = 0
        # The first character, the number of them before the first tag, and an unread backslash.
        self._first = ""
        self._first_tag: int | None = None
        self._escape = ""
        self._in_string = False
        self._is_broken = False

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    @property
    def has_tags(self) -> bool:
        return self._first_tag is not None

    def add(self, text: str) -> None:
        """Take text in which no tag begins."""
        self._pieces.append(text)
        self._num_chars += len(text)
        self._first = self._first or text.lstrip(SPACE)[:1]
        if not self._reads_strings:
            return
        text, end = self._escape + text, 0
        for found in _IN_JSON.finditer(text):
            end = found.end()
            if found[0] == '"':
                self._in_string = not self._in_string
            elif self._in_string and len(found[0]) == 1:
                self._is_broken = True
        self._escape = "\\" if end < len(text) and text.endswith("\\") else ""

    def add_tag(self, tag: str) -> None:
        """Take a tag that stands in a string."""
        if self._first_tag is None:
            self._first_tag = self._num_chars
        self._escape = ""
        self._pieces.append(tag)
        self._num_chars += len(tag)

    def is_inside(self) -> bool:
        """Whether the text so far ends in a string of a list or an object."""
        is_open = self._in_string and not self._is_broken
        return self._reads_strings and is_open and self._first in ("[", "{")

    def has_wrong_string(self) -> bool:
        """Whether a string that has a tag is none, or too long to wait for its end."""
        if self._first_tag is None:
            return False
        return self._is_broken or self._num_chars - self._first_tag > _MAX_BEHIND

    def is_whole(self) -> bool:
        """Whether a value that has tags is JSON."""
        if self._first_tag is None:
            return True
        try:
            json.loads(self.text)
        except (ValueError, RecursionError):
            return False
        return True

    def go_back(self) -> str:
        """End the value before its first tag; returns the text from there on."""
        text, place = self.text, self._first_tag
        assert place is not None
        self._pieces, self._first_tag = [text[:place]], None
        return text[place:]


_TYPES: dict[str, Callable[[Any], bool]] = {
    "integer": lambda v: type(v) is int or (isinstance(v, float) and v.is_integer()),
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
    "array": lambda v: isinstance(v, list),
    "object": lambda v: isinstance(v, dict),
}


def _allowed_types(schema: Any, root: Any, seen: set[int], texts: set[str]) -> set[str]:
    """The JSON types that a property's schema allows; empty where it says nothing of them.

    Args:
        root: the schema that references are read from.
        seen: identities of schemas that have been read.
        texts: takes the texts that the schema lists.
    """
    if not isinstance(schema, Mapping) or id(schema) in seen:
        return set()
    seen.add(id(schema))
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list):
        texts.update(value for value in values if isinstance(value, str))
        return _types_of(values)
    kind = schema.get("type")
    kinds = kind if isinstance(kind, list) else [kind]
    found = {type_name(kind) for kind in kinds if isinstance(kind, str)}
    if schema.get("nullable") is True and found:
        found.add("null")
    if isinstance(reference := schema.get("$ref"), str):
        found |= _allowed_types(follow(root, reference), root, seen, texts)
    for variants in (schema.get("anyOf"), schema.get("oneOf"), schema.get("allOf")):
        for variant in variants if isinstance(variants, list) else ():
            found |= _allowed_types(variant, root, seen, texts)
    return found


def _types_of(values: list[Any]) -> set[str]:
    types = {kind for value in values for kind, is_one in _TYPES.items() if is_one(value)}
    return types | ({"string"} if any(isinstance(value, str) for value in values) else set())


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _value_text(text: str, allowed: set[str], texts: set[str]) -> str:
    """A parameter's text as JSON: a value of another type only where the schema allows one, and
    does not list the text itself."""
    text = text.removeprefix("\n").removesuffix("\n")
    if allowed != {"string"} and text not in texts:
        kinds = allowed - {"string"} or _TYPES.keys()
        for source in _readings(text.strip(), allowed):
            try:
                value = json.loads(source, parse_constant=_refuse_constant)
            except (ValueError, RecursionError):
                continue
            if any(_TYPES[kind](value) for kind in kinds if kind in _TYPES):
                return source
    return json.dumps(text, ensure_ascii=False)


_CONSTANTS = {"True": "true", "False": "false", "None": "null"}
_WORDS = {"true": "true", "false": "false", "null": "null", "none": "null"}


def _readings(text: str, allowed: set[str]) -> Iterator[str]:
    """The text as it is, then as JSON: of what is only nearly JSON, where it cannot be a string."""
    yield text
    yield _CONSTANTS.get(text, "")
    if not allowed or "string" in allowed:
        return
    yield _WORDS.get(text.lower(), "")
    if text[:1] in ("[", "{"):
        yield _bracketed(text)


def _bracketed(text: str) -> str:
    """A list or an object that is nearly JSON, as JSON; empty where more text is behind it."""
    reader = ObjectReader()
    written = []
    for char in text:
        if reader.is_complete:
            return ""
        written.append(reader.feed(char))
    return "".join(written) + ("" if reader.is_complete else reader.end())
