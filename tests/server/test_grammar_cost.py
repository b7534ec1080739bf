"""What a grammar costs is bounded before it is compiled, and computed in linear time."""

from __future__ import annotations

from typing import Any

import pytest

from chunkllama_server.api.common.grammar_cost import regex_size
from chunkllama_server.api.common.lark_cost import lark_size
from chunkllama_server.api.common.structured_outputs import check_schema, from_structured_outputs
from chunkllama_server.api.schema.base import StructuredOutputs
from chunkllama_server.api.schema.chat import FunctionDefinition, InputFormat
from chunkllama_server.api.tools import config as tools_config
from chunkllama_server.config.limits import DEFAULT_LIMITS
from chunkllama_server.transport.errors import ApiError


@pytest.mark.parametrize(
    ("pattern", "forced", "expanded"),
    [
        ("abc", 3, 3),
        ("a{5}", 5, 5),
        ("a{2,7}", 2, 7),
        ("a{ 2 , 7 }", 2, 7),
        ("a{" + "0" * 5000 + "2," + "0" * 5000 + "7}", 2, 7),
        ("a{0,7}", 1, 7),
        ("(ab){3}c?", 7, 7),
        ("((a{10}b?){10}){100}", 11_000, 11_000),
        (r"\d{4}-\d{2}", 1, 7),
        (r"\n{9}", 9, 9),
        (r"\{5}x", 4, 4),
        ("[ab]{50}[a]{9}", 9, 59),
        ("[^]]{50}", 0, 50),
        (r"[\]]{3}", 3, 3),
        (".{0,9999}", 0, 9999),
        ("(?:a|b){1000}(?P<n>c)(?i:d)", 2002, 2002),
    ],
)
def test_regex_size(pattern, forced, expanded) -> None:
    assert regex_size(pattern) == (forced, expanded)


@pytest.mark.parametrize(
    "outputs",
    [
        {"regex": "a{100000}"},
        {"regex": "a{ 100000 }"},
        {"regex": "a{" + "0" * 20 + "100000}"},
        {"grammar": 'start: "a"{' + "0" * 20 + "100000}"},
        {"grammar": 'start: "a"~' + "0" * 20 + "100000"},
        {"regex": "(a{100}){100}"},
        {"regex": "(?:(?:aa{9}){9}b{99}){99}"},
        {"regex": "[a]{99999}"},
        {"regex": r"\x{99999}"},
        {"regex": "(a{100000})?"},
        {"regex": "b|a{100000}"},
        {"regex": "(.{1,9999}){9999}"},
        {"regex": "a{99999999999999999}"},
        {"regex": "a" * 4000},
        {"choice": ["x", "y" * 5000]},
        {"grammar": "start: /a{100000}/"},
        {"grammar": 'start: "a"{100000}'},
        {"grammar": 'start: "a"~100000'},
        {"grammar": 'start: ("a" "b")~5000..100000 x\n?x: "b"'},
        {"grammar": 'start: "' + "a" * 5000 + '"'},
        {"grammar": 'start: /"{3}/ /a{100000}/ // "'},
        {"json": {"const": "a" * 5000}},
        {"json": {"enum": ["a", "b" * 5000]}},
        {"json": {"type": "string", "pattern": "^a{100000}$"}},
        {"json": {"type": "array", "minItems": 100_000, "items": {"const": None}}},
        {"json": {"properties": {"a" * 5000: {}}}},
        {"json": {"$defs": {"x": {"const": "a" * 5000}}, "$ref": "#/$defs/x"}},
        {"json": {"anyOf": [{"type": "null"}, {"items": {"const": "a" * 5000}}]}},
        {
            "json": {
                "type": "array", "minItems": 50,
                "items": {"type": "array", "minItems": 50, "items": {"const": 1}},
            }
        },
    ],
)  # fmt: skip
def test_grammars_that_make_each_token_costly_are_refused(outputs) -> None:
    with pytest.raises(ApiError) as caught:
        from_structured_outputs(StructuredOutputs.model_validate(outputs), [])
    assert (caught.value.status_code, caught.value.code) == (400, "grammar_too_complex")
    assert caught.value.param == f"structured_outputs.{next(iter(outputs))}"


