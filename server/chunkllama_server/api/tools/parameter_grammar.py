"""Lark rules of arguments that are not one JSON object: Python keywords, and a tag a parameter.

What such a form cannot say for certain (open objects, names that are no identifiers, text that has
to match a pattern) has no rules here; the caller then uses a JSON object in the same place.
"""

from __future__ import annotations

import json
import keyword
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from chunkllama_server.api.tools.parameter_call import VALUE_ENDS

Inline = Callable[[Any], str]
_Tree: TypeAlias = "dict[str, _Tree]"
_ANNOTATIONS = frozenset(("title", "description", "default", "examples", "$comment", "deprecated"))
_OBJECT = frozenset(("type", "properties", "required", "additionalProperties"))
_DEFINITIONS = ("$defs", "definitions")
_MAX_CHARS = 1 << 15
# Beginnings of tags in a row that are none, as in "<<<".
_MAX_BEGUN = 8
# Types whose JSON text cannot be taken for other text.
_PLAIN_TYPES = frozenset(("integer", "number", "boolean", "null", "array", "object"))


def _members(schema: Mapping[str, Any]) -> dict[str, tuple[Any, bool]] | None:
    """Schema of each property and whether it is required; None for an object that is more."""
    properties, required = schema.get("properties"), schema.get("required", [])
    is_closed = schema.get("additionalProperties") is False
    known = schema.keys() <= _OBJECT | _ANNOTATIONS | {*_DEFINITIONS}
    if not isinstance(properties, Mapping) or not isinstance(required, list):
        return None
    if not is_closed or not known or not {*map(str, required)} <= properties.keys():
        return None
    definitions = {key: schema[key] for key in _DEFINITIONS if key in schema}
    members = {}
    for name, value in properties.items():
        if not isinstance(value, dict):
            return None
        references = _references(value)
        if any(
            not reference.startswith(("#/$defs/", "#/definitions/")) for reference in references
        ):
            return None
        members[name] = ({**value, **definitions} if references else value, name in required)
    return members


def _references(schema: Any) -> list[str]:
    if isinstance(schema, list):
        return [reference for item in schema for reference in _references(item)]
    if not isinstance(schema, dict):
        return []
    own = schema.get("$ref")
    found = [own] if isinstance(own, str) else []
    return found + _references([*schema.values()])


def keyword_rules(rule: str, name: str, schema: Mapping[str, Any], inline: Inline) -> list[str]:
    """The rules of a Python call ``name(key=value, ...)``; [] where it cannot have this form.

    Args:
        inline: writes a schema for ``%json``.
    """
    members = _members(schema)
    if members is None or not all(map(_is_keyword, members)):
        return []
    lines = [f'{rule}: "{name}(" {rule}_first_0 ")"']
    last = len(members)
    for at, (key, (value, is_required)) in enumerate(members.items()):
        for kind, before in (("first", ""), ("rest", ", ")):
            written = f'"{before}{key}=" {rule}_value_{at} {rule}_rest_{at + 1}'
            left_out = "" if is_required else f" | {rule}_{kind}_{at + 1}"
            if kind == "first" or at > 0:
                lines.append(f"{rule}_{kind}_{at}: {written}{left_out}")
        lines.append(f"{rule}_value_{at}: %json {inline(value)}")
    lines.append(f'{rule}_first_{last}: ""')
    if members:
        lines.append(f'{rule}_rest_{last}: ""')
    return lines


def _is_keyword(name: str) -> bool:
    return name.isascii() and name.isidentifier() and not keyword.iskeyword(name)


def parameter_rules(
    rule: str, schema: Mapping[str, Any], inline: Inline, edge: str = "\n"
) -> list[str]:
    """The rules of a tag for each parameter; [] where the arguments cannot have this form.

    Args:
        edge: stands between a value and its tags.
    """
    members = _members(schema)
    if members is None or not all(name.isascii() and name.isidentifier() for name in members):
        return []
    parts, lines = [], []
    for at, (key, (value, is_required)) in enumerate(members.items()):
        written = _value_rules(f"{rule}_value_{at}", value, inline, edge)
        if not written:
            return []
        parts.append(f"{rule}_{at}" + ("" if is_required else "?"))
        begin = json.dumps(f"<parameter={key}>{edge}")
        lines += [f"{rule}_{at}: {begin} {rule}_value_{at}", *written]
    return [f"{rule}: {' '.join(parts) or _EMPTY}", *lines]


