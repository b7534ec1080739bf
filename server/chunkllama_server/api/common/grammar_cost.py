"""Bound what a grammar costs at each token, from its text, before anything compiles it.

The engine's matcher recomputes the text that must follow (a constant, ``a{1000}``) for each
token, so a forced run of N bytes costs N for each of its tokens: 100,000 cost 60 ms a token, which
every other request of the step waits for. Repeats that force nothing (``.{0,10000}``) cost little.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from chunkllama_server.config.limits import DEFAULT_LIMITS, LimitsConfig
from chunkllama_server.transport.errors import exceeded, invalid

_REPEAT = re.compile(r"\{(\d{1,18})(,(\d{0,18}))?\}|([*+?])")
_GROUP = re.compile(r"\((\?(P?<\w+>|[a-zA-Z-]*:|<?[=!]))?")
_MANY = 1 << 62
_FREE_ESCAPES = frozenset("dDwWsSpP")
# Keywords that become a regular expression of the value, by their part of ``max_joined_texts``.
# A multiple of p has p states, and of p and q together p times q.
_TEXT_KEYWORDS = {"pattern": 1, "format": 1, "minLength": 1, "maxLength": 1, "multipleOf": 5}
_LARK_REPEAT = re.compile(r"\s*~\s*(\d{1,18})(?:\s*\.\.\s*(\d{1,18}))?")
_LARK_SCHEMA = re.compile(r"%json\s*")
_read_json = json.JSONDecoder().raw_decode
# Possessive, and without need of a closing quote: each character is read once.
_LARK_TOKEN = re.compile(
    r"//[^\n]*|\"(?:[^\"\\\n]|\\.)*+\"?i?|/(?:[^/\\\n]|\\.)++/?[a-z]*|[()\[\]]"
    r"|[A-Za-z_]\w*|\s+|.",
    re.DOTALL,
)


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
        self.stack[-1] = (min(before[0] + forced, _MANY), min(before[1] + expanded, _MANY))

    def open(self) -> None:
        self.stack.append((0, 0))

    def close(self) -> None:
        if len(self.stack) > 1:
            self.add(*self.stack.pop())

    def repeat(self, low: int, high: int) -> None:
        """Repeat what was added last ``low`` to ``high`` times."""
        forced, expanded = self._last
        # What may be left out is forced once it has begun.
        self._last = (min(forced * max(low, 1), _MANY), min(expanded * max(high, 1), _MANY))
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
    sizes.repeat(low, low if not match[2] else int(match[3] or low))


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


def lark_size(grammar: str) -> tuple[int, int]:
    """As ``regex_size``, of a Lark grammar: rules that use rules count once, not multiplied."""
    sizes = _Sizes()
    at = 0
    while at < len(grammar):
        if (repeat := _REPEAT.match(grammar, at)) is not None:
            _apply_repeat(sizes, repeat)
            at = repeat.end()
            continue
        if (repeat := _LARK_REPEAT.match(grammar, at)) is not None:
            sizes.repeat(int(repeat[1]), int(repeat[2] or repeat[1]))
            at = repeat.end()
            continue
        token = _LARK_TOKEN.match(grammar, at)
        assert token is not None, "the last alternative matches any character"
        at = token.end()
        text = token[0]
        if text in "([":
            sizes.open()
        elif text in ")]":
            sizes.close()
        elif text[0] == '"' and len(text) > 1:
            sizes.add(len(text), len(text))
        elif text[0] == "/" and len(text) > 1 and text[1] != "/":
            sizes.add(*regex_size(text[1:].rpartition("/")[0] or text[1:]))
        elif text[0].isalpha() or text[0] == "_":
            sizes.add(1, 1)
    return sizes.total()


class _SchemaSize:
    """The text a JSON schema forces, following its references once each.

    Raises:
        ApiError: 400 when it has too many parts, or is nothing but references to itself.
    """

    def __init__(self, root: Any, limits: LimitsConfig, param: str) -> None:
        self._root = root
        self._limits = limits
        self._param = param
        self._open: set[int] = set()
        self._known: dict[int, int] = {}
        self._num_looked_at = 0
        self._joined: dict[int, int] = {}

    def forced(self, schema: Any) -> int:
        if not isinstance(schema, Mapping) or id(schema) in self._open:
            return 0
        if id(schema) not in self._known:
            self._open.add(id(schema))
            if len(self._known) + len(self._open) > self._limits.max_schema_work:
                raise exceeded(self._limits, "max_schema_work", self._param)
            self._known[id(schema)] = min(self._compute(schema), _MANY)
            self._open.discard(id(schema))
        return self._known[id(schema)]

    def _compute(self, schema: Mapping[str, Any]) -> int:
        if "const" in schema:
            return len(json.dumps(schema["const"]))
        if isinstance(values := schema.get("enum"), list):
            return max((len(json.dumps(value)) for value in values), default=0)
        total = 0
        if isinstance(reference := schema.get("$ref"), str):
            total += self.forced(self._resolve(reference))
        if isinstance(pattern := schema.get("pattern"), str):
            forced, expanded = regex_size(pattern)
            total += _MANY if expanded > self._limits.max_expanded_chars else forced
        for name in ("anyOf", "oneOf"):
            if isinstance(branches := schema.get(name), list):
                total += max((self.forced(branch) for branch in branches), default=0)
        for name in ("allOf", "prefixItems"):
            if isinstance(branches := schema.get(name), list):
                total += sum(self.forced(branch) for branch in branches)
        if isinstance(properties := schema.get("properties"), Mapping):
            total += sum(len(name) + 4 + self.forced(value) for name, value in properties.items())
        items = self.forced(schema.get("items"))
        if isinstance(count := schema.get("minItems"), int) and count > 0:
            total += count * (items + 1)
        else:
            total += items
        return total + self.forced(schema.get("additionalProperties"))

    def check_joined(self) -> None:
        """Refuse regular expressions whose intersection would take without end to compile."""
        pending, seen = [self._root], set()
        while pending:
            node = pending.pop()
            if isinstance(node, list):
                pending += node
            if not isinstance(node, Mapping) or id(node) in seen:
                continue
            seen.add(id(node))
            pending += node.values()
            if self._num_joined(node) > self._limits.max_joined_texts:
                raise exceeded(self._limits, "max_joined_texts", self._param)
            patterns = node.get("patternProperties")
            most = self._limits.max_pattern_properties
            if isinstance(patterns, Mapping) and len(patterns) > most:
                raise exceeded(self._limits, "max_pattern_properties", self._param)

    def _num_joined(self, schema: Any) -> int:
        """Regular expressions that a value of the schema has to match together, at most."""
        if not isinstance(schema, Mapping):
            return 0
        if id(schema) not in self._joined:
            self._joined[id(schema)] = 0  # of a schema that leads back to itself
            own = sum(
                part  # of a keyword: what a property of its name has is a schema
                for name, part in _TEXT_KEYWORDS.items()
                if isinstance(schema.get(name), str | int | float)
            )
            if isinstance(reference := schema.get("$ref"), str):
                own += self._num_joined(self._resolve(reference))
            if isinstance(parts := schema.get("allOf"), list):
                own += sum(map(self._num_joined, parts))
            for name in ("anyOf", "oneOf"):
                if isinstance(branches := schema.get(name), list):
                    own += max(map(self._num_joined, branches), default=0)
            self._joined[id(schema)] = own
        return self._joined[id(schema)]

    def _resolve(self, reference: str) -> Any:
        node = self._root
        for part in reference.removeprefix("#").split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            node = node.get(part) if isinstance(node, Mapping) else None
        return node

    def check_ends(self) -> None:
        """Refuse a schema whose references lead back to it before they reach anything else."""
        if self._is_endless(self._root):
            raise invalid(
                "The schema refers to itself without end", self._param, "grammar_too_complex"
            )

    def _is_endless(self, schema: Any) -> bool:
        if not isinstance(schema, Mapping):
            return False
        if id(schema) in self._open:
            return True
        self._num_looked_at += 1
        if self._num_looked_at > self._limits.max_schema_work:
            raise exceeded(self._limits, "max_schema_work", self._param)
        self._open.add(id(schema))
        try:
            return self._leads_back(schema)
        finally:
            self._open.discard(id(schema))

    def _leads_back(self, schema: Mapping[str, Any]) -> bool:
        """Whether every text of the schema is one of a schema that is being looked at."""
        reference, parts = schema.get("$ref"), schema.get("allOf")
        if isinstance(reference, str) and self._is_endless(self._resolve(reference)):
            return True
        if isinstance(parts, list) and any(map(self._is_endless, parts)):
            return True
        choices = [schema.get(name) for name in ("anyOf", "oneOf")]
        return any(
            isinstance(branches, list) and branches and all(map(self._is_endless, branches))
            for branches in choices
        )


def check_regex_cost(pattern: str, param: str, limits: LimitsConfig = DEFAULT_LIMITS) -> None:
    """Raises:
    ApiError: 400 when its repeats make each token dear.
    """
    _check(*regex_size(pattern), param, limits)


def check_lark_cost(grammar: str, param: str, limits: LimitsConfig = DEFAULT_LIMITS) -> None:
    """Raises:
    ApiError: 400 when its repeats make each token dear, or a JSON schema in it would.
    """
    _check(*lark_size(grammar), param, limits)
    for found in _LARK_SCHEMA.finditer(grammar):
        try:
            schema, _ = _read_json(grammar, found.end())
        except ValueError:  # the compiler says so, too
            continue
        except RecursionError:
            raise exceeded(limits, "max_schema_work", param) from None
        check_schema_cost(schema, param, limits)


def check_schema_cost(schema: Any, param: str, limits: LimitsConfig = DEFAULT_LIMITS) -> None:
    """Raises:
    ApiError: 400 when constants, patterns and minItems force too long a text, when its
        references have no end, or when it joins many patterns.
    """
    try:
        size = _SchemaSize(schema, limits, param)
        _check(size.forced(schema), 0, param, limits)
        size.check_ends()
        size.check_joined()
    except RecursionError:  # a chain of references, each to the next
        raise exceeded(limits, "max_schema_work", param) from None


def check_choice_cost(
    choices: list[str], param: str, limits: LimitsConfig = DEFAULT_LIMITS
) -> None:
    """Raises:
    ApiError: 400 for a choice that is too long.
    """
    _check(max(map(len, choices), default=0), 0, param, limits)


def _check(forced: int, expanded: int, param: str, limits: LimitsConfig) -> None:
    if forced > limits.max_forced_chars:
        raise exceeded(limits, "max_forced_chars", param)
    if expanded > limits.max_expanded_chars:
        raise exceeded(limits, "max_expanded_chars", param)
