"""Prepare a JSON schema for a grammar: enforce what a grammar can, name what it cannot.

A keyword is enforced, an annotation (it constrains nothing, or names a format no grammar knows), or
unenforceable. An unenforceable keyword is a 400 that names its place if the schema is strict;
otherwise it is left out and named. Objects that list their properties are closed unless the schema
says otherwise: a model invents members where it may.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from chunkllama_server.api.common.grammar_cost import check_schema_cost
from chunkllama_server.api.common.schema_keywords import (
    SCHEMA_LISTS,
    SCHEMA_MAPS,
    SCHEMA_MEMBERS,
    without_null,
)
from chunkllama_server.api.common.schema_merge import merge_objects
from chunkllama_server.api.common.schema_texts import enforceable, format_pattern
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
_IDENTIFIERS = frozenset(("$schema", "$id", "id", "$anchor"))
_COMBINATORS = frozenset(("anyOf", "oneOf", "allOf", "$ref"))

# A path is as long as the names above it, so that of many keywords are longer than the schema.
_MAX_LEFT_OUT = 256
_MAX_PATH_CHARS = 512


@dataclass(slots=True)
class PreparedSchema:
    """A schema a grammar can enforce.

    Attributes:
        left_out: dotted paths of keywords that are not enforced.
    """

    schema: Any
    left_out: list[str] = field(default_factory=list)


def prepare_schema(
    schema: Any,
    param: str,
    *,
    strict: bool,
    owner: str = "",
    limits: LimitsConfig = DEFAULT_LIMITS,
) -> PreparedSchema:
    """The part of a schema that a grammar enforces.

    Args:
        param: path of the schema in the request.
        strict: refuse what cannot be enforced, and close no object that the schema leaves open.
        owner: names the schema in errors, e.g. the tool it belongs to.

    Raises:
        ApiError: 400 naming the keyword and its place, or when the schema costs too much as it is
            compiled.
    """
    preparer = _Preparer(param, strict, owner)
    if not strict:
        schema = merge_objects(schema, limits)
    check_schema_cost(schema, param, limits)
    preparer.find_merged(schema)
    prepared = preparer.schema(schema, (), closes=not strict)
    return PreparedSchema(prepared, preparer.left_out)


class _Preparer:
    def __init__(self, param: str, strict: bool, owner: str) -> None:
        self.left_out: list[str] = []
        self._param = param
        self._strict = strict
        self._owner = owner
        # Definitions that hold together with others: closed, they would forbid their members.
        self._merged: set[str] = set()

    def _leave_out(self, path: tuple[str, ...], *, constrains: bool = True) -> None:
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

    def find_merged(self, node: Any, *, is_branch: bool = False) -> None:
        """Find the definitions that hold together with other parts of the schema."""
        if isinstance(node, list):
            for item in node:
                self.find_merged(item, is_branch=is_branch)
        elif isinstance(node, dict):
            name = node.get("$ref")
            if isinstance(name, str) and (is_branch or "properties" in node):
                self._merged.add(name.rpartition("/")[2])
            for key, value in node.items():
                others = node.keys() & {"properties", "$ref"}
                merges = isinstance(value, list) and (len(value) > 1 or bool(others))
                self.find_merged(value, is_branch=key == "allOf" and merges)

    def schema(self, node: Any, path: tuple[str, ...], *, closes: bool) -> Any:
        if not isinstance(node, dict):
            return node
        if node.get("not") in ({}, True):
            return False
        prepared: dict[str, Any] = {}
        for key, value in self._with_names(_with_prefix(without_null(node))).items():
            here = (*path, key)
            if key in _IDENTIFIERS and isinstance(value, str):
                continue
            if key in UNENFORCEABLE:
                if not _is_trivial(key, value):
                    self._leave_out(here)
            elif key == "format" and not (isinstance(value, str) and value in FORMATS):
                self._leave_out(here, constrains=False)
            elif key == "pattern" and isinstance(value, str) and enforceable(value) is None:
                self._leave_out(here)
            else:
                prepared[key] = self._member(key, value, here, closes)
        narrow = format_pattern(prepared)
        if narrow is not None:
            prepared.setdefault("pattern", narrow)
        if "oneOf" in prepared and "anyOf" not in prepared:
            prepared["anyOf"] = prepared.pop("oneOf")
        if closes and _lists_its_members(prepared):
            prepared["additionalProperties"] = False
        return prepared

    def _member(self, key: str, value: Any, path: tuple[str, ...], closes: bool) -> Any:
        # A closed branch of allOf would forbid the members of the others.
        closes = closes and key != "allOf"
        if key in SCHEMA_MAPS and isinstance(value, dict):
            open_names = self._merged if key in ("$defs", "definitions") else ()
            return {
                name: self.schema(item, (*path, name), closes=closes and name not in open_names)
                for name, item in value.items()
            }
        if key in SCHEMA_LISTS and isinstance(value, list):
            return [
                self.schema(item, (*path, str(index)), closes=closes)
                for index, item in enumerate(value)
            ]
        if key in SCHEMA_MEMBERS:
            return self.schema(value, path, closes=closes)
        if key == "pattern" and isinstance(value, str):
            return enforceable(value)
        return value

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


def _is_trivial(key: str, value: Any) -> bool:
    """Whether an unenforceable keyword constrains nothing."""
    if key == "propertyNames":
        return value is True or value in ({}, {"type": "string"})
    if key in ("uniqueItems", "minContains"):
        return not value
    return value in ({}, []) and key.startswith("depend")


def _lists_its_members(node: dict[str, Any]) -> bool:
    return (
        isinstance(node.get("properties"), dict)
        and "additionalProperties" not in node
        and "patternProperties" not in node
        and not _COMBINATORS & node.keys()
    )


def object_schema(parameters: dict[str, Any] | None) -> dict[str, Any]:
    """The schema of a call's arguments: always an object, whatever the parameters say."""
    if not parameters:
        return {"type": "object", "properties": {}}
    takes_none = parameters.get("properties", True) is None
    parameters = without_null(parameters)
    if takes_none and not _COMBINATORS & parameters.keys():
        parameters = {**parameters, "properties": {}}
    kind = parameters.get("type")
    if kind == "object":
        return parameters
    if kind is None and not _COMBINATORS & parameters.keys():
        return {"properties": {}, **parameters, "type": "object"}
    if kind is None or (isinstance(kind, list) and "object" in kind):
        return {**parameters, "type": "object"}
    return {"type": "object", "properties": {}}
