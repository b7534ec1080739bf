"""Read a call whose texts are between marks instead of quotation marks: FunctionGemma, Gemma 4."""

from __future__ import annotations

import json
from typing import Literal

import regex

from chunkllama.text.partial_match import partial_end
from chunkllama_server.api.tools.brackets import SPACE, ObjectReader
from chunkllama_server.api.tools.call_forms import CallForm, Functions

# Each of them begins and ends a text.
MARKS = ("<escape>", '<|"|>')
OPENS = ("<start_function_call>", "<|tool_call>")
CLOSES = ("<end_function_call>", "<tool_call|>")
# They end a call without its brace; any other "<" is text.
_ENDS = (
    *(*CLOSES, *OPENS, "</tool_call>"),
    *("<start_function_response>", "<end_of_turn>", "<|tool_response>", "<turn|>"),
)
_TAGS = (*MARKS, *_ENDS)
# A long text is read in pieces of so many characters: the rest is copied behind each of its parts.
_PIECE = 1 << 10
# What a comma may wait for is limited, since it is read again with each piece.
_LIMIT = 64
_VALUE = regex.compile(
    r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|true|false|null|True|False|None"
)
_SPACES = rf"[{SPACE}]{{0,{_LIMIT}}}"
_MARKED = "|".join(
    rf"{mark}[^<]{{0,{_LIMIT}}}{mark}{_SPACES}:" for mark in map(regex.escape, MARKS)
)
_STOP = "|".join(["}", *map(regex.escape, _ENDS)])
# The colon of a key, not of a URL.
_COLON = rf"{_SPACES}:(?:[^/]|/[^/])"
# A comma that ends a text: the object's end follows, or a key.
_COMMA = regex.compile(
    rf",{_SPACES}(?:{_STOP}|[^\W\d][\w.$\-]{{0,{_LIMIT}}}{_COLON}|{_MARKED}"
    rf"|\"(?:[^\"\\]|\\.){{0,{_LIMIT}}}\"{_SPACES}:|'(?:[^'\\]|\\.){{0,{_LIMIT}}}'{_SPACES}:)",
    regex.DOTALL,
)
# A comma that ends a number or a constant: keys of any form.
_COMMA_OF_VALUE = regex.compile(
    rf",{_SPACES}(?:{_STOP}|[\"']|{'|'.join(map(regex.escape, MARKS))}"
    rf"|[^,:{{}}\[\]\"'<]{{1,{_LIMIT}}}{_COLON})"
)


