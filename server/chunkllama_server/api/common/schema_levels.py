"""Prepare a JSON schema for a grammar: enforce what a grammar can, name what it cannot.

A keyword is enforced, an annotation (it constrains nothing, or names a format no grammar knows), or
unenforceable. An unenforceable keyword is a 400 that names its place if the schema is strict;
otherwise it is left out and named. Objects that list their properties are closed unless the schema
says otherwise: a model invents members where it may.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from chunkllama_server.api.common.schema_closing import close_objects
from chunkllama_server.api.common.schema_cost import check_schema_cost
from chunkllama_server.api.common.schema_keywords import COMBINATORS, map_parts
from chunkllama_server.api.common.schema_merge import (
    has_open_end,
    merge_objects,
    without_open_ends,
)
from chunkllama_server.api.common.schema_references import References
from chunkllama_server.api.common.schema_spelling import plain_spelling
from chunkllama_server.api.common.schema_texts import enforceable, format_pattern
from chunkllama_server.api.common.schema_values import readable
from chunkllama_server.config.limits import DEFAULT_LIMITS, LimitsConfig
from chunkllama_server.transport.errors import invalid

# Formats llguidance enforces; another format is an annotation.
FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
)
UNENFORCEABLE = frozenset(
    (
        *("uniqueItems", "propertyNames", "not", "contains", "minContains", "maxContains"),
        *("if", "then", "else", "dependencies", "dependentRequired", "dependentSchemas"),
        *("unevaluatedProperties", "unevaluatedItems", "$dynamicRef", "$recursiveRef"),
    )
)
# Identifiers make references resolve against addresses that nothing fetches.
_IDENTIFIERS = frozenset(
    ("$schema", "$id", "id", "$anchor", "$dynamicAnchor", "$recursiveAnchor", "$vocabulary")
)
# The grammar library compares bounds as doubles and with integers of 64 bits.
_MAX_INTEGER, _MAX_NUMBER = 2**63 - 1024, 1e18
_COUNTS = frozenset(("minProperties", "maxProperties"))
_LOWER = frozenset(("minimum", "exclusiveMinimum"))
_UPPER = frozenset(("maximum", "exclusiveMaximum"))

# A path is as long as the names above it, so that of many keywords are longer than the schema.
_MAX_LEFT_OUT = 256
_MAX_PATH_CHARS = 512


@dataclass(slots=True)
class PreparedSchema:
    """A schema a grammar can enforce.

    Attributes:
        schema: an object at its root.
        left_out: dotted paths of keywords that are not enforced.
    """

    schema: dict[str, Any]
    left_out: list[str] = field(default_factory=list)


def prepare_schema(
    schema: Any,
    param: str,
    *,
    strict: bool,
    is_call: bool = False,
    owner: str = "",
    limits: LimitsConfig = DEFAULT_LIMITS,
) -> PreparedSchema:
    """The part of a schema that a grammar enforces.

    Args:
        param: path of the schema in the request.
        strict: refuse what cannot be enforced, and close no object that the schema leaves open.
        is_call: the schema is of a function's arguments, which are closed in any case.
        owner: names the schema in errors, e.g. the tool it belongs to.

    Raises:
        ApiError: 400 naming the keyword and its place, when the schema costs too much as it is
            compiled, or when it allows nothing.
    """
    schema = plain_spelling(schema)
    closes = is_call or not strict
    preparer = _Preparer(schema, param, owner, is_strict=strict, closes=closes)
    prepared = preparer.without_closed(merge_objects(preparer.schema(schema, ()), limits))
    check_schema_cost(prepared, param, limits)
    if prepared is False:
        whose = f" of {owner}" if owner else ""
        message = f"The schema{whose} allows no value; remove its 'not'"
        raise invalid(message, param, "invalid_grammar")
    if prepared is True:  # what reads schemas from here on takes objects
        prepared = {}
    if closes:
        prepared = close_objects(prepared)
    return PreparedSchema(prepared, preparer.left_out)


class _Preparer:
    def __init__(self, root: Any, param: str, owner: str, *, is_strict: bool, closes: bool) -> None:
        self.left_out: list[str] = []
        # Places of objects that other schemas add members to, and that have no others.
        self.closed: list[tuple[str, ...]] = []
        self._references = References(root)
        self._param = param
        self._strict = is_strict
        self._is_open = not closes
        self._owner = owner

    def _leave_out(self, path: tuple[str, ...], *, constrains: bool = True) -> None:
        """Name a keyword that is not enforced.

        Raises:
            ApiError: 400 where the schema is strict and the keyword constrains.
        """
        dotted = ".".join((self._param, *path))[:_MAX_PATH_CHARS]
        if self._strict and constrains:
            pointer = "/".join(part.replace("~", "~0").replace("/", "~1") for part in path)
            owner = f" of {self._owner}" if self._owner else ""
            raise invalid(
                f"{path[-1]!r} at #/{pointer[:_MAX_PATH_CHARS]}{owner} cannot be enforced; remove "
                "it or send strict: false",
                dotted,
                "unenforceable_schema",
            )
        if len(self.left_out) < _MAX_LEFT_OUT:
            self.left_out.append(dotted)

    def schema(self, node: Any, path: tuple[str, ...]) -> Any:
        if not isinstance(node, dict):
            if not isinstance(node, bool):
                self._leave_out(path)
            return bool(node) if isinstance(node, bool) else True
        if node.get("not") in ({}, True):
            return False
        node = self._with_names(_with_prefix(_with_closed_members(node)))
        kept = {
            key: item
            for key, value in node.items()
            if (item := self._keyword(node, key, self._read(node, key, path), (*path, key)))
            is not None
            or value is None
        }
        if "patternProperties" in node.keys() - kept.keys():
            kept.pop("additionalProperties", None)  # it says what all other members are
        narrow = format_pattern(kept)
        if narrow is not None:
            kept.setdefault("pattern", narrow)
        prepared = map_parts(kept, lambda part, place: self.schema(part, (*path, *place)))
        if "oneOf" in prepared and "anyOf" not in prepared:
            prepared["anyOf"] = prepared.pop("oneOf")
        return prepared

    def _read(self, node: dict[str, Any], key: str, path: tuple[str, ...]) -> Any:
        """What can be read of a keyword's value; the rest is named."""
        value = node[key]
        found = None if key in _IDENTIFIERS else readable(node, key)
        if found != value and key not in _IDENTIFIERS:
            # An enumeration says of which types its values are.
            is_said = key == "type" and found is None and bool(node.get("enum"))
            self._leave_out((*path, key), constrains=not is_said)
        return found

    def _keyword(self, node: dict[str, Any], key: str, value: Any, path: tuple[str, ...]) -> Any:
        """What a grammar enforces of a keyword; None for nothing."""
        if key in _IDENTIFIERS or value is None:
            return None
        if key == "unevaluatedProperties" and value is False:
            self.closed.append(path)  # until the members are merged
            return value
        if key in UNENFORCEABLE:
            if not _is_trivial(key, value):
                self._leave_out(path)
            return None
        if key == "format" and not (isinstance(value, str) and value in FORMATS):
            self._leave_out(path, constrains=False)
            return None
        if key in _COUNTS and isinstance(value, int):
            return self._count(node, key, value, path)
        enforced = value
        if key == "pattern" and isinstance(value, str):
            enforced = enforceable(value)
        elif key == "patternProperties" and isinstance(value, dict):
            enforced = _enforceable_names(value)
        elif key == "$ref" and isinstance(value, str):
            enforced = self._references.place(value, path[:-1])
        elif key in _LOWER | _UPPER and isinstance(value, int | float):
            enforced = _representable(key, value, is_integer=node.get("type") == "integer")
        else:
            return value
        if enforced is None:
            self._leave_out(path)
        return enforced

    def without_closed(self, merged: Any) -> Any:
        """The merged schema, where objects that could not be merged are named and left open."""
        if not self.closed or not has_open_end(merged):
            return merged
        for path in self.closed:
            self._leave_out(path)
        return without_open_ends(merged)

    def _count(
        self, node: dict[str, Any], key: str, value: int, path: tuple[str, ...]
    ) -> int | None:
        """A bound of an object's members; beside optional ones that it lists a grammar counts none
        but the first."""
        listed, required = node.get("properties"), node.get("required")
        if COMBINATORS & node.keys():
            self._leave_out(path)
            return None
        if not isinstance(listed, dict):
            return value
        given = required if isinstance(required, list) else []
        names = {name for name in given if isinstance(name, str)}
        if listed.keys() <= names:
            return value
        is_open = node.get("additionalProperties", self._is_open) is not False
        is_open |= "patternProperties" in node
        if key == "maxProperties" and value >= len(listed) and not is_open:
            return None
        one_more = len(names) + 1
        is_counted = value == one_more or (key == "minProperties" and value < one_more)
        if is_counted and not is_open:
            return value
        self._leave_out(path)
        return None

    def _with_names(self, node: dict[str, Any]) -> dict[str, Any]:
        """A map whose names are listed, as an object that has these members."""
        names = node.get("propertyNames")
        listed = names.get("enum") if isinstance(names, dict) else None
        is_plain = isinstance(listed, list) and all(isinstance(name, str) for name in listed)
        if listed is None or not is_plain or "patternProperties" in node:
            return node
        own = node.get("properties")
        known = own if isinstance(own, dict) else {}
        value = node.get("additionalProperties", True)
        rest = {key: item for key, item in node.items() if key != "propertyNames"}
        members = {name: known.get(name, value) for name in listed}
        return {**rest, "properties": members, "additionalProperties": False}


