"""Merge objects that a JSON schema joins with ``allOf``, so that the whole can be closed."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from chunkllama_server.api.common.schema_keywords import (
    SCHEMA_LISTS,
    SCHEMA_MAPS,
    SCHEMA_MEMBERS,
    without_null,
)
from chunkllama_server.config.limits import DEFAULT_LIMITS, LimitsConfig

# What the joined objects may say; anything else keeps them apart.
_MEMBERS = frozenset(("type", "properties", "required", "title", "description"))
# Members that annotate the whole.
_NOTES = frozenset(("title", "description", "default", "examples", "$defs", "definitions"))
_MAX_LEVELS = 8


def merge_objects(schema: Any, limits: LimitsConfig = DEFAULT_LIMITS) -> Any:
    """The schema with one object for each ``allOf`` of plain ones, as OpenAPI's inheritance is.

    Each place that joins a definition gets a copy of it. An ``allOf`` stays as it is where the
    copies have ``max_schema_chars`` together or are ``max_schema_depth`` levels deep, and where a
    definition joins itself.
    """
    return _Merger(schema, limits).schema(schema, 1, frozenset())


@dataclass(slots=True)
class _Joined:
    """What the parts of an object say together.

    Attributes:
        is_object: a part says that it is one, or has a member.
        properties: each with the references that lead to it.
    """

    is_object: bool
    properties: dict[str, tuple[Any, frozenset[str]]] | None = None
    required: dict[str, None] = field(default_factory=dict)

    def add(self, part: _Joined) -> bool:
        """Add a part; False if the two define a property in different ways."""
        if part.properties is not None:
            known = self.properties or {}
            for name, (item, _) in part.properties.items():
                if name in known and known[name][0] != item:
                    return False
            self.properties = {**part.properties, **known}
        self.is_object |= part.is_object
        self.required |= part.required
        return True


class _Merger:
    def __init__(self, root: Any, limits: LimitsConfig) -> None:
        self._root = root
        self._max_depth = limits.max_schema_depth
        self._chars_left = limits.max_schema_chars
        self._chars: dict[str, int] = {}

    def schema(self, node: Any, depth: int, names: frozenset[str]) -> Any:
        """A schema whose members are merged.

        Args:
            depth: levels above the schema, itself included.
            names: references that are being replaced by what they name.
        """
        if not isinstance(node, dict):
            return node
        node = without_null(node)
        merged: dict[str, Any] = {}
        if "allOf" in node and depth <= self._max_depth:
            joined = None
            if (reference := _only_reference(node)) is not None:
                node = reference
            elif (joined := self._joined(node, names, 0)) is not None and joined.is_object:
                node = {key: item for key, item in node.items() if key in _NOTES}
                merged = self._object(joined, depth)
        return {
            **{key: self._member(key, item, depth, names) for key, item in node.items()},
            **merged,
        }

    def _member(self, key: str, value: Any, depth: int, names: frozenset[str]) -> Any:
        if key in SCHEMA_MAPS and isinstance(value, dict):
            return {name: self.schema(item, depth + 2, names) for name, item in value.items()}
        if key in SCHEMA_LISTS | SCHEMA_MEMBERS and isinstance(value, list):
            return [self.schema(item, depth + 2, names) for item in value]
        return self.schema(value, depth + 1, names) if key in SCHEMA_MEMBERS else value

    def _object(self, joined: _Joined, depth: int) -> dict[str, Any]:
        merged: dict[str, Any] = {"type": "object"}
        if joined.properties is not None:
            merged["properties"] = {
                name: self.schema(item, depth + 2, names)
                for name, (item, names) in joined.properties.items()
            }
        if joined.required:
            merged["required"] = list(joined.required)
        return merged

    def _joined(self, node: Any, names: frozenset[str], level: int) -> _Joined | None:
        """What a schema and the parts that it joins say together; None if it is more than that."""
        reference = _reference(node)
        if reference is not None:
            node = self._definition(reference, names)
            names |= {reference}
        if not isinstance(node, dict) or level > _MAX_LEVELS:
            return None
        node = without_null(node)
        joined = _own_part(node, names)
        parts = node.get("allOf", [])
        if joined is None or not isinstance(parts, list):
            return None
        for item in parts:
            part = self._joined(item, names, level + 1)
            if part is None or not joined.add(part):
                return None
        return joined

    def _definition(self, reference: str, names: frozenset[str]) -> Any:
        """What a reference names; None if it is being replaced or there is no room for a copy."""
        if reference in names or self._chars_left < 0:
            return None
        target = self._root
        for step in reference.removeprefix("#/").split("/"):
            target = target.get(step) if isinstance(target, dict) else None
        if reference not in self._chars:
            self._chars[reference] = len(json.dumps(target))
        self._chars_left -= self._chars[reference]
        return target if self._chars_left >= 0 else None


def _own_part(node: dict[str, Any], names: frozenset[str]) -> _Joined | None:
    """What an object says beside its ``allOf``; None if it is more than that of a plain one."""
    own = node.keys() - {"allOf"}
    if not own <= _MEMBERS | _NOTES or node.get("type", "object") != "object":
        return None
    properties, required = node.get("properties"), node.get("required", [])
    is_list = isinstance(required, list) and all(isinstance(name, str) for name in required)
    if not is_list or not isinstance(properties, dict | None):
        return None
    listed = None if properties is None else {k: (v, names) for k, v in properties.items()}
    return _Joined("type" in node or bool(properties), listed, dict.fromkeys(required))


def _reference(node: Any) -> str | None:
    """The name that is all a schema says."""
    if not isinstance(node, dict) or node.keys() - _NOTES != {"$ref"}:
        return None
    return node["$ref"] if isinstance(node["$ref"], str) else None


def _only_reference(node: dict[str, Any]) -> dict[str, Any] | None:
    """The reference that an ``allOf`` of nothing else is, with its annotations."""
    parts = node["allOf"]
    if not isinstance(parts, list) or node.keys() - _NOTES != {"allOf"}:
        return None
    said = [part for part in parts if not isinstance(part, dict) or part.keys() - _NOTES]
    reference = _reference(said[0]) if len(said) == 1 else None
    if reference is None:
        return None
    return {key: item for key, item in node.items() if key != "allOf"} | {"$ref": reference}
