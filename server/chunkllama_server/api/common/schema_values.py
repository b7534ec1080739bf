"""Find keywords of a JSON schema whose value is none that the keyword has."""

from __future__ import annotations

from typing import Any

from chunkllama_server.api.common.schema_keywords import (
    SCHEMA_LISTS,
    SCHEMA_MAPS,
    SCHEMA_MEMBERS,
)
from chunkllama_server.api.common.schema_spelling import TYPES

_COUNTS = frozenset(
    ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
)
_BOUNDS = frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"))
_TEXTS = frozenset(("pattern", "format", "$ref"))
_TYPE_OF = {str: "string", bool: "boolean", dict: "object", list: "array", type(None): "null"}


def readable(node: dict[str, Any], key: str) -> Any:
    """What can be read of a keyword's value; None for nothing.

    Args:
        node: the schema that has the keyword.
    """
    value = node[key]
    if key == "type":
        return _types(node, value)
    if key == "required":
        names = value if isinstance(value, list) else []
        texts = [name for name in names if isinstance(name, str)]
        return texts if texts or value == [] else None
    is_right = True
    if key in SCHEMA_MAPS:
        is_right = isinstance(value, dict)
    elif key in SCHEMA_LISTS or key == "enum":
        is_right = isinstance(value, list) and (bool(value) or key == "prefixItems")
    elif key in SCHEMA_MEMBERS:
        is_right = isinstance(value, dict | bool)
    elif key in _COUNTS:
        is_right = type(value) is int and value >= 0
    elif key in _BOUNDS:
        is_right = type(value) in (int, float) and (key != "multipleOf" or value > 0)
    elif key in _TEXTS:
        is_right = isinstance(value, str)
    return value if is_right else None


def _types(node: dict[str, Any], value: Any) -> Any:
    """The types that are known, and that one of the listed values has."""
    listed = value if isinstance(value, list) else [value]
    known = [name for name in listed if isinstance(name, str) and name in TYPES]
    values = node.get("enum")
    if isinstance(values, list) and values and not any(_has_type(v, known) for v in values):
        return None
    if len(known) < len(listed):
        return known or None
    return value if known else None


def _has_type(value: Any, names: list[str]) -> bool:
    if isinstance(value, int | float) and not isinstance(value, bool):
        is_whole = isinstance(value, int) or value.is_integer()
        return "number" in names or ("integer" in names and is_whole)
    return _TYPE_OF[type(value)] in names
