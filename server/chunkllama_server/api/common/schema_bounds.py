"""Bound what a schema leaves open, so that an answer with a grammar ends within its tokens.

A weak model in a grammar repeats itself where it may: a string, a number or a list without an end
takes all tokens, and what is left is cut JSON. The bounds are wide: they follow from the tokens
that the answer may take.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

import msgspec

from chunkllama.sampling_params import GrammarSpec
from chunkllama_server.api.common.schema_keywords import COMBINATORS
from chunkllama_server.api.common.schema_texts import other_names

MAX_INTEGER = 2**53 - 1
_MAX_NUMBER = 10**15
# Beyond it the grammar library takes no bound of a number.
_FARTHEST = 92 * 10**17
_HUGE = 10**300  # an integer beyond it has no float
_DECIMAL_STEP = 1e-9
# A narrower range may hold no multiple of the step, or few.
_LEAST_RANGE = 1000 * _DECIMAL_STEP
_MAX_MEMBERS = 32
_MAX_ITEMS = 256
_LEAST_ITEMS, _LEAST_CHARS = 4, 32
# A token of ordinary text has about four characters; half of that leaves room for bad text.
_CHARS_PER_TOKEN = 2
_MAX_CHARS = 1 << 15
# Names of members of a map.
_NAME_CHARS = 64
_NAMES = f"^.{{1,{_NAME_CHARS}}}$"
# Names of other members beside so many listed ones make a large expression.
_MAX_LISTED_CHARS = 512
# Digits behind a second or a label of a host name may go on as long as any text.
_FORMAT_CHARS = {
    **{"date-time": 35, "time": 24, "date": 10, "duration": 32, "uuid": 36, "ipv4": 15, "ipv6": 45},
    **{"email": 128, "hostname": 128, "uri": 512},
}
# A pattern that counts in hundreds may need more characters than any bound.
_PATTERN_CHARS, _LONG_PATTERN = 256, re.compile(r"\{[0-9]{3,}|\{[0-9]*,[0-9]{3,}")
# The grammar library joins no longer pattern with a bound.
_MAX_WIDTH = 64
_ONE_CHAR, _COUNT = re.compile(r"\\.|\[(?:\\.|[^\]])*\]"), re.compile(r"(\)?)\{([0-9]+)")
_MARKS = re.compile(r"\{[0-9,]*\}|\(\?.|[()|*+?^$]")
# What may come several times counts so often.
_REPEATED, _REPEATS = frozenset(("items", "additionalProperties", "patternProperties")), 4
# An untyped value may nest so deep.
_ANY_DEPTH = 3
_ANY_VALUE = "any-value-"
_MAPS = frozenset(("properties", "patternProperties", "$defs", "definitions"))
_LISTS = frozenset(("anyOf", "oneOf", "allOf", "prefixItems"))
_CHILDREN = frozenset(("items", "additionalProperties", "additionalItems"))
_ANNOTATIONS = frozenset(
    (
        *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"),
        *("$comment", "nullable", "example"),
    )
)
_MEMBERS = frozenset(("properties", "patternProperties", "additionalProperties"))
_FIXED = frozenset(("enum", "const", "$ref"))


def bound_grammar(grammar: GrammarSpec, num_tokens: int, *, patterns: bool = True) -> GrammarSpec:
    """A grammar whose JSON schema has bounds; other grammars stay as they are."""
    if grammar.kind != "json_schema":
        return grammar
    text = json.dumps(bounded(json.loads(grammar.text), num_tokens, patterns=patterns))
    return msgspec.structs.replace(grammar, text=text)


def bounded(schema: Any, num_tokens: int, *, patterns: bool = True) -> Any:
    """The schema with bounds where it has none.

    Args:
        schema: what a grammar enforces; it stays as it is.
        num_tokens: output tokens that the answer may take.
        patterns: texts that match a pattern get bounds too; not all patterns can be joined with
            one.
    """
    share = max(num_tokens, 1) * _CHARS_PER_TOKEN // max(_num_strings(schema), 1)
    items = min(max(_floor(num_tokens // 16), _LEAST_ITEMS), _MAX_ITEMS)
    chars = min(max(_floor(share), _LEAST_CHARS), _MAX_CHARS)
    bounder = _Bounder(chars, items, bounds_names=not _merges(schema), patterns=patterns)
    result = bounder.schema(schema)
    definitions = result.get("$defs", {}) if isinstance(result, dict) else None
    if not bounder.any_values or not isinstance(definitions, dict):
        return result
    return {**result, "$defs": {**definitions, **bounder.any_values}}


def _merges(schema: Any) -> bool:
    """Whether objects of several places have to hold together; their names cannot be bounded."""
    if isinstance(schema, list):
        return any(map(_merges, schema))
    if not isinstance(schema, dict):
        return False
    joins, members = schema.keys() & COMBINATORS, schema.keys() & _MEMBERS
    return "allOf" in joins or bool(joins and members) or any(map(_merges, schema.values()))


def _floor(number: int) -> int:
    """The power of two at or below a number: few different bounds share compiled grammars."""
    return 1 << (number.bit_length() - 1) if number > 0 else 0


def _num_strings(schema: Any) -> int:
    """Places of a schema that may be text; of alternatives, those of the longest."""
    if isinstance(schema, list):
        return sum(map(_num_strings, schema))
    if not isinstance(schema, dict):
        return 0
    kind = schema.get("type")
    count = int(kind == "string" or (isinstance(kind, list) and "string" in kind))
    for key, value in schema.items():
        if key in ("anyOf", "oneOf") and isinstance(value, list):
            count += max(map(_num_strings, value), default=0)
        elif key in _REPEATED:
            count += _REPEATS * _num_strings(value)
        else:
            count += _num_strings(value)
    return count


def _is_short(names: Iterable[str]) -> bool:
    """Whether an expression of all other names stays small."""
    lengths = [len(name) for name in names]
    return max(lengths) <= _NAME_CHARS and sum(lengths) <= _MAX_LISTED_CHARS


def _least(node: dict[str, Any]) -> float:
    """Characters that a string may need."""
    return max(_number(node, "minLength", 0), _PATTERN_CHARS if "pattern" in node else 0)


def _is_long(pattern: str) -> bool:
    """Whether a pattern may need more characters than can be bounded."""
    if _LONG_PATTERN.search(pattern):
        return True
    # About the characters of a text, where alternatives and optional parts count like others.
    text = _ONE_CHAR.sub("a", pattern)
    width, groups = len(_MARKS.sub("", text)), 1
    for group, digits in _COUNT.findall(text):
        width += 0 if group else int(digits)
        groups *= max(int(digits), 1) if group else 1
    return width * groups > _MAX_WIDTH


def _lower(node: dict[str, Any], default: int) -> float:
    """The higher of a number's lower bounds; without one ``default``."""
    keys = [key for key in ("minimum", "exclusiveMinimum") if node.get(key) is not None]
    found = max((_number(node, key, default) for key in keys), default=default)
    return min(max(found, -_HUGE), _HUGE)


