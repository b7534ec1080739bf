"""Read a call whose texts are between marks instead of quotation marks: FunctionGemma, Gemma 4."""

from __future__ import annotations

import json
import re

from chunkllama.text.partial_match import partial_end
from chunkllama_server.api.tools.brackets import SPACE, ObjectReader
from chunkllama_server.api.tools.call_forms import CallForm, Functions

# Each of them begins and ends a text.
MARKS = ("<escape>", '<|"|>')
# A long text is read in pieces of so many characters: the rest is copied behind each of its parts.
_PIECE = 1 << 10
_VALUE = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|true|false|null|True|False|None")


class EscapedCall(CallForm):
    """``call:name{``, which has been read, then ``key:value`` pairs up to the closing brace.

    A text is ``<escape>text<escape>``; keys are plain or between marks. JSON is read as well, and a
    value that is neither is a text.
    """

    def __init__(self, functions: Functions, name: str, raw: str) -> None:
        super().__init__(functions, name, raw)
        self._object = ObjectReader()
        self._written.append(self._object.feed("{"))
        self._text = ""
        # The mark around the text that is being read; a key, number or constant; and whether a
        # space follows what has been written.
        self._mark = ""
        self._word = ""
        self._has_gap = False

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
        if self._text[0] == "<" and not self._object.in_string:
            return self._begin_marked()
        char, self._text = self._text[0], self._text[1:]
        if self._object.in_string or (char in SPACE and not self._word):
            self._write(char)
        elif char == ":":
            word = self._word.strip(SPACE)
            self._word = ""
            self._write((json.dumps(word, ensure_ascii=False) if word else "") + char)
            self._has_gap = True
        elif char in "{}[],\"'":
            self._write(self._value() + char)
            self._has_gap = char == ","
        else:
            self._word += char
        self.is_complete = self._object.is_complete
        return True

    def _begin_marked(self) -> bool:
        """Begin a text where there is a mark; any other tag ends the call without its brace."""
        mark = next((mark for mark in MARKS if self._text.startswith(mark)), None)
        if mark is not None:
            self._text, self._mark = self._text[len(mark) :], mark
            self._write(self._value() + '"')
            return True
        if any(mark.startswith(self._text) for mark in MARKS):
            return False
        self._write(self._value())
        self._written.append(self._object.end())
        self.is_complete = True
        return False

    def _read_marked(self) -> bool:
        end = self._text.find(self._mark)
        size = len(self._text) - partial_end(self._text, self._mark) if end < 0 else end
        self._write(json.dumps(self._text[:size], ensure_ascii=False)[1:-1])
        self._text = self._text[size:]
        if end < 0:
            return False
        self._text, self._mark = self._text[len(self._mark) :], ""
        self._write('"')
        return True

    def _value(self) -> str:
        """The JSON of the word that has been read."""
        word, self._word = self._word.strip(SPACE), ""
        is_value = not word or _VALUE.fullmatch(word)
        return word if is_value else json.dumps(word, ensure_ascii=False)

    def _write(self, text: str) -> None:
        if self._has_gap and text:
            self._has_gap = False
            text = text if text[0] in SPACE or text[0] in "}]" else f" {text}"
        for char in text:
            self._written.append(self._object.feed(char))
