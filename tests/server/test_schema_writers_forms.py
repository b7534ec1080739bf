"""Schemas as they are found in the wild: references, spellings, bounds and expressions that the
grammar library does not read, and what becomes of each."""

from __future__ import annotations

import json

import llguidance
import pytest

from chunkllama.engine.grammar_text import to_llguidance
from chunkllama.sampling_params import GrammarSpec
from chunkllama_server.api.common.regex_syntax import rust_syntax
from chunkllama_server.api.common.schema_bounds import bounded
from chunkllama_server.api.common.schema_cost import check_schema_cost
from chunkllama_server.api.common.schema_levels import prepare_schema
from chunkllama_server.api.schema.chat import ChatCompletionRequest
from chunkllama_server.api.tools.call_format import CallFormat
from chunkllama_server.api.tools.config import plan_tools
from chunkllama_server.config.limits import DEFAULT_LIMITS, LimitsConfig
from chunkllama_server.transport.errors import ApiError

TEXT, WHOLE = {"type": "string"}, {"type": "integer"}


def fields(required=None, **properties) -> dict:
    listed = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": listed}


def takes(schema, value, *, strict=False) -> bool:
    """Whether the grammar of a schema allows a value."""
    prepared = prepare_schema(schema, "s", strict=strict).schema
    text = json.dumps(prepared if strict else bounded(prepared, 256))
    grammar = to_llguidance(GrammarSpec(kind="json_schema", text=text))
    tokenizer = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = tokenizer.tokenize_str(json.dumps(value, ensure_ascii=False))
    return (
        matcher.validate_tokens(tokens) == len(tokens)
        and matcher.consume_tokens(tokens)
        and matcher.is_accepting()
    )


NODE = {"$ref": "#/$defs/Node"}
TREE = {"name": "a", "child": {"name": "b"}}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "child",
    [
        {**NODE, "nullable": True},
        {**NODE, "x-order": 1, "readOnly": True},
        {**NODE, "type": "object"},
        {**NODE, "required": ["name"]},
        {**NODE, "additionalProperties": False},
        {**NODE, "properties": {"more": TEXT}},
        {"allOf": [NODE], "nullable": True},
        {"allOf": [NODE, {"required": ["name"]}], "description": "d"},
    ],
    ids=str,
)
def test_a_recursive_reference_beside_other_keywords(child, strict):
    schema = {**NODE, "$defs": {"Node": fields(["name"], name=TEXT, child=child)}}
    assert takes(schema, TREE, strict=strict)
    assert not takes(schema, {"child": {"name": "b"}}, strict=strict)


def test_a_recursive_reference_keeps_what_stands_beside_it():
    child = {**NODE, "required": ["child"], "properties": {"more": WHOLE}}
    schema = {**NODE, "$defs": {"Node": fields(["name"], name=TEXT, child=child)}}
    assert not takes(schema, TREE)
    schema["$defs"]["Node"]["properties"]["child"] = {**child, "required": ["more"]}
    assert takes(schema, {"name": "a", "child": {"name": "b", "more": 1}})
    assert not takes(schema, TREE)


def test_the_root_is_joined_with_a_part():
    more = {"allOf": [{"$ref": "#"}, {"required": ["next"]}]}
    schema = fields(["v"], v=WHOLE, next=fields(["v"], v=WHOLE), of=more)
    assert takes(schema, {"v": 1, "of": {"v": 2, "next": {"v": 3}}})
    assert not takes(schema, {"v": 1, "of": {"v": 2}})


