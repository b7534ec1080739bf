"""Write regular expressions of Python and JavaScript in the syntax of the grammar library.

It is that of Rust's regex crate: without look-around, back references, conditions and boundaries
inside a text, with brackets and braces that have to be escaped where they stand for themselves.
"""

from __future__ import annotations

import re

_GROUP = re.compile(r"\(\?(?:P?<[A-Za-z_]\w*>|[imsUu]*(?:-[imsUu]+)?[:)])")
_COMMENT = re.compile(r"\(\?#[^)]*\)")
_REPEAT = re.compile(r"\{([0-9]+)(,[0-9]*)?\}|\{,([0-9]+)\}")
# A class or a character by its number, with what belongs to it.
_ESCAPE = re.compile(
    r"\\(?:[dDwWsSaftnrvAz]|[pP](?:\{[^}]*\}|[A-Za-z])|x(?:[0-9A-Fa-f]{2}|\{[0-9A-Fa-f]+\})"
    r"|u(?:[0-9A-Fa-f]{4}|\{[0-9A-Fa-f]+\})|U[0-9A-Fa-f]{8}|[^0-9A-Za-z<>])"
)
_POSIX = re.compile(r"\[:\^?[a-z]+:\]")
_OTHER_ESCAPES = {r"\Z": r"\z", r"\0": r"\x00", r"\<": "<", r"\>": ">", r"\e": r"\x1b"}
_DIGITS = frozenset("0123456789")
_SET_OPERATORS = ("&&", "~~")


def rust_syntax(pattern: str) -> str | None:
    """The expression in the library's syntax; None if it has no such form.

    An expression that is none in any language stays for the compiler to refuse.
    """
    parts: list[str] = []
    at, class_begin = 0, -1
    while at < len(pattern):
        char = pattern[at]
        if char == "\\":
            escape = _escape(pattern, at, is_in_class=class_begin >= 0)
            if escape is None:
                return None
            taken, written = escape
        elif class_begin >= 0:
            taken, written = _in_class(pattern, at, class_begin)
            class_begin = -1 if written == "]" else class_begin
        elif (comment := _COMMENT.match(pattern, at)) is not None:
            taken, written = len(comment[0]), ""
        elif pattern.startswith("(?", at) and _GROUP.match(pattern, at) is None:
            return None
        elif char == "{":
            repeat = _REPEAT.match(pattern, at)
            taken, written = (1, r"\{") if repeat is None else (len(repeat[0]), _repeat(repeat))
        else:
            taken, written = 1, char
            if char == "[":
                negates = pattern.startswith("[^", at)
                taken, written = 1 + negates, "[^" if negates else "["
                class_begin = at + taken
        parts.append(written)
        at += taken
    return "".join(parts)


def _escape(pattern: str, at: int, *, is_in_class: bool) -> tuple[int, str] | None:
    """Characters that an escape takes, and what is written for it."""
    if (known := _ESCAPE.match(pattern, at)) is not None:
        return len(known[0]), known[0]
    pair = pattern[at : at + 2]
    if pair == r"\b" and is_in_class:
        return 2, r"\x08"
    if pair == r"\0" and pattern[at + 2 : at + 3] in _DIGITS:
        return None
    written = _OTHER_ESCAPES.get(pair)
    return None if written is None else (2, written)


def _in_class(pattern: str, at: int, begin: int) -> tuple[int, str]:
    if (posix := _POSIX.match(pattern, at)) is not None:
        return len(posix[0]), posix[0]
    char = pattern[at]
    if char == "]" and at == begin:
        return 1, r"\]"
    if char == "[" or pattern[at : at + 2] in _SET_OPERATORS or pattern[at - 1 : at + 1] == "&&":
        return 1, "\\" + char
    return 1, char


def _repeat(match: re.Match[str]) -> str:
    return match[0] if match[3] is None else f"{{0,{match[3]}}}"