_EMPTY = '""'
PARAMETER_END = "</parameter>\n"


def _value_rules(rule: str, schema: dict[str, Any], inline: Inline, edge: str) -> list[str]:
    """The rules of a parameter's value and its closing tag: text as it is, anything else as JSON;
    [] for a value whose text could be read as another."""
    kind = schema.get("type")
    variants = schema.get("anyOf")
    is_json = kind is not None and _is_plain(kind)
    if isinstance(variants, list) and kind is None:
        # Text that may be null: "null" is read as such.
        texts = [v for v in variants if isinstance(v, dict) and v.get("type") == "string"]
        others = [v for v in variants if v not in texts]
        if len(texts) == 1 and all(v == {"type": "null"} for v in others):
            return _text_rules(rule, texts[0], edge)
        kinds = [v.get("type") if isinstance(v, dict) else None for v in variants]
        is_json = all(map(_is_plain, kinds))
    if kind == "string":
        return _text_rules(rule, schema, edge)
    end = json.dumps(edge + PARAMETER_END)
    return [f"{rule}: %json {inline(schema)} {end}"] if is_json else []


def _is_plain(kind: Any) -> bool:
    return isinstance(kind, str) and kind in _PLAIN_TYPES


def _text_rules(rule: str, schema: dict[str, Any], edge: str) -> list[str]:
    end = json.dumps(edge + PARAMETER_END)
    values = schema.get("enum")
    if isinstance(values, list):
        is_plain = all(isinstance(v, str) and v and v == v.strip() and "<" not in v for v in values)
        known = schema.keys() <= {"type", "enum"} | _ANNOTATIONS
        if not (values and is_plain and known):
            return []
        listed = " | ".join(json.dumps(value, ensure_ascii=False) for value in values)
        return [f"{rule}: ({listed}) {end}"]
    if not schema.keys() <= {"type", "maxLength"} | _ANNOTATIONS:
        return []
    limit = schema.get("maxLength", _MAX_CHARS)
    if type(limit) is not int or limit < 0:
        return []
    # One terminal with the tag: text that may hold anything would consume the line's end.
    closing = (edge + PARAMETER_END).replace("/", r"\/").replace("\n", r"\n")
    terminal = rule.upper()  # only a terminal can be an intersection
    return [
        f"{rule}: {terminal}",
        f"{terminal}: (/{_TEXT}*{_BEGUN}/ & /(?s:.{{0,{limit}}})/) /{closing}/",
    ]


def _tree(ends: Iterable[str]) -> _Tree:
    """The ends of a value behind their first character, which is "<" and stands nowhere else."""
    tree: _Tree = {}
    for end in ends:
        node = tree
        for char in end[1:]:
            node = node.setdefault(char, {})
    return tree


def _begun(tree: _Tree) -> str:
    """An expression of what begins a path of the tree and does not end it."""
    ways = [_literal(char) + _begun(node) for char, node in tree.items() if node]
    return f"({'|'.join(ways)})?" if ways else ""


def _other(tree: _Tree) -> str:
    """An expression of what begins a path of the tree and then leaves it, but for another "<"."""
    outside = f"[^<{''.join(map(_literal, tree))}]"
    ways = [_literal(char) + _other(node) for char, node in tree.items() if node]
    return f"({'|'.join([outside, *ways])})"


def _literal(char: str) -> str:
    return r"\/" if char == "/" else char


# A value ends at the first of its ends, so none may begin inside.
_ENDS = _tree(VALUE_ENDS)
_BEGUN = f"(<{_begun(_ENDS)}){{0,{_MAX_BEGUN}}}"
_TEXT = f"([^<]|{_BEGUN}<{_other(_ENDS)})"
