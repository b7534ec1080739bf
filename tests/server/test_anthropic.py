"""Anthropic's Messages API by its own client: messages, streams, tools, thoughts, token counts."""

from __future__ import annotations

import json

import pytest
from anthropic.types import Message, ModelInfo
from anthropic_helpers import (
    PATH,
    WEATHER,
    accumulated,
    body_of,
    events_of,
    prompt_of,
    say,
    sdk,
    without_ids,
)
from fake_engine import MODEL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'
MARK = {"cache_control": {"type": "ephemeral"}}


def test_a_message(server, text_parts) -> None:
    message = sdk(server).messages.create(
        model=MODEL, max_tokens=64, system="be brief", messages=say("hi there")
    )
    assert [block.text for block in message.content] == ["hi there"]
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert message.usage.input_tokens == len(server.engine.requests[-1].prompt_token_ids)
    assert message.usage.output_tokens == len("hi there") + 1
    assert (message.usage.cache_creation_input_tokens, message.usage.cache_read_input_tokens) == (
        0, 0,
    )  # fmt: skip
    assert message._request_id.startswith("req_")
    assert prompt_of(server, text_parts).startswith("<|im_start|>system\nbe brief<|im_end|>")


def test_a_stream_by_the_client(server) -> None:
    with sdk(server).messages.stream(model=MODEL, max_tokens=64, messages=say("hi there")) as got:
        assert "".join(got.text_stream) == "hi there"
        final = got.get_final_message()
    assert final.stop_reason == "end_turn"
    assert final.usage.output_tokens == len("hi there") + 1


@pytest.mark.parametrize("system", ["be brief", [{"type": "text", "text": "be brief"}]])
def test_system_as_text_or_blocks(server, text_parts, system) -> None:
    assert server.post(PATH, body_of(say("a"), system=system)).status_code == 200
    assert "system\nbe brief<|im_end|>" in prompt_of(server, text_parts)


def test_tool_loop(server, text_parts) -> None:
    client = sdk(server)
    messages = say(f"Let me look. {CALL}")
    first = client.messages.create(model=MODEL, max_tokens=200, messages=messages, tools=[WEATHER])
    text, call = first.content
    assert (text.text.strip(), call.name, call.input) == (
        "Let me look.", "weather", {"city": "Paris"},
    )  # fmt: skip
    assert first.stop_reason == "tool_use"
    messages += [
        {"role": "assistant", "content": first.content},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": call.id, "content": "rain"},
                {"type": "text", "text": "say(wet)yas"},
            ],
        },
    ]
    second = client.messages.create(model=MODEL, max_tokens=200, messages=messages, tools=[WEATHER])
    assert [block.text for block in second.content] == ["wet"]
    prompt = prompt_of(server, text_parts)
    assert 'weather{"city": "Paris"}<|im_end|>\n<|im_start|>tool\nrain<|im_end|>' in prompt


def test_tool_arguments_stream(server) -> None:
    with sdk(server).messages.stream(
        model=MODEL, max_tokens=200, messages=say(CALL), tools=[WEATHER]
    ) as got:
        parts = [event.partial_json for event in got if event.type == "input_json"]
        final = got.get_final_message()
    assert json.loads("".join(parts)) == {"city": "Paris"}
    assert [block.input for block in final.content] == [{"city": "Paris"}]
    assert final.stop_reason == "tool_use"


@pytest.mark.parametrize(
    ("choice", "forced", "most"),
    [
        ({"type": "auto"}, False, None),
        ({"type": "any"}, True, 16),
        ({"type": "any", "disable_parallel_tool_use": True}, True, 1),
        ({"type": "tool", "name": "weather"}, True, 1),
        ({"type": "none"}, False, None),
    ],
)
def test_tool_choice(server, text_parts, choice, forced, most) -> None:
    body = body_of(say("x"), tools=[WEATHER, {**WEATHER, "name": "other"}], tool_choice=choice)
    assert server.post(PATH, body).status_code == 200
    grammar = server.engine.requests[-1].sampling.grammar
    assert (grammar is not None) == forced
    if grammar is not None:
        schema = json.loads(grammar.text.partition("object: %json ")[2].splitlines()[0])
        names = {v["properties"]["name"]["const"] for v in schema["anyOf"]}
        assert ("{0,15}" in grammar.text) == (most > 1)
        assert names == ({"weather"} if choice["type"] == "tool" else {"weather", "other"})
    assert "weather" in prompt_of(server, text_parts)


def test_tools_of_anthropics_servers_are_left_out(server) -> None:
    tools = [{"type": "web_search_20250305", "name": "web_search", "max_uses": 5}, WEATHER]
    response = server.post(PATH, body_of(say(CALL), tools=tools))
    assert response.json()["content"][0]["name"] == "weather"
    assert response.headers["x-chunkllama-ignored-fields"] == "tools[0]"


