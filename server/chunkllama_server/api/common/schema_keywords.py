"""Name the keywords of a JSON schema that contain schemas, and go through them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from chunkllama.rests import rest

SCHEMA_MEMBERS = frozenset(("additionalProperties", "items", "additionalItems"))
SCHEMA_MAPS = frozenset(("properties", "patternProperties", "$defs", "definitions"))
SCHEMA_LISTS = frozenset(("anyOf", "oneOf", "allOf", "prefixItems"))
# Keywords beside which other schemas say what an object has.
COMBINATORS = frozenset(("anyOf", "oneOf", "allOf", "$ref"))
# Keywords that may be null in what they say.
_VALUES = frozenset(("const", "default", "example"))

Change = Callable[[Any, tuple[str, ...]], Any]


def map_parts(node: dict[str, Any], change: Change) -> dict[str, Any]:
    """A schema with each schema that stands directly inside it changed.

    Args:
        change: takes a schema and its place below the node.
    """
    rest()
    return {key: _map_part(key, value, change) for key, value in node.items()}


def _map_part(key: str, value: Any, change: Change) -> Any:
    if key in SCHEMA_MAPS and isinstance(value, dict):
        return {name: change(item, (key, name)) for name, item in value.items()}
    if isinstance(value, list) and key in SCHEMA_LISTS | SCHEMA_MEMBERS:
        return [change(item, (key, str(index))) for index, item in enumerate(value)]
    return change(value, (key,)) if key in SCHEMA_MEMBERS else value


def without_null(node: dict[str, Any]) -> dict[str, Any]:
    """A schema without members that are null, as clients in typed languages write absent ones."""
    if not any(item is None for key, item in node.items() if key not in _VALUES):
        return node
    return {key: item for key, item in node.items() if item is not None or key in _VALUES}