@pytest.mark.parametrize(
    "outputs",
    [
        {"regex": ".{0,100000}"},
        {"regex": r"(\d{1,3}\.){3}\d{1,3}"},
        {"regex": "[a-z]{1,5000}"},
        {"choice": ["yes", "no", "z" * 2000]},
        {"grammar": 'start: (word " ")~1..50\n// a "comment (\nword: /[a-z]{1,20}/'},
        {"json": {"type": "string", "maxLength": 100_000}},
        {"json": {"type": "array", "maxItems": 100_000, "items": {"type": "integer"}}},
        {"json": {"$defs": {"n": {"properties": {"n": {"$ref": "#/$defs/n"}}}},
                  "$ref": "#/$defs/n"}},
        {"json": {"description": "d" * 20_000, "properties": {f"p{i}": {} for i in range(100)}}},
    ],
)  # fmt: skip
def test_ordinary_grammars_are_not(outputs) -> None:
    assert from_structured_outputs(StructuredOutputs.model_validate(outputs), [])[0].text


LARK_SIZES = [
    ("start: " + "A " * 1000 + "\nA: /x{1000}/", 1_000_000, 1_001_000),
    ('start: A\nA: B{120}\nB: "xxxxxxxxxx"{150}', 216_000, 433_800),
    ('start: x x\nx: y y\ny: "abc" z{3}\nz: "d"', 56, 15),
    ('start: "a" "bc"? | "ddd"', 7, 12),
    ('start: ("x" ","){3,}', 24, 18),
    ('start: A{0} "b"\nA: "cccc"', 6, 9),
    ('start[suffix="abcde"]: /[a-z]+/', 7, 8),
    ('start: x x\nx: %lark { start: "abc" "d"{10} }', 70, 37),
    ('start: "a" // "b"{9}\n%ignore /x{50}/', 50, 53),
    ('start: expr\n?expr: expr "+" expr | N\nN: /[0-9]+/', 5, 8),
]


@pytest.mark.parametrize(("grammar", "forced", "expanded"), LARK_SIZES, ids=range(len(LARK_SIZES)))
def test_lark_size(grammar, forced, expanded) -> None:
    assert lark_size(grammar) == (forced, expanded)


@pytest.mark.parametrize(
    "grammar",
    [
        "start: " + "A " * 1000 + "\nA: /x{1000}/",
        'start: A\nA: B{120}\nB: "xxxxxxxxxx"{150}',
        "start: c{40}\nc: " + f'%json {{"const": "{"a" * 100}"}}',
        "start: c{40}\nc: " + '%lark { start: b{10} b: "' + "a" * 8 + '" }',
        "start: k0" + "".join(f"\nk{i}: k{i + 1} k{i + 1}" for i in range(40)) + '\nk40: "a"',
        'start: r::0x0\nr::_ : "aaaa" r::incr(_) %if lt(_, 9999) | ""',
        "start: k0" + "".join(f"\nk{i}: k{i + 1}" for i in range(4000)),
    ],
    ids=["rules", "terminals", "schemas", "grammars", "doubled", "condition", "chain"],
)
def test_S6_uses_of_names_are_multiplied(grammar) -> None:
    """Also as the format of a custom tool."""
    for check in (
        lambda: from_structured_outputs(StructuredOutputs(grammar=grammar), []),
        lambda: _custom_tool(grammar),
    ):
        with pytest.raises(ApiError) as caught:
            check()
        assert (caught.value.status_code, caught.value.code) == (400, "grammar_too_complex")


def _custom_tool(grammar: str) -> None:
    given = FunctionDefinition(name="f").with_input(InputFormat("lark", grammar))
    tools_config._input_grammar({"tools[0]": given}, DEFAULT_LIMITS)


def test_a_grammar_of_many_rules_is_not_refused() -> None:
    levels = "\n".join(f'e{i}: e{i + 1} ("{i}op" e{i + 1})*' for i in range(12))
    words = "\n".join(f'w{i}: "a_keyword_{i}" e0' for i in range(200))
    choice = " | ".join(f"w{i}" for i in range(200))
    text = f'start: {choice}\n{words}\n{levels}\ne12: /[0-9]{{1,9}}/ | "(" e0 ")"'
    assert from_structured_outputs(StructuredOutputs(grammar=text), [])[0].kind == "lark"


@pytest.mark.parametrize("text", ["[" * 5000, "(" * 5000, "{9}" * 2000, "\\", "[^", '"', "a~"])
def test_sizes_of_malformed_grammars_are_computed(text) -> None:
    assert regex_size(text)[0] >= 0
    assert lark_size(text)[0] >= 0


def test_shared_references_are_computed_once() -> None:
    schema: dict[str, Any] = {"$defs": {"s0": {"type": "null"}}, "$ref": "#/$defs/s60"}
    for level in range(1, 61):
        branch = {"$ref": f"#/$defs/s{level - 1}"}
        schema["$defs"][f"s{level}"] = {"anyOf": [branch, dict(branch)]}
    assert check_schema(schema, "x")