@pytest.mark.parametrize(
    "tool",
    [
        {"type": "computer_toolset_20260801"},
        {"type": "mcp_toolset", "name": "not a name", "description": {"of": "another kind"}},
    ],
)
def test_tools_that_are_left_out_may_have_other_members(server, tool) -> None:
    response = server.post(PATH, body_of(say(CALL), tools=[WEATHER, tool]))
    assert response.status_code == 200, response.text
    assert response.json()["content"][0]["name"] == "weather"
    assert response.headers["x-chunkllama-ignored-fields"] == "tools[1]"


def test_more_tools_than_openais_api_has(server, text_parts) -> None:
    tools = [{"name": f"t{n}", "input_schema": {}} for n in range(129)]
    counted = server.post(f"{PATH}/count_tokens", {"messages": say("x"), "tools": tools})
    assert counted.status_code == 200, counted.text
    assert counted.json()["input_tokens"] > 129


def test_a_failed_tool_says_so(server, text_parts) -> None:
    messages = [
        {"role": "user", "content": "look"},
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "t1", "name": "weather", "input": {}}],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "no net", "is_error": True}
            ],
        },
    ]
    assert server.post(PATH, body_of(messages, tools=[WEATHER])).status_code == 200
    assert "tool\nError: no net<|im_end|>" in prompt_of(server, text_parts)


def test_a_last_message_of_the_assistant_is_continued(server, text_parts) -> None:
    messages = [*say("B)"), {"role": "assistant", "content": "The answer is ("}]
    answer = server.post(PATH, body_of(messages)).json()
    assert prompt_of(server, text_parts).endswith("assistant\nThe answer is (")
    assert answer["content"][0]["text"] == "B)"


@pytest.mark.parametrize(
    ("fields", "said", "reason", "sequence"),
    [
        ({"stop_sequences": ["END"]}, "one END two", "stop_sequence", "END"),
        ({"stop_sequences": [*"ABCDEFGH", "END"]}, "one END two", "stop_sequence", "E"),
        ({"max_tokens": 3}, "abcdef", "max_tokens", None),
        ({"max_tokens": 100_000}, "abcdef", "end_turn", None),
        ({}, "", "end_turn", None),
    ],
)
def test_stop_reasons(server, fields, said, reason, sequence) -> None:
    body = body_of(say(said), **fields)
    answer = server.post(PATH, body).json()
    assert (answer["stop_reason"], answer["stop_sequence"]) == (reason, sequence)
    assert accumulated(events_of(server, body))["stop_reason"] == reason


def test_an_answer_as_long_as_the_context(server) -> None:
    """The tokens asked for do not fit: the answer gets what does, and says why it ended."""
    answer = server.post(PATH, body_of(say("x" * 1500), max_tokens=4000)).json()
    assert answer["stop_reason"] == "model_context_window_exceeded"
    assert answer["usage"]["input_tokens"] + answer["usage"]["output_tokens"] == 2048


def test_a_prompt_is_stored_without_an_answer(server) -> None:
    answer = server.post(PATH, body_of(say("abc"), max_tokens=0)).json()
    assert (answer["content"], answer["stop_reason"]) == ([], "max_tokens")
    assert answer["usage"]["output_tokens"] == 0
    again = server.post(PATH, body_of(say("abc"))).json()
    assert again["usage"]["cache_read_input_tokens"] == answer["usage"]["input_tokens"] - 1


@pytest.mark.parametrize("is_known", [False, True])
def test_the_first_event_has_the_usage_of_the_prompt(server, is_known) -> None:
    """Clients that count the prompt read it from message_start alone."""
    body = body_of(say("hi"), system=[{"type": "text", "text": "rules", **MARK}])
    if is_known:
        assert server.post(PATH, body).status_code == 200
    first = events_of(server, body)[0]["message"]["usage"]
    request = server.engine.requests[-1]
    read = len(request.prompt_token_ids) - 1 if is_known else 0
    read = min(read, request.cache_until)
    created = request.cache_until - read
    assert first["cache_read_input_tokens"] == read
    assert first["cache_creation_input_tokens"] == created
    assert first["cache_creation"]["ephemeral_5m_input_tokens"] == created
    assert first["input_tokens"] == len(request.prompt_token_ids) - read - created


def test_output_format(server) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    config = {"format": {"type": "json_schema", "schema": schema}}
    assert server.post(PATH, body_of(say("x"), output_config=config)).status_code == 200
    grammar = json.loads(server.engine.requests[-1].sampling.grammar.text)
    assert "a" in grammar["properties"]


def test_output_format_by_its_former_name(server) -> None:
    described = {"type": "json_schema", "schema": {"type": "object", "properties": {}}}
    assert server.post(PATH, body_of(say("{}"), output_format=described)).status_code == 200
    former = server.engine.requests[-1].sampling
    config = {"format": described}
    assert server.post(PATH, body_of(say("{}"), output_config=config)).status_code == 200
    assert former == server.engine.requests[-1].sampling
    assert former.grammar is not None
    both = body_of(say("{}"), output_config=config, output_format=described)
    assert server.post(PATH, both).status_code == 400


TEXT = {"type": "text", "media_type": "text/plain", "data": "It rains."}


