"""``allOf`` of objects: what is merged, what is left as it is, and what the copies may cost."""

from __future__ import annotations

import json
from itertools import pairwise

import llguidance
import pytest

from chunkllama.engine.grammar_text import to_llguidance
from chunkllama_server.api.common.schema_levels import prepare_schema
from chunkllama_server.api.common.schema_merge import merge_objects
from chunkllama_server.api.common.structured_outputs import json_schema
from chunkllama_server.config.limits import DEFAULT_LIMITS
from chunkllama_server.transport.errors import ApiError

TEXT = {"type": "string"}
BASE = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
REFERENCE = {"$ref": "#/$defs/Node"}
NEEDS_NAME = {"required": ["name"]}


def prepared(schema) -> dict:
    return prepare_schema(schema, "s", strict=False).schema


def grammar(schema):
    return json_schema(schema, "s", DEFAULT_LIMITS, strict=False, left_out=[])


def tree(child) -> dict:
    node = {"type": "object", "properties": {"name": TEXT, "child": child}}
    return {**REFERENCE, "$defs": {"Node": node}}


@pytest.mark.parametrize(
    "child",
    [
        {"allOf": [REFERENCE]},
        {"allOf": [REFERENCE], "description": "d", "default": None},
        {"allOf": [REFERENCE, {"description": "d"}]},
    ],
    ids=str,
)
def test_all_of_one_reference_is_that_reference(child):
    """As pydantic 1 and OpenAPI 3.0 write a reference with a description."""
    node = prepared(tree(child))["$defs"]["Node"]
    notes = {key: value for key, value in child.items() if key != "allOf"}
    assert node["properties"]["child"] == {**notes, **REFERENCE}
    assert node["additionalProperties"] is False
    assert not llguidance.LLMatcher.validate_grammar(to_llguidance(grammar(tree(child))), None)


def test_a_join_that_leads_to_itself_is_a_definition():
    child = {"allOf": [REFERENCE, NEEDS_NAME]}
    merged = merge_objects(tree(child))
    (name,) = merged["$defs"].keys() - {"Node"}
    reference = {"$ref": f"#/$defs/{name}"}
    assert merged["$defs"]["Node"]["properties"]["child"] == reference
    properties = {"name": TEXT, "child": reference}
    assert merged["$defs"][name] == {"type": "object", "properties": properties, **NEEDS_NAME}


def test_definitions_that_join_each_other_end():
    def one(of):
        return {
            "type": "object",
            "properties": {"a": {"allOf": [{"$ref": f"#/$defs/{of}"}, NEEDS_NAME]}},
        }

    schema = {**one("A"), "$defs": {"A": one("B"), "B": one("A")}}
    assert "allOf" not in json.dumps(merge_objects(schema))
    assert not llguidance.LLMatcher.validate_grammar(to_llguidance(grammar(schema)), None)


def test_siblings_may_join_the_same_definition():
    """One that is joined beside another, or above a member of it, is not joined inside itself."""
    parts = [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}]
    own = {"properties": {"own": {"allOf": [parts[0], {"required": ["own"]}]}}}
    based = {"allOf": [{"$ref": "#/$defs/Base"}, {"properties": {"y": TEXT}}]}
    made = prepared({"allOf": [*parts, own], "$defs": {"A": based, "B": based, "Base": BASE}})
    assert made["properties"].keys() == {"x", "y", "own"}
    assert made["properties"]["own"]["properties"].keys() == {"x", "y", "own"}
    assert sorted(made["properties"]["own"]["required"]) == ["own", "x"]


@pytest.mark.parametrize("path", ["response_format", "tools"])
@pytest.mark.parametrize("child", [{"allOf": [REFERENCE]}, {"allOf": [REFERENCE, NEEDS_NAME]}])
def test_recursive_schemas_of_requests(server, path, child):
    """The fake engine's compiler accepts all that does not say REFUSE."""
    schema = tree(child)
    fields = {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
    if path == "tools":
        function = {"name": "f", "parameters": schema}
        tools = [{"type": "function", "function": function}]
        fields = {"tools": tools, "tool_choice": "required"}
    response = server.chat(**fields)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    "parts",
    [
        [{}],
        [{"description": "d"}],
        [{"$ref": "#/$defs/JSON"}, {"required": ["a"]}],
        [{"properties": {}}],
    ],
    ids=str,
)
def test_what_is_no_object_stays_any_value(parts):
    definitions = {"JSON": {"description": "any JSON"}}
    schema = {"type": "object", "properties": {"v": {"description": "d", "allOf": parts}}}
    made = prepared({**schema, "$defs": definitions})
    assert made["properties"]["v"] == schema["properties"]["v"]


def test_a_reference_to_any_value_stays_any_value():
    value = {"description": "d", "allOf": [{"$ref": "#/$defs/JSON"}]}
    schema = {"properties": {"value": value}, "$defs": {"JSON": {"description": "any JSON"}}}
    made = prepared(schema)
    assert made["properties"]["value"] == {"description": "d", "$ref": "#/$defs/JSON"}
    assert made["$defs"] == schema["$defs"]


