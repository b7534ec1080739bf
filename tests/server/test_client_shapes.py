"""Shapes that clients send and no specification has: what is read of them, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fake_engine import MODEL

from chunkllama_server.api.chat.history import normalise, readable_arguments
from chunkllama_server.api.schema.anthropic import ContentBlock
from chunkllama_server.api.schema.chat import ChatCompletionRequest
from chunkllama_server.api.schema.responses import ResponseRequest
from chunkllama_server.transport.errors import ApiError

HELLO = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "ho"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLS = {"role": "assistant", "tool_calls": [CALL]}


def history(*messages: Any) -> list[dict[str, Any]]:
    body = ChatCompletionRequest.model_validate({"messages": [*messages]})
    return normalise(body.messages).messages


MEDIA = [
    {"type": "audio_url", "audio_url": {"url": "x"}},
    {"type": "image_embeds", "image_embeds": "x"},
    {"type": "video", "video": "x"},
    {"type": "image_file", "image_file": {"file_id": "x"}},
    {"type": "document", "source": {"type": "base64", "data": "x"}},
    {"type": "media", "mime_type": "image/png", "data": "x"},
    {"type": "attachment", "file_id": "x"},
    {"type": "resource", "resource": {"uri": "x", "blob": "x", "mimeType": "image/png"}},
    {"image_url": {"url": "x"}},
]
TEXTS = [
    ({"type": "resource", "resource": {"uri": "x", "text": "found"}}, "found"),
    ({"type": "json", "json": {"a": 1}}, '{"a": 1}'),
    ({"type": "json", "value": [1]}, "[1]"),
    ({"type": "text", "text": "found", "file": None}, "found"),
]


@pytest.mark.parametrize("part", MEDIA, ids=str)
def test_media_are_refused_in_the_turn_to_be_answered_alone(part):
    media = {"role": "user", "content": [{"type": "text", "text": "what is it?"}, part]}
    with pytest.raises(ApiError, match="not supported") as caught:
        history(media)
    assert caught.value.param == "messages[0].content[1]"
    assert history(media, ANSWER, HELLO)[0]["content"].startswith("what is it?")


@pytest.mark.parametrize(("part", "text"), TEXTS, ids=str)
def test_parts_that_hold_text(part, text):
    assert history({"role": "user", "content": [part]})[0]["content"] == text
    result = {"role": "tool", "tool_call_id": "c1", "content": [part]}
    assert history(HELLO, CALLS, result)[-1]["content"] == text


@pytest.mark.parametrize(
    ("content", "text"),
    [(5, "5"), (True, "true"), ({"a": 1}, '{"a": 1}'), ([1, 2], "[1, 2]"), (None, "")],
    ids=str,
)
@pytest.mark.parametrize("role", ["user", "system"])
def test_past_content_that_is_no_text(role, content, text):
    given = {"role": role, "content": content}
    assert history(given, HELLO, ANSWER, HELLO)[0]["content"] == text


@pytest.mark.parametrize(
    "call",
    [
        {"id": "c1", "type": "function", "name": "f", "arguments": '{"a": 1}'},
        {"id": "c1", "name": "f", "arguments": {"a": 1}},
        {"id": "c1", "toolName": "f", "args": {"a": 1}},
        {"id": "c1", "type": "tool_use", "name": "f", "input": {"a": 1}},
    ],
    ids=str,
)
def test_flat_calls_of_the_past(call):
    result = {"role": "tool", "tool_call_id": "c1", "content": "x"}
    made = history(HELLO, {"role": "assistant", "tool_calls": [call]}, result)[1]
    assert made["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
@pytest.mark.parametrize(
    ("asks", "answers"), [("human", "ai"), ("User", "model"), ("human", "gpt")]
)
def test_roles_by_other_names(server, path, asks, answers):
    def render(asks, answers):
        turn = [{"role": asks, "content": "a"}, {"role": answers, "content": "b"}]
        turns = [*turn, {"role": asks, "content": "c"}]
        name = "messages" if "chat" in path else "input"
        return server.post(path, {"model": MODEL, name: turns, "max_tokens": 16})

    given, plain = render(asks, answers), render("user", "assistant")
    assert given.status_code == plain.status_code == 200, given.text
    tokens = {"prompt_tokens", "input_tokens"}
    counts = [{n: body.json()["usage"].get(n) for n in tokens} for body in (given, plain)]
    assert counts[0] == counts[1]


def test_a_tool_may_return_nothing(server):
    body = {"model": MODEL, "messages": [HELLO, CALLS, {"role": "tool", "tool_call_id": "c1"}]}
    assert server.post("/v1/chat/completions", body).status_code == 200


def test_no_arguments_as_php_writes_them():
    assert readable_arguments("[]") == ({}, True) == readable_arguments([])


def test_empty_lists_in_place_of_objects(server):
    tool = {"type": "function", "function": {"name": "f", "parameters": []}}
    other = {"name": "g", "parameters": {"type": "object", "properties": [], "required": []}}
    fields = {
        "tools": [tool, {"type": "function", "function": other}],
        "tool_choice": "required",
        "metadata": [],
        "stream_options": [],
        "chat_template_kwargs": [],
    }
    response = server.chat(**fields)
    assert response.status_code == 200, response.text
    assert "x-chunkllama-ignored-fields" not in response.headers


@pytest.mark.parametrize(
    ("content", "read"),
    [
        ({"type": "text", "text": "x"}, [{"type": "text", "text": "x"}]),
        ({"found": [1]}, '{"found": [1]}'),
        ([{"found": 1}], '[{"found": 1}]'),
        (["a", "b"], [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
        (5, "5"),
        ("x", "x"),
    ],
    ids=str,
)
def test_results_of_anthropics_tools(content, read):
    given = {"type": "tool_result", "tool_use_id": "c1", "content": content}
    block = ContentBlock.model_validate(given)
    assert block.model_dump(exclude_unset=True)["content"] == read


def items(*given: Any) -> list[Any]:
    read = ResponseRequest.model_validate({"input": [*given]}).input
    assert isinstance(read, list)
    return read


def test_parts_among_items(server):
    (text,) = items({"type": "input_text", "text": "x"})
    assert (text.role, text.content[0].text) == ("user", "x")
    body = {"model": MODEL, "input": [{"type": "input_text", "text": "say(x)yas"}]}
    assert server.post("/v1/responses", body).json()["output"][0]["content"][0]["text"] == "x"
    body["input"].append({"type": "input_image", "image_url": "x"})
    error = server.post("/v1/responses", body).json()["error"]
    assert "input_image" in error["message"]


def test_items_by_their_ids(server):
    made = server.post("/v1/responses", {"model": MODEL, "input": "say(x)yas"}).json()
    with server.http() as http:
        asked = http.get(f"/v1/responses/{made['id']}/input_items").json()["data"][0]
    for reference in (asked["id"], made["output"][0]["id"]):
        for kind in ({}, {"type": "item_reference"}):
            body = {"model": MODEL, "input": [{"id": reference, **kind}, {**HELLO}]}
            response = server.post("/v1/responses", body)
            assert response.status_code == 200, response.text
            # A stored reference does not stand for the item that it leads to.
            assert server.post("/v1/responses", body).status_code == 200
    empty = {"model": MODEL, "input": [], "previous_response_id": made["id"]}
    assert server.post("/v1/responses", empty).status_code == 200
    error = server.post("/v1/responses", {"model": MODEL, "input": []}).json()["error"]
    assert error["param"] == "input"


ECHOED = [
    {"text": {"format": {"type": "json_schema", "schema": {"type": "object"}}}},
    {"tools": [{"type": "function", "name": "f"}], "tool_choice": "auto"},
    {"tools": [{"type": "custom", "name": "f", "format": {"type": "other"}}]},
    {"tools": [{"type": "custom", "name": "f", "format": {"type": "grammar", "syntax": "ebnf"}}]},
    {
        "tools": [{"type": "function", "name": "f", "parameters": {}}],
        "tool_choice": {"type": "allowed_tools", "tools": [{"type": "function", "name": "f"}]},
    },
    {"reasoning": {"effort": "low", "enabled": True}, "service_tier": "flex"},
    {"prompt_cache_retention": "in-memory", "service_tier": "fast"},
]


@pytest.mark.parametrize("fields", ECHOED, ids=str)
def test_what_is_echoed_fits_the_types_of_openai(server, fields):
    from openai.types.responses import Response

    response = server.post("/v1/responses", {"model": MODEL, "input": "hi", **fields})
    assert response.status_code == 200, response.text
    Response.model_validate(response.json(), strict=False)


def test_a_typed_answer_by_any_name_stands_beside_calls(server):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    format_ = {"type": "json_schema", "json_schema": {"schema": schema}}
    texts = []
    for fields in (
        {"response_format": format_},
        {"guided_json": schema},
        {"format": schema},
        {"json_schema": schema},
        {"structured_outputs": {"json": json.dumps(schema)}},
    ):
        for choice in ("auto", "required"):
            response = server.chat(tools=tools, tool_choice=choice, **fields)
            assert response.status_code == 200, response.text
            texts.append(server.engine.requests[-1].sampling.grammar.text)
    assert len(set(texts)) == 2, "one grammar for each choice"
    assert "calls | answer" in texts[0]
    error = server.chat(tools=tools, tool_choice="required", guided_regex="a").json()["error"]
    assert error["param"] == "guided_regex"
