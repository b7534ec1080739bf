"""Earlier messages are data: repaired, kept as text or left out, named in a header, never 400."""

from __future__ import annotations

import json

import pytest
from fake_engine import MODEL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chunkllama_server.api.chat.history import readable_arguments

HELLO = {"role": "user", "content": "hi"}
JSON = {"content-type": "application/json"}
REPAIRED = "x-chunkllama-repaired-history"
CALL = '{"name": "get_weather", "arguments": {"city": "Oslo"}}'
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}]
RESPONSE_TOOLS = [{"type": "function", "name": "get_weather", "parameters": PARAMETERS}]
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
EACH = "{% for m in messages %}"
TEMPLATES = {
    "tools": None,
    "generic": EACH + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
    "no tool role": EACH + "{% if m.role in ['system', 'user', 'assistant'] %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}",
    "alternating": EACH + "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('alternate') }}{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}",
    "one call": "{{ tools | tojson }}" + EACH + "{% if m.tool_calls %}"
    "{% if m.tool_calls | length > 1 %}{{ raise_exception('one call') }}{% endif %}"
    "{{ m.tool_calls[0].function | tojson }}{% else %}[{{ m.role }}]{{ m.content }}{% endif %}"
    "{% endfor %}",
    "parts": EACH + "[{{ m.role }}]{% for part in m.content %}{{ part.text }}{% endfor %}"
    "{% endfor %}",
}


def turn(*messages):
    return {"model": MODEL, "messages": [HELLO, *messages, HELLO]}


def called(arguments, **members):
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": "1", "function": function, **members}]}


@pytest.mark.parametrize(
    ("given_text", "shown", "was_object"),
    [
        ('{"city": "Oslo"}', {"city": "Oslo"}, True),
        ({"city": "Oslo"}, {"city": "Oslo"}, True),
        ("", {}, True),
        (" ", {}, False),
        (None, {}, False),
        ("null", {}, False),
        ('{"city": "Os', {"city": "Os"}, False),
        ('{"city": "Os\\', {"city": "Os"}, False),
        ('{"a": [1, {"b": ', {"a": [1, {"b": None}]}, False),
        ('{"a": 1,', {"a": 1}, False),
        ("{'city': 'Oslo', 'now': True}", {"city": "Oslo", "now": True}, False),
        ("[1]", {"value": [1]}, False),
        ('{"say": "he said "hi" to me"}', {"value": '{"say": "he said "hi" to me"}'}, False),
        ('{"a": NaN}', {"value": '{"a": NaN}'}, False),
        ("{'a': 1e999}", {"value": "{'a': 1e999}"}, False),
        ('{"a": "\\ud800"}', {"value": '{"a": "\\ud800"}'}, False),
        ("[" * 100_000, {"value": "[" * 100_000}, False),
    ],
    ids=lambda v: str(v)[:30],
)
def test_arguments_become_an_object(given_text, shown, was_object):
    assert readable_arguments(given_text) == (shown, was_object)


@pytest.mark.parametrize(
    ("message", "path", "in_prompt"),
    [
        (called('{"city": "Os'), "tool_calls[0].function.arguments", '"Os"'),
        (called("not JSON"), "tool_calls[0].function.arguments", "not JSON"),
        (called(None), "tool_calls[0].function.arguments", "f{}"),
        (called("{}", id=None), "tool_calls[0].id", "f{}"),
        (
            {"role": "assistant", "function_call": {"name": "f", "arguments": "{"}},
            "function_call.arguments",
            "f{}",
        ),
        (
            {
                "role": "assistant",
                "tool_calls": [
                    {"id": "1", "type": "custom", "custom": {"name": "sh", "input": "ls -l"}}
                ],
            },
            "tool_calls[0]",
            "ls -l",
        ),
        ({"role": "assistant"}, "content", "assistant"),
        ({"role": "assistant", "content": None}, "content", "assistant"),
        ({"role": "user", "content": None}, "content", "user"),
        ({"role": "assistant", "content": []}, "content", "assistant"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "content[0]", "user"),
        ({"role": "user", "content": [{"type": "note", "text": "kept"}]}, "content[0]", "kept"),
        ({"role": "tool", "tool_call_id": None, "content": "12"}, "tool_call_id", "12"),
    ],
    ids=lambda v: str(v)[:60],
)
def test_repairs_are_named_and_the_text_reaches_the_prompt(
    server, text_parts, message, path, in_prompt
):
    answer = server.post("/v1/chat/completions", turn(message))
    assert answer.status_code == 200, answer.text
    assert answer.headers[REPAIRED] == f"messages[1].{path}"
    prompt = text_parts[0].decode(server.engine.requests[0].prompt_token_ids)
    assert in_prompt in prompt


