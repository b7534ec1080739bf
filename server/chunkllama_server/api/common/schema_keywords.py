"""Name the keywords of a JSON schema that contain schemas, and leave out those that are null."""

from __future__ import annotations

from typing import Any

SCHEMA_MEMBERS = frozenset(("additionalProperties", "items", "additionalItems"))
SCHEMA_MAPS = frozenset(("properties", "patternProperties", "$defs", "definitions"))
SCHEMA_LISTS = frozenset(("anyOf", "oneOf", "allOf", "prefixItems"))
_CONTAINERS = (*SCHEMA_MEMBERS, *SCHEMA_MAPS, *SCHEMA_LISTS, "required")


def without_null(node: dict[str, Any]) -> dict[str, Any]:
    """A schema without members that are null, as clients in typed languages write absent ones."""
    if not any(node.get(key, True) is None for key in _CONTAINERS):
        return node
    return {key: item for key, item in node.items() if item is not None or key not in _CONTAINERS}
