"""Conversations that are legal JSON and odd: none is refused where nothing is to be enforced."""

from __future__ import annotations

import json

import pytest
from fake_engine import MODEL

REPAIRED = "x-chunkllama-repaired-history"
USER = {"role": "user", "content": "go on"}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}]
RESPONSE_TOOLS = [{"type": "function", "name": "f", "parameters": PARAMETERS}]


def call(**members):
    return {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}, **members}


def calling(*calls, **members):
    return {"role": "assistant", "content": None, "tool_calls": [*calls], **members}


def result(call_id="c1", content="12", **members):
    return {"role": "tool", "tool_call_id": call_id, "content": content, **members}


def assistant(content, **members):
    return {"role": "assistant", "content": content, **members}


# Messages before the last one, and text of them that the prompt must have.
CHAT = {
    "null content": ([assistant(None)], ""),
    "no content": ([{"role": "assistant"}], ""),
    "empty content": ([assistant(""), assistant([])], ""),
    "a user without content in the past": ([{"role": "user"}, assistant("kept")], "kept"),
    "a role in capitals": ([{"role": "Assistant", "content": "kept"}], "kept"),
    "no role": ([{"content": "kept"}, assistant("a")], "kept"),
    "a role of null": ([{"role": None, "content": "kept"}, assistant("a")], "kept"),
    "text alone": (["kept", assistant("a")], "kept"),
    "null": ([None, {}, assistant("kept")], "kept"),
    "parts without types": ([assistant([{"text": "kept"}])], "kept"),
    "a part of null": ([assistant([{"type": "text", "text": None}])], ""),
    "parts that are texts": ([{"role": "user", "content": ["kept"]}, assistant("a")], "kept"),
    "a part in no list": ([assistant({"type": "text", "text": "kept"})], "kept"),
    "parts of unknown types": ([assistant([{"type": "citation", "text": "kept"}])], "kept"),
    "a long type": ([assistant([{"type": "x" * 300, "text": "kept"}])], "kept"),
    "a number as text": ([assistant([{"type": "text", "text": 12345}])], "12345"),
    "text with annotations": (
        [assistant([{"type": "text", "text": {"value": "kept", "annotations": []}}])],
        "kept",
    ),
    "thinking parts": ([assistant([{"type": "thinking", "thinking": "hm"}, "kept"])], "kept"),
    "a thought as a list": ([assistant("kept", reasoning_content=[{"text": "hm"}])], "kept"),
    "foreign members": ([assistant("kept", annotations=[], audio=None, refusal=None)], "kept"),
    "a refusal": ([assistant(None, refusal="kept")], "kept"),
    "an unknown role": ([{"role": "critic", "content": "kept"}, assistant("a")], "kept"),
    "a developer in the middle": (
        [assistant("a"), {"role": "developer", "content": "kept"}],
        "kept",
    ),
    "a result before its call": ([result(content="kept"), calling(call())], "kept"),
    "a result without a call": ([result("nowhere", "kept")], "kept"),
    "a call without a result": ([calling(call())], "f"),
    "a result without an id": ([calling(call()), {"role": "tool", "content": "kept"}], "kept"),
    "a result twice": ([calling(call()), result(), result(content="kept")], "kept"),
    "two calls of one id": ([calling(call(), call()), result(), result(content="kept")], "kept"),
    "results in another order": (
        [calling(call(id="a"), call(id="b")), result("b", "kept"), result("a")],
        "kept",
    ),
    "an empty id": ([calling(call(id="")), result("", "kept")], "kept"),
    "a long id": ([calling(call(id="i" * 700)), result("i" * 700, "kept")], "kept"),
    "a number as id": ([calling(call(id=7)), result(7, "kept")], "kept"),
    "an id of null": ([calling(call(id=None)), result(None, "kept")], "kept"),
    "a long name": ([calling(call(function={"name": "n" * 500, "arguments": "{}"}))], "nnn"),
    "an odd name": ([calling(call(function={"name": "a b/é🤖", "arguments": "{}"}))], "a b"),
    "no name": ([calling(call(function={"arguments": '{"k": "kept"}'}))], "kept"),
    "no function": ([calling({"id": "c1", "type": "function"}), result(content="kept")], "kept"),
    "a call of another type": (
        [calling({"id": "c1", "type": "custom", "custom": {"name": "sh", "input": "kept"}})],
        "kept",
    ),
    "calls that are none": ([calling(None, 5, "x", [], content="kept")], "kept"),
    "calls in no list": ([assistant("kept", tool_calls=call())], "kept"),
    "no calls": ([assistant("kept", tool_calls=[]), assistant("b", tool_calls=None)], "kept"),
    "a cut object": ([calling(call(function={"name": "f", "arguments": '{"k": "kept'}))], "kept"),
    "arguments that are data": (
        [calling(call(function={"name": "f", "arguments": ["kept"]}))],
        "kept",
    ),
    "a function call of before": (
        [
            {"role": "assistant", "function_call": {"name": "f", "arguments": "{"}},
            {"role": "function", "name": "f", "content": "kept"},
        ],
        "kept",
    ),
    "a function call that is none": ([assistant("kept", function_call="f")], "kept"),
    "a result that is data": ([calling(call()), result(content={"k": "kept"})], "kept"),
    "a result that is a list": ([calling(call()), result(content=[1, {"k": "kept"}])], "kept"),
    "a result that is empty": ([calling(call()), result(content=[])], ""),
    "a result that is null": ([calling(call()), result(content=None)], ""),
    "an image in a result": (
        [calling(call()), result(content=[{"type": "image_url", "image_url": {"url": "x"}}])],
        "[image_url]",
    ),
    "names": (
        [assistant("kept", name="n" * 300), {"role": "user", "name": "", "content": "b"}],
        "kept",
    ),
    "control tokens": ([assistant("<|im_end|><|im_start|>system kept")], "kept"),
    "tags of calls": ([assistant("<tool_call></tool_call>[TOOL_CALLS]<|python_tag|>kept")], "kept"),
    "open thoughts": ([assistant("<think>hm")], "hm"),
    "NUL and others": ([assistant("a\0\u0001\u200f\ufeff\U0010ffff kept")], "kept"),
    "many of one role": ([assistant(str(n)) for n in range(50)], "49"),
    "a template in text": (
        [assistant("{{ messages }}{% raw %} kept")],
        "{{ messages }}{% raw %} kept",
    ),
}
PATHS = ("/v1/chat/completions", "/v1/chat/completions/render")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", CHAT)
def test_odd_messages_are_answered(server, text_parts, case, path):
    messages, kept = CHAT[case]
    body = {"model": MODEL, "messages": [USER, *messages, USER], "tools": TOOLS}
    answer = server.post(path, body)
    assert answer.status_code == 200, answer.text
    if path.endswith("render"):
        assert kept in answer.json()["prompt"]
    else:
        prompt = text_parts[0].decode(server.engine.requests[0].prompt_token_ids)
        assert kept in prompt


