"""Close objects and tuples of a JSON schema: a model invents other members where it may."""

from __future__ import annotations

from typing import Any

from chunkllama_server.api.common.schema_keywords import COMBINATORS, map_parts
from chunkllama_server.api.common.schema_references import name_of

# Values that are listed say themselves what members they have.
_FIXED = frozenset(("enum", "const"))


def close_objects(schema: Any) -> Any:
    """The schema with ``additionalProperties: false`` where it says nothing else, and with tuples
    as long as the list of their items.

    What holds together with other parts stays open: closed, it would forbid their members.
    """
    closer = _Closer()
    closer.find_merged(schema)
    return closer.schema(schema, closes=True)


class _Closer:
    def __init__(self) -> None:
        # Names of definitions that hold together with others.
        self._merged: set[str] = set()

    def find_merged(self, node: Any, *, is_branch: bool = False) -> None:
        if isinstance(node, list):
            for item in node:
                self.find_merged(item, is_branch=is_branch)
        elif isinstance(node, dict):
            name = node.get("$ref")
            if isinstance(name, str) and (is_branch or "properties" in node):
                self._merged.add(name_of(name))
            for key, value in node.items():
                others = node.keys() & {"properties", "$ref"}
                joins = isinstance(value, list) and (len(value) > 1 or bool(others))
                is_part = (key == "allOf" and joins) or (key in ("anyOf", "oneOf") and bool(others))
                self.find_merged(value, is_branch=is_part)

    def schema(self, node: Any, *, closes: bool) -> Any:
        if not isinstance(node, dict):
            return node
        is_joined = "properties" in node or "$ref" in node

        def part(inner: Any, place: tuple[str, ...]) -> Any:
            stays = place[0] == "allOf" or (place[0] in ("anyOf", "oneOf") and is_joined)
            stays |= place[0] in ("$defs", "definitions") and place[1] in self._merged
            return self.schema(inner, closes=closes and not stays)

        closed = map_parts(node, part)
        if closes and _lists_its_members(closed):
            closed["additionalProperties"] = False
            closed["properties"] = _with_required(closed)
        if closes and _is_open_tuple(closed):
            closed["items"] = False
            # A tuple of itself ends because it may be shorter.
            if not _refers(closed["prefixItems"]):
                closed.setdefault("minItems", len(closed["prefixItems"]))
        return closed


def _with_required(node: dict[str, Any]) -> dict[str, Any]:
    """The properties of an object, with those that it requires and does not describe."""
    required = node.get("required")
    names = required if isinstance(required, list) else []
    missing = [name for name in names if isinstance(name, str) and name not in node["properties"]]
    return {**node["properties"], **{name: {} for name in missing}}


def _lists_its_members(node: dict[str, Any]) -> bool:
    return (
        isinstance(node.get("properties"), dict)
        and "additionalProperties" not in node
        and "patternProperties" not in node
        and not (COMBINATORS | _FIXED) & node.keys()
    )


def _is_open_tuple(node: dict[str, Any]) -> bool:
    items, least = node.get("prefixItems"), node.get("minItems", 0)
    if not isinstance(items, list) or not items or not isinstance(least, int):
        return False
    return least <= len(items) and not ({"items", "maxItems"} | _FIXED) & node.keys()


def _refers(node: Any) -> bool:
    """Whether a reference is anywhere in a schema."""
    if isinstance(node, list):
        return any(map(_refers, node))
    return isinstance(node, dict) and ("$ref" in node or any(map(_refers, node.values())))
