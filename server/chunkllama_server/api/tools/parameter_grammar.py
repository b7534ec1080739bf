"""Lark rules of arguments that are not one JSON object: Python keywords, a tag a parameter, and
texts between marks.

What such a form cannot say for certain (open objects, names that are no identifiers, text that has
to match a pattern) has no rules here; the caller then uses a JSON object in the same place.
"""

from __future__ import annotations

import json
import keyword
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

from chunkllama_server.api.tools.call_format import CallFormat
from chunkllama_server.api.tools.escaped_call import MARKS
from chunkllama_server.api.tools.parameter_tags import PARAMETER

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
    values = [f"{rule}_value_{at}: %json {inline(v)}" for at, (v, _) in enumerate(members.values())]
    return [
        f'{rule}: "{name}(" {rule}_first_0 ")"',
        *_member_rules(rule, members, "=", ", "),
        *values,
    ]


def _member_rules(
    rule: str, members: Mapping[str, tuple[Any, bool]], behind: str, separator: str
) -> list[str]:
    """The rules of members in their order: keys with ``behind`` and ``<rule>_value_<number>``."""
    lines = []
    last = len(members)
    for at, (key, (_, is_required)) in enumerate(members.items()):
        for kind, before in (("first", ""), ("rest", separator)):
            written = f'"{before}{key}{behind}" {rule}_value_{at} {rule}_rest_{at + 1}'
            left_out = "" if is_required else f" | {rule}_{kind}_{at + 1}"
            if kind == "first" or at > 0:
                lines.append(f"{rule}_{kind}_{at}: {written}{left_out}")
    lines.append(f'{rule}_first_{last}: ""')
    if members:
        lines.append(f'{rule}_rest_{last}: ""')
    return lines


def escaped_rules(
    rule: str, schema: Mapping[str, Any], inline: Inline, written: CallFormat
) -> list[str]:
    """The rules of ``{key:value,...}`` with texts between marks; [] where it cannot be so.

    Args:
        written: how the model writes calls.
    """
    members = _members(schema)
    if members is None or not all(name.isascii() and name.isidentifier() for name in members):
        return []
    form = ParameterForm(MARKS[0], MARKS[0], MARKS[:1])
    lines = [f'{rule}: "{{" {rule}_first_0 "}}"', *_member_rules(rule, members, ":", ",")]
    for at, (value, _) in enumerate(members.values()):
        name = f"{rule}_value_{at}"
        text, others = _text_schema(value)
        if text is None:
            lines.append(f"{name}: %json {inline(value)}")
            continue
        rules = _text_rules(f"{name}_text", text, form, written)
        if not rules:
            return []
        or_null = ' | "null"' if others else ""
        lines += [f"{name}: {written.literal(form.begin)} {name}_text{or_null}", *rules]
    return lines


def _is_keyword(name: str) -> bool:
    return name.isascii() and name.isidentifier() and not keyword.iskeyword(name)


@dataclass(frozen=True, slots=True)
class ParameterForm:
    """The form of a parameter.

    Attributes:
        begin: stands before its value, with ``{0}`` for its name and ``{1}`` for whether it is
            text.
        end: stands behind its value.
        value_ends: where a value ends for a reader, so it holds none of them.
    """

    begin: str = "<parameter={0}>\n"
    end: str = "\n</parameter>\n"
    value_ends: tuple[str, ...] = PARAMETER.value_ends


def parameter_rules(
    rule: str, schema: Mapping[str, Any], inline: Inline, written: CallFormat, form: ParameterForm
) -> list[str]:
    """The rules of a tag for each parameter; [] where the arguments cannot have this form."""
    members = _members(schema)
    if members is None or not all(name.isascii() and name.isidentifier() for name in members):
        return []
    parts, lines = [], []
    for at, (key, (value, is_required)) in enumerate(members.items()):
        rules = _value_rules(f"{rule}_value_{at}", value, inline, written, form)
        if not rules:
            return []
        parts.append(f"{rule}_{at}" + ("" if is_required else "?"))
        is_text = "false" if _text_schema(value)[0] is None else "true"
        begin = written.literal(form.begin.format(key, is_text))
        lines += [f"{rule}_{at}: {begin} {rule}_value_{at}", *rules]
    return [f"{rule}: {' '.join(parts) or _EMPTY}", *lines]


_EMPTY = '""'


def _text_schema(schema: dict[str, Any]) -> tuple[dict[str, Any] | None, list[Any]]:
    """The schema of a value that is text or null, and of its null; None for any other value."""
    kind, variants = schema.get("type"), schema.get("anyOf")
    if kind == "string":
        return schema, []
    if not isinstance(variants, list) or kind is not None:
        return None, []
    texts = [v for v in variants if isinstance(v, dict) and v.get("type") == "string"]
    others = [v for v in variants if v not in texts]
    is_text = len(texts) == 1 and all(v == {"type": "null"} for v in others)
    return (texts[0], others) if is_text else (None, [])


def _value_rules(
    rule: str, schema: dict[str, Any], inline: Inline, written: CallFormat, form: ParameterForm
) -> list[str]:
    """The rules of a parameter's value and its closing tag: text as it is, anything else as JSON;
    [] for a value whose text could be read as another."""
    text, _ = _text_schema(schema)
    if text is not None:
        # Where it may be null, "null" is read as such.
        return _text_rules(rule, text, form, written)
    kind, variants = schema.get("type"), schema.get("anyOf")
    kinds = [kind]
    if isinstance(variants, list) and kind is None:
        kinds = [v.get("type") if isinstance(v, dict) else None for v in variants]
    is_json = all(map(_is_plain, kinds))
    return [f"{rule}: %json {inline(schema)} {written.literal(form.end)}"] if is_json else []


def _is_plain(kind: Any) -> bool:
    return isinstance(kind, str) and kind in _PLAIN_TYPES


def _text_rules(
    rule: str, schema: dict[str, Any], form: ParameterForm, written: CallFormat
) -> list[str]:
    """The rules of a text and what ends it."""
    end, values = written.literal(form.end), schema.get("enum")
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
    text = f"({_text_expression(form.value_ends)} & /(?s:.{{0,{limit}}})/)"
    terminal = rule.upper()  # only a terminal can be an intersection
    # One terminal with the tag up to a token: text that may hold anything would consume it.
    closing, *rest = written.parts(form.end)
    closing = closing.replace("/", r"\/").replace("\n", r"\n")
    return [
        f"{rule}: {terminal} {written.literal(''.join(rest))}".rstrip(),
        f"{terminal}: {text}{f' /{closing}/' if closing else ''}",
    ]


@cache
def _text_expression(ends: tuple[str, ...]) -> str:
    """Text in which none of the ends begins: a value ends at the first of them."""
    tree = _tree(ends)
    begun = f"(<{_begun(tree)}){{0,{_MAX_BEGUN}}}"
    return f"/([^<]|{begun}<{_other(tree)})*{begun}/"


def _tree(ends: tuple[str, ...]) -> _Tree:
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
