"""Merge objects that a JSON schema joins with ``allOf``, so that the whole can be closed.

A reference beside other keywords joins them, too, and so do members beside alternatives.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from chunkllama_server.api.common.schema_keywords import (
    SCHEMA_LISTS,
    SCHEMA_MAPS,
    SCHEMA_MEMBERS,
    map_parts,
)
from chunkllama_server.api.common.schema_references import follow, written
from chunkllama_server.config.limits import DEFAULT_LIMITS, LimitsConfig

# Members that annotate the whole.
_NOTES = frozenset(("title", "description", "default", "examples", "$defs", "definitions"))
# What the joined objects may say; anything else keeps them apart.
_MEMBERS = frozenset(
    ("type", "properties", "required", "additionalProperties", "unevaluatedProperties")
)
# Keywords that constrain; others say nothing beside a reference.
_CONSTRAINTS = frozenset(
    (
        *("type", "enum", "const", "properties", "required", "additionalProperties"),
        "unevaluatedProperties",
        *("patternProperties", "minProperties", "maxProperties", "allOf", "anyOf", "oneOf"),
        *("items", "prefixItems", "minItems", "maxItems", "pattern", "format", "minLength"),
        *("maxLength", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    )
)
_MAX_LEVELS = 8


def merge_objects(schema: Any, limits: LimitsConfig = DEFAULT_LIMITS) -> Any:
    """The schema with one object for each ``allOf`` of plain ones, as OpenAPI's inheritance is.

    Each place that joins a definition gets a copy of it, or a definition of its own where it joins
    one that it is itself a part of. An ``allOf`` stays as it is where the copies have
    ``max_schema_chars`` together or are ``max_schema_depth`` levels deep, and where a definition is
    nothing but itself.
    """
    merger = _Merger(schema, limits)
    merged = merger.schema(schema, 1)
    if not merger.definitions:
        return merged
    return {**merged, "$defs": {**merged.get("$defs", {}), **merger.definitions}}


@dataclass(slots=True)
class _Joined:
    """What the parts of an object say together.

    Attributes:
        is_object: a part says that it is one, or has a member.
        only: the members that parts without others have in common; None without such a part.
    """

    is_object: bool
    only: frozenset[str] | None = None
    properties: Mapping[str, Any] | None = None
    required: Mapping[str, None] = field(default_factory=dict)

    def close(self) -> None:
        """Allow no member beside those that the parts have."""
        own = frozenset(self.properties or ())
        self.only = own if self.only is None else own & self.only


class _Merger:
    def __init__(self, root: Any, limits: LimitsConfig) -> None:
        self.definitions: dict[str, Any] = {}
        self._root = root
        self._max_depth = limits.max_schema_depth
        self._chars_left = limits.max_schema_chars
        self._chars: dict[str, int] = {}
        # What two descriptions of a member say together, by their identities.
        self._both: dict[tuple[int, int], dict[str, Any]] = {}
        # Joins that are being merged, with the name of one that is met inside itself.
        self._open: dict[int, str | None] = {}
        given = root.get("$defs", {}) if isinstance(root, dict) else {}
        self._names = set(given) if isinstance(given, dict) else None

    def schema(self, node: Any, depth: int) -> Any:
        """A schema whose members are merged.

        Args:
            depth: levels above the schema, itself included.
        """
        if not isinstance(node, dict):
            return node
        if id(node) in self._open:
            return self._reference_to(node)
        changed = _as_all_of(node)
        if depth > self._max_depth:
            return self._members(node, depth)
        if (reference := _only_reference(changed)) is not None:
            return self._members(reference, depth)
        joined = self._joined(changed, frozenset(), 0) if "allOf" in changed else None
        alternatives = None
        if joined is None or not joined.is_object:
            alternatives = self._alternatives(changed)
            if alternatives is None:
                is_reference = "$ref" in changed
                return self._members(changed if is_reference else node, depth)
        self._open[id(node)] = None
        merged = self._members(_notes(node), depth)
        if alternatives is None:
            assert joined is not None
            merged |= self._object(joined, depth)
        else:
            key = "anyOf" if "anyOf" in node else "oneOf"
            merged[key] = [{**notes, **self._object(j, depth + 2)} for notes, j in alternatives]
        name = self._open.pop(id(node))
        if name is None:
            return merged
        self.definitions[name] = merged
        return {"$ref": written(("$defs", name))}

    def _reference_to(self, node: dict[str, Any]) -> dict[str, Any]:
        """A reference to a join that is being merged, which becomes a definition."""
        if self._names is None:
            return node
        name = self._open[id(node)] or self._new_name(self._names)
        self._open[id(node)] = name
        return {"$ref": written(("$defs", name))}

    def _new_name(self, names: set[str]) -> str:
        count = len(self.definitions) + 1
        while (name := f"joined-{count}") in names:
            count += 1
        names.add(name)
        return name

    def _members(self, node: dict[str, Any], depth: int) -> dict[str, Any]:
        return {key: self._member(key, item, depth) for key, item in node.items()}

    def _member(self, key: str, value: Any, depth: int) -> Any:
        if key in SCHEMA_MAPS and isinstance(value, dict):
            return {name: self.schema(item, depth + 2) for name, item in value.items()}
        if key in SCHEMA_LISTS | SCHEMA_MEMBERS and isinstance(value, list):
            return [self.schema(item, depth + 2) for item in value]
        return self.schema(value, depth + 1) if key in SCHEMA_MEMBERS else value

    def _object(self, joined: _Joined, depth: int) -> dict[str, Any]:
        merged: dict[str, Any] = {"type": "object"}
        if joined.properties is not None:
            members = joined.properties
            if joined.only is not None:
                allowed = joined.only | joined.required.keys()
                members = {name: item for name, item in members.items() if name in allowed}
            merged["properties"] = self._member("properties", members, depth)
        if joined.required:
            merged["required"] = list(joined.required)
        if joined.only is not None:
            merged["additionalProperties"] = False
        return merged

    def _alternatives(self, node: dict[str, Any]) -> list[tuple[dict[str, Any], _Joined]] | None:
        """What an object with alternatives is in each; None if it is more than a plain one."""
        keys = node.keys() & {"anyOf", "oneOf"}
        if len(keys) != 1 or not node.keys() & {"properties", "required", "allOf"}:
            return None
        (key,) = keys
        base = {
            name: item for name, item in node.items() if name not in (key, "unevaluatedProperties")
        }
        branches = node[key] if isinstance(node[key], list) else []
        self._chars_left -= len(json.dumps(base)) * len(branches)
        if self._chars_left < 0:
            return None
        alternatives = []
        for branch in branches:
            whole = self._joined(base, frozenset(), 0)
            part = self._joined(branch, frozenset(), 0)
            if whole is None or part is None:
                return None
            self._add(part, whole)
            if not part.is_object:
                return None
            if _is_closed(node):
                part.close()
            alternatives.append((_notes(branch), part))
        return alternatives or None

    def _joined(self, node: Any, names: frozenset[str], level: int) -> _Joined | None:
        """What a schema and the parts that it joins say together; None if it is more than that.

        Args:
            names: references that lead to the schema.
            level: joins around it.
        """
        if not isinstance(node, dict) or level > _MAX_LEVELS:
            return None
        node = _as_all_of(node)
        reference = node.get("$ref")
        if isinstance(reference, str) and not node.keys() & _CONSTRAINTS:
            return self._joined(self._definition(reference, names), names | {reference}, level + 1)
        joined = _own_part(node)
        parts = node.get("allOf", [])
        if joined is None or not isinstance(parts, list):
            return None
        for item in parts:
            part = self._joined(item, names, level + 1)
            if part is None:
                return None
            self._add(joined, part)
        if _is_closed(node):
            joined.close()
        return joined

    def _add(self, joined: _Joined, part: _Joined) -> None:
        """Add a part, its members first."""
        if part.properties is not None:
            known = joined.properties or {}
            shared = {
                name: self._one_of_both(part.properties[name], known[name])
                for name in part.properties.keys() & known.keys()
            }
            joined.properties = {**part.properties, **known, **shared}
        joined.is_object |= part.is_object
        if part.only is not None:
            joined.only = part.only if joined.only is None else joined.only & part.only
        joined.required = {**joined.required, **part.required}

    def _one_of_both(self, first: Any, second: Any) -> Any:
        """One schema for what two say of a member; the same one each time that they meet."""
        if first == second or first in (True, {}):
            return second
        if second in (True, {}):
            return first
        key = (id(first), id(second))
        return self._both.setdefault(key, {"allOf": [first, second]})

    def _definition(self, reference: str, names: frozenset[str]) -> Any:
        """What a reference names; None if it leads to itself or there is no room for a copy."""
        if reference in names or self._chars_left < 0:
            return None
        target = follow(self._root, reference)
        if reference not in self._chars:
            self._chars[reference] = len(json.dumps(target))
        self._chars_left -= self._chars[reference]
        return target if self._chars_left >= 0 else None


def _is_closed(node: Mapping[str, Any]) -> bool:
    return node.get("unevaluatedProperties") is False


def has_open_end(schema: Any) -> bool:
    """Whether an object that could not be merged says that it has no other members."""
    return bool(schema != without_open_ends(schema))


def without_open_ends(schema: Any) -> Any:
    """The schema without ``unevaluatedProperties``, which no grammar enforces."""
    if not isinstance(schema, dict):
        return schema
    rest = {key: item for key, item in schema.items() if key != "unevaluatedProperties"}
    return map_parts(rest, lambda part, _: without_open_ends(part))


def _own_part(node: dict[str, Any]) -> _Joined | None:
    """What an object says beside its ``allOf``; None if it is more than that of a plain one."""
    own = (node.keys() & _CONSTRAINTS) - {"allOf"}
    if not own <= _MEMBERS or node.get("type", "object") != "object":
        return None
    properties, required = node.get("properties"), node.get("required", [])
    is_list = isinstance(required, list) and all(isinstance(name, str) for name in required)
    if not is_list or not isinstance(properties, dict | None):
        return None
    is_closed = "additionalProperties" in node
    if is_closed and node["additionalProperties"] is not False:
        return None
    only = frozenset(properties or ()) if is_closed else None
    is_object = "type" in node or bool(properties)
    return _Joined(is_object, only, properties, dict.fromkeys(required))


def _as_all_of(node: dict[str, Any]) -> dict[str, Any]:
    """A reference that joins what stands beside it; without what only annotates it."""
    reference, parts = node.get("$ref"), node.get("allOf", [])
    if not isinstance(reference, str) or not isinstance(parts, list):
        return node
    if not node.keys() & _CONSTRAINTS:
        return {**_notes(node), "$ref": reference}
    rest = {key: item for key, item in node.items() if key != "$ref"}
    return {**rest, "allOf": [{"$ref": reference}, *parts]}


def _notes(node: dict[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in node.items() if key in _NOTES}


def _only_reference(node: dict[str, Any]) -> dict[str, Any] | None:
    """The reference that an ``allOf`` of nothing else is, with its annotations."""
    parts = node.get("allOf")
    if not isinstance(parts, list) or node.keys() & _CONSTRAINTS != {"allOf"}:
        return None
    says = _CONSTRAINTS | {"$ref"}
    said = [part for part in parts if not isinstance(part, dict) or part.keys() & says]
    if len(said) != 1 or not isinstance(said[0], dict) or said[0].keys() & says != {"$ref"}:
        return None
    return {**_notes(node), "$ref": said[0]["$ref"]}