def _with_prefix(node: dict[str, Any]) -> dict[str, Any]:
    """A tuple as drafts before 2020-12 write it, in the newer form."""
    if not isinstance(node.get("items"), list) or "prefixItems" in node:
        return node
    rest = {key: item for key, item in node.items() if key not in ("items", "additionalItems")}
    more = node.get("additionalItems", True)
    return {**rest, "prefixItems": node["items"], **({} if more is True else {"items": more})}


def _with_closed_members(node: dict[str, Any]) -> dict[str, Any]:
    """An object without members that it does not list, where no other schema lists some."""
    if node.get("unevaluatedProperties") is not False or COMBINATORS & node.keys():
        return node
    rest = {key: item for key, item in node.items() if key != "unevaluatedProperties"}
    return {"additionalProperties": False, **rest}


def _enforceable_names(patterns: dict[str, Any]) -> dict[str, Any] | None:
    """Members whose names match expressions; None if one has no enforceable form."""
    forms = {name: enforceable(name) for name in patterns}
    return None if None in forms.values() else {str(forms[n]): s for n, s in patterns.items()}


def _representable(key: str, bound: float, *, is_integer: bool) -> float | None:
    """A bound within what a grammar can count; None for one that every such number breaks."""
    most = _MAX_INTEGER if is_integer else _MAX_NUMBER
    if bound > most:
        return most if key in _UPPER else None
    if bound < -most:
        return -most if key in _LOWER else None
    return bound


def _is_trivial(key: str, value: Any) -> bool:
    """Whether an unenforceable keyword constrains nothing."""
    if key == "propertyNames":
        return value is True or value in ({}, {"type": "string"})
    if key.startswith("unevaluated"):
        return value is True
    if key in ("uniqueItems", "minContains"):
        return not value
    return value in ({}, []) and key.startswith("depend")


def object_schema(parameters: dict[str, Any] | None) -> dict[str, Any]:
    """The schema of a call's arguments: an object for parameters of any kind."""
    if not parameters:
        return {"type": "object", "properties": {}}
    takes_none = parameters.get("properties", True) is None
    parameters = plain_spelling(parameters)
    if takes_none and not COMBINATORS & parameters.keys():
        parameters = {**parameters, "properties": {}}
    kind = parameters.get("type")
    if kind == "object":
        return parameters
    if kind is None and not (COMBINATORS | {"enum", "const"}) & parameters.keys():
        return {"properties": {}, **parameters, "type": "object"}
    if kind is None or (isinstance(kind, list) and "object" in kind):
        return {**parameters, "type": "object"}
    return {"type": "object", "properties": {}}
