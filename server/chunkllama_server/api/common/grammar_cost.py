"""Bound what a grammar costs at each token, from its text, before anything compiles it.

The engine's matcher recomputes the text that must follow (a constant, ``a{1000}``) for each
token, so a forced run of N bytes costs N for each of its tokens: 100,000 cost 60 ms a token, which
every other request of the step waits for. Repeats that force nothing (``.{0,10000}``) cost little.
"""

from __future__ import annotations

import re

from chunkllama_server.api.common.forced_runs import MANY
from chunkllama_server.config.limits import DEFAULT_LIMITS, LimitsConfig
from chunkllama_server.transport.errors import exceeded

# The library skips blanks and leading zeros.
_REPEAT = re.compile(r"\{\s*0*([0-9]{1,18})\s*(,\s*0*([0-9]{0,18})\s*)?\}|([*+?])")
_GROUP = re.compile(r"\((\?(P?<\w+>|[a-zA-Z-]*:|<?[=!]))?")
_FREE_ESCAPES = frozenset("dDwWsSpP")


class _Sizes:
    """Characters forced, and characters when every repeat is written out, group by group."""

    def __init__(self) -> None:
        self.stack = [(0, 0)]
        self._last = (0, 0)

    def add(self, forced: int, expanded: int) -> None:
        self._last = (forced, expanded)
        self._sum(forced, expanded)

    def _sum(self, forced: int, expanded: int) -> None:
        before = self.stack[-1]
        self.stack[-1] = (min(before[0] + forced, MANY), min(before[1] + expanded, MANY))

    def open(self) -> None:
        self.stack.append((0, 0))

    def close(self) -> None:
        if len(self.stack) > 1:
            self.add(*self.stack.pop())

    def repeat(self, low: int, high: int) -> None:
        """Repeat what was added last ``low`` to ``high`` times."""
        forced, expanded = self._last
        # What may be left out is forced once it has begun.
        self._last = (min(forced * max(low, 1), MANY), min(expanded * high, MANY))
        if high == 0:
            self._last = (0, 0)
        self._sum(self._last[0] - forced, self._last[1] - expanded)

    def total(self) -> tuple[int, int]:
        while len(self.stack) > 1:
            self.close()
        return self.stack[0]


def _apply_repeat(sizes: _Sizes, match: re.Match[str]) -> None:
    if match[4]:
        sizes.repeat(1 if match[4] == "+" else 0, 1)
        return
    low = int(match[1])
    sizes.repeat(low, low if not match[2] else int(match[3] or max(low, 1)))


def regex_size(pattern: str) -> tuple[int, int]:
    """(characters it forces at most, characters with all repeats written out) of a regex."""
    sizes = _Sizes()
    at = 0
    while at < len(pattern):
        char = pattern[at]
        if (match := _REPEAT.match(pattern, at)) is not None:
            _apply_repeat(sizes, match)
            at = match.end()
            continue
        if (group := _GROUP.match(pattern, at)) is not None:
            sizes.open()
            at = group.end()
            continue
        at += 1
        if char == ")":
            sizes.close()
        elif char == "[":
            end = _class_end(pattern, at)
            inside = pattern[at : end - 1].removeprefix("\\")
            sizes.add(int(len(inside) == 1 and inside not in _FREE_ESCAPES), 1)
            at = end
        elif char == "\\":
            sizes.add(int(pattern[at : at + 1] not in _FREE_ESCAPES), 1)
            at += 1
        elif char == ".":
            sizes.add(0, 1)
        elif char not in "|^$":
            sizes.add(1, 1)
    return sizes.total()


def _class_end(pattern: str, at: int) -> int:
    """Behind the bracket that closes a character class whose inside begins at ``at``."""
    if pattern[at : at + 1] == "^":
        at += 1
    if pattern[at : at + 1] == "]":
        at += 1
    while at < len(pattern) and pattern[at] != "]":
        at += 2 if pattern[at] == "\\" else 1
    return at + 1


def check_regex_cost(pattern: str, param: str, limits: LimitsConfig = DEFAULT_LIMITS) -> None:
    """Raises:
    ApiError: 400 when its repeats make each token expensive.
    """
    check_size(*regex_size(pattern), param, limits)


def check_choice_cost(
    choices: list[str], param: str, limits: LimitsConfig = DEFAULT_LIMITS
) -> None:
    """Raises:
    ApiError: 400 for a choice that is too long.
    """
    check_size(max(map(len, choices), default=0), 0, param, limits)


def check_size(forced: int, expanded: int, param: str, limits: LimitsConfig) -> None:
    """Raises:
    ApiError: 400 for more characters in a row, or written out, than a grammar may have.
    """
    if forced > limits.max_forced_chars:
        raise exceeded(limits, "max_forced_chars", param)
    if expanded > limits.max_expanded_chars:
        raise exceeded(limits, "max_expanded_chars", param)
