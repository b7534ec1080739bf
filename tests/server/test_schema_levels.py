"""Schemas that libraries write by default, in three levels."""

from __future__ import annotations

import json
import re

import pytest
from grammar_checks import compiles, matches
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkllama.engine.grammar_text import to_llguidance
from chunkllama.errors import InvalidRequestError
from chunkllama.sampling_params import GrammarSpec
from chunkllama_server.api.common.schema_bounds import bound_grammar, bounded
from chunkllama_server.api.common.schema_levels import object_schema, prepare_schema
from chunkllama_server.api.common.structured_outputs import json_schema
from chunkllama_server.config.limits import DEFAULT_LIMITS, LimitsConfig
from chunkllama_server.transport.errors import ApiError


def member(field) -> dict:
    return {"type": "object", "properties": {"ok": {"type": "boolean"}, "x": field}}


UNENFORCEABLE = {
    "pydantic set": (
        {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
        "uniqueItems",
    ),
    "names by pattern": ({"type": "object", "propertyNames": {"pattern": "^a"}}, "propertyNames"),
    "not": ({"type": "string", "not": {"const": "a"}}, "not"),
    "look-ahead": ({"type": "string", "pattern": "^(?=a)b"}, "pattern"),
    "contains": ({"type": "array", "contains": {"const": 1}}, "contains"),
    "if": ({"if": {"const": 1}, "then": {"const": 1}}, "if"),
}
ACCEPTED = {
    "zod record": {
        "type": "object",
        "propertyNames": {"type": "string"},
        "additionalProperties": {"type": "string"},
    },
    "zod never": {"not": {}},
    "dict of literals": {
        "type": "object",
        "additionalProperties": {"type": "integer"},
        "propertyNames": {"enum": ["a", "b"]},
    },
    "schema address": {"$schema": "http://json-schema.org/draft-07/schema#", "$id": "x"},
    "one of objects": {"oneOf": [member({"const": 1}), member({"const": 2})]},
    **{
        f"format {name}": {"type": "string", "format": name}
        for name in ("password", "binary", "path", "uuid4", "int64", "regex", "uri-reference")
    },
    "format date": {"type": "string", "format": "date"},
}


@pytest.mark.parametrize("name", UNENFORCEABLE)
def test_what_cannot_be_enforced_is_named_or_refused(name):
    field, keyword = UNENFORCEABLE[name]
    prepared = prepare_schema(member(field), "s", strict=False)
    assert f"s.properties.x.{keyword}" in prepared.left_out
    assert compiles(GrammarSpec(kind="json_schema", text=json.dumps(prepared.schema)))
    with pytest.raises(ApiError, match=f"{keyword}' at #/properties/x/{keyword} of f") as caught:
        prepare_schema(member(field), "s", strict=True, owner="f")
    assert caught.value.param == f"s.properties.x.{keyword}"


@pytest.mark.parametrize("name", ACCEPTED)
@pytest.mark.parametrize("strict", [True, False])
def test_what_libraries_write_by_default_is_accepted(name, strict):
    prepared = prepare_schema(member(ACCEPTED[name]), "s", strict=strict)
    assert compiles(GrammarSpec(kind="json_schema", text=json.dumps(prepared.schema)))


# Of pydantic before 2.14 and of zod, with texts that are allowed and others.
LOOK_AHEADS = {
    "Decimal": (r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$", ["1", "-10.5", "+0.25"], ["", ".", "+", "x"]),
    "Decimal of 6 digits, 2 places": (
        r"^(?!^[-+.]*$)[+-]?0*(?:\d{0,4}|(?=[\d.]{1,7}0*$)\d{0,4}\.\d{0,2}0*$)",
        ["1234.56", "-7", "0.5"],
        ["", "-", "12345.1", "1.234"],
    ),
    "Decimal below 1": (
        r"^(?!^[-+.]*$)[+-]?0*(?:\d{0,0}|(?=[\d.]{1,3}0*$)\d{0,0}\.\d{0,2}0*$)",
        ["0.5", "-0.25"],
        ["", "1.5", "2"],
    ),
    "email": (
        r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@"
        r"([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$",
        ["a.b-c@mail.example.org", "x+y@a.io"],
        [".a@b.org", "a..b@c.org", "a@b", "a@.org"],
    ),
    "hostname": (
        r"^(?=.{1,253}\.?$)[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
        r"(?:\.[a-zA-Z0-9](?:[-0-9a-zA-Z]{0,61}[0-9a-zA-Z])?)*\.?$",
        ["localhost", "www.example-1.org"],
        ["", "-a", "a..b", "a_b"],
    ),
    "duration": (
        r"^P(?:(\d+W)|(?!.*W)(?=\d|T\d)(\d+Y)?(\d+M)?(\d+D)?"
        r"(T(?=\d)(\d+H)?(\d+M)?(\d+([.,]\d+)?S)?)?)$",
        ["P3W", "P1Y2M3DT4H5M", "P3D", "PT1H", "PT5M6S", "PT7S"],
        ["P", "PT", "P1WT1H", "1D"],
    ),
}


@pytest.mark.parametrize("name", LOOK_AHEADS)
@pytest.mark.parametrize("strict", [True, False])
def test_look_aheads_of_libraries_are_enforced(name, strict):
    pattern, allowed, others = LOOK_AHEADS[name]
    field = {"type": "string", "pattern": pattern}
    prepared = prepare_schema(member(field), "s", strict=strict)
    assert prepared.left_out == []
    written = prepared.schema["properties"]["x"]["pattern"]
    for text in allowed:
        assert re.search(pattern, text) and re.search(written, text), text
    assert not any(re.search(written, text) for text in others)
    assert compiles(GrammarSpec(kind="json_schema", text=json.dumps(prepared.schema)))


@pytest.mark.parametrize(
    ("node", "allowed", "others"),
    [
        ({"format": "date-time"}, ["2024-02-29T23:59:59.5+01:00"], ["2024-02-29T23:59:60Z"]),
        (
            {"format": "date"},
            ["2024-02-29", "2000-02-29", "1999-12-31"],
            ["2023-02-29", "1900-02-29", "2024-04-31", "2024-13-01", "0000-01-01"],
        ),
        ({"format": "time"}, ["23:59:59Z"], ["23:59:60Z", "23:59:59"]),
        ({"format": "duration"}, ["P1Y", "PT12H"], ["P99999D"]),
        (
            {"format": "uri", "maxLength": 2083},
            ["https://example.org/a?b=1", "http://127.0.0.1:8000", "http://localhost/"],
            ["mailto:a", "ftp://x.org", "http://", "http://300.1.1.1", "https://a--b.org"],
        ),
    ],
    ids=str,
)
def test_formats_are_what_types_of_languages_accept(node, allowed, others):
    """Python and JavaScript know no leap second; 2083 is the length of pydantic's HttpUrl."""
    prepared = prepare_schema({"type": "string", **node}, "s", strict=False).schema
    assert prepared["format"] == node["format"]
    assert all(re.search(prepared["pattern"], text) for text in allowed)
    assert not any(re.search(prepared["pattern"], text) for text in others)
    own = prepare_schema({"type": "string", **node, "pattern": "^x"}, "s", strict=False).schema
    assert own["pattern"] == "^x"


NUMBER, TEXT = {"type": "number"}, {"type": "string"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {"items": [NUMBER, TEXT]},
            {"prefixItems": [NUMBER, TEXT], "items": False, "minItems": 2},
        ),
        (
            {"prefixItems": [NUMBER, TEXT], "minItems": 1},
            {"prefixItems": [NUMBER, TEXT], "items": False, "minItems": 1},
        ),
        (
            {"prefixItems": [{"$ref": "#"}]},
            {"prefixItems": [{"$ref": "#"}], "items": False},
        ),
        ({"prefixItems": [NUMBER], "maxItems": 3}, {"prefixItems": [NUMBER], "maxItems": 3}),
        ({"prefixItems": [NUMBER], "minItems": 2}, {"prefixItems": [NUMBER], "minItems": 2}),
        ({"prefixItems": [NUMBER], "enum": [[1, 2]]}, {"prefixItems": [NUMBER], "enum": [[1, 2]]}),
        (
            {"items": [NUMBER], "additionalItems": False},
            {"prefixItems": [NUMBER], "items": False},
        ),
        ({"items": [NUMBER], "additionalItems": TEXT}, {"prefixItems": [NUMBER], "items": TEXT}),
        ({"items": TEXT}, {"items": TEXT}),
    ],
    ids=str,
)
def test_tuples(given, expected):
    """As the AI SDK and zod-to-json-schema write them, and zod before it closed them itself."""
    prepared = prepare_schema({"type": "array", **given}, "s", strict=False).schema
    assert prepared == {"type": "array", **expected}


