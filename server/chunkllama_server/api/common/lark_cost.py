"""Bound what a Lark grammar costs at each token, from its text, before anything compiles it.

Rules and terminals are followed where they are used: ``A A A`` forces three times the text of
``A``, and ``A: B{9}`` writes out nine times that of ``B``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from chunkllama_server.api.common.forced_runs import MANY, Runs, fixed, free, one_of
from chunkllama_server.api.common.grammar_cost import check_size, regex_size
from chunkllama_server.api.common.schema_cost import check_schema_cost
from chunkllama_server.config.limits import DEFAULT_LIMITS, LimitsConfig
from chunkllama_server.transport.errors import exceeded

# The library's tokens. Possessive, and without need of a closing quote: each character is read
# once.
_TOKEN = re.compile(
    r"""(?P<blank>(?:\#|//)[^\n]*|\s+|->\s*\w*)
    |(?P<repeat>\{\s*0*(?P<low>[0-9]{1,18})\s*(?P<to>,\s*0*(?P<high>[0-9]{0,18})\s*)?\}
      |~\s*0*(?P<least>[0-9]{1,18})(?:\s*\.\.\s*0*(?P<most>[0-9]{1,18}))?|[*+?])
    |(?P<range>"(?:[^"\\\n]|\\.)"\s*\.\.\s*"(?:[^"\\\n]|\\.)")
    |(?P<string>"(?:[^"\\\n]|\\.)*+"?i?)
    |(?P<regex>/(?:[^/\\]|\\.)++/?[imslux]*)
    |(?P<special><[^<>\s]+>)
    |(?P<directive>%[a-z]+)
    |(?P<name>[A-Za-z_](?:\w|-(?!>))*)
    |(?P<mark>::|.)""",
    re.DOTALL | re.VERBOSE,
)
_STATEMENTS = frozenset(("%ignore", "%import", "%declare", "%override", "%llguidance"))
_read_json = json.JSONDecoder().raw_decode


class _Size(NamedTuple):
    """What a part forces, and its characters with all repeats written out."""

    runs: Runs
    expanded: int


_NOTHING = _Size(Runs(), 0)
_ONE = _Size(free(1), 1)
# A rule with a condition may use itself as often as its parameter allows, up to 2**64 times.
_ENDLESS = _Size(free(MANY), MANY)


class _Token(NamedTuple):
    """A token of the grammar.

    Attributes:
        kind: the group of ``_TOKEN``; ``size`` for what has been read as a whole.
        size: of that.
        low, high: of a repeat; ``high`` is None for one without end.
    """

    kind: str
    text: str = ""
    size: _Size = _ONE
    low: int = 0
    high: int | None = None


@dataclass(slots=True)
class _Sequence:
    """Alternatives of sequences in one pair of brackets, as they are read.

    Attributes:
        is_optional: all of it may be left out.
        done, last: of the present sequence, without its last part, and that.
    """

    is_optional: bool = False
    branches: list[Runs] = field(default_factory=list)
    done: Runs = field(default_factory=Runs)
    last: _Size = _NOTHING
    expanded: int = 0

    def add(self, part: _Size) -> None:
        self.done = self.done.then(self.last.runs)
        self.expanded = min(self.expanded + self.last.expanded, MANY)
        self.last = part

    def next_branch(self) -> None:
        self.add(_NOTHING)
        self.branches.append(self.done)
        self.done = Runs()

    def repeat(self, low: int, high: int | None) -> None:
        """Repeat the last part ``low`` to ``high`` times."""
        if high == 0:
            self.last = _NOTHING
            return
        runs, expanded = self.last
        repeated = runs.times(low)
        if high != low:  # one more is a choice, and forces text once begun
            repeated = repeated.then(one_of([runs]))
        self.last = _Size(repeated, min(expanded * max(high or low, 1), MANY))

    def total(self) -> _Size:
        self.add(_NOTHING)
        runs = one_of([*self.branches, self.done]) if self.branches else self.done
        return _Size(one_of([runs]) if self.is_optional else runs, self.expanded)


class _Grammar:
    """The definitions of one grammar.

    Args:
        tokens: of its text.
    """

    def __init__(self, tokens: list[_Token]) -> None:
        self._bodies: dict[str, list[_Token]] = {"": []}
        self._known: dict[str, _Size] = {}
        self._open: set[str] = set()
        name = ""
        for token in tokens:
            body = self._bodies[name]
            if token.kind == "mark" and token.text == ":":
                head = _take_head(body)
                name = head[0].text
                body = self._bodies.setdefault(name, [])
                # Text of its options, which it may end with, counts as text of its body.
                body += [_Token("mark", "|")] * bool(body)
                body += [token for token in head if token.kind in ("string", "regex")]
            elif token.kind == "directive" and token.text in _STATEMENTS:
                name = ""
                self._bodies[name].append(_Token("mark", "|"))
            else:
                body.append(token)

    def total(self) -> _Size:
        """The most that a definition forces, and all characters together."""
        sizes = [self.size(name) for name in self._bodies]
        longest = max(size.runs.longest for size in sizes)
        return _Size(free(longest), min(sum(size.expanded for size in sizes), MANY))

    def size(self, name: str) -> _Size:
        """What a rule or a terminal stands for; a part of itself counts as one character."""
        if name in self._open or name not in self._bodies:
            return _ONE
        if name not in self._known:
            self._open.add(name)
            self._known[name] = self._read(self._bodies[name])
            self._open.discard(name)
        return self._known[name]

    def _read(self, tokens: list[_Token]) -> _Size:
        stack = [_Sequence()]
        for token in tokens:
            if token.kind == "mark":
                _read_mark(stack, token.text)
            elif token.kind == "repeat":
                stack[-1].repeat(token.low, token.high)
            elif token.kind == "name":
                size = self.size(token.text)
                # A rule is not written out where it is used, a terminal is.
                is_terminal = token.text.lstrip("_")[:1].isupper()
                stack[-1].add(size if is_terminal else _Size(size.runs, 1))
            else:
                stack[-1].add(token.size)
        while len(stack) > 1:
            _read_mark(stack, ")")
        return stack[0].total()


def _read_mark(stack: list[_Sequence], mark: str) -> None:
    if mark in ("(", "["):
        stack.append(_Sequence(is_optional=mark == "["))
    elif mark == "|":
        stack[-1].next_branch()
    elif mark in (")", "]") and len(stack) > 1:
        part = stack.pop().total()
        stack[-1].add(part)


def _take_head(body: list[_Token]) -> list[_Token]:
    """Remove what stands before the colon of a definition: its name, then its options and its
    parameter."""
    options: list[_Token] = []
    depth = 0
    while body:
        token = body.pop()
        depth += (token.text == "]") - (token.text == "[")
        if token.kind == "name" and depth <= 0 and not (body and body[-1].text == "::"):
            return [token, *reversed(options)]
        options.append(token)
    return [_Token("name"), *reversed(options)]


def _tokens(grammar: str, schema_runs: Callable[[Any], Runs]) -> list[_Token]:
    """The tokens of a grammar; JSON and grammars in it are sizes.

    Raises:
        ApiError: what ``schema_runs`` raises.
        RecursionError: JSON is nested too deeply.
    """
    levels: list[list[_Token]] = [[]]  # of grammars within grammars
    depths = [0]  # of braces in each
    at = 0
    while at < len(grammar):
        match = _TOKEN.match(grammar, at)
        assert match is not None and match.lastgroup is not None, "a mark is any character"
        at, text = match.end(), match[0]
        kind = next(name for name in _KINDS if match[name] is not None)
        found = levels[-1]
        if kind == "directive" and text in ("%json", "%regex", "%llguidance"):
            value, at = _json_at(grammar, at)
            if text == "%json":
                found.append(_Token("size", size=_Size(schema_runs(value), 1)))
            elif text == "%regex":
                length = len(json.dumps(value))
                found.append(_Token("size", size=_Size(free(length), length)))
            else:
                found.append(_Token(kind, text))
        elif kind == "directive" and text == "%if":
            found.append(_Token("size", size=_ENDLESS))
        elif kind == "directive" and text == "%lark":
            levels.append([])
            depths.append(0)
        elif kind == "mark" and text in ("{", "}"):
            depths[-1] += 1 if text == "{" else -1
            if depths[-1] <= 0 and len(levels) > 1:
                depths.pop()
                inner = _Grammar(levels.pop())
                levels[-1].append(_Token("size", size=_nested(inner)))
        elif kind != "blank":
            found.append(_token(kind, text, match))
    return [token for level in levels for token in level]


_KINDS = ("blank", "repeat", "range", "string", "regex", "special", "directive", "name", "mark")


def _nested(grammar: _Grammar) -> _Size:
    return _Size(grammar.size("start").runs, grammar.total().expanded)


def _json_at(grammar: str, at: int) -> tuple[Any, int]:
    """The JSON at a place and what follows it; None where there is none, as the compiler says."""
    while grammar[at : at + 1].isspace():
        at += 1
    try:
        return _read_json(grammar, at)
    except ValueError:
        return None, at


def _token(kind: str, text: str, match: re.Match[str]) -> _Token:
    if kind == "repeat":
        if text in "*+?":
            return _Token(kind, low=int(text == "+"), high=1 if text == "?" else None)
        low = int(match["low"] or match["least"])
        if match["to"] and not match["high"]:
            return _Token(kind, low=low)
        return _Token(kind, low=low, high=int(match["high"] or match["most"] or low))
    if kind == "string":
        return _Token(kind, text, _Size(fixed(len(text)), len(text)))
    if kind == "regex":
        forced, expanded = regex_size(text[1:].rpartition("/")[0] or text[1:])
        runs = fixed(forced) if forced == expanded else free(forced)
        return _Token(kind, text, _Size(runs, expanded))
    return _Token(kind, text)


def lark_size(
    grammar: str, schema_runs: Callable[[Any], Runs] = lambda _: free(1)
) -> tuple[int, int]:
    """(characters it forces in a row at most, characters with all repeats written out).

    Args:
        schema_runs: returns the runs of a JSON schema in it.

    Raises:
        RecursionError: definitions use each other in too long a chain.
    """
    runs, expanded = _Grammar(_tokens(grammar, schema_runs)).total()
    return runs.longest, expanded


def check_lark_cost(grammar: str, param: str, limits: LimitsConfig = DEFAULT_LIMITS) -> None:
    """Raises:
    ApiError: 400 when its repeats make each token expensive, or a JSON schema in it would.
    """

    def schema_runs(schema: Any) -> Runs:
        return check_schema_cost(schema, param, limits)

    try:
        check_size(*lark_size(grammar, schema_runs), param, limits)
    except RecursionError:
        raise exceeded(limits, "max_schema_work", param) from None