def test_a_result_of_the_past_needs_no_call(server, text_parts):
    body = turn({"role": "tool", "content": "12 degrees"}, {"role": "assistant", "content": "ok"})
    answer = server.post("/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text
    assert answer.headers[REPAIRED] == "messages[1].tool_call_id"
    assert "12 degrees" in text_parts[0].decode(server.engine.requests[0].prompt_token_ids)


CALLED = {"type": "tool_use", "id": "1", "name": "find", "input": {"city": "Oslo"}}


@pytest.mark.parametrize(
    ("message", "in_prompt"),
    [
        ({"role": "assistant", "content": "x", "reasoning": "hm-hm"}, "<think>hm-hm</think>x"),
        (
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm-hm"}]},
            "<think>hm-hm</think>",
        ),
        (
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": [{"type": "text", "text": "hm-hm"}]},
                    {"type": "text", "text": "x"},
                ],
            },
            "<think>hm-hm</think>x",
        ),
        ({"role": "assistant", "content": [CALLED]}, 'find{"city": "Oslo"}'),
        (
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1"}, "and?"]},
            "and?",
        ),
        (
            {"role": "user", "content": [{"type": "tool_result", "content": "12 degrees"}]},
            "12 degrees",
        ),
        (
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "content": [{"type": "text", "text": "12"}, {"type": "image"}, 7],
                    }
                ],
            },
            "12\n[image]\n7",
        ),
    ],
    ids=lambda v: str(v)[:70],
)
def test_shapes_of_other_apis_keep_their_texts(start_server, text_parts, message, in_prompt):
    server = start_server(
        template_source=EACH + "[{{ m.role }}]"
        "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
        "{{ m.content }}{% for c in m.tool_calls %}"
        "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
    )
    answer = server.post("/v1/chat/completions", turn(message))
    assert answer.status_code == 200, answer.text
    assert REPAIRED not in answer.headers
    prompt = text_parts[0].decode(server.engine.requests[0].prompt_token_ids)
    assert in_prompt in prompt


@pytest.mark.parametrize("content", [{"content": ""}, {}])
def test_a_response_reads_messages_of_chat(server, text_parts, content):
    function = {"name": "find", "arguments": '{"city": "Oslo"}'}
    call = {"id": "1", "type": "function", "function": function}
    items = [
        HELLO,
        {"role": "assistant", **content, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "12 degrees"}]},
    ]
    same = {"model": MODEL, "messages": [items[0], {"content": "", **items[1]}, items[2]]}
    assert server.post("/v1/chat/completions", same).status_code == 200
    answer = server.post("/v1/responses", {"model": MODEL, "input": items})
    assert answer.status_code == 200, answer.text
    assert REPAIRED not in answer.headers
    chat, response = (request.prompt_token_ids for request in server.engine.requests)
    assert chat == response
    assert "12 degrees" in text_parts[0].decode(chat)


def test_the_output_of_a_shell_reaches_the_prompt(server, text_parts):
    output = [{"stdout": "a.txt", "stderr": "", "outcome": {"type": "exit", "exit_code": 0}}]
    call = {"type": "shell_call", "call_id": "1", "action": {"commands": ["ls"]}}
    items = [HELLO, call, {"type": "shell_call_output", "call_id": "1", "output": output}]
    answer = server.post("/v1/responses", {"model": MODEL, "input": items})
    assert answer.status_code == 200, answer.text
    prompt = text_parts[0].decode(server.engine.requests[0].prompt_token_ids)
    assert '"stdout": "a.txt"' in prompt


def test_an_empty_id_of_a_previous_response_is_none(server):
    body = {"model": MODEL, "input": "hi", "previous_response_id": ""}
    assert server.post("/v1/responses", body).json()["previous_response_id"] is None


def test_a_sound_conversation_is_not_repaired(server):
    result = {"role": "tool", "tool_call_id": "1", "content": "sunny"}
    answer = server.post("/v1/chat/completions", turn(called("{}"), result))
    assert answer.status_code == 200
    assert REPAIRED not in answer.headers


