"""Structured output: what becomes a grammar, and the bounds that keep grammars cheap."""

from __future__ import annotations

import json
import threading
import time

import pytest
from fake_engine import MODEL

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}},
    "additionalProperties": False,
}


def nested(depth: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def named(schema) -> dict:
    return {
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    }


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        (named(SCHEMA), "json_schema", json.dumps(SCHEMA)),
        ({"response_format": {"type": "json_object"}}, "json_object", ""),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", json.dumps(SCHEMA)),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "json_schema", json.dumps(SCHEMA)),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"structured_outputs": {"choice": ["x", "y"]}}, "choice", '["x", "y"]'),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "lark", 'start: "a"'),
        ({"structured_outputs": {"json_object": True}}, "json_object", ""),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_constraints_reach_the_engine(server, path, fields, kind, text):
    prompt = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
    assert server.post(path, {"model": MODEL, **prompt, **fields}).status_code == 200
    grammar = server.engine.requests[0].sampling.grammar
    assert (grammar.kind, grammar.text) == (kind, text)


def test_text_format_constrains_nothing(server):
    server.chat(response_format={"type": "text"})
    assert server.engine.requests[0].sampling.grammar is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (named({"x": "y" * 200_000}), "response_format.json_schema.schema"),
        (named(nested(70)), "response_format.json_schema.schema"),
        (named({"enum": list(range(10_000))}), "response_format.json_schema.schema"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": "[1]"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": "[" * 100_000}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": True}}, "structured_outputs.json"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a" * 10_000}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "REFUSE"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["x" * 70_000]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"grammar": "x" * 70_000}}, "structured_outputs.grammar"),
    ],
    ids=lambda v: str(v)[:50],
)
def test_bad_grammars_are_refused_quickly(server, fields, param):
    started = time.monotonic()
    response = server.chat(**fields)
    assert time.monotonic() - started < 2.0
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert not server.engine.requests


def test_slow_grammars_are_given_up_and_stop_nobody(start_server):
    server = start_server(grammar_seconds=0.2)
    results = []

    def slow() -> None:
        results.append(server.chat(structured_outputs={"regex": "SLOW"}))

    threads = [threading.Thread(target=slow) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert server.chat("say(ok)yas").json()["choices"][0]["message"]["content"] == "ok"
    for thread in threads:
        thread.join()
    codes = {(r.status_code, r.json()["error"]["code"]) for r in results}
    assert codes == {(400, "grammar_too_complex")}
    assert server.chat(structured_outputs={"regex": "a"}).status_code == 200, "its turn has come"


def test_forced_tools_exclude_structured_outputs(server):
    tools = [{"type": "function", "function": {"name": "f"}}]
    response = server.chat(tools=tools, tool_choice="required", structured_outputs={"regex": "a"})
    assert response.json()["error"]["param"] == "structured_outputs.regex"


@pytest.mark.parametrize(
    ("parameters", "param"),
    [
        ({"enum": list(range(10_000))}, "tools[0].function.parameters"),
        (nested(70), "tools[0].function.parameters"),
    ],
)
def test_a_tool_schema_that_does_not_compile(server, parameters, param):
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    response = server.chat(tools=tools, tool_choice="required")
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("endpoint", ["chat", "tool", "completions"])
def test_a_schema_that_allows_nothing_is_refused(server, endpoint):
    described = {"type": "json_schema", "json_schema": {"name": "f", "schema": {"not": {}}}}
    fields, param = {"response_format": described}, "response_format.json_schema.schema"
    if endpoint == "tool":
        tool = {"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}
        fields, param = {"tools": [tool], "tool_choice": "required"}, "tools[0].function.parameters"
    if endpoint == "completions":
        response = server.post("/v1/completions", {"model": MODEL, "prompt": "x", **fields})
    else:
        response = server.chat(**fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, "invalid_grammar")


@pytest.mark.parametrize("endpoint", ["chat", "tool", "completions"])
@pytest.mark.parametrize("strict", [True, False])
def test_what_does_not_compile_is_refused_if_strict_and_else_left_out(server, endpoint, strict):
    """The fake engine's compiler accepts all that does not say REFUSE."""
    x = {"type": "string", "pattern": "REFUSE"}
    schema = {"type": "object", "properties": {"x": x, "y": {"type": "integer"}}}
    described = {"name": "f", "strict": strict}
    fields = {
        "response_format": {"type": "json_schema", "json_schema": {**described, "schema": schema}}
    }
    param = "response_format.json_schema.schema.properties.x.pattern"
    if endpoint == "tool":
        tool = {"type": "function", "function": {**described, "parameters": schema}}
        fields = {"tools": [tool], "tool_choice": "required"}
        param = "tools[0].function.parameters.properties.x.pattern"
    if endpoint == "completions":
        response = server.post("/v1/completions", {"model": MODEL, "prompt": "x", **fields})
    else:
        response = server.chat(**fields)
    if strict:
        error = response.json()["error"]
        assert (error["param"], error["code"]) == (param, "invalid_grammar")
        assert "#/properties/x/pattern" in error["message"]
        assert ("'f'" in error["message"]) is (endpoint == "tool")
    else:
        assert response.status_code == 200, response.text
        assert response.headers["x-chunkllama-ignored-fields"] == param
        text = server.engine.requests[-1].sampling.grammar.text
        assert "REFUSE" not in text and '"y": {"type": "integer"' in text


def test_bounds_follow_from_the_tokens_of_a_request(start_server):
    """They may be fewer than the model's: what memory holds."""
    texts = []
    for most in (2048, 256):
        server = start_server()
        server.engine.info.max_request_tokens = most
        assert server.chat(**named({"type": "string"})).status_code == 200
        grammar = server.engine.requests[0].sampling.grammar
        texts.append(json.loads(grammar.text)["maxLength"])
    assert texts[0] > texts[1]
    assert texts[1] <= 2 * 256


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("strict", [False, True])
def test_both_endpoints_bound_what_a_schema_leaves_open(server, path, strict):
    prompt = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
    described = {"name": "n", "schema": {"type": "string"}, "strict": strict}
    response_format = {"type": "json_schema", "json_schema": described}
    body = {"model": MODEL, "max_tokens": 100, "response_format": response_format, **prompt}
    assert server.post(path, body).status_code == 200
    schema = json.loads(server.engine.requests[0].sampling.grammar.text)
    assert schema.get("maxLength") == (None if strict else 128)
