"""Shapes of values that clients of other servers send: formats, limits, tools, choices."""

from __future__ import annotations

import json

import pytest
from dialect_helpers import BODIES, FUNCTION, JSON, PATHS, REGEX, SCHEMA, read, run
from fake_engine import MODEL

FORMATS = [
    {"type": "json_object", "schema": SCHEMA},
    {"type": "json_object", "value": SCHEMA},
    {"type": "json", "value": SCHEMA},
    {"type": "json", "schema": SCHEMA},
    {"type": "json_schema", "value": {"name": "a", "schema": SCHEMA}},
    {"type": "json_schema", "schema": SCHEMA},
    {"type": "json_schema", "name": "a", "schema": SCHEMA},
    {"type": "json_schema", "json_schema": SCHEMA},
    {"type": "json_object", "response_schema": SCHEMA},
    {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
    {"type": "json_schema", "json_schema": {"name": "a", "schema": json.dumps(SCHEMA)}},
    SCHEMA,
]


@pytest.mark.parametrize("given", FORMATS, ids=str)
def test_a_schema_is_found_wherever_clients_put_it(server, given):
    expected = run(server, "chat", JSON)
    assert run(server, "chat", {"response_format": given}) == expected
    text = run(server, "completions", JSON)
    assert run(server, "completions", {"response_format": given}) == text
    for fields in ({"text": {"format": given}}, {"response_format": given}):
        assert run(server, "responses", fields)[1].grammar == expected[1].grammar


@pytest.mark.parametrize("name", ["value", "regex", "pattern"])
def test_a_regex_as_response_format(server, name):
    given = {"type": "regex", name: "[0-9]{3}"}
    expected = run(server, "chat", REGEX)[1].grammar
    assert run(server, "chat", {"response_format": given})[1].grammar == expected
    assert run(server, "responses", {"text": {"format": given}})[1].grammar == expected


@pytest.mark.parametrize("count", [9, 64])
@pytest.mark.parametrize("endpoint", ["chat", "completions", "responses"])
def test_as_many_stop_strings_as_clients_send(server, endpoint, count):
    stops = [f"<{i}>" for i in range(count)]
    assert len(run(server, endpoint, {"stop": stops})[1].stop) == count


HOSTED = [{"type": "web_search"}, {"type": "mcp", "server_label": "x"}]


@pytest.mark.parametrize("endpoint", ["chat", "responses"])
@pytest.mark.parametrize("nests", [True, False])
@pytest.mark.parametrize(
    "named", [{"type": "function", "name": "f"}, {"type": "function", "function": {"name": "f"}}]
)
def test_shapes_of_allowed_tools(server, endpoint, nests, named):
    others = {"name": "g", "parameters": SCHEMA}
    tools = [{"type": "function", "function": one} for one in (FUNCTION, others)]
    allowed = {"mode": "required", "tools": [HOSTED[0], named]}
    choice = {"type": "allowed_tools", **({"allowed_tools": allowed} if nests else allowed)}
    body = {"model": MODEL, **BODIES[endpoint], "tools": tools, "tool_choice": choice}
    response = server.post(PATHS[endpoint], body)
    assert response.status_code == 200, response.text
    place = "tool_choice.allowed_tools.tools[0]" if nests else "tool_choice.tools[0]"
    assert response.headers["x-chunkllama-ignored-fields"] == place
    text = server.engine.requests[-1].sampling.grammar.text
    assert '"const": "f"' in text and '"const": "g"' not in text


@pytest.mark.parametrize("endpoint", ["chat", "responses"])
def test_allowed_tools_that_are_all_hosted(server, endpoint):
    tools = [{"type": "function", "function": FUNCTION}]
    body = {"model": MODEL, **BODIES[endpoint], "tools": tools}
    choice = {"type": "allowed_tools", "mode": "auto", "tools": HOSTED}
    assert server.post(PATHS[endpoint], {**body, "tool_choice": choice}).status_code == 200
    error = server.post(PATHS[endpoint], {**body, "tool_choice": {**choice, "mode": "required"}})
    assert error.json()["error"]["param"] == "tool_choice.tools"


@pytest.mark.parametrize(
    "fields",
    [{"enable_thinking": False}, {"thinking": {"type": "disabled"}}, {"think": False},
     {"reasoning": {"enabled": False}}],
    ids=str,
)  # fmt: skip
def test_thinking_switches_of_responses(fields):
    switched = {"enable_thinking": False, "thinking": False}
    assert read("responses", fields).body == {"chat_template_kwargs": switched}


def test_thinking_budgets_of_responses():
    given = {"reasoning": {"effort": "low", "max_tokens": 100}, "top_k": 7}
    means = {"reasoning": {"effort": "low"}, "thinking_token_budget": 100, "top_k": 7}
    assert read("responses", given).body == means


@pytest.mark.parametrize("endpoint", ["chat", "completions", "responses"])
@pytest.mark.parametrize("empty", [{}, [], "", None], ids=str)
def test_empty_objects_are_absent(server, endpoint, empty):
    names = ["metadata", "logit_bias"] if empty == [] else []
    fields = dict.fromkeys((*names, "vllm_xargs", "kv_transfer_params"), empty)
    if endpoint != "chat":
        fields.pop("metadata", None)
    body = {"model": MODEL, **BODIES[endpoint], **fields}
    assert server.post(PATHS[endpoint], body).status_code == 200


def test_inputs_of_embeddings_are_cut(server):
    assert len(run(server, "embeddings", {"truncate_prompt_tokens": 1})[0]) == 1
    assert run(server, "embeddings", {"truncate_prompt_tokens": -1}) == run(
        server, "embeddings", {}
    )


@pytest.mark.parametrize(
    ("endpoint", "name"),
    [("chat", "max_tokens"), ("chat", "max_completion_tokens"), ("responses", "max_output_tokens"),
     ("completions", "max_tokens"), ("completions", "n_predict"),
     ("chat", "thinking_token_budget"), ("responses", "thinking_token_budget")],
)  # fmt: skip
@pytest.mark.parametrize("value", [-1, -2])
def test_no_limit(server, endpoint, name, value):
    sampling = run(server, endpoint, {name: value})[1]
    # Without the field a text completion has 16 tokens.
    assert sampling.max_tokens is None or sampling.max_tokens > 16


@pytest.mark.parametrize("endpoint", ["chat", "responses"])
@pytest.mark.parametrize(
    "tool",
    [
        {"type": "function", "function": {"name": "f", "parameters": SCHEMA}},
        {"type": "function", "name": "f", "parameters": SCHEMA},
        {"function": {"name": "f", "parameters": SCHEMA}},
        {"name": "f", "input_schema": SCHEMA},
        {"type": "custom", "name": "f", "input_schema": SCHEMA},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "choice",
    [
        {"type": "function", "function": {"name": "f"}},
        {"type": "function", "name": "f"},
        {"type": "tool", "name": "f"},
        {"function": {"name": "f"}},
    ],
    ids=str,
)
def test_shapes_of_tools(server, endpoint, tool, choice):
    canonical = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
    named = {"type": "function", "function": {"name": "f"}}
    expected = run(server, "chat", {"tools": [canonical], "tool_choice": named})
    fields = {"tools": [tool], "tool_choice": choice}
    assert run(server, endpoint, fields)[:2] == expected[:2]


@pytest.mark.parametrize("endpoint", ["chat", "responses"])
def test_a_word_in_capitals_is_no_tool_choice(server, endpoint):
    tool = {"type": "function", "name": "f", "parameters": SCHEMA}
    body = {"model": MODEL, **BODIES[endpoint], "tools": [tool], "tool_choice": "AUTO"}
    error = server.post(PATHS[endpoint], body).json()["error"]
    assert error["param"] == "tool_choice"
    assert "auto, none or required" in error["message"]


@pytest.mark.parametrize("endpoint", ["chat", "responses"])
@pytest.mark.parametrize("choice", ["any", {"type": "any"}, "required"], ids=str)
def test_any_tool_is_a_required_call(server, endpoint, choice):
    tool = {"type": "function", "name": "f", "parameters": SCHEMA}
    sampling = run(server, endpoint, {"tools": [tool], "tool_choice": choice})[1]
    assert '"const": "f"' in sampling.grammar.text


def test_bias_as_pairs(server):
    assert run(server, "chat", {"logit_bias": [[5, 1], [6, False]]})[1].logit_bias == {
        5: 1.0,
        6: -100.0,
    }


@pytest.mark.parametrize("role", ["assistant", "Assistant"])
def test_a_prefix_message_is_continued(server, text_parts, role):
    messages = [
        {"role": "user", "content": "x"},
        {"role": role, "content": "It is", "prefix": True},
    ]
    assert server.post(PATHS["chat"], {"messages": messages}).status_code == 200
    prompt = text_parts[0].decode(server.engine.requests[-1].prompt_token_ids)
    assert prompt.endswith("assistant\nIt is")