@pytest.mark.parametrize("fixed", [{"const": {"k": 1}}, {"enum": [{"k": 1}, 2]}], ids=str)
def test_values_that_are_listed_are_not_closed(fixed):
    """They have members that no other keyword lists."""
    for schema in (fixed, {**fixed, "type": "object", "properties": {}}):
        prepared = prepare_schema(object_schema(schema), "s", strict=True, is_call=True).schema
        assert matches(GrammarSpec(kind="json_schema", text=json.dumps(prepared)), '{"k":1}')


INTEGER = {"type": "integer"}
BASE = {"type": "object", "properties": {"x": INTEGER}, "required": ["x"]}
OTHER = {"type": "object", "properties": {"y": TEXT}, "required": ["y"]}
DEFINITIONS = {"Base": BASE, "Other": OTHER, "Both": {"allOf": [{"$ref": "#/$defs/Base"}, OTHER]}}


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [{"$ref": "#/$defs/Base"}, OTHER]},
        {"allOf": [{"$ref": "#/$defs/Base"}], **OTHER},
        {"allOf": [{"$ref": "#/$defs/Base"}, {"$ref": "#/$defs/Other"}]},
        {"type": "object", "allOf": [{"$ref": "#/$defs/Both"}]},
        {"$ref": "#/$defs/Base", **OTHER},
        {"allOf": [BASE, {"required": ["x"]}, OTHER], "title": "T"},
    ],
    ids=lambda s: str(s)[:60],
)
def test_objects_joined_by_all_of_are_one_closed_object(schema):
    """As inheritance is written in OpenAPI, and so by servers of MCP that are made from it."""
    whole = {**schema, "$defs": DEFINITIONS}
    prepared = prepare_schema(whole, "s", strict=False).schema
    assert "allOf" not in prepared
    assert prepared["properties"] == {"x": INTEGER, "y": TEXT}
    assert sorted(prepared["required"]) == ["x", "y"]
    assert prepared["additionalProperties"] is False
    nested = prepare_schema(member(schema) | {"$defs": DEFINITIONS}, "s", strict=False).schema
    assert nested["properties"]["x"]["properties"] == {"x": INTEGER, "y": TEXT}
    strict = prepare_schema(whole, "s", strict=True).schema
    for made in (prepared, nested, strict):
        assert compiles(GrammarSpec(kind="json_schema", text=json.dumps(bounded(made, 256))))


