"""Read types, numbers and absent keywords of a JSON schema as their writer means them.

Typed languages write absent keywords as null and counts as 2.0, Gemini writes types in capitals,
and who describes a function of Python by hand may write Python's names of types.
"""

from __future__ import annotations

from typing import Any

from chunkllama_server.api.common.schema_keywords import map_parts, without_null

TYPES = frozenset(("string", "integer", "number", "boolean", "object", "array", "null"))
_OTHER_NAMES = {
    **{"str": "string", "text": "string", "int": "integer", "long": "integer"},
    **{"float": "number", "double": "number", "decimal": "number", "bool": "boolean"},
    **{"dict": "object", "map": "object", "hashmap": "object", "none": "null", "nonetype": "null"},
    **{"list": "array", "tuple": "array", "set": "array", "arraylist": "array"},
}
_COUNTS = frozenset(
    ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
)


def plain_spelling(node: Any) -> Any:
    """The schema in the words of JSON Schema; what it does not know stays as it is."""
    if not isinstance(node, dict):
        return node
    changed = {key: _plain(key, value) for key, value in _with_bounds(without_null(node)).items()}
    if "any" in _lowered(changed.get("type")):
        del changed["type"]
    return map_parts(changed, lambda part, _: plain_spelling(part))


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