def _upper(node: dict[str, Any], default: int) -> float:
    """The lower of a number's upper bounds; without one ``default``."""
    keys = [key for key in ("maximum", "exclusiveMaximum") if node.get(key) is not None]
    found = min((_number(node, key, default) for key in keys), default=default)
    return min(max(found, -_HUGE), _HUGE)


def _number(node: dict[str, Any], key: str, default: int) -> float:
    """A bound that the schema has; one that is no number is left for the compiler to refuse."""
    value = node.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    return default


class _Bounder:
    def __init__(
        self, max_chars: int, max_items: int, *, bounds_names: bool, patterns: bool
    ) -> None:
        self._bounds_names = bounds_names
        self._patterns = patterns
        self._max_chars = max_chars
        self._max_items = max_items
        # Definitions of any value, one for each depth.
        self.any_values: dict[str, Any] = {}

    def schema(self, node: Any, depth: int = 0) -> Any:
        """A schema with bounds; ``depth`` counts the untyped values around it."""
        if node is True:
            return self._any(depth)
        if not isinstance(node, dict):
            return node
        if node.keys() <= _ANNOTATIONS:
            return {**node, **self._any(depth)}
        result = {key: self._member(key, value, depth) for key, value in node.items()}
        given = result.get("type")
        listed = given if isinstance(given, list) else [given]
        kinds = {kind for kind in listed if isinstance(kind, str)}
        if not _FIXED & result.keys():
            self._bound(result, kinds, depth)
        return result

    def _member(self, key: str, value: Any, depth: int) -> Any:
        if key in _MAPS and isinstance(value, dict):
            return {name: self.schema(item, depth) for name, item in value.items()}
        if key in _LISTS and isinstance(value, list):
            return [self.schema(item, depth) for item in value]
        return self.schema(value, depth) if key in _CHILDREN else value

    def _bound(self, node: dict[str, Any], kinds: set[str], depth: int) -> None:
        is_bounded = "pattern" not in node or (self._patterns and not _is_long(node["pattern"]))
        if "string" in kinds and is_bounded:
            limit = max(_FORMAT_CHARS.get(str(node.get("format")), self._max_chars), _least(node))
            node.setdefault("maxLength", limit)
        limit = MAX_INTEGER if "integer" in kinds else _MAX_NUMBER
        if "integer" in kinds or "number" in kinds:
            self._bound_number(node, limit)
        if "number" in kinds and _upper(node, limit) - _lower(node, -limit) >= _LEAST_RANGE:
            node.setdefault("multipleOf", _DECIMAL_STEP)
        if "array" in kinds:
            node.setdefault("maxItems", max(self._max_items, _number(node, "minItems", 0)))
            if "items" not in node:
                node["items"] = self._any(depth + 1)
        is_map = "object" in kinds and node.get("additionalProperties", True) is not False
        # What holds together with others is left to them.
        is_map &= not node.keys() & COMBINATORS and (self._bounds_names or "properties" not in node)
        if is_map and "patternProperties" not in node:
            value = node.setdefault("additionalProperties", self._any(depth + 1))
            properties = node.get("properties")
            names = list(properties) if isinstance(properties, dict) else []
            # The grammar library counts the members of plain maps alone.
            if names and _is_short(names):
                node["patternProperties"] = {other_names(names, _NAME_CHARS): value}
                node["additionalProperties"] = False
            elif not names:
                least = _number(node, "minProperties", 0)
                node.setdefault("maxProperties", max(_MAX_MEMBERS, least))
                node["patternProperties"] = {_NAMES: value}
                node["additionalProperties"] = False

    def _bound_number(self, node: dict[str, Any], limit: int) -> None:
        """Bound a number; twice the bound that it has leaves room beside that."""
        lower, upper = _lower(node, 0), _upper(node, 0)
        if node.get("minimum") is None and "exclusiveMinimum" not in node:
            node["minimum"] = min(-limit, upper, max(2 * upper, -_FARTHEST))
        if node.get("maximum") is None and "exclusiveMaximum" not in node:
            node["maximum"] = max(limit, lower, min(2 * lower, _FARTHEST))

    def _any(self, depth: int) -> dict[str, Any]:
        """A reference to any JSON value, with bounds: a schema may have thousands of them."""
        name = f"{_ANY_VALUE}{depth}"
        if name not in self.any_values:
            kinds: list[dict[str, Any]] = [
                {"type": "string"},
                {"type": "number"},
                {"type": "boolean"},
                {"type": "null"},
            ]
            if depth < _ANY_DEPTH:
                kinds += [{"type": "array"}, {"type": "object"}]
            self.any_values[name] = {"anyOf": [self.schema(kind, depth) for kind in kinds]}
        return {"$ref": f"#/$defs/{name}"}
