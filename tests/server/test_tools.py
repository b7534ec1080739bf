"""Tools through the openai client: auto, forced and legacy calls, whole and streamed."""

from __future__ import annotations

import json

import pydantic
import pytest
from fake_engine import MODEL

from chunkllama.text.chat_template import load_chat_template
from chunkllama.text.tokenizer import load_tokenizer

CALL = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
SCHEMA = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}},
    "$defs": {"city": {"type": "string"}},
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "add", "description": "adds"}},
]


def ask(client, text, **options):
    messages = [{"role": "user", "content": f"say({text})yas"}]
    return client.chat.completions.create(model=MODEL, messages=messages, **options)


def streamed(client, text, **options):
    """Content, calls and finish reason put together from chunks."""
    content, calls, reason = "", [], None
    for chunk in ask(client, text, stream=True, **options):
        choice = chunk.choices[0]
        content += choice.delta.content or ""
        reason = choice.finish_reason or reason
        for call in choice.delta.tool_calls or ():
            if call.id:
                assert call.index == len(calls)
                assert call.type == "function"
                calls.append([call.function.name, ""])
            calls[call.index][1] += call.function.arguments or ""
    return content, calls, reason


def test_auto_call(client):
    answer = ask(client, f"<tool_call>{CALL}</tool_call>", tools=TOOLS)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    call = choice.message.tool_calls[0]
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris"}


def test_auto_call_streamed(client):
    said = streamed(client, f"Let me see. <tool_call>{CALL}</tool_call>", tools=TOOLS)
    assert said == ("Let me see. ", [["get_weather", '{"city": "Paris"}']], "tool_calls")


def test_text_without_call_is_content(client):
    assert streamed(client, "It is {sunny}", tools=TOOLS) == ("It is {sunny}", [], "stop")


def test_template_sees_the_tools(server, text_parts, client):
    ask(client, "x", tools=TOOLS)
    ask(client, "x", tools=TOOLS, tool_choice="none")
    prompts = [text_parts[0].decode(r.prompt_token_ids) for r in server.engine.requests]
    assert "get_weather" in prompts[0]
    assert prompts[0] == prompts[1], "tool_choice changes no prompt, so its prefix stays cached"


def test_no_call_is_read_with_tool_choice_none(client):
    answer = ask(client, f"<tool_call>{CALL}</tool_call>", tools=TOOLS, tool_choice="none")
    assert answer.choices[0].message.content == f"<tool_call>{CALL}</tool_call>"


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "function", "function": {"name": "get_weather"}},
        {
            "type": "allowed_tools",
            "allowed_tools": {
                "mode": "required",
                "tools": [{"type": "function", "function": {"name": "get_weather"}}],
            },
        },
    ],
    ids=["required", "named", "allowed"],
)
def test_forced_call_has_a_grammar(server, client, choice):
    answer = ask(client, f"[{CALL}]", tools=TOOLS, tool_choice=choice)
    assert answer.choices[0].message.tool_calls[0].function.name == "get_weather"
    assert streamed(client, f"[{CALL}]", tools=TOOLS, tool_choice=choice)[1] == [
        ["get_weather", '{"city": "Paris"}']
    ]
    text = server.engine.requests[0].sampling.grammar.text
    schema = json.loads(text.partition("object: %json ")[2].splitlines()[0])
    names = [v["properties"]["name"]["const"] for v in schema["anyOf"]]
    assert names == (["get_weather", "add"] if choice == "required" else ["get_weather"])
    moved = schema["anyOf"][0]["properties"]["arguments"]
    assert moved["properties"]["city"]["$ref"] == "#/anyOf/0/properties/arguments/$defs/city"
    is_named = isinstance(choice, dict) and "function" in choice
    assert ("{0,15}" in text) == (not is_named)


def test_parallel_calls_and_their_prohibition(server, client):
    two = f"<tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call>"
    assert len(ask(client, two, tools=TOOLS).choices[0].message.tool_calls) == 2
    one = ask(client, two, tools=TOOLS, parallel_tool_calls=False)
    assert len(one.choices[0].message.tool_calls) == 1
    ask(client, f"[{CALL}]", tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    assert "{0,15}" not in server.engine.requests[-1].sampling.grammar.text


def test_allowed_tools_auto(client):
    allowed = {
        "type": "allowed_tools",
        "allowed_tools": {
            "mode": "auto",
            "tools": [{"type": "function", "function": {"name": "add"}}],
        },
    }
    said = streamed(client, f"<tool_call>{CALL}</tool_call>", tools=TOOLS, tool_choice=allowed)
    assert said == (f"<tool_call>{CALL}</tool_call>", [], "stop")


def test_conversation_with_a_tool_result(server, client, text_parts):
    call = {"id": "c1", "type": "function", "function": json.loads(CALL)}
    call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    messages = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS)
    prompt = text_parts[0].decode(server.engine.requests[0].prompt_token_ids)
    assert 'get_weather{"city": "Paris"}' in prompt
    assert "tool\nsunny" in prompt