class EscapedCall(CallForm):
    """``call:name{``, which has been read, then ``key:value`` pairs up to the closing brace.

    A text is ``<escape>text<escape>``; keys are plain or between marks. JSON is read as well, and a
    value that is neither is a text. It may have colons, quotation marks and balanced brackets; in
    an object it ends at a comma only where a key follows.
    """

    def __init__(self, functions: Functions, name: str, raw: str) -> None:
        super().__init__(functions, name, raw)
        self._object = ObjectReader()
        self._written.append(self._object.feed("{"))
        self._text = ""
        # The mark around the text that is being read; a key, number, constant or text without
        # marks, and the brackets open in it; whether a space follows what has been written.
        self._mark = ""
        self._word: list[str] = []
        self._inner = {"}": 0, "]": 0}
        self._has_gap = False
        # What closes the containers around, and what is being read: a key, its colon, a value, or
        # what follows a value.
        self._closers = ["}"]
        self._num_lists = 0
        self._part: Literal["key", "colon", "value", "done"] = "key"

    def feed(self, text: str) -> str:
        for start in range(0, len(text), _PIECE):
            piece = text[start : start + _PIECE]
            self._read.append(piece)
            self._text += piece
            while self._text and not self.is_complete and self._step():
                pass
            if self.is_complete:
                raw = self.raw
                self._read = [raw[: len(raw) - len(self._text)]]
                return self._text + text[start + _PIECE :]
        return ""

    def _step(self) -> bool:
        """Consume some of the text; False when more must come first."""
        if self._mark:
            return self._read_marked()
        char = self._text[0]
        if self._object.in_string:
            self._text = self._text[1:]
            return self._read_string(char)
        if char == "<":
            return self._read_tag()
        if char == "," and self._part == "value" and self._closers[-1] == "}":
            return self._read_comma()
        self._text = self._text[1:]
        if char in SPACE and not self._word:
            self._write(char)
        elif char in "}]":
            self._close(char)
        elif self._part == "value":
            self._read_value(char)
        else:
            self._read_key(char)
        return True

    def _read_tag(self) -> bool:
        """Begin a text where there is a mark, end the call at its tag; else ``<`` is text."""
        tag = next((tag for tag in _TAGS if self._text.startswith(tag)), None)
        if tag is None:
            if any(tag.startswith(self._text) for tag in _TAGS):
                return False
            self._text = self._text[1:]
            if self._part in ("key", "value"):
                self._word.append("<")
        elif tag in _ENDS:
            self._end_member()
            self._written.append(self._object.end())
            self.is_complete = True
        else:
            self._text = self._text[len(tag) :]
            # Behind a text, its beginning was not marked.
            if self._part in ("key", "value") and not self._word:
                self._mark = tag
                self._write('"')
        return True

    def _read_marked(self) -> bool:
        end = self._text.find(self._mark)
        size = len(self._text) - partial_end(self._text, self._mark) if end < 0 else end
        self._write(json.dumps(self._text[:size], ensure_ascii=False)[1:-1])
        self._text = self._text[size:]
        if end < 0:
            return False
        self._text, self._mark = self._text[len(self._mark) :], ""
        self._write('"')
        self._end_text()
        return True

    def _read_string(self, char: str) -> bool:
        self._write(char)
        if not self._object.in_string:
            self._end_text()
        return True

    def _end_text(self) -> None:
        self._part = "colon" if self._part == "key" else "done"

    def _read_comma(self) -> bool:
        """Read a comma behind a word in an object: text unless what follows tells otherwise."""
        is_value = len(self._word) <= _LIMIT and _VALUE.fullmatch("".join(self._word).strip(SPACE))
        found = (_COMMA_OF_VALUE if is_value else _COMMA).match(self._text, partial=True)
        if found is not None and found.partial:
            return False
        self._text = self._text[1:]
        if found is None:
            self._word.append(",")
        else:
            self._separate()
        return True

    def _read_key(self, char: str) -> None:
        """Read a key, its colon, or what follows a value; what has no place there is left out."""
        is_key = self._part == "key"
        if char == ":" and self._part != "done":
            key = json.dumps(self._take_word(), ensure_ascii=False) if is_key else ""
            self._write(key + char)
            self._has_gap = True
            self._part = "value"
        elif char == ",":
            if self._word or not is_key:
                self._separate()
        elif is_key and (self._word or char not in "{[\"'"):
            self._word.append(char)
        elif is_key and char not in "{[":
            self._write(char)

    def _read_value(self, char: str) -> None:
        if char == "," and not any(self._inner.values()):  # in a list
            if self._word:
                self._separate()
        elif self._word or char not in "{[\"'":
            self._word.append(char)
            if char in "{[":
                self._inner["}" if char == "{" else "]"] += 1
        else:
            self._write(char)
            if char in "{[":
                self._closers.append("}" if char == "{" else "]")
                self._num_lists += char == "["
                self._part = "key" if char == "{" else "value"

    def _close(self, char: str) -> None:
        if self._word and self._inner[char]:
            self._inner[char] -= 1
            self._word.append(char)
        elif char == "]" and not self._num_lists:
            if self._word:
                self._word.append(char)
        else:
            self._end_member()
            self._write(char)
            closed = ""
            while closed != char:
                closed = self._closers.pop()
                self._num_lists -= closed == "]"
            self.is_complete = self._object.is_complete

    def _separate(self) -> None:
        self._end_member()
        self._write(",")
        self._has_gap = True
        self._part = "key" if self._closers[-1] == "}" else "value"

    def _end_member(self) -> None:
        """Write what has been read of a member or an item; a missing value is null."""
        word = self._take_word()
        if self._part == "value" and word:
            self._write(word if _VALUE.fullmatch(word) else json.dumps(word, ensure_ascii=False))
        elif self._part == "value" and self._closers[-1] == "}":
            self._write("null")
        elif self._part == "colon" or word:
            self._write((json.dumps(word, ensure_ascii=False) if word else "") + ": null")
        self._part = "done"

    def _take_word(self) -> str:
        word, self._word = "".join(self._word).strip(SPACE), []
        self._inner = dict.fromkeys(self._inner, 0)
        return word

    def _write(self, text: str) -> None:
        if self._has_gap and text:
            self._has_gap = False
            text = text if text[0] in SPACE or text[0] in "}]" else f" {text}"
        for char in text:
            self._written.append(self._object.feed(char))
