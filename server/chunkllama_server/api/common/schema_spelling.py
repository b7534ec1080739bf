"""Read types, numbers and absent keywords of a JSON schema as their writer means them.

Typed languages write absent keywords as null and counts as 2.0, Gemini writes types in capitals,
and who describes a function of Python by hand may write Python's names of types.
"""

from __future__ import annotations

import re
from typing import Any

from chunkllama_server.api.common.schema_keywords import (
    COMBINATORS,
    SCHEMA_MAPS,
    map_parts,
    without_null,
)

TYPES = frozenset(("string", "integer", "number", "boolean", "object", "array", "null"))
_OTHER_NAMES = {
    **{"str": "string", "text": "string", "int": "integer", "long": "integer"},
    **{"float": "number", "double": "number", "decimal": "number", "bool": "boolean"},
    **{"dict": "object", "map": "object", "hashmap": "object", "none": "null", "nonetype": "null"},
    **{"list": "array", "tuple": "array", "set": "array", "arraylist": "array"},
    **dict.fromkeys(("date", "time", "datetime", "date-time", "uuid", "email", "url"), "string"),
    **dict.fromkeys(("uri", "char", "password", "byte", "binary", "varchar"), "string"),
}
_COUNTS = frozenset(
    ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
)
_NUMBERS = _COUNTS | {
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
_NUMBER = re.compile(r"-?[0-9]{1,15}(\.[0-9]{1,9})?")
# What stays around a schema that becomes an alternative: references lead to it.
_OUTER = frozenset(("$defs", "definitions", "$schema", "$id", "title", "description", "default"))


def plain_spelling(node: Any) -> Any:
    """The schema in the words of JSON Schema; what it does not know stays as it is."""
    if not isinstance(node, dict):
        return node
    node = _nullable(_with_bounds(without_null(node)))
    changed = {key: _plain(key, value) for key, value in node.items()}
    if "any" in _lowered(changed.get("type")):
        del changed["type"]
    return map_parts(changed, lambda part, _: plain_spelling(part))


def _nullable(node: dict[str, Any]) -> dict[str, Any]:
    """A schema that allows null where OpenAPI's ``nullable`` says so."""
    if node.get("nullable") is not True:
        return node
    rest = {key: item for key, item in node.items() if key != "nullable"}
    if isinstance(values := rest.get("enum"), list) and None not in values:
        rest["enum"] = [*values, None]
    kind = rest.get("type")
    if kind is not None and not COMBINATORS & rest.keys() and "const" not in rest:
        kinds = kind if isinstance(kind, list) else [kind]
        return {**rest, "type": [*kinds, *([] if "null" in kinds else ["null"])]}
    if rest.keys().isdisjoint(COMBINATORS | {"const"}):
        return rest
    outer = {key: rest.pop(key) for key in _OUTER & rest.keys()}
    return {**outer, "anyOf": [rest, {"type": "null"}]}


def _with_bounds(node: dict[str, Any]) -> dict[str, Any]:
    """A schema whose bounds are numbers; in draft 4 they are inclusive or exclusive by a flag."""
    for bound, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if isinstance(is_exclusive := node.get(exclusive), bool):
            node = {key: item for key, item in node.items() if key != exclusive}
            if is_exclusive and bound in node:
                node[exclusive] = node.pop(bound)
    return node


def _plain(key: str, value: Any) -> Any:
    if key == "type":
        return [type_name(name) for name in value] if isinstance(value, list) else type_name(value)
    if key in SCHEMA_MAPS and value == []:  # as PHP writes an empty object
        return {}
    if key in _NUMBERS and isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value) if "." in value else int(value)
    if key in _COUNTS and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def type_name(name: Any) -> Any:
    """JSON Schema's name of a type that may be spelled otherwise."""
    if not isinstance(name, str) or name in TYPES:
        return name
    lowered = name.lower()
    return lowered if lowered in TYPES else _OTHER_NAMES.get(lowered, name)


def _lowered(names: Any) -> list[str]:
    listed = names if isinstance(names, list) else [names]
    return [name.lower() for name in listed if isinstance(name, str)]
