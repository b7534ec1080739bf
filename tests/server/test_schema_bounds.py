"""Bounds of schemas: an answer with a grammar ends, and what the schema says itself stays."""

from __future__ import annotations

import json
import re

import llguidance
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkllama_server.api.common.schema_bounds import bounded
from chunkllama_server.api.common.schema_texts import other_names


def at(schema, *path):
    for step in path:
        schema = schema[step]
    return schema


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "string"}, {"maxLength": 2048}),
        ({"type": "string", "maxLength": 5}, {"maxLength": 5}),
        ({"type": "string", "minLength": 5000}, {"maxLength": 5000}),
        ({"type": ["string", "null"]}, {"maxLength": 2048}),
        ({"type": "string", "format": "date-time"}, {"maxLength": 35}),
        ({"type": "string", "format": "date-time", "pattern": "^2"}, {"maxLength": 256}),
        ({"type": "string", "pattern": "^a+$"}, {"maxLength": 2048}),
        ({"type": "integer"}, {"minimum": -(2**53) + 1, "maximum": 2**53 - 1}),
        ({"type": "integer", "minimum": 3}, {"minimum": 3, "maximum": 2**53 - 1}),
        ({"type": "integer", "exclusiveMinimum": 3}, {"maximum": 2**53 - 1}),
        ({"type": "number"}, {"minimum": -(10**15), "maximum": 10**15, "multipleOf": 1e-9}),
        ({"type": "number", "multipleOf": 0.5}, {"multipleOf": 0.5}),
        ({"type": "array", "items": {"type": "null"}}, {"maxItems": 64}),
        ({"type": "array", "maxItems": 3, "items": {"type": "null"}}, {"maxItems": 3}),
        (
            {"type": "object", "additionalProperties": {"type": "null"}},
            {
                "maxProperties": 32,
                "patternProperties": {"^.{1,64}$": {"type": "null"}},
                "additionalProperties": False,
            },
        ),
    ],
)
def test_a_bound_where_there_is_none(schema, expected):
    before = json.dumps(schema)
    result = bounded(schema, 1024)
    assert {key: result[key] for key in expected} == expected
    assert json.dumps(schema) == before, "the schema stays as it is"


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": ["a"], "type": "string"},
        {"const": 1, "type": "integer"},
        {"type": "string", "pattern": "^a{300}$"},
        {"type": "boolean"},
        {"type": "null"},
        {"$ref": "#/$defs/a"},
        {"type": "object", "properties": {}, "additionalProperties": False},
    ],
)
def test_what_ends_by_itself_stays(schema):
    assert bounded(schema, 1024) == schema


def test_bounds_follow_from_the_tokens_and_the_number_of_strings():
    one = {"type": "object", "properties": {"a": {"type": "string"}}}
    assert at(bounded(one, 100), "properties", "a", "maxLength") == 128
    assert at(bounded(one, 130), "properties", "a", "maxLength") == 256
    assert at(bounded(one, 10**9), "properties", "a", "maxLength") == 1 << 15
    four = {"type": "object", "properties": {key: {"type": "string"} for key in "abcd"}}
    assert at(bounded(four, 1024), "properties", "a", "maxLength") == 512
    listed = {"type": "array", "items": {"type": "string"}}
    assert at(bounded(listed, 1024), "items", "maxLength") == 512
    either = {"anyOf": [four, one]}
    assert at(bounded(either, 1024), "anyOf", 1, "properties", "a", "maxLength") == 512