@pytest.mark.parametrize(
    ("block", "shown"),
    [
        ({"type": "document", "source": TEXT}, "It rains."),
        (
            {"type": "document", "source": TEXT, "title": "Report", "context": "of May"},
            "Report\nof May\nIt rains.",
        ),
        ({"type": "document", "source": {"type": "content", "content": "It rains."}}, "It rains."),
        (
            {
                "type": "document",
                "source": {"type": "content", "content": [{"type": "text", "text": "It rains."}]},
            },
            "It rains.",
        ),
        (
            {
                "type": "search_result",
                "source": "there",
                "title": "Report",
                "content": [{"type": "text", "text": "It rains."}],
            },
            "Report\nthere\nIt rains.",
        ),
    ],
    ids=lambda v: str(v)[:60],
)
def test_documents_of_text(server, text_parts, block, shown) -> None:
    result = {"type": "tool_result", "tool_use_id": "1", "content": [block]}
    for content in ([block, {"type": "text", "text": "?"}], [result]):
        answer = server.post(PATH, body_of([{"role": "user", "content": content}]))
        assert answer.status_code == 200, answer.text
        assert "x-chunkllama-repaired-history" not in answer.headers
        assert shown in prompt_of(server, text_parts)


def test_the_past_is_not_refused(server) -> None:
    result = {"type": "tool_result", "content": "12 degrees"}
    past = [{"role": "user"}, {"role": "user", "content": [result]}]
    answer = server.post(PATH, body_of([*past, {"role": "assistant", "content": "b"}, *say("c")]))
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-chunkllama-repaired-history"].startswith("messages[0].content")


@pytest.mark.parametrize("content", [[], None, ""])
def test_a_turn_may_be_empty(server, content) -> None:
    turns = [*say("a"), {"role": "assistant", "content": content}, *say("b")]
    assert server.post(PATH, body_of(turns)).status_code == 200
    before = [*say("a"), {"role": "assistant", "content": "b"}]
    for past in ([], before):
        empty, text = (
            body_of([*past, {"role": "user", "content": value}]) for value in (content, "")
        )
        assert server.post(PATH, empty).status_code == 200
        del empty["max_tokens"], text["max_tokens"]
        counted, expected = (server.post(f"{PATH}/count_tokens", body) for body in (empty, text))
        assert counted.status_code == 200
        assert counted.json() == expected.json()


def test_models_in_the_clients_shape(server) -> None:
    client = sdk(server)
    listed = client.models.list()
    assert [model.id for model in listed] == [MODEL, "alias"]
    assert client.models.retrieve(MODEL).max_input_tokens == 2048
    with server.http(headers={"anthropic-version": "2023-06-01"}) as http:
        page = http.get("/v1/models").json()
        for model in (*page["data"], http.get(f"/v1/models/{MODEL}").json()):
            ModelInfo.model_validate_json(json.dumps(model), strict=True)
    assert (page["first_id"], page["last_id"], page["has_more"]) == (MODEL, "alias", False)
    assert server.http().get("/v1/models").json()["object"] == "list"


def test_a_ping_is_the_sign_of_life(start_server) -> None:
    slow = start_server(stream_first_byte_seconds=0.02, stream_comment_seconds=0.02)
    slow.engine.gate_at = 2
    slow.engine.gate.clear()
    kinds: list[str] = []
    with (
        slow.http() as http,
        http.stream("POST", PATH, json=body_of(say("abcdef"), stream=True)) as response,
    ):
        for line in response.iter_lines():
            if line.startswith("event: "):
                kinds.append(line.removeprefix("event: "))
            if kinds.count("ping") == 2:
                slow.engine.gate.set()
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="()<>"), max_size=12)
PARTS = st.lists(
    st.one_of(
        TEXTS,
        st.builds(
            lambda city: (
                '<tool_call>{"name": "weather", "arguments": '
                + json.dumps({"city": city})
                + "}</tool_call>"
            ),
            TEXTS,
        ),
    ),
    max_size=3,
)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    parts=PARTS,
    tokens_per_delta=st.integers(1, 9),
    max_tokens=st.integers(1, 150),
    mark=st.booleans(),
)
def test_every_answer_fits_the_clients_types(
    shared_server, parts, tokens_per_delta, max_tokens, mark
) -> None:
    """Whole and streamed answers are valid and the same, however the text is cut."""
    engine = shared_server.engine
    engine.reset()
    engine.tokens_per_delta = tokens_per_delta
    control = MARK if mark else {}
    body = body_of(say("".join(parts)), tools=[WEATHER], **{**control, "max_tokens": max_tokens})
    whole = shared_server.post(PATH, body)
    assert whole.status_code == 200, whole.text
    Message.model_validate(whole.json(), strict=True)
    engine.prompts.clear()
    events = events_of(shared_server, body)
    is_cut = whole.json()["stop_reason"] == "max_tokens"
    if is_cut:  # the arguments of a call that is cut are not JSON yet
        assert events[-2]["usage"]["output_tokens"] == max_tokens
        return
    assert without_ids(accumulated(events)) == without_ids(whole.json())