def test_legacy_functions(client):
    functions = [tool["function"] for tool in TOOLS]
    text = f"<tool_call>{CALL}</tool_call>"
    choice = ask(client, text, functions=functions).choices[0]
    assert choice.finish_reason == "function_call"
    assert choice.message.function_call.name == "get_weather"
    name, arguments = "", ""
    for chunk in ask(client, text, functions=functions, stream=True):
        call = chunk.choices[0].delta.function_call
        name += (call and call.name) or ""
        arguments += (call and call.arguments) or ""
    assert (name, json.loads(arguments)) == ("get_weather", {"city": "Paris"})
    forced = ask(
        client, f"[{CALL}]", functions=functions, function_call={"name": "get_weather"}
    ).choices[0]
    assert forced.message.function_call.name == "get_weather"


def test_length_in_the_middle_of_a_call(client):
    answer = ask(client, f"<tool_call>{CALL}", tools=TOOLS, max_tokens=40)
    assert answer.choices[0].finish_reason == "length"


def test_parse_with_a_pydantic_model(server, client):
    class City(pydantic.BaseModel):
        name: str
        people: int

    answer = client.chat.completions.parse(
        model=MODEL,
        messages=[{"role": "user", "content": 'say({"name": "Paris", "people": 2})yas'}],
        response_format=City,
    )
    assert answer.choices[0].message.parsed == City(name="Paris", people=2)
    assert server.engine.requests[0].sampling.grammar.kind == "json_schema"


def test_stream_helper_of_the_client(client):
    with client.chat.completions.stream(
        model=MODEL,
        messages=[{"role": "user", "content": f"say(<tool_call>{CALL}</tool_call>)yas"}],
        tools=TOOLS,
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls[0].function.name == "get_weather"


SIMPLE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def test_a_template_without_tools_gets_them_in_words(start_server, text_parts):
    server = start_server(trust_request_chat_template=True)
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    body = {
        "model": MODEL,
        "chat_template": SIMPLE,
        "tools": TOOLS,
        "messages": [
            {"role": "system", "content": "rules"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "2"},
        ],
    }
    prompt = server.post("/v1/chat/completions/render", body).json()["prompt"]
    assert prompt.startswith("<system>rules\n\nYou have access")
    assert '"name": "get_weather"' in prompt
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>' in prompt
    assert prompt.endswith("<tool>2<assistant>")
    without = [{"role": "user", "content": "hi"}]
    prompt = server.post("/v1/chat/completions/render", {**body, "messages": without}).json()
    assert prompt["prompt"].startswith("<system>You have access")


def test_breakpoint_is_exact_behind_described_tools(start_server, text_parts):
    server = start_server(trust_request_chat_template=True)
    part = {"type": "text", "text": "stable", "prompt_cache_breakpoint": {"mode": "explicit"}}
    body = {
        "model": MODEL,
        "chat_template": SIMPLE,
        "tools": TOOLS,
        "messages": [{"role": "user", "content": [part, {"type": "text", "text": "new"}]}],
        "prompt_cache_options": {"mode": "explicit"},
    }
    assert server.post("/v1/chat/completions", body).status_code == 200
    request = server.engine.requests[0]
    stored = text_parts[0].decode(request.prompt_token_ids[: request.cache_until])
    assert stored.endswith("<user>stable")


WANTS_A_USER = (
    "{% if messages | length == 1 %}{{ raise_exception('no user message') }}{% endif %}"
    "{% for m in messages %}<{{ m.role }} of {{ messages | length }}>{{ m.content | trim }}"
    "{% endfor %}<assistant>"
)


def test_breakpoint_where_the_template_looks_ahead(start_server, text_parts):
    server = start_server(trust_request_chat_template=True)
    part = {"type": "text", "text": "rules", "prompt_cache_breakpoint": {"mode": "explicit"}}
    body = {
        "model": MODEL,
        "chat_template": WANTS_A_USER,
        "messages": [{"role": "system", "content": [part]}, {"role": "user", "content": "hi"}],
        "prompt_cache_options": {"mode": "explicit"},
    }
    assert server.post("/v1/chat/completions", body).status_code == 200
    request = server.engine.requests[0]
    stored = text_parts[0].decode(request.prompt_token_ids[: request.cache_until])
    assert stored == "<system of 2>rules"


SPECIAL_TAGS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<think>", "</think>")


@pytest.fixture(scope="module")
def special(start_server, tokenizer_writer, tmp_path_factory):
    """A server whose tags of calls and thoughts are special tokens, which decoding skips."""
    folder = tmp_path_factory.mktemp("special")
    tokenizer_writer(folder, SPECIAL_TAGS)
    tokenizer = load_tokenizer(folder)
    server = start_server(parts=(tokenizer, load_chat_template(folder, tokenizer)))
    server.engine.writes_special = True
    return server


@pytest.mark.parametrize(
    "text",
    [
        f"<tool_call>{CALL}</tool_call>",
        f"[TOOL_CALLS][{CALL}]",
        '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}',
        f"<think>hm</think><tool_call>{CALL}</tool_call>",
    ],
)
def test_tags_that_are_special_tokens(special, text):
    with special.client() as client:
        message = ask(client, text, tools=TOOLS).choices[0].message
        assert message.content is None
        assert message.tool_calls[0].function.arguments == '{"city": "Paris"}'
        said = streamed(client, text, tools=TOOLS)
    assert said == ("", [["get_weather", '{"city": "Paris"}']], "tool_calls")


def test_special_tags_are_not_in_an_answer_without_calls(special):
    with special.client() as client:
        text = "<tool_call>no</tool_call> call[ARGS]"
        assert ask(client, text, tools=TOOLS).choices[0].message.content == "no call"
        assert ask(client, text).choices[0].message.content == "no call"