CLOSED = {"additionalProperties": False}


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {},
        {"title": "Anything", "default": None},
        {"type": "array"},
        {"type": "object"},
        {"type": "object", "additionalProperties": True},
        {
            "properties": {"a": {"$ref": "#/properties/x/$defs/b"}},
            "$defs": {"b": {"type": "number"}},
        },
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {}}]},
    ],
    ids=str,
)
def test_bounded_schemas_compile(schema):
    text = json.dumps(bounded({"type": "object", "properties": {"x": schema}, **CLOSED}, 256))
    grammar = llguidance.LLMatcher.grammar_from_json_schema(text)
    assert llguidance.LLMatcher.validate_grammar(grammar) == ""


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "exclusiveMinimum": 10**16},
        {"type": "integer", "exclusiveMaximum": -(10**16)},
        {"type": "number", "exclusiveMinimum": 1e15},
        {"type": "number", "minimum": 5e18},
        {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1e-9},
        {"type": "number", "minimum": 1e-12, "maximum": 1e-10},
        {"type": "number", "exclusiveMinimum": 3, "exclusiveMaximum": 3.0000000005},
        {"type": "string", "pattern": "a" * 64},
        {"type": "string", "pattern": "a" * 300},
        {"type": "string", "pattern": "^[a-z]{31}[0-9]{31}$"},
        {"type": "string", "pattern": "^[a-z]{99}[0-9]{99}$"},
        {"type": "string", "pattern": "^((ab){20}){20}$"},
    ],
    ids=str,
)
@pytest.mark.parametrize("num_tokens", [16, 1024])
def test_bounds_leave_room_beside_those_of_the_schema(schema, num_tokens):
    text = json.dumps(bounded(schema, num_tokens))
    grammar = llguidance.LLMatcher.grammar_from_json_schema(text)
    assert llguidance.LLMatcher.validate_grammar(grammar) == ""


def test_a_bound_beyond_the_default_admits_other_values():
    assert bounded({"type": "integer", "minimum": 10**17}, 64)["maximum"] == 2 * 10**17
    assert bounded({"type": "number", "maximum": -1e16}, 64)["minimum"] == -2e16
    for pattern in (r"^[a-z0-9._%+-]+@[a-z0-9.-]+\.[a-z]{2,}$", "[0-9a-f]{8}(-[0-9a-f]{4}){3}"):
        assert bounded({"type": "string", "pattern": pattern}, 64)["maxLength"] == 256
    huge = {"type": "number", "minimum": -(10**400), "maximum": 0.5}
    assert bounded(huge, 64)["minimum"] == -(10**400), "the compiler refuses it"


NAMES = ["a", "ab", "x-]^y", "abc d", "\\", "é", "[", "a.b"]


@given(st.sampled_from(NAMES) | st.text("ab.x-]^y\\é[ cd", max_size=7))
def test_names_beside_those_listed(text):
    pattern = other_names(NAMES, 8)
    assert bool(re.fullmatch(pattern, text)) == (text != "" and text not in NAMES)


def test_names_of_open_objects_end():
    """Nothing else bounds what a model writes as the name of a further member."""
    schema = {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}
    result = bounded(schema, 256)
    (pattern,) = result["patternProperties"]
    assert result["additionalProperties"] is False
    assert re.fullmatch(pattern, "b") and not re.fullmatch(pattern, "a")
    assert not re.fullmatch(pattern, "b" * 66)
    grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(result))
    assert llguidance.LLMatcher.validate_grammar(grammar) == ""
    for long in ({"a" * 65: {}}, {f"name_{number:03}": {} for number in range(99)}):
        assert "patternProperties" not in bounded({"type": "object", "properties": long}, 256)
    merged = bounded({"allOf": [schema, schema]}, 256)
    assert "patternProperties" not in merged["allOf"][0], "the names of both have to be allowed"


@pytest.mark.parametrize("wrong", ["3", True, None, [3], {}], ids=str)
def test_a_bound_that_is_no_number_stays_for_the_compiler(wrong):
    assert bounded({"type": "string", "minLength": wrong}, 1024)["minLength"] == wrong
    assert bounded({"type": "array", "minItems": wrong}, 1024)["maxItems"] == 64
    assert bounded({"type": "object", "minProperties": wrong}, 1024)["maxProperties"] == 32
    assert bounded({"type": "integer", "minimum": wrong}, 1024)["maximum"] == 2**53 - 1
    assert bounded({"type": "integer", "maximum": wrong}, 1024)["minimum"] == -(2**53) + 1