def test_media_is_text_in_the_past_and_refused_in_the_turn_to_answer(server, text_parts):
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    answer = server.post("/v1/chat/completions", turn(image, {"role": "assistant", "content": "a"}))
    assert answer.headers[REPAIRED] == "messages[1].content[0]"
    prompt = text_parts[0].decode(server.engine.requests[0].prompt_token_ids)
    assert "[image_url]" in prompt
    result = {"role": "tool", "tool_call_id": "1", "content": image["content"]}
    assert server.post("/v1/chat/completions", turn(called("{}"), result)).status_code == 200
    refused = server.post("/v1/chat/completions", turn(image))
    assert refused.json()["error"]["param"] == "messages[1].content[0]"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_nul_is_a_character_like_any_other(server, text_parts, path):
    text = "12\0-18"
    field = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}.get(path, "input")
    value = [{"role": "user", "content": text}] if field == "messages" else text
    assert server.post(path, {"model": MODEL, field: value}).status_code == 200
    assert text in text_parts[0].decode(server.engine.requests[0].prompt_token_ids)


@pytest.mark.parametrize(
    ("item", "in_prompt", "repaired"),
    [
        (
            {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]},
            "hi",
            False,
        ),
        ({"type": "reasoning", "summary": [], "content": None}, "hi", False),
        ({"type": "web_search_call", "id": "ws_1", "status": "completed"}, "hi", True),
        ({"type": "mcp_list_tools", "tools": []}, "hi", True),
        ({"type": "custom_tool_call", "call_id": "1", "name": "sh", "input": "ls"}, "ls", False),
        ({"type": "custom_tool_call_output", "call_id": "1", "output": "a.py"}, "a.py", False),
        (
            {"type": "local_shell_call", "call_id": "1", "action": {"command": ["pwd"]}},
            "pwd",
            False,
        ),
        ({"type": "function_call", "call_id": "1", "name": "f"}, "f{}", True),
        ({"type": "function_call", "call_id": "1", "name": "f", "arguments": "["}, "f[", True),
        ({"type": "function_call", "name": "f", "arguments": "{}"}, "f{}", True),
        ({"type": "function_call_output", "call_id": "1", "output": {"t": 12}}, '{"t": 12}', False),
        ({"type": "function_call_output", "call_id": "1", "output": None}, "tool", True),
        (
            {
                "type": "function_call_output",
                "call_id": "1",
                "output": [{"type": "input_text", "text": "12"}, {"type": "input_image"}],
            },
            "[input_image]",
            True,
        ),
    ],
    ids=lambda v: str(v)[:50],
)
def test_items_of_a_response(server, text_parts, item, in_prompt, repaired):
    body = {"model": MODEL, "input": [HELLO, item, HELLO]}
    answer = server.post("/v1/responses", body)
    assert answer.status_code == 200, answer.text
    named = answer.headers.get(REPAIRED, "")
    assert named.startswith("input[1]") if repaired else not named
    prompt = text_parts[0].decode(server.engine.requests[0].prompt_token_ids)
    assert in_prompt.replace("f[", "f{") in prompt


def test_tools_of_other_types_are_left_out_and_named(server, start_server):
    body = {
        "model": MODEL,
        "input": "x",
        "tools": [{"type": "web_search"}, *RESPONSE_TOOLS, {"type": "namespace", "tools": []}],
    }
    answer = server.post("/v1/responses", body)
    assert answer.headers["x-chunkllama-ignored-fields"] == "tools[0], tools[2]"
    custom = {"type": "custom", "custom": {"name": "x"}}
    answer = server.chat(tools=[*TOOLS, custom])
    assert answer.headers["x-chunkllama-ignored-fields"] == "tools[1]"
    refused = start_server(strict=True).post("/v1/responses", body)
    assert refused.json()["error"]["param"] == "tools[0]"


def test_an_item_reference_stands_for_the_stored_item(server, text_parts):
    first = server.post("/v1/responses", {"model": MODEL, "input": "say(Bergen)yas"}).json()
    reference = {"type": "item_reference", "id": first["output"][0]["id"]}
    answer = server.post("/v1/responses", {"model": MODEL, "input": [reference, HELLO]})
    assert answer.status_code == 200
    prompt = text_parts[0].decode(server.engine.requests[1].prompt_token_ids)
    assert "assistant\nBergen" in prompt


