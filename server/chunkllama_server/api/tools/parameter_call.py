"""Read a call that has a tag for each parameter, as Qwen3-Coder writes it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import regex

from chunkllama_server.api.common.schema_references import follow
from chunkllama_server.api.common.schema_spelling import type_name
from chunkllama_server.api.tools.brackets import SPACE
from chunkllama_server.api.tools.call_forms import CallForm, Functions, NamedCall

_PARAMETER = regex.compile(r'<parameter(?:=|\s+name=)"?(?P<key>[^">]*)"?[^>]*>')
_ENDS = ("</function>", "</invoke>")
# A value ends with its own tag; where that is missing, with the next tag of the call.
VALUE_ENDS = ("</parameter>", "<parameter=", "<parameter ", *_ENDS, "</tool_call>")
# So many characters at a text's end may be the beginning of a tag.
_MAX_HELD = max(map(len, VALUE_ENDS)) - 1


class ParameterCall(CallForm):
    """``<function=name>`` or ``<invoke name="name">``, which has been read, then a tag for each
    parameter, or a JSON object, and the closing tag."""

    def __init__(self, functions: Functions, name: str, raw: str) -> None:
        super().__init__(functions, name, raw)
        self._text = ""
        # The beginning of the current value, in which no tag begins.
        self._value: list[str] = []
        self._key: str | None = None
        self._num_given = 0
        self._named: NamedCall | None = None

    def feed(self, text: str) -> str:
        self._read.append(text)
        self._text += text
        while not self.is_complete and self._step():
            pass
        if not self.is_complete:
            return ""
        raw = self.raw
        self._read = [raw[: len(raw) - len(self._text)]]
        return self._text

    def _step(self) -> bool:
        """Consume some of the text; False when more must come first."""
        if self._key is not None:
            return self._read_value(self._key)
        if self._named is not None:
            self._text = self._named.feed(self._text)
            self._written.append(self._named.take_arguments())
            if self._named.is_complete:
                self._named, self._num_given = None, -1
            return bool(self._text)
        self._text = self._text.lstrip(SPACE)
        if not self._text:
            return False
        if self._text[0] == "{" and self._num_given == 0:
            self._named = NamedCall(self._functions, self.name or "", "")
            self._text = self._text[1:]
            return True
        for tag in _ENDS:
            if self._text.startswith(tag):
                self._text = self._text[len(tag) :]
                return self._end()
        found = _PARAMETER.match(self._text, partial=True)
        if found is not None and not found.partial:
            self._key = found["key"].strip()
            self._text = self._text[found.end() :]
            return True
        if found is not None or any(tag.startswith(self._text) for tag in _ENDS):
            return False
        return self._end()

    def _read_value(self, key: str) -> bool:
        ends = [at for tag in VALUE_ENDS if (at := self._text.find(tag)) >= 0]
        if not ends:
            cut = max(0, len(self._text) - _MAX_HELD)
            self._value.append(self._text[:cut])
            self._text = self._text[cut:]
            return False
        value, rest = self._text[: min(ends)], self._text[min(ends) :]
        value, self._value = "".join([*self._value, value]), []
        self._text = rest.removeprefix("</parameter>")
        properties = self._functions.get(self.name or "", {}).get("properties") or {}
        schema = properties.get(key) if isinstance(properties, Mapping) else None
        allowed = _allowed_types(schema, self._functions.get(self.name or "", {}), set())
        member = f"{json.dumps(key)}: {_value_text(value, allowed)}"
        self._written.append(("{" if self._num_given == 0 else ", ") + member)
        self._num_given += 1
        self._key = None
        return True

    def _end(self) -> bool:
        if self._num_given >= 0:
            self._written.append("}" if self._num_given else "{}")
        self.is_complete = True
        return False

    def finish(self) -> None:
        if not self.is_complete and self._key is None and self._named is None:
            self._end()


_TYPES: dict[str, Callable[[Any], bool]] = {
    "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
    "array": lambda v: isinstance(v, list),
    "object": lambda v: isinstance(v, dict),
}


def _allowed_types(schema: Any, root: Any, seen: set[int]) -> set[str]:
    """The JSON types that a property's schema allows; empty where it says nothing of them.

    Args:
        root: the schema that references are read from.
        seen: identities of schemas that have been read.
    """
    if not isinstance(schema, Mapping) or id(schema) in seen:
        return set()
    seen.add(id(schema))
    if "const" in schema:
        return _types_of([schema["const"]])
    if isinstance(values := schema.get("enum"), list):
        return _types_of(values)
    kind = schema.get("type")
    kinds = kind if isinstance(kind, list) else [kind]
    found = {type_name(kind) for kind in kinds if isinstance(kind, str)}
    if isinstance(reference := schema.get("$ref"), str):
        found |= _allowed_types(follow(root, reference), root, seen)
    for variants in (schema.get("anyOf"), schema.get("oneOf"), schema.get("allOf")):
        for variant in variants if isinstance(variants, list) else ():
            found |= _allowed_types(variant, root, seen)
    return found


def _types_of(values: list[Any]) -> set[str]:
    types = {kind for value in values for kind, is_one in _TYPES.items() if is_one(value)}
    return types | ({"string"} if any(isinstance(value, str) for value in values) else set())


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _value_text(text: str, allowed: set[str]) -> str:
    """A parameter's text as JSON: a value of another type only where the schema allows one."""
    text = text.removeprefix("\n").removesuffix("\n")
    if allowed != {"string"}:
        stripped = text.strip()
        for source in (stripped, {"True": "true", "False": "false", "None": "null"}.get(stripped)):
            try:
                value = json.loads(source or "", parse_constant=_refuse_constant)
            except (ValueError, RecursionError):
                continue
            kinds = allowed - {"string"} or _TYPES.keys()
            if any(_TYPES[kind](value) for kind in kinds if kind in _TYPES):
                return source or ""
    return json.dumps(text, ensure_ascii=False)
