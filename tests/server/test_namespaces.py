"""Tools in namespaces, as Codex sends those of MCP servers: the model knows each by both names, and
a call of it has them apart."""

from __future__ import annotations

import json

import pytest
from fake_engine import MODEL
from openai.types import responses as response_types
from openai_checks import check, events

PARAMETERS = {
    "type": "object",
    "properties": {"q": {"type": "string"}},
    "required": ["q"],
    "additionalProperties": False,
}
SEARCH = {"type": "function", "name": "search", "description": "Finds.", "parameters": PARAMETERS}
EXEC = {"type": "custom", "name": "exec", "description": "Runs."}
WEB = {"type": "namespace", "name": "mcp__web", "description": "The web.", "tools": [SEARCH]}
CODE = {"type": "namespace", "name": "functions__", "description": "", "tools": [EXEC]}
NAME, CODE_NAME = "mcp__web__search", "functions__exec"
CALL = json.dumps({"name": NAME, "arguments": {"q": "x"}})
RUN = json.dumps({"name": CODE_NAME, "arguments": {"input": "ls"}})
USER = {"role": "user", "content": "go on"}


def tagged(*calls: str) -> str:
    return "".join(f"<tool_call>{call}</tool_call>" for call in calls)


def ask(server, text, **fields):
    body = {"model": MODEL, "input": f"say({text})yas", "tools": [WEB, CODE], **fields}
    response = server.post("/v1/responses", body)
    assert response.status_code == 200, response.text
    return response


def prompt_of(server, text_parts) -> str:
    return text_parts[0].decode(server.engine.requests[-1].prompt_token_ids)


def test_the_model_knows_both_names(server, text_parts):
    response = ask(server, "hi")
    prompt = prompt_of(server, text_parts)
    assert f'"{NAME}"' in prompt and f'"{CODE_NAME}"' in prompt
    assert "The web." in prompt and "Finds." in prompt
    assert "x-chunkllama-ignored-fields" not in response.headers


def test_a_call_has_its_names_apart(server):
    made = check(response_types.Response, ask(server, tagged(CALL, RUN)).json())
    call, run = made.output
    assert (call.type, call.namespace, call.name) == ("function_call", "mcp__web", "search")
    assert json.loads(call.arguments) == {"q": "x"}
    assert (run.type, run.namespace, run.name) == ("custom_tool_call", "functions__", "exec")
    assert run.input == "ls"
    assert [tool.name for tool in made.tools] == ["mcp__web", "functions__"]


def test_a_streamed_call_has_them_from_its_first_event(server):
    parts = events(ask(server, tagged(CALL), stream=True).text)
    for event in parts:
        check(response_types.ResponseStreamEvent, event)
    added, done = (
        next(event["item"] for event in parts if event["type"] == f"response.output_item.{end}")
        for end in ("added", "done")
    )
    for item in (added, done):
        assert (item["namespace"], item["name"]) == ("mcp__web", "search")


@pytest.mark.parametrize("stored", [False, True])
def test_the_next_turn_names_the_call_as_the_model_did(server, text_parts, stored):
    first = ask(server, tagged(CALL, RUN)).json()
    results = [
        {"type": f"{item['type']}_output", "call_id": item["call_id"], "output": "12"}
        for item in first["output"]
    ]
    asked = {"role": "user", "content": f"say({tagged(CALL, RUN)})yas"}
    items = [*results, USER] if stored else [asked, *first["output"], *results, USER]
    previous = {"previous_response_id": first["id"]} if stored else {}
    response = ask(server, "", input=items, **previous)
    assert "x-chunkllama-repaired-history" not in response.headers
    turn = prompt_of(server, text_parts).split("say(")[1].split(")yas", 1)[1]
    assert NAME in turn and CODE_NAME in turn


@pytest.mark.parametrize("name", ["search", NAME])
def test_a_choice_may_use_either_name(server, name):
    ask(server, "hi", tool_choice={"type": "function", "name": name})
    text = server.engine.requests[-1].sampling.grammar.text
    assert f'"const": "{NAME}"' in text and CODE_NAME not in text
    allowed = {"type": "allowed_tools", "mode": "required",
               "tools": [{"type": "function", "name": name}]}  # fmt: skip
    ask(server, "hi", tool_choice=allowed)
    assert '"const": "mcp__web__search"' in server.engine.requests[-1].sampling.grammar.text