ITEM = fields(id=WHOLE)
PLACES = {
    "brackets": {**fields(a={"$ref": "#/$defs/Page[int]"}), "$defs": {"Page[int]": ITEM}},
    "no ASCII": {**fields(a={"$ref": "#/$defs/Größe"}), "$defs": {"Größe": ITEM}},
    "escaped": {**fields(a={"$ref": "#/$defs/a~1b%20c"}), "$defs": {"a/b c": ITEM}},
    "anchor": {**fields(a={"$ref": "#item"}), "$defs": {"I": {"$anchor": "item", **ITEM}}},
    "identifier": {**fields(a={"$ref": "i.json"}), "$defs": {"I": {"$id": "i.json", **ITEM}}},
    "inner": fields(a={**fields(["id"], id={"$ref": "#/$defs/I"}), "$defs": {"I": WHOLE}}),
    "in a list": fields(["a"], b={"anyOf": [ITEM, TEXT]}, a={"$ref": "#/properties/b/anyOf/0"}),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", PLACES)
def test_references_of_all_forms(name, strict):
    assert takes(PLACES[name], {"a": {"id": 1}}, strict=strict)
    assert not takes(PLACES[name], {"a": {"id": "x"}}, strict=strict)


LIST = "#/properties/b/anyOf/"


@pytest.mark.parametrize(
    "reference",
    [
        *("#/$defs/Missing", "http://example.org/s.json", "#nowhere"),
        *(LIST + "2", LIST + "9" * 5_000, LIST + "\N{ARABIC-INDIC DIGIT ONE}", LIST + "-1"),
    ],
    ids=lambda reference: reference[:24],
)
def test_a_reference_that_leads_nowhere_is_named_or_refused(reference):
    schema = fields(["a"], a={"$ref": reference}, b={"anyOf": [ITEM, TEXT]})
    assert prepare_schema(schema, "s", strict=False).left_out == ["s.properties.a.$ref"]
    assert takes(schema, {"a": 1})
    with pytest.raises(ApiError, match="ref' at #/properties/a"):
        prepare_schema(schema, "s", strict=True)


@pytest.mark.parametrize(
    ("field", "allowed", "others"),
    [
        ({"type": "STRING"}, ["a"], [1]),
        ({"type": "dict", "properties": {"a": {"type": "int"}}}, [{"a": 1}], [{"a": "x"}]),
        ({"type": ["str", "None"]}, ["a", None], [1]),
        ({"type": "float"}, [1.5], ["x"]),
        ({"type": "any"}, [1, "a", None], []),
        ({"type": "array", "items": WHOLE, "minItems": 2.0}, [[1, 2]], [[1]]),
        ({"type": "string", "pattern": None, "enum": None, "maxLength": None}, ["a"], [1]),
        ({"type": "integer", "minimum": None, "maximum": 3}, [3], [4]),
        ({"type": "integer", "minimum": 0, "exclusiveMinimum": True}, [1], [0]),
        ({"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}, [-5, 5], [1.5]),
        ({"type": "number", "minimum": -1.8e308, "maximum": 1.8e308}, [1.5], ["x"]),
        ({"type": "object", "unevaluatedProperties": False, "properties": {}}, [{}], [{"a": 1}]),
    ],
    ids=str,
)
@pytest.mark.parametrize("strict", [False, True])
def test_other_spellings(field, allowed, others, strict):
    schema = fields(x=field)
    assert prepare_schema(schema, "s", strict=strict).left_out == []
    assert all(takes(schema, {"x": value}, strict=strict) for value in allowed)
    assert not any(takes(schema, {"x": value}, strict=strict) for value in others)


@pytest.mark.parametrize("bound", [{"minimum": 10**30}, {"exclusiveMaximum": -(10**30)}])
def test_a_bound_that_no_grammar_counts_to(bound):
    field = {"type": "integer", **bound}
    (key,) = bound
    assert prepare_schema(field, "s", strict=False).left_out == [f"s.{key}"]
    with pytest.raises(ApiError, match=f"'{key}' at #/{key} cannot be enforced"):
        prepare_schema(field, "s", strict=True)


def test_members_beside_alternatives_are_part_of_each():
    schema = {
        **fields(["base"], base=TEXT),
        "oneOf": [fields(a=WHOLE), {"$ref": "#/$defs/B"}],
        "$defs": {"B": fields(b=WHOLE)},
    }
    assert takes(schema, {"base": "x", "a": 1}) and takes(schema, {"base": "x", "b": 1})
    for value in ({"base": "x"}, {"a": 1}, {"base": "x", "a": 1, "z": 1}):
        assert not takes(schema, value)
    either = {**fields([], a=TEXT, b=TEXT), "anyOf": [{"required": ["a"]}, {"required": ["b"]}]}
    assert takes(either, {"a": "x"}) and takes(either, {"b": "x"})
    assert not takes(either, {}) and not takes(either, {"c": 1})


def test_a_part_narrows_a_member_of_another():
    """As a derived class does with the type that its base has for several."""
    base = fields(kind=TEXT, of=fields(["a"], a=WHOLE))
    more = fields(kind={"const": "cat"}, of={"type": "object", "properties": {"b": WHOLE}})
    schema = {"allOf": [{"$ref": "#/$defs/Base"}, more], "$defs": {"Base": base}}
    assert takes(schema, {"kind": "cat", "of": {"a": 1, "b": 2}})
    for value in ({"kind": "dog", "of": {"a": 1}}, {"kind": "cat", "of": {"b": 1}}):
        assert not takes(schema, value)
    assert not takes(schema, {"kind": "cat", "of": {"a": 1}, "more": 1})


def test_a_part_without_other_members_keeps_those_that_another_requires():
    closed = {**fields(a=WHOLE), "additionalProperties": False}
    schema = {"allOf": [closed, fields(["b"], b=WHOLE, c=WHOLE)]}
    for strict in (False, True):
        made = prepare_schema(schema, "s", strict=strict).schema
        assert (made["properties"].keys(), made["additionalProperties"]) == ({"a", "b"}, False)


@pytest.mark.parametrize(
    "node",
    [
        fields(next=NODE),
        {"type": "array", "items": NODE, "minItems": 1},
        {"type": "array", "prefixItems": [TEXT, NODE], "minItems": 2},
        fields(next={"anyOf": [NODE, fields(a=NODE)]}),
    ],
    ids=str,
)
def test_a_schema_without_a_finite_text_is_refused(node):
    with pytest.raises(ApiError, match="refers to itself without end"):
        prepare_schema({**fields(a=NODE), "$defs": {"Node": node}}, "s", strict=False)


def test_a_schema_with_a_finite_text_is_read_in_time():
    """Each level is looked at once, though every one has two references to the next."""
    levels = {
        f"L{level}": fields(
            a={"$ref": f"#/$defs/L{level + 1}"}, b={"$ref": f"#/$defs/L{level + 1}"}
        )
        for level in range(60)
    }
    definitions = {**levels, "L60": {"anyOf": [{"$ref": "#/$defs/L0"}, TEXT]}}
    prepare_schema({"$ref": "#/$defs/L0", "$defs": definitions}, "s", strict=True)


def test_a_member_that_is_required_and_not_described_may_be_anything():
    assert takes(fields(["a", "z"], a=TEXT), {"a": "x", "z": [1]})
    assert not takes(fields(["a", "z"], a=TEXT), {"a": "x"})


def test_counts_beside_optional_members_are_enforced_where_the_object_is_closed():
    schema = {**fields([], a=WHOLE, b=WHOLE), "minProperties": 1}
    assert takes(schema, {"b": 1}) and not takes(schema, {})
    with pytest.raises(ApiError, match="minProperties"):
        prepare_schema(schema, "s", strict=True)
    both = {**schema, "additionalProperties": False}
    assert takes(both, {"b": 1}, strict=True) and not takes(both, {}, strict=True)
    assert takes({**both, "maxProperties": 2}, {"a": 1, "b": 1}, strict=True)
    assert prepare_schema({**both, "minProperties": 2}, "s", strict=False).left_out == [
        "s.minProperties"
    ]


def test_arguments_of_a_strict_call_are_closed():
    schema = fields(a=TEXT)
    assert prepare_schema(schema, "s", strict=True).schema == schema
    call = prepare_schema(schema, "s", strict=True, is_call=True).schema
    assert call == {**schema, "additionalProperties": False}


@pytest.mark.parametrize(
    ("pattern", "allowed", "others"),
    [
        (r"^a\Z", ["a"], ["b"]),
        (r"^{a}$", ["{a}"], ["a"]),
        (r"^a{,2}$", ["", "aa"], ["aaa"]),
        (r"^[^[\]]+$", ["ab"], ["[", "]"]),
        (r"^[]a]$", ["]", "a"], ["b"]),
        (r"^[a&&b]$", ["&", "b"], ["c"]),
        (r"^\<b\>$", ["<b>"], ["b"]),
        (r"^a(?#comment)b$", ["ab"], ["a"]),
        (r"^\@\_\-\/$", ["@_-/"], ["@"]),
        (r"^(?P<year>\d{4})$", ["2024"], ["24"]),
        (r"^$|^https?://x$", ["", "http://x"], ["x"]),
    ],
)
def test_expressions_of_other_languages(pattern, allowed, others):
    schema = fields(x={"type": "string", "pattern": pattern})
    assert prepare_schema(schema, "s", strict=True).left_out == []
    assert all(takes(schema, {"x": text}) for text in allowed)
    assert not any(takes(schema, {"x": text}) for text in others)


@pytest.mark.parametrize(
    "pattern",
    [
        *(r"^(?=a)b", r"(?<!a)b", r"^(a)\1$", r"^(?P<n>a)(?P=n)$", r"^(?<n>a)\k<n>$"),
        *(r"^(?>a+)b", r"^(a)?(?(1)b|c)$", r"\bfoo\b", r"foo\B", r"^\Qa\E$", r"^\cA$"),
    ],
)
def test_expressions_that_no_automaton_has_are_named_or_refused(server, pattern):
    assert rust_syntax(pattern) is None
    field = {"type": "string", "pattern": pattern}
    assert prepare_schema(field, "s", strict=False).left_out == ["s.pattern"]
    with pytest.raises(ApiError, match="'pattern' at #/pattern cannot be enforced"):
        prepare_schema(field, "s", strict=True)
    names = {"type": "object", "patternProperties": {pattern: WHOLE}}
    closed = prepare_schema({**names, "additionalProperties": False}, "s", strict=False)
    assert (closed.schema, closed.left_out) == ({"type": "object"}, ["s.patternProperties"])
    refused = server.chat(structured_outputs={"regex": pattern})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "structured_outputs.regex"


def test_many_names_force_no_long_text():
    """A free value stands between two names: only what follows on each other is forced."""
    many = {f"a_property_with_a_name_{index}": TEXT for index in range(500)}
    check_schema_cost(fields(**many), "s", DEFAULT_LIMITS)
    check_schema_cost(fields([], **many), "s", DEFAULT_LIMITS)
    with pytest.raises(ApiError, match="forces over 2048 characters"):
        check_schema_cost(
            fields([], **many, **{f"{n}_more": TEXT for n in many}), "s", DEFAULT_LIMITS
        )
    constants = {name: {"const": "x"} for name in many}
    with pytest.raises(ApiError, match="forces over 2048 characters"):
        check_schema_cost(fields(**constants), "s", DEFAULT_LIMITS)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": fields(a={"const": "x" * 40}), "minItems": 50},
        {"prefixItems": [{"const": "x" * 40}] * 50},
        {"prefixItems": [{"prefixItems": [{"const": "x" * 40}]}, {"type": "null"}] * 50},
        fields(a={"allOf": [{"const": "x" * 2000}]}),
        fields([], a={"const": "x" * 2000}),
        {"anyOf": [{"const": 1}, {"const": "x" * 2000}]},
        {"type": "object", "additionalProperties": {"const": "x" * 2000}},
        {**fields(a=NODE), "$defs": {"Node": {"const": "x" * 2000}}},
    ],
    ids=lambda schema: str(schema)[:60],
)
def test_what_is_forced_in_a_row_is_counted(schema):
    with pytest.raises(ApiError, match="forces over 1000 characters"):
        check_schema_cost(schema, "s", LimitsConfig(max_forced_chars=1000))


@pytest.mark.parametrize("answer", [None, {"type": "object"}])
@pytest.mark.parametrize("family", ["hermes", "pythonic", "qwen3_coder", "mistral"])
def test_untyped_arguments_of_calls(family, answer):
    """Definitions of untyped values belong to the arguments that refer to them."""
    tools = [
        {"type": "function", "function": {"name": name, "parameters": fields(a={}, b=TEXT)}}
        for name in ("f", "g")
    ]
    described = {"type": "json_schema", "json_schema": {"name": "a", "schema": answer}}
    body = ChatCompletionRequest(
        model="m",
        messages=[{"role": "user", "content": "hi"}],
        tools=tools,
        tool_choice="auto" if answer else "required",
        response_format=described if answer else None,
    )
    config = plan_tools(body, CallFormat(family)).bounded(256)
    spec = answer and GrammarSpec(kind="json_schema", text=json.dumps(answer))
    compiled = to_llguidance(config.grammar(spec))
    assert not llguidance.LLMatcher.validate_grammar(compiled, None)
