"""Merge objects that a JSON schema joins with ``allOf``, so that the whole can be closed."""

from __future__ import annotations

from typing import Any

# What the joined objects may say; anything else keeps them apart.
_MEMBERS = frozenset(("type", "properties", "required", "title", "description"))
# Members that annotate the whole.
_NOTES = frozenset(("title", "description", "default", "examples", "$defs", "definitions"))
_MAX_DEPTH = 8
# Parts read for one schema; those of a definition count wherever it is joined.
_MAX_PARTS = 1024


def merge_objects(schema: Any) -> Any:
    """The schema with one object for each ``allOf`` of plain ones, as OpenAPI's inheritance is."""
    return _Merger(schema).schema(schema)


class _Merger:
    def __init__(self, root: Any) -> None:
        self._root = root
        self._num_parts = 0

    def schema(self, node: Any) -> Any:
        if isinstance(node, list):
            return [self.schema(item) for item in node]
        if not isinstance(node, dict):
            return node
        merged = self._merged(node, 0) if "allOf" in node else None
        if merged is not None:
            node = {**{key: item for key, item in node.items() if key in _NOTES}, **merged}
        return {key: self.schema(item) for key, item in node.items()}

    def _merged(self, node: Any, depth: int) -> dict[str, Any] | None:
        """One plain object of a schema and the parts that it joins; None if there is none."""
        node = _resolved(node, self._root)
        self._num_parts += 1
        if not isinstance(node, dict) or max(depth - _MAX_DEPTH, self._num_parts - _MAX_PARTS) > 0:
            return None
        own = {key: item for key, item in node.items() if key != "allOf"}
        branches = node.get("allOf", [])
        is_plain = own.keys() <= _MEMBERS | _NOTES and own.get("type", "object") == "object"
        if not is_plain or not isinstance(branches, list):
            return None
        parts = [own]
        for branch in branches:
            part = self._merged(branch, depth + 1)
            if part is None:
                return None
            parts.append(part)
        properties: dict[str, Any] = {}
        required: list[Any] = []
        for part in parts:
            listed, needed = part.get("properties", {}), part.get("required", [])
            if not isinstance(listed, dict) or not isinstance(needed, list):
                return None
            if any(properties.get(name, item) != item for name, item in listed.items()):
                return None
            properties |= listed
            required += [name for name in needed if name not in required]
        return {"type": "object", "properties": properties, "required": required}


def _resolved(node: Any, root: Any) -> Any:
    """The definition that a plain reference names."""
    if not isinstance(node, dict) or node.keys() - _NOTES != {"$ref"}:
        return node
    target = root
    for step in str(node["$ref"]).removeprefix("#/").split("/"):
        target = target.get(step) if isinstance(target, dict) else None
    return target