def test_a_map_stays_open_until_a_part_lists_members():
    merged = prepared({"allOf": [{"type": "object"}, {"description": "d"}]})
    assert merged == {"type": "object"}
    closed = prepared({"allOf": [{"type": "object"}, {"properties": {"a": TEXT}}]})
    assert closed["additionalProperties"] is False


@pytest.mark.parametrize("key", ["const", "default", "examples", "enum"])
@pytest.mark.parametrize(
    "value", [{"allOf": [BASE, {"properties": {"y": TEXT}}]}, {"items": None}], ids=str
)
def test_values_are_not_read_as_schemas(key, value):
    given = [value] if key in ("enum", "examples") else value
    schema = {"type": "object", "properties": {"a": {key: given}, key: {key: given}}}
    assert merge_objects(schema) == schema


@pytest.mark.parametrize("name", ["const", "default", "examples", "allOf"])
def test_members_may_have_names_of_keywords(name):
    joined = {"allOf": [BASE, {"properties": {"y": TEXT}}]}
    made = prepared({"type": "object", "properties": {name: joined}})
    assert made["properties"][name]["properties"].keys() == {"x", "y"}


def test_definitions_that_join_each_other_often_are_read_so_often():
    """Twenty times twenty, eight levels deep, are more than a server has time for."""
    names = [f"L{level}" for level in range(8)]
    levels = {
        name: {"allOf": [{"$ref": f"#/$defs/{below}"}] * 20}
        for name, below in pairwise([*names, "Base"])
    }
    parts = [{"$ref": "#/$defs/L0"}, NEEDS_NAME]
    schema = {"allOf": parts, "$defs": {**levels, "Base": BASE}}
    assert merge_objects(schema)["allOf"] == parts


def copies(of, *more) -> dict:
    parts = [{"$ref": "#/$defs/B"}, *more]
    branches = [
        {"type": "object", "properties": {f"p{index}": {"allOf": parts}}} for index in range(500)
    ]
    return {"anyOf": branches, "$defs": {"B": {"type": "object", "properties": {"v": of}}}}


MANY = {"anyOf": [{"type": "null"}] * 2000}


def test_references_multiply_nothing():
    schema = copies(MANY)
    assert len(grammar(schema).text) < 1.2 * len(json.dumps(schema))


@pytest.mark.parametrize("of", [MANY, {"enum": ["x" * 10] * 2000}, {"description": "d" * 50_000}])
def test_copies_are_bounded_by_their_text(of):
    schema = copies(of, {"required": ["v"]})
    merged = len(json.dumps(merge_objects(schema)))
    assert merged < len(json.dumps(schema)) + DEFAULT_LIMITS.max_schema_chars + 4096


def test_members_beside_many_alternatives_are_not_copied_to_all():
    members = {f"p{index}": {"description": "d" * 1000} for index in range(50)}
    schema = {"type": "object", "properties": members, "anyOf": [{}] * 2000}
    assert len(json.dumps(merge_objects(schema))) <= len(json.dumps(schema))
    nested: dict = {"type": "object", "properties": {"a": TEXT}}
    for _ in range(20):
        nested = {"type": "object", "properties": {"a": nested}, "anyOf": [NEEDS_NAME] * 2}
    merged = len(json.dumps(merge_objects(nested)))
    assert merged < len(json.dumps(nested)) + 2 * DEFAULT_LIMITS.max_schema_chars


def test_the_cost_of_the_merged_schema_is_checked():
    """2,000 parts are copied to ten places, which have 20,000 together."""
    many = {"anyOf": [{}] * 2000}
    schema = copies(many, {"required": ["v"]})
    with pytest.raises(ApiError, match="has over 10000 parts"):
        grammar(schema)


def test_copies_inside_each_other_have_a_depth():
    """Each of three hundred definitions has a member that joins the next."""
    definitions = {
        f"D{index}": {
            "type": "object",
            "properties": {"p": {"allOf": [{"$ref": f"#/$defs/D{index + 1}"}, BASE]}},
        }
        for index in range(300)
    }
    schema = {"$ref": "#/$defs/D0", "$defs": {**definitions, "D300": BASE}}
    merged, depth = merge_objects(schema)["$defs"]["D0"], 0
    while "properties" in merged:
        merged, depth = merged["properties"]["p"], depth + 1
    assert merged == {"allOf": [{"$ref": f"#/$defs/D{depth}"}, BASE]}
    assert 10 < depth < DEFAULT_LIMITS.max_schema_depth


def test_required_names_are_listed_once():
    names = [f"n{index}" for index in range(2000)]
    merged = merge_objects({"allOf": [{"type": "object", "required": names}, {"required": names}]})
    assert merged == {"type": "object", "required": names}


@pytest.mark.parametrize("required", [[{}], [1], "x"], ids=str)
def test_required_names_that_are_no_texts_stay(required):
    schema = {"allOf": [BASE, {"required": required}]}
    assert merge_objects(schema) == schema


def test_references_without_end_are_refused():
    loop = {"allOf": [{"$ref": "#/$defs/Loop"}]}
    for parts in ([{"$ref": "#/$defs/Loop"}], [BASE, {"$ref": "#/$defs/Loop"}]):
        with pytest.raises(ApiError, match="refers to itself without end"):
            grammar({"allOf": parts, "$defs": {"Loop": loop}})