def test_a_tool_of_the_request_comes_before_one_of_a_namespace(server):
    ask(server, "hi", tools=[WEB, SEARCH], tool_choice={"type": "function", "name": "search"})
    assert '"const": "search"' in server.engine.requests[-1].sampling.grammar.text


def test_items_offer_tools_too(server, text_parts):
    """Codex sends some of its tools as the first item."""
    item = {"type": "additional_tools", "role": "developer", "id": "at_1", "tools": [CODE, WEB]}
    items = [item, {"role": "user", "content": f"say({tagged(RUN)})yas"}]
    response = ask(server, "", input=items, tools=[])
    assert f'"{CODE_NAME}"' in prompt_of(server, text_parts)
    (run,) = check(response_types.Response, response.json()).output
    assert (run.namespace, run.name, run.input) == ("functions__", "exec", "ls")
    for header in ("x-chunkllama-repaired-history", "x-chunkllama-ignored-fields"):
        assert header not in response.headers
    with server.http() as http:
        listed = http.get(f"/v1/responses/{response.json()['id']}/input_items").json()["data"]
    assert "additional_tools" in {each["type"] for each in listed}


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ([{**WEB, "tools": [{"type": "function"}]}], "tools[0].tools[0].name"),
        ([{**WEB, "tools": [{**SEARCH, "name": "a b"}]}], "tools[0].tools[0].name"),
        ([{**WEB, "name": "n" * 128}], "tools[0].tools[0].name"),
        ([{**WEB, "name": None}], "tools[0].name"),
        ([{**WEB, "tools": [WEB]}], "tools[0].tools[0].type"),
        ([SEARCH, WEB, {**SEARCH, "name": NAME}], "tools[2].name"),
        ([{"type": "web_search"}, {**WEB, "tools": [SEARCH, SEARCH]}], "tools[1].tools[1].name"),
        ([{**WEB, "tools": [{**SEARCH, "name": f"f{i}"} for i in range(128)],
           "name": f"n{n}"} for n in range(9)], "tools"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_refusals_name_the_tool(server, tools, param):
    body = {"model": MODEL, "input": "hi", "tools": tools}
    error = server.post("/v1/responses", body).json()["error"]
    assert error["param"] == param, error


def test_a_namespace_without_tools_is_named(server):
    response = ask(server, "hi", tools=[SEARCH, {**WEB, "tools": []}])
    assert response.headers["x-chunkllama-ignored-fields"] == "tools[1]"
    assert [tool["type"] for tool in response.json()["tools"]] == ["function"]


def test_tools_of_a_namespace_may_be_in_the_shape_of_chat(server, text_parts):
    nested = {"type": "function", "function": {"name": "search", "parameters": PARAMETERS}}
    ask(server, "hi", tools=[{**WEB, "tools": [nested, {"name": "find", "parameters": {}}]}])
    prompt = prompt_of(server, text_parts)
    assert f'"{NAME}"' in prompt and '"mcp__web__find"' in prompt


def test_members_of_tools_that_servers_run_are_not_read(server):
    hosted = {"type": "mcp", "name": 5, "tools": "x", "parameters": [], "strict": {}}
    response = ask(server, "hi", tools=[SEARCH, hosted, {**WEB, "tools": [SEARCH, hosted]}])
    assert response.headers["x-chunkllama-ignored-fields"] == "tools[1], tools[2].tools[1]"


def test_a_schema_in_a_namespace_is_named_by_its_place(server):
    strict = {**SEARCH, "strict": True, "parameters": {**PARAMETERS, "not": {"required": ["z"]}}}
    body = {"model": MODEL, "input": "hi", "tools": [{**WEB, "tools": [strict]}],
            "tool_choice": "required"}  # fmt: skip
    error = server.post("/v1/responses", body).json()["error"]
    assert error["param"].startswith("tools[0].tools[0].parameters"), error
