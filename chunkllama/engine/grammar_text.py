"""Grammars of a request as llguidance writes them. No torch: the API process validates with it."""

from __future__ import annotations

import json
import os
import re
from typing import Any

import llguidance
from llguidance.gbnf_to_lark import gbnf_to_lark

from chunkllama.errors import InvalidRequestError
from chunkllama.sampling_params import GrammarSpec

# With RUST_BACKTRACE set each rule around an error would record the stack: seconds for a grammar
# whose 400th rule has an error. Read when the first error is made.
os.environ.setdefault("RUST_LIB_BACKTRACE", "0")

# One optional blank between JSON tokens: a model that may write blanks without end will.
JSON_WHITESPACE = {"whitespace_pattern": "[ \\n]?", "whitespace_flexible": True}


def to_llguidance(spec: GrammarSpec) -> str:
    """llguidance's own grammar text.

    Raises:
        InvalidRequestError: ``text`` is not what ``kind`` says.
    """
    matcher = llguidance.LLMatcher
    json_options: Any = JSON_WHITESPACE
    try:
        match spec.kind:
            case "json_schema":
                return matcher.grammar_from_json_schema(spec.text, overrides=json_options)
            case "json_object":
                return matcher.grammar_from_json_schema('{"type":"object"}', overrides=json_options)
            case "regex":
                return matcher.grammar_from_regex(with_ascii_classes(spec.text))
            case "choice":
                return matcher.grammar_from_lark(_choice(json.loads(spec.text)))
            case "lark":
                return matcher.grammar_from_lark(_with_ascii_regexes(spec.text))
            case "gbnf":
                return matcher.grammar_from_lark(gbnf_as_lark(spec.text))
    except ValueError as error:
        raise InvalidRequestError(f"invalid {spec.kind}: {one_line(error)}", "grammar") from None
    raise InvalidRequestError(f"unknown grammar kind {spec.kind!r}", "grammar")


def is_gbnf(text: str) -> bool:
    """Whether a grammar is in GBNF (llama.cpp, xgrammar), not in Lark's syntax."""
    # Within one line: white space that may span lines is read again from each of them.
    return re.search(r"^[^\S\n]*[\w-]+[^\S\n]*::=", text, re.MULTILINE) is not None


def gbnf_as_lark(text: str) -> str:
    """A GBNF grammar in Lark's syntax; its rule ``root`` becomes ``start``.

    Raises:
        InvalidRequestError: it is malformed, or nested too deeply.
    """
    try:
        return str(gbnf_to_lark(text))
    except Exception as error:  # it raises a plain one for a rule that is missing
        raise InvalidRequestError(f"invalid gbnf: {one_line(error)}", "grammar") from None


# ECMA-262's and Python's ASCII meaning of the classes that Rust's regex reads as Unicode's.
_ASCII_CLASSES = {"d": "0-9", "w": "0-9A-Za-z_"}


def with_ascii_classes(pattern: str) -> str:
    r"""A regex in which ``\d`` and ``\w`` and their opposites mean ASCII, as in ECMA-262."""
    parts: list[str] = []
    depth = at = 0
    while at < len(pattern):
        char, following = pattern[at], pattern[at + 1 : at + 2]
        if char == "\\":
            members = _ASCII_CLASSES.get(following.lower())
            if members is None:
                parts.append(char + following)
            elif following.isupper():
                parts.append(f"[^{members}]")
            else:
                parts.append(members if depth else f"[{members}]")
            at += 2
            continue
        if char == "[":
            depth += 1
            # A bracket that comes first in its class is a member.
            head = re.compile(r"\[\^?\]?").match(pattern, at)
            assert head is not None, "it begins with a bracket"
            parts.append(head[0])
            at = head.end()
            continue
        depth -= char == "]" and depth > 0
        parts.append(char)
        at += 1
    return "".join(parts)


# Comments, strings and regular expressions of a Lark grammar; the last are in a group of their own.
_LARK_TEXTS = re.compile(r"//[^\n]*|\"(?:[^\"\\\n]|\\.)*+\"?|/((?:[^/\\\n]|\\.)++)/", re.DOTALL)


def _with_ascii_regexes(grammar: str) -> str:
    """A Lark grammar whose regular expressions have ASCII classes."""

    def plain(found: re.Match[str]) -> str:
        return found[0] if found[1] is None else f"/{with_ascii_classes(found[1])}/"

    return _LARK_TEXTS.sub(plain, grammar)


def _choice(choices: object) -> str:
    if not (isinstance(choices, list) and choices and all(isinstance(c, str) for c in choices)):
        raise ValueError("expected a list of at least one string")
    return "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)


def one_line(error: object) -> str:
    """Return the message without the lines that quote; of a regular expression, with what is
    wrong with it."""
    lines = str(error).strip().splitlines()
    if len(lines) > 1 and lines[0].endswith("regex parse error:"):
        why = next((line for line in lines if line.startswith("error: ")), lines[-1]).strip()
        return f"{lines[1].strip()!r} is no regular expression: {why}"
    return lines[0] if lines else "not accepted"
