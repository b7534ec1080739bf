"""Schemas that writers get wrong or the grammar library cannot read: only that part is left out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import llguidance
import pytest

from chunkllama.engine.grammar_text import to_llguidance
from chunkllama.errors import InvalidRequestError
from chunkllama.sampling_params import GrammarSpec
from chunkllama_server.api.common import schema_relaxing
from chunkllama_server.api.common.schema_bounds import bounded
from chunkllama_server.api.common.schema_levels import prepare_schema
from chunkllama_server.api.common.schema_relaxing import REFUSED, SchemaSource, checked_grammar
from chunkllama_server.transport.errors import ApiError, invalid


async def check(spec: GrammarSpec, param: str) -> GrammarSpec:
    try:
        message = llguidance.LLMatcher.validate_grammar(to_llguidance(spec), None)
    except InvalidRequestError as error:
        message = error.message
    if message:
        raise invalid(message, param, REFUSED)
    return spec


is_preparing = False


async def prepare(make: Callable[[], GrammarSpec]) -> GrammarSpec:
    global is_preparing
    is_preparing = True
    try:
        return make()
    finally:
        is_preparing = False


def grammar_of(schema: Any, *, strict: bool = False) -> tuple[Any, list[str]]:
    """The schema that is enforced, and the paths of what is not."""
    prepared = prepare_schema(schema, "s", strict=strict, owner="the function 'f'")
    source = SchemaSource(prepared.schema, "s", "the function 'f'", is_strict=strict)

    async def build(schemas: Any, patterns: bool) -> tuple[GrammarSpec, str]:
        (whole,) = schemas
        whole = whole if strict else bounded(whole, 256, patterns=patterns)
        return GrammarSpec(kind="json_schema", text=json.dumps(whole)), "s"

    grammar, more = asyncio.run(checked_grammar(check, prepare, build, [source], 256))
    assert grammar is not None
    return json.loads(grammar.text), [*prepared.left_out, *more]


def member(field: Any, **members: Any) -> dict[str, Any]:
    properties = {"ok": {"type": "boolean"}, "x": field}
    return {"type": "object", "properties": properties, "required": ["ok", "x"], **members}


def allows(schema: Any, value: Any) -> bool:
    spec = GrammarSpec(kind="json_schema", text=json.dumps(schema))
    byte_tokenizer = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(byte_tokenizer, to_llguidance(spec))
    tokens = [*json.dumps(value).encode()]
    return matcher.validate_tokens(tokens) == len(tokens)


EMAIL, DOTTED = r"^[\w-\.]+@([\w-]+\.)+[\w-]{2,4}$", r"^([a-z]+\.)+[a-z]{2,4}$"


@pytest.mark.parametrize(("pattern", "text"), [(EMAIL, "a.b@c-d.org"), (DOTTED, "a.bc.org")])
def test_patterns_that_cannot_be_joined_with_our_bounds(pattern, text):
    schema, left_out = grammar_of(member({"type": "string", "pattern": pattern}))
    assert not left_out and "maxLength" not in schema["properties"]["x"]
    assert allows(schema, {"ok": True, "x": text})
    assert not allows(schema, {"ok": True, "x": "!"})
    own = member({"type": "string", "pattern": pattern, "maxLength": 1000})
    schema, left_out = grammar_of(own)
    assert left_out == ["s.properties.x.maxLength"]
    assert schema["properties"]["x"] == {"type": "string", "pattern": pattern}
    with pytest.raises(ApiError, match="#/properties/x/maxLength of the function 'f'"):
        grammar_of(own, strict=True)


LOOP = {
    "A": {
        "type": "object",
        "properties": {"p": {"type": "string", "pattern": "("}, "q": {"$ref": "#/$defs/A"}},
    },
    "B": {"type": "array", "items": {"$ref": "#/$defs/A"}},
}
# A member, what is left out of it, and a value that it allows then.
LEFT_OUT = [
    ({"type": "image"}, ["type"], 5),
    ({"type": ["string", "image"]}, ["type"], "a"),
    ({"enum": [], "type": "string"}, ["enum"], "a"),
    ({"type": "integer", "enum": ["1", "2"]}, ["type"], "1"),
    ({"type": "object", "properties": {"a": {}}, "required": {}}, ["required"], {}),
    ({"type": "object", "properties": {"a": "string"}}, ["properties.a"], {"a": 1}),
    ({"type": "object", "properties": {"a": {}}, "required": True}, ["required"], {"a": 1}),
    ({"type": "string", "pattern": "("}, ["pattern"], "("),
    ({"type": "integer", "minimum": 5, "maximum": 3}, ["maximum"], 9),
    ({"type": "integer", "multipleOf": 0}, ["multipleOf"], 7),
    ({"anyOf": []}, ["anyOf"], 7),
    ({"type": "object", "patternProperties": {"^a": {"type": "string"}, "^ab": {"const": 1}}},
     ["patternProperties"], {"ab": 2}),
]  # fmt: skip


@pytest.mark.parametrize(("field", "names", "value"), LEFT_OUT, ids=str)
def test_only_what_cannot_be_read_is_left_out(field, names, value):
    schema, left_out = grammar_of(member(field))
    assert left_out == [f"s.properties.x.{name}" for name in names]
    assert allows(schema, {"ok": True, "x": value})
    assert not allows(schema, {"ok": 1, "x": value}), "the other members stay"
    if names != ["type"] or "enum" not in field:
        with pytest.raises(ApiError) as caught:
            grammar_of(member(field), strict=True)
        assert caught.value.param == f"s.properties.x.{names[0]}"
        pointer = names[0].replace(".", "/")
        assert f"#/properties/x/{pointer} of the function 'f'" in caught.value.message


def test_a_part_of_a_definition():
    schema, left_out = grammar_of(member({"$ref": "#/$defs/A"}, **{"$defs": LOOP}))
    assert left_out == ["s.$defs.A.properties.p.pattern"]
    assert allows(schema, {"ok": True, "x": {"p": "(", "q": {"p": "a"}}})
    assert not allows(schema, {"ok": True, "x": {"p": 5}})


def test_a_schema_of_too_many_parts_is_left_out_as_a_whole():
    fields = {f"x{i}": {"type": "string", "pattern": "("} for i in range(40)}
    schema, left_out = grammar_of({"type": "object", "properties": fields})
    assert left_out == ["s"]
    assert allows(schema, {"a": 1})


# Read as their writers mean them, without a name in the header.
READ = [
    ({"type": "date"}, "2026-01-01", 5),
    ({"type": "uuid"}, "a", 5),
    ({"type": "integer", "minimum": "3"}, 4, 2),
    ({"type": "object", "properties": []}, {}, {"a": 1}),
    ({"type": "string", "nullable": True}, None, 5),
    ({"type": "string", "nullable": False}, "a", None),
    ({"type": "string", "enum": ["a"], "nullable": True}, None, "b"),
    ({"const": "a", "nullable": True}, None, "b"),
    ({"$ref": "#/$defs/A", "nullable": True}, None, "b"),
    ({"allOf": [{"$ref": "#/$defs/A"}], "nullable": True}, None, "b"),
    ({"type": "array", "items": {"type": "integer", "nullable": True}}, [1, None], ["a"]),
]


@pytest.mark.parametrize(("field", "value", "other"), READ, ids=str)
def test_spellings_that_are_read(field, value, other):
    definitions = {"A": {"type": "string", "enum": ["a"]}}
    given = member(field, **{"$defs": definitions, "$recursiveAnchor": True})
    schema, left_out = grammar_of(given)
    assert not left_out
    assert allows(schema, {"ok": True, "x": value})
    assert not allows(schema, {"ok": True, "x": other})


BASE = {"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["b"]}
OWN = {"type": "object", "properties": {"a": {"type": "string"}}}


@pytest.mark.parametrize(
    "given",
    [
        {"allOf": [OWN, {"$ref": "#/$defs/B"}]},
        {"$ref": "#/$defs/B", "properties": OWN["properties"]},
        {**OWN, "allOf": [{"$ref": "#/$defs/B"}]},
        {**OWN, "oneOf": [{"properties": BASE["properties"], "required": ["b"]}]},
    ],
    ids=str,
)
@pytest.mark.parametrize("strict", [True, False])
def test_objects_that_are_closed_after_a_merge(given, strict):
    whole = {**given, "unevaluatedProperties": False, "$defs": {"B": BASE}}
    schema, left_out = grammar_of(whole, strict=strict)
    assert not left_out
    assert allows(schema, {"a": "x", "b": 1}) or allows(schema, {"b": 1, "a": "x"})
    assert not allows(schema, {"b": 1, "c": 1})
    assert not allows(schema, {"a": "x", "c": 1})


def test_objects_that_cannot_be_merged_stay_unenforceable():
    whole = {"allOf": [OWN, {"minProperties": 1}], "unevaluatedProperties": False}
    assert "s.unevaluatedProperties" in grammar_of(whole)[1]
    with pytest.raises(ApiError, match="'unevaluatedProperties' at #/unevaluatedProperties"):
        grammar_of(whole, strict=True)


def test_classes_of_regexes_in_lark_are_those_of_regexes():
    lark = r'start: /\d+[\w]/ "\d" other // /\d/' "\n" r"other: /[^\W]\/x/"
    text = to_llguidance(GrammarSpec(kind="lark", text=lark))
    assert r"""/[0-9]+[0-9A-Za-z_]/ "\d" other""" in text


def test_parts_are_bounded_where_bodies_are_prepared(monkeypatch):
    """A part may be large, and there may be many: the event loop makes no grammar of one."""
    made = []

    def bound(*given: Any, **named: Any) -> Any:
        made.append(is_preparing)
        return bounded(*given, **named)

    monkeypatch.setattr(schema_relaxing, "bounded", bound)
    grammar_of(member({"type": "string", "pattern": "("}))
    assert len(made) > 2 and all(made)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("schema", [{"not": {}}, {"type": "string", "not": True}, False], ids=str)
def test_a_schema_that_allows_nothing_is_refused(schema, strict):
    with pytest.raises(ApiError, match="of the function 'f' allows no value") as caught:
        grammar_of(schema, strict=strict)
    assert (caught.value.status_code, caught.value.code) == (400, REFUSED)
    assert caught.value.param == "s"


def test_a_schema_that_is_true_allows_all():
    assert prepare_schema(True, "s", strict=True).schema == {}
    schema, left_out = grammar_of(True)
    assert not left_out and allows(schema, {"a": [1]})