OPEN = {"type": "object", "minProperties": 1}


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [{"$ref": "#/$defs/Base"}, OPEN]},
        {"allOf": [{"$ref": "#/$defs/Base"}, {"$ref": "#/$defs/Map"}]},
    ],
    ids=lambda s: str(s)[:60],
)
def test_definitions_that_cannot_be_merged_stay_open(schema):
    """A closed one would forbid the members of the others."""
    others = {"Else": BASE, "Map": {"type": "object", "additionalProperties": True}}
    definitions = {**DEFINITIONS, **others}
    prepared = prepare_schema({**schema, "$defs": definitions}, "s", strict=False).schema
    assert "additionalProperties" not in prepared["$defs"]["Base"]
    assert prepared["$defs"]["Else"]["additionalProperties"] is False


@pytest.mark.parametrize("strict", [True, False])
def test_null_members_of_a_schema_are_absent(strict):
    """Clients in Go and C# write null for a list or an object that they do not have."""
    given = {"type": "object", "properties": None, "required": None, "$defs": None, "anyOf": None}
    prepared = prepare_schema(member(given), "s", strict=strict).schema
    assert prepared["properties"]["x"] == {"type": "object"}
    arguments = prepare_schema(object_schema(given), "s", strict=strict).schema
    assert arguments == {"type": "object", "properties": {}} | ({} if strict else CLOSED)
    joined = {"type": "object", "properties": None, "allOf": [{"$ref": "#/$defs/Base"}]}
    whole = prepare_schema({**joined, "$defs": DEFINITIONS}, "s", strict=strict).schema
    assert "properties" in (whole["$defs"]["Base"] if strict else whole)
    kept = {"const": None, "default": None}
    assert prepare_schema(kept, "s", strict=strict).schema == kept


CLOSED = {"additionalProperties": False}


def test_objects_that_list_their_members_are_closed():
    inner = {"type": "object", "properties": {"b": {"type": "integer"}}}
    schema = {
        "type": "object",
        "properties": {
            "a": inner,
            "map": {"type": "object"},
            "open": {**inner, "additionalProperties": True},
            "all": {"allOf": [inner, {"type": "object", "minProperties": 1}]},
        },
        "$defs": {"d": inner},
    }
    closed = prepare_schema(schema, "s", strict=False).schema
    assert closed["additionalProperties"] is False
    members = closed["properties"]
    assert members["a"]["additionalProperties"] is False
    assert "additionalProperties" not in members["map"]
    assert members["open"]["additionalProperties"] is True
    assert "additionalProperties" not in members["all"]["allOf"][0]
    assert "additionalProperties" not in prepare_schema(schema, "s", strict=True).schema


