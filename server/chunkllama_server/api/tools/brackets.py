"""Read a bracketed value a character at a time: a JSON object that a model wrote, or the arguments
of a Python call.

What models write is often nearly JSON. `ObjectReader` writes valid JSON for it as it comes, so that
a streamed call and a whole one have the same arguments; JSON that is valid comes out unchanged.
"""

from __future__ import annotations

import json

SPACE = " \t\r\n"
_CLOSERS = {"{": "}", "[": "]", "(": ")"}
_CONSTANTS = {"True": "true", "False": "false", "None": "null"}
_ESCAPES = '"\\/bfnrtu'


class ObjectReader:
    """Reads one JSON object, which ends with its own bracket.

    Python's quotes and constants, raw control characters in strings, unknown escapes, a comma
    behind the last member and missing inner brackets are written as JSON has them.

    Attributes:
        is_complete: the object's bracket is closed.
    """

    def __init__(self) -> None:
        self.is_complete = False
        self._closers: list[str] = []
        self._quote = ""
        self._is_escaped = False
        self._word = ""
        # A comma and the white space behind it, until it is known that a member follows.
        self._comma = ""

    @property
    def in_string(self) -> bool:
        """Whether the next character belongs to a string."""
        return bool(self._quote)

    def feed(self, char: str) -> str:
        """Take one character; returns the JSON text that is certain now."""
        if self._quote:
            return self._in_string(char)
        if char.isalpha():
            self._word += char
            comma, self._comma = self._comma, ""
            return comma
        written = self._end_word()
        if self._comma and char in SPACE:
            self._comma += char
            return written
        if char in "}]":
            comma, self._comma = self._comma[1:], ""
            return written + comma + self._close(char)
        comma, self._comma = self._comma, ""
        written += comma
        if char == ",":
            self._comma = char
        elif char in "\"'":
            self._quote = char
            written += '"'
        else:
            if char in "{[":
                self._closers.append(_CLOSERS[char])
            written += char
        return written

    def _in_string(self, char: str) -> str:
        if self._is_escaped:
            self._is_escaped = False
            return _escaped(char)
        if char == "\\":
            self._is_escaped = True
            return ""
        if char == self._quote:
            self._quote = ""
            return '"'
        if char == '"' or char < " ":
            return json.dumps(char)[1:-1]
        return char

    def _end_word(self) -> str:
        word, self._word = self._word, ""
        return _CONSTANTS.get(word, word)

    def _close(self, char: str) -> str:
        """Close up to the bracket that ``char`` closes; a bracket that nothing opened is left
        out."""
        if char not in self._closers:
            return ""
        written = ""
        while not written.endswith(char):
            written += self._closers.pop()
        self.is_complete = not self._closers
        return written

    def end(self) -> str:
        """Close all brackets, because what follows is no part of the object."""
        written = self._end_word() + ('"' if self._quote else "")
        written += "".join(reversed(self._closers))
        self._quote, self._comma, self._closers = "", "", []
        self.is_complete = True
        return written


def _escaped(char: str) -> str:
    """An escaped character as JSON has it."""
    if char == "'":
        return char
    if char == "x":
        return "\\u00"  # the two hexadecimal digits follow
    if char in _ESCAPES:
        return "\\" + char
    return "\\\\" + (json.dumps(char)[1:-1] if char < " " else char)


class BracketScanner:
    """Finds the bracket that closes a Python expression, of which the opening one has been read."""

    def __init__(self) -> None:
        self.is_complete = False
        self._depth = 1
        self._quote = ""
        self._run = ""
        self._tail = ""
        self._is_escaped = False

    @property
    def is_outermost(self) -> bool:
        """Whether the last character stood in no inner bracket and no string."""
        return self._depth == 1 and not self._quote and not self._run

    def feed(self, char: str) -> None:
        """Take one character; the closing bracket completes the expression."""
        if self._run:
            # One, two or three quotation marks: a string, an empty string, or a long string.
            if char == self._run[0] and len(self._run) < 3:
                self._run += char
                if len(self._run) == 3:
                    self._quote, self._run = self._run, ""
                return
            self._quote = self._run if len(self._run) == 1 else ""
            self._run = ""
        if self._quote:
            self._in_string(char)
        elif char in "\"'":
            self._run = char
        elif char in "([{":
            self._depth += 1
        elif char in ")]}":
            self._depth -= 1
            self.is_complete = self._depth == 0

    def _in_string(self, char: str) -> None:
        if self._is_escaped or char == "\\":
            self._is_escaped = not self._is_escaped
            self._tail = ""
            return
        self._tail = (self._tail + char)[-3:]
        if self._tail.endswith(self._quote):
            self._quote, self._tail = "", ""
