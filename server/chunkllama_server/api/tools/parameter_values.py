"""The JSON of one parameter's text: what its schema allows decides whether it is a string."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from chunkllama_server.api.common.schema_references import follow
from chunkllama_server.api.common.schema_spelling import type_name
from chunkllama_server.api.tools.brackets import ObjectReader

_TYPES: dict[str, Callable[[Any], bool]] = {
    "integer": lambda v: type(v) is int or (isinstance(v, float) and v.is_integer()),
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
    "array": lambda v: isinstance(v, list),
    "object": lambda v: isinstance(v, dict),
}


def allowed_types(schema: Any, root: Any, seen: set[int], texts: set[str]) -> set[str]:
    """The JSON types that a property's schema allows; empty where it says nothing of them.

    Args:
        root: the schema that references are read from.
        seen: identities of schemas that have been read.
        texts: takes the texts that the schema lists.
    """
    if not isinstance(schema, Mapping) or id(schema) in seen:
        return set()
    seen.add(id(schema))
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list):
        texts.update(value for value in values if isinstance(value, str))
        return _types_of(values)
    kind = schema.get("type")
    kinds = kind if isinstance(kind, list) else [kind]
    found = {type_name(kind) for kind in kinds if isinstance(kind, str)}
    if schema.get("nullable") is True and found:
        found.add("null")
    if isinstance(reference := schema.get("$ref"), str):
        found |= allowed_types(follow(root, reference), root, seen, texts)
    for variants in (schema.get("anyOf"), schema.get("oneOf"), schema.get("allOf")):
        for variant in variants if isinstance(variants, list) else ():
            found |= allowed_types(variant, root, seen, texts)
    return found


def _types_of(values: list[Any]) -> set[str]:
    types = {kind for value in values for kind, is_one in _TYPES.items() if is_one(value)}
    return types | ({"string"} if any(isinstance(value, str) for value in values) else set())


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def value_text(text: str, allowed: set[str], texts: set[str]) -> str:
    """A parameter's text as JSON: a value of another type only where the schema allows one, and
    does not list the text itself."""
    if allowed != {"string"} and text not in texts:
        kinds = allowed - {"string"} or _TYPES.keys()
        for source in _readings(text.strip(), allowed):
            try:
                value = json.loads(source, parse_constant=_refuse_constant)
            except (ValueError, RecursionError):
                continue
            if any(_TYPES[kind](value) for kind in kinds if kind in _TYPES):
                return source
    return json.dumps(text, ensure_ascii=False)


_CONSTANTS = {"True": "true", "False": "false", "None": "null"}
_WORDS = {"true": "true", "false": "false", "null": "null", "none": "null"}


def _readings(text: str, allowed: set[str]) -> Iterator[str]:
    """The text as it is, then as JSON: of what is only nearly JSON, where it cannot be a string."""
    yield text
    yield _CONSTANTS.get(text, "")
    if not allowed or "string" in allowed:
        return
    yield _WORDS.get(text.lower(), "")
    if text[:1] in ("[", "{"):
        yield _bracketed(text)


def _bracketed(text: str) -> str:
    """A list or an object that is nearly JSON, as JSON; empty where more text is behind it."""
    reader = ObjectReader()
    written = []
    for char in text:
        if reader.is_complete:
            return ""
        written.append(reader.feed(char))
    return "".join(written) + ("" if reader.is_complete else reader.end())