ANSWERS = st.lists(
    st.sampled_from(
        [CALL, f"<tool_call>{CALL}</tool_call>", f"[{CALL}]", "<tool_call>", "It is ", "\0", "é{"]
    ),
    max_size=3,
).map("".join)
_TURNS = settings(
    max_examples=10,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module", params=TEMPLATES)
def any_template(request, start_server):
    return start_server(template_source=TEMPLATES[request.param])


@_TURNS
@given(ANSWERS, st.integers(1, 150), st.sampled_from(["auto", "required", "none"]))
def test_every_chat_answer_is_accepted_in_the_next_turn(any_template, text, cut, choice):
    ask = {"role": "user", "content": f"say({text})yas"}
    body = {"model": MODEL, "messages": [ask], "tools": TOOLS, "tool_choice": choice}
    first = any_template.post("/v1/chat/completions", {**body, "max_tokens": cut})
    assert first.status_code == 200, first.text
    message = first.json()["choices"][0]["message"]
    results = [
        {"role": "tool", "tool_call_id": call["id"], "content": "12"}
        for call in message.get("tool_calls", ())
    ]
    for back in ([message, HELLO], [message, *results, HELLO], [message, *results]):
        again = {**body, "messages": [ask, *back], "max_tokens": 1}
        second = any_template.post("/v1/chat/completions", again)
        assert second.status_code == 200, second.text


@_TURNS
@given(ANSWERS, st.integers(16, 150), st.sampled_from(["auto", "required", "none"]))
def test_every_response_is_accepted_in_the_next_turn(any_template, text, cut, choice):
    ask = {"role": "user", "content": f"say({text})yas"}
    body = {"model": MODEL, "tools": RESPONSE_TOOLS, "tool_choice": choice}
    first = any_template.post("/v1/responses", {**body, "input": [ask], "max_output_tokens": cut})
    assert first.status_code == 200, first.text
    output = first.json()["output"]
    results = [
        {"type": "function_call_output", "call_id": item["call_id"], "output": "12"}
        for item in output
        if item["type"] == "function_call"
    ]
    previous = {"previous_response_id": first.json()["id"]}
    for more in (
        {"input": [ask, *output, *results, HELLO]},
        {"input": [ask, *output, HELLO]},
        {"input": [*results, HELLO], **previous},
        {"input": "go on", **previous},
    ):
        second = any_template.post("/v1/responses", {**body, **more, "max_output_tokens": 16})
        assert second.status_code == 200, second.text


@pytest.mark.parametrize(
    ("path", "field"),
    [("/v1/chat/completions", "messages"), ("/tokenize", "messages"), ("/v1/responses", "input")],
)
@pytest.mark.parametrize("odd", [[IMAGE], 5, {"a": 1}], ids=["image", "number", "object"])
def test_an_answer_that_is_continued_leaves_its_question_to_be_read(server, path, field, odd):
    """The turn to be answered is that before it; an image there would be dropped silently."""
    sure = {"role": "assistant", "content": "Sure"}
    asked = {"role": "user", "content": odd}
    more = {} if field == "input" else {"continue_final_message": True}
    refused = server.post(path, {"model": MODEL, field: [asked, sure], **more})
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["param"].startswith(f"{field}[0].content")
    past = server.post(path, {"model": MODEL, field: [asked, sure, HELLO, sure], **more})
    assert past.status_code == 200, past.text


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": []},
        {"tools": [], "tool_choice": "auto"},
        {"stop": ""},
        {"stop": ["", "END"]},
        {"stop": []},
        {"max_tokens": 5.0},
        {"stop_token_ids": [5.0]},
        {"n": 1.0, "top_k": 3.0, "seed": 7.0},
        {"documents": []},
        {"store": True},
        {"model": None},
    ],
    ids=str,
)
def test_what_common_clients_send_is_accepted(server, fields):
    answer = server.chat(**fields)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == MODEL
    ignored = answer.headers.get("x-chunkllama-ignored-fields")
    assert ignored == ("store" if "store" in fields else None)


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/chat/completions", {"messages": [HELLO]}),
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/responses", {"input": "x"}),
        ("/v1/embeddings", {"input": "x"}),
    ],
)
def test_a_missing_model_is_the_served_one(server, path, field):
    assert server.post(path, field).json()["model"] == MODEL


def test_a_byte_order_mark_before_the_body_is_skipped(server):
    raw = b"\xef\xbb\xbf" + json.dumps({"model": MODEL, "messages": [HELLO]}).encode()
    with server.http() as http:
        answer = http.post("/v1/chat/completions", content=raw, headers=JSON)
    assert answer.status_code == 200, answer.text