def item(kind, **members):
    return {"type": kind, **members}


ITEMS = {
    "an unknown item": ([item("mcp_list_tools", server_label="x", tools=[])], ""),
    "an unknown item with odd members": ([item("x", content=5, role=7, name=[], call_id={})], ""),
    "an item of a long type": ([item("x" * 500)], ""),
    "no role": ([{"content": "kept"}, {"role": "assistant", "content": "a"}], "kept"),
    "a role of null": (
        [{"type": "message", "role": None, "content": "kept"}, {"role": "assistant"}],
        "kept",
    ),
    "a message of nothing": ([item("message"), {"role": "assistant", "content": "kept"}], "kept"),
    "items without types": (
        [{"call_id": "c", "name": "f", "arguments": "{}"}, {"call_id": "c", "output": "kept"}],
        "kept",
    ),
    "an empty message": ([{"role": "assistant", "content": []}], ""),
    "a message of null": ([{"role": "assistant", "content": None}], ""),
    "a part without a type": ([{"role": "assistant", "content": [{"text": "kept"}]}], "kept"),
    "a part in no list": ([{"role": "assistant", "content": {"text": "kept"}}], "kept"),
    "an unknown part": (
        [{"role": "assistant", "content": [{"type": "x", "text": "kept"}]}],
        "kept",
    ),
    "a refusal": (
        [{"role": "assistant", "content": [{"type": "refusal", "refusal": "kept"}]}],
        "kept",
    ),
    "an unknown role": (
        [{"role": "critic", "content": "kept"}, {"role": "assistant", "content": "a"}],
        "kept",
    ),
    "reasoning without content": ([item("reasoning", id="rs_1", summary=[])], ""),
    "reasoning with odd content": ([item("reasoning", summary="s", content="hm")], ""),
    "encrypted reasoning": ([item("reasoning", encrypted_content="gAAAA", summary=None)], ""),
    "a call without arguments": ([item("function_call", call_id="c", name="f")], "f"),
    "a call with cut arguments": (
        [item("function_call", call_id="c", name="f", arguments='{"k": "kept')],
        "kept",
    ),
    "a call without an id": ([item("function_call", name="f", arguments='{"k": "kept"}')], "kept"),
    "a call of a long id": (
        [
            item("function_call", call_id="i" * 700, name="f", arguments='{"k": "kept"}'),
            item("function_call_output", call_id="i" * 700, output="x"),
        ],
        "kept",
    ),
    "a call of a long name": (
        [item("function_call", call_id="c", name="n" * 500, arguments="{}")],
        "nn",
    ),
    "an output without a call": (
        [item("function_call_output", call_id="c", output="kept")],
        "kept",
    ),
    "an output without an id": (
        [
            item("function_call", call_id="c", name="f", arguments="{}"),
            item("function_call_output", output="kept"),
        ],
        "kept",
    ),
    "an output before its call": (
        [
            item("function_call_output", call_id="c", output="kept"),
            item("function_call", call_id="c", name="f", arguments="{}"),
        ],
        "kept",
    ),
    "an output of data": (
        [item("function_call_output", call_id="c", output=[1, {"k": "kept"}])],
        "",
    ),
    "an output of null": ([item("function_call_output", call_id="c", output=None)], ""),
    "an output of parts": (
        [
            item(
                "function_call_output", call_id="c", output=[{"type": "input_text", "text": "kept"}]
            )
        ],
        "kept",
    ),
    "a shell call": ([item("local_shell_call", call_id="c", action={"command": ["kept"]})], "kept"),
    "a shell output": ([item("local_shell_call_output", call_id="c", output="kept")], "kept"),
    "a search": ([item("web_search_call", id="ws_1", status="completed", action={})], ""),
    "a computer call": (
        [item("computer_call", call_id="c", action={"type": "click", "x": 1})],
        "click",
    ),
    "a custom call": ([item("custom_tool_call", call_id="c", name="run", input="kept")], "kept"),
    "a custom output": ([item("custom_tool_call_output", call_id="c", output=["kept"])], "kept"),
    "a compaction of others": ([item("compaction", encrypted_content="b3RoZXI=")], ""),
    "numbers as ids": (
        [item("function_call", id=1, call_id=2, name="f", arguments='{"k": "kept"}')],
        "kept",
    ),
    "ids twice": (
        [
            item("message", id="m", role="assistant", content="kept"),
            item("message", id="m", role="assistant", content="b"),
        ],
        "kept",
    ),
    "a status that is none": (
        [item("message", role="assistant", content="kept", status={"x": 1}, phase=5)],
        "kept",
    ),
}


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/responses/input_tokens"])
@pytest.mark.parametrize("case", ITEMS)
def test_odd_items_are_answered(server, text_parts, case, path):
    items, kept = ITEMS[case]
    body = {"model": MODEL, "input": [USER, *items, USER], "tools": RESPONSE_TOOLS}
    answer = server.post(path, body)
    assert answer.status_code == 200, answer.text
    if path == "/v1/responses":
        prompt = text_parts[0].decode(server.engine.requests[0].prompt_token_ids)
        assert kept in prompt
        # The same conversation goes on from the stored response.
        after = {"model": MODEL, "input": "more", "previous_response_id": answer.json()["id"]}
        assert server.post(path, after).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "half @@ kept"}]}),
        ("/v1/chat/completions", {"messages": [USER, calling(call(id="@@")), USER], "user": "@@"}),
        ("/v1/chat/completions/render", {"messages": [{"role": "user", "content": "@@"}]}),
        ("/v1/responses", {"input": "half @@ kept"}),
        ("/v1/responses", {"input": [USER], "instructions": "@@"}),
        ("/v1/responses/compact", {"input": "half @@"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "@@"}], "max_tokens": 4}),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "half @@"}]}),
        ("/api/chat", {"messages": [{"role": "user", "content": "half @@"}], "stream": False}),
        ("/tokenize", {"messages": [{"role": "user", "content": "half @@"}]}),
    ],
)
@pytest.mark.parametrize("half", ["\\ud83d", "\\ude00", "\\ude00\\ud83d"])
def test_half_a_character_becomes_its_replacement(server, text_parts, path, body, half):
    """JavaScript cuts text between the two halves."""
    raw = json.dumps({"model": MODEL, **body}).replace("@@", half).encode()
    with server.http() as http:
        answer = http.post(path, content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 200, answer.text
    assert answer.headers[REPAIRED].startswith("body")
    whole = json.dumps({"model": MODEL, **body}).replace("@@", "\\ud83d\\ude00").encode()
    with server.http() as http:
        answer = http.post(path, content=whole, headers={"content-type": "application/json"})
    assert answer.status_code == 200 and not answer.headers.get(REPAIRED, "").startswith("body")


@pytest.mark.parametrize("path", ["/tokenize", "/v1/completions", "/api/generate"])
def test_half_a_character_of_a_plain_prompt_is_refused(server, path):
    raw = json.dumps({"model": MODEL, "prompt": "half \ud83d"}).encode()
    with server.http() as http:
        answer = http.post(path, content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and "is not valid UTF-8 text" in answer.text


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [{"role": "critic", "content": "x"}]}, "messages[0].role"),
        ({"messages": [USER, assistant("a"), {"role": "user"}]}, "messages[2].content"),
        (
            {"messages": [USER, assistant("a"), {"role": "user", "content": 5}]},
            "messages[2].content",
        ),
        ({"messages": [USER, {"role": "tool", "content": "x"}]}, "messages[1].tool_call_id"),
        ({"messages": [USER, {"content": "x"}]}, "messages[1].role"),
    ],
)
def test_the_turn_to_be_answered_is_checked(server, body, param):
    answer = server.post("/v1/chat/completions", {"model": MODEL, **body})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
