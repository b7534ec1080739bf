"""Read a call that has a tag for each parameter, as Qwen3-Coder, MiniMax, DeepSeek V3.2 and GLM
write it."""

from __future__ import annotations

import json
from collections.abc import Mapping

import regex

from chunkllama.text.partial_match import partial_end
from chunkllama_server.api.tools.brackets import SPACE
from chunkllama_server.api.tools.call_forms import CallForm, Functions, NamedCall
from chunkllama_server.api.tools.parameter_tags import KEY_AND_VALUE, tags_behind
from chunkllama_server.api.tools.parameter_values import allowed_types, value_text

# So far a JSON value is read behind a tag in one of its strings; then the tag is the end.
_MAX_BEHIND = 1 << 16
# A long text is read in pieces of so many characters: the rest is copied behind each value.
_PIECE = 1 << 12


class ParameterCall(CallForm):
    """``<function=name>``, ``<invoke name="name">`` or a name before ``<arg_key>``, which has been
    read, then a tag for each parameter, or a JSON object, and the closing tag.

    Values that can only be text are written as they come, others when they end.
    """

    def __init__(self, functions: Functions, name: str, raw: str) -> None:
        super().__init__(functions, name, raw)
        tag = raw[raw.rindex("<") :]
        self._tags = tags_behind(tag)
        # Where the call begins with a name alone, the tag behind it has told it from other text.
        self._text = tag if self._tags is KEY_AND_VALUE else ""
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
        for tag in self._tags.ends:
            if self._text.startswith(tag):
                self._text = self._text[len(tag) :]
                return self._end()
        found = self._tags.match(self._text)
        if found is not None and not found.partial:
            # Behind an object nothing can be added to it.
            key = found["key"].strip() if self._num_given >= 0 else ""
            self._begin_value(key, is_text=bool(found.groupdict().get("string")))
            self._text = self._text[found.end() :]
            return True
        if found is not None or any(tag.startswith(self._text) for tag in self._tags.ends):
            return False
        for tag in self._tags.begun:
            if self._text.startswith(tag):
                self._begin_value("")
                self._text = self._text[len(tag) :]
                return True
        return self._end()

    def _begin_value(self, key: str, *, is_text: bool = False) -> None:
        parameters = self._functions.get(self.name or "", {})
        properties = parameters.get("properties") or {}
        schema = properties.get(key) if isinstance(properties, Mapping) else None
        texts: set[str] = set()
        allowed = allowed_types(schema, parameters, set(), texts)
        if key and (allowed == {"string"} or (is_text and not allowed)):
            self._value = _Text(self._member(key), trims=self._tags.trims)
        else:
            self._value = _Json(key, allowed, texts, reads_strings=self._reads_strings)

    def _member(self, key: str) -> str:
        """What is written before a value; it counts as given."""
        self._num_given += 1
        return ("{" if self._num_given == 1 else ", ") + f"{json.dumps(key)}: "

    def _read_value(self, value: _Text | _Json) -> bool:
        end = self._tags.value_end.search(self._text)
        size = end.start() if end is not None else max(0, len(self._text) - self._tags.max_held)
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
            text = value.text
            if self._tags.trims:
                text = text.removeprefix("\n").removesuffix("\n")
            written = value_text(text, value.allowed, value.texts)
            self._written.append(self._member(value.key) + written)
        self._leave_value()

    def _leave_value(self) -> None:
        self._value = None
        self._text = self._text.removeprefix(self._tags.close)

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
            held = max(partial_end(self._text, tag) for tag in self._tags.value_ends)
            read = self._text[: len(self._text) - held]
            read = read.removesuffix("\n") if self._tags.trims else read
            self._written.append(value.add(read))
        elif not self.is_complete and value is None and self._named is None:
            self._end()
        return ""


class _Text:
    """A value that is text, written as JSON piece by piece.

    Args:
        before: stands before the value.
        trims: a line's end at either end of the value is left out.
    """

    def __init__(self, before: str, *, trims: bool) -> None:
        self._before = before
        self._trims = trims

    def add(self, text: str, *, is_last: bool = False) -> str:
        """The JSON text of the next piece."""
        if not text and not is_last:
            return ""
        before = ""
        if self._before:
            before, self._before = f'{self._before}"', ""
            text = text.removeprefix("\n") if self._trims else text
        text = text.removesuffix("\n") if is_last and self._trims else text
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
