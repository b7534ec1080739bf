"""Custom tools of the Responses API, and the tools that Codex sends."""

from __future__ import annotations

import pytest
from fake_engine import MODEL
from openai.types.responses import Response
from pydantic import TypeAdapter
from response_helpers import PATH, events_of

CUSTOM = [{"type": "custom", "name": "run", "description": "Run a command."}]
CUSTOM_CALL = '{"name": "run", "arguments": {"input": "ls \\"a\\""}}'


@pytest.mark.parametrize("stream", [False, True])
def test_custom_tools(server, stream):
    body = {
        "model": MODEL, "tools": CUSTOM, "stream": stream,
        "input": f"say(<tool_call>{CUSTOM_CALL}</tool_call>)yas",
    }  # fmt: skip
    answer = server.post(PATH, body)
    assert "x-chunkllama-ignored-fields" not in answer.headers
    response = answer.json() if not stream else events_of(answer.text)[-1]["response"]
    TypeAdapter(Response).validate_python(response)
    (item,) = response["output"]
    assert (item["type"], item["name"], item["input"]) == ("custom_tool_call", "run", 'ls "a"')
    if stream:
        types = [event["type"] for event in events_of(answer.text)]
        assert types[2:6] == [
            "response.output_item.added",
            "response.custom_tool_call_input.delta",
            "response.custom_tool_call_input.done",
            "response.output_item.done",
        ]
    output = {"type": "custom_tool_call_output", "call_id": item["call_id"], "output": "a"}
    followed = {"input": [output], "tools": CUSTOM, "previous_response_id": response["id"]}
    assert server.post(PATH, followed).status_code == 200
    prompt = server.engine.tokenizer.decode(server.engine.requests[-1].prompt_token_ids)
    assert "ls" in prompt


def custom(syntax: str, definition: str) -> dict:
    return {**CUSTOM[0], "format": {"type": "grammar", "syntax": syntax, "definition": definition}}


FUNCTION = {"type": "function", "name": "add", "parameters": {"type": "object"}}
RUN = {"type": "custom", "name": "run"}


def test_a_grammar_of_the_only_custom_tool_is_that_of_the_answer(server):
    """The whole answer is the input, also where it looks like a call or has quotes."""
    text = 'a "b"\n\\ é<tool_call>'
    tool = custom("lark", "start: /(.|\n)+/")
    for choice in (RUN, "required"):
        body = {"input": f"say({text})yas", "tools": [tool], "tool_choice": choice}
        response = server.post(PATH, body)
        assert response.status_code == 200, response.text
        assert "x-chunkllama-ignored-fields" not in response.headers
        request = server.engine.requests[-1]
        assert request.sampling.grammar.text == "start: /(.|\n)+/"
        assert "start: /" in server.engine.tokenizer.decode(request.prompt_token_ids)
        (item,) = response.json()["output"]
        assert (item["type"], item["name"], item["input"]) == ("custom_tool_call", "run", text)
        events = events_of(server.post(PATH, {**body, "stream": True}).text)
        (streamed,) = events[-1]["response"]["output"]
        assert streamed["input"] == text
        cut = server.post(PATH, {**body, "max_output_tokens": 16}).json()
        assert text.startswith(cut["output"][0]["input"])


def test_a_regular_expression_of_a_custom_tool_is_part_of_its_schema(server):
    body = {"input": "x", "tools": [custom("regex", "a|b"), FUNCTION], "tool_choice": "required"}
    response = server.post(PATH, body)
    assert "x-chunkllama-ignored-fields" not in response.headers
    assert '"pattern": "^(?:a|b)$"' in server.engine.requests[-1].sampling.grammar.text


@pytest.mark.parametrize(
    ("tools", "choice"),
    [
        ([custom("lark", "start: /x/"), FUNCTION], "required"),
        ([custom("lark", "start: /x/")], "auto"),
        ([custom("regex", "x")], "auto"),
    ],
    ids=["several", "lark and auto", "regex and auto"],
)
def test_a_format_that_is_only_shown_is_named(server, tools, choice):
    response = server.post(PATH, {"input": "x", "tools": tools, "tool_choice": choice})
    assert response.headers["x-chunkllama-ignored-fields"] == "tools[0].format"


ODD = [[], {}, 5, None, "other", ["grammar"]]


@pytest.mark.parametrize("odd", ODD, ids=str)
@pytest.mark.parametrize("member", ["type", "syntax", "definition"])
def test_a_format_that_no_client_reads_is_not_repeated(server, member, odd):
    tool = custom("lark", "start: /x/")
    tool["format"][member] = odd
    response = server.post(PATH, {"input": "x", "tools": [tool]})
    assert response.status_code == 200, response.text
    (echoed,) = response.json()["tools"]
    is_text = member == "definition" and isinstance(odd, str)
    assert ("format" in echoed) is is_text


def test_a_grammar_of_a_custom_tool_is_checked(server):
    for definition, code in (("start: REFUSE", "invalid_grammar"), ("x" * 70_000, None)):
        body = {"input": "x", "tools": [custom("lark", definition)], "tool_choice": RUN}
        error = server.post(PATH, body).json()["error"]
        assert error["param"] in ("tools", "tools[0].format")
        assert code is None or error["code"] == code


def test_what_codex_sends(server):
    shell = {"type": "object", "properties": {"command": {"type": "string"}}}
    tools = [
        {"type": "function", "name": "shell", "parameters": shell, "strict": False},
        {"type": "custom", "name": "apply_patch", "description": "d",
         "format": {"type": "grammar", "syntax": "lark", "definition": "start: /x/"}},
        {"type": "namespace", "name": "multi_agent_v1", "tools": []},
        {"type": "web_search"},
        {"type": "local_shell"},
    ]  # fmt: skip
    body = {
        "model": MODEL, "instructions": "You are a coding agent.", "tools": tools,
        "tool_choice": "auto", "parallel_tool_calls": False, "store": False, "stream": True,
        "reasoning": {"effort": "medium", "summary": "auto"}, "prompt_cache_key": "k",
        "include": ["reasoning.encrypted_content"], "text": {"verbosity": "low"},
        "input": [{"type": "message", "role": "user",
                   "content": [{"type": "input_text", "text": "say(hi)yas"}]}],
    }  # fmt: skip
    response = server.post(PATH, body)
    assert response.status_code == 200, response.text
    assert events_of(response.text)[-1]["type"] == "response.completed"
    named = response.headers["x-chunkllama-ignored-fields"].split(", ")
    assert {"tools[2]", "tools[3]", "tools[4]"} <= set(named)