def test_listed_names_are_members():
    prepared = prepare_schema(ACCEPTED["dict of literals"], "s", strict=True).schema
    assert prepared["properties"] == {"a": {"type": "integer"}, "b": {"type": "integer"}}
    assert prepared["additionalProperties"] is False


@pytest.mark.parametrize(
    ("parameters", "shown"),
    [
        (None, {"type": "object", "properties": {}}),
        ({}, {"type": "object", "properties": {}}),
        ({"type": "string"}, {"type": "object", "properties": {}}),
        ({"type": ["object", "null"]}, {"type": "object"}),
        ({"properties": {"a": {}}}, {"type": "object", "properties": {"a": {}}}),
        ({"$ref": "#/$defs/a"}, {"type": "object", "$ref": "#/$defs/a"}),
        ({"properties": None}, {"type": "object", "properties": {}}),
        ({"$ref": "#/$defs/a", "properties": None}, {"type": "object", "$ref": "#/$defs/a"}),
    ],
)
def test_arguments_are_an_object(parameters, shown):
    assert object_schema(parameters) == shown


def test_names_of_left_out_keywords_are_shorter_than_the_schema():
    leaves = {f"k{i}": {"format": "x", "not": {"const": 1}} for i in range(2000)}
    schema: dict = {"properties": leaves}
    for depth in range(40):
        schema = {"properties": {f"{depth}" * 500: schema}}
    limits = LimitsConfig(max_forced_chars=1 << 20)
    prepared = prepare_schema(schema, "s", strict=False, limits=limits)
    assert len(prepared.left_out) == 256
    assert max(map(len, prepared.left_out)) == 512
    with pytest.raises(ApiError, match="cannot be enforced") as caught:
        prepare_schema(schema, "s", strict=True, limits=limits)
    assert len(caught.value.message) < 1000


def test_left_out_keywords_are_named(server):
    parameters = member({"type": "array", "uniqueItems": True})
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    answer = server.chat(tools=tools, tool_choice="required")
    named = answer.headers["x-chunkllama-ignored-fields"]
    assert named == "tools[0].function.parameters.properties.x.uniqueItems"
    tools[0]["function"]["strict"] = True
    error = server.chat(tools=tools, tool_choice="required").json()["error"]
    assert error["param"] == named
    assert "'f'" in error["message"]


WORDS = st.sampled_from(
    (
        *("type", "properties", "items", "prefixItems", "anyOf", "oneOf", "allOf", "enum", "const"),
        *("required", "additionalProperties", "patternProperties", "propertyNames", "format"),
        *("pattern", "minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum"),
        *("exclusiveMaximum", "multipleOf", "minItems", "maxItems", "minProperties", "not", "$ref"),
        *("maxProperties", "uniqueItems", "$defs", "title", "dependencies", "minContains"),
    )
)
KINDS = ("string", "integer", "number", "array", "object", "boolean", "null")
VALUES = st.recursive(
    st.sampled_from(("date", "#", "^a", *KINDS))
    | st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=8,
)
SCHEMAS = st.builds(
    lambda kind, rest: {"type": kind, **rest},
    st.sampled_from(KINDS) | st.lists(st.sampled_from(KINDS), max_size=2),
    st.dictionaries(WORDS, VALUES, max_size=5),
)


@settings(max_examples=300, deadline=None)
@given(SCHEMAS, st.booleans())
def test_a_malformed_schema_is_a_request_error(schema, strict):
    try:
        spec = json_schema(schema, "s", DEFAULT_LIMITS, strict=strict, left_out=[])
        to_llguidance(bound_grammar(spec, 256))
    except (ApiError, InvalidRequestError):
        pass


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize(
    "field",
    [
        {"type": "string", "format": ["date"]},
        {"type": "number", "maximum": [3]},
        {"type": "object", "minProperties": {}},
        {"type": [{}]},
        {"type": {"string": 1}},
        {"type": 5},
    ],
    ids=str,
)
def test_a_schema_of_wrong_types_is_read_without_them(server, field, forced):
    schema = member(field)
    fields = {
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    }
    if forced:
        function = {"name": "f", "parameters": schema}
        fields = {
            "tools": [{"type": "function", "function": function}],
            "tool_choice": "required",
        }
    response = server.chat(**fields)
    assert response.status_code == 200, response.text
    assert ".properties.x." in response.headers["x-chunkllama-ignored-fields"]
