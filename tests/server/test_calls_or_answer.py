"""Grammars of calls in each family's form, and of calls or a typed answer."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from grammar_checks import compiles, matches

from chunkllama.sampling_params import GrammarSpec
from chunkllama_server.api.tools.call_format import CallFormat
from chunkllama_server.api.tools.config import ToolConfig

ARGUMENTS = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
CALL_SCHEMA = {
    "type": "object",
    "properties": {"name": {"const": "weather"}, "arguments": ARGUMENTS},
    "required": ["name", "arguments"],
    "additionalProperties": False,
}
CALL = '{"name": "weather", "arguments": {"city": "Oslo"}}'
TAGGED_CALL = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n"
    "</tool_call>"
)
DEEPSEEK_CALL = (
    '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Oslo"}'
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
KIMI_CALL = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0"
    '<|tool_call_argument_begin|>{"city": "Oslo"}<|tool_call_end|><|tool_calls_section_end|>'
)
PARAMETERS_CALL = CALL.replace("arguments", "parameters")
ANSWER = GrammarSpec(
    kind="json_schema",
    text=json.dumps(
        {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    ),
)


@pytest.mark.parametrize(
    ("tools", "text", "allowed"),
    [
        ("hermes", f"<tool_call>\n{CALL}\n</tool_call>", True),
        ("hermes", f"<tool_call>{CALL}</tool_call>\n<tool_call>\n{CALL}\n</tool_call>", True),
        ("hermes", '{"a": 1}', True),
        ("hermes", "hello", False),
        ("hermes", '<tool_call>{"name": "other", "arguments": {}}</tool_call>', False),
        ("hermes", '<tool_call>{"name": "weather", "arguments": {}}</tool_call>', False),
        ("llama3_json", PARAMETERS_CALL, True),
        ("llama3_json", f"{PARAMETERS_CALL};{PARAMETERS_CALL}", True),
        ("llama3_json", '{"a": 1}', True),
        ("mistral", f"[TOOL_CALLS][{CALL}]", True),
        ("mistral", f"[TOOL_CALLS][{CALL},{CALL}]", True),
        ("mistral", CALL, False),
        ("granite", f"<|tool_call|>[{CALL}]", True),
        ("qwen3_coder", f"<tool_call>{CALL}</tool_call>", False),
        ("qwen3_coder", TAGGED_CALL, True),
        ("qwen3_coder", f"{TAGGED_CALL}\n{TAGGED_CALL}", True),
        ("qwen3_coder", TAGGED_CALL.replace("Oslo", "a < b</parameter>"), False),
        ("pythonic", '[weather(city="Oslo")]', True),
        ("pythonic", '[weather(city="Oslo"), weather(city="Oslo")]', True),
        ("pythonic", "[weather()]", False),
        ("deepseek_v3", DEEPSEEK_CALL, True),
        ("kimi_k2", KIMI_CALL, True),
        ("functionary", '<function=weather>{"city": "Oslo"}</function>', True),
        ("phi4_mini_json", f"<|tool_call|>[{CALL}]<|/tool_call|>", True),
    ],
)
def test_a_typed_answer_or_calls(tools, text, allowed):
    config = ToolConfig(
        functions={"weather": {}}, call_schemas=(CALL_SCHEMA,), format=CallFormat(tools)
    )
    assert matches(config.grammar(ANSWER), text) is allowed
    single = replace(config, max_calls=1)
    if text.count("Oslo") == 2:
        assert not matches(single.grammar(ANSWER), text)
    forced = replace(config, is_forced=True)
    assert matches(forced.grammar(ANSWER), text) is (allowed and text != '{"a": 1}')


def ask(server, **fields):
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    response_format = {"type": "json_schema", "json_schema": {"schema": schema}}
    return server.chat(tools=tools, response_format=response_format, **fields)


@pytest.mark.parametrize(
    ("choice", "kind"), [("auto", "lark"), ("required", "lark"), ("none", "json_schema")]
)
def test_tools_and_a_typed_answer_in_one_request(server, choice, kind):
    assert ask(server, tool_choice=choice).status_code == 200
    grammar = server.engine.requests[0].sampling.grammar
    assert grammar.kind == kind
    assert ('"weather"' in grammar.text) == (choice != "none")
    assert compiles(grammar)
