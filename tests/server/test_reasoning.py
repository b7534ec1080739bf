"""Thoughts over HTTP: told from the answer, counted, bounded, turned off, and dropped from the next
prompt."""

from __future__ import annotations

import json

import pytest
from fake_engine import MODEL

from chunkllama.errors import ConfigError
from chunkllama_server.config.settings import load_settings

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
)
# As DeepSeek R1's: the prompt opens the thoughts, earlier ones are dropped.
OPENS = CHATML + "<think>\n{% endif %}"
# As Qwen3's: an argument turns thoughts off, earlier ones are dropped.
SWITCH = (
    CHATML + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
EFFORT = CHATML + "effort={{ reasoning_effort or 'medium' }}{% endif %}"
TAGS = "<think>,</think>"


@pytest.fixture(scope="module")
def opens(start_server):
    return start_server(template_source=OPENS)


@pytest.fixture(scope="module")
def switch(start_server):
    return start_server(template_source=SWITCH)


@pytest.fixture(params=["opens", "switch"])
def thinking(request):
    """A server whose model thinks, and the text that opens the thoughts."""
    server = request.getfixturevalue(request.param)
    server.engine.reset()
    return server, "" if request.param == "opens" else "<think>"


def said(text: str) -> str:
    return f"say({text})yas"


def prompt_of(server, text_parts) -> str:
    return text_parts[0].decode(server.engine.requests[-1].prompt_token_ids, False)


def test_chat_whole(thinking):
    server, begin = thinking
    text = f"{begin}let me see</think>\n\nParis"
    body = server.chat(said(text)).json()
    message = body["choices"][0]["message"]
    assert message["reasoning_content"] == "let me see"
    assert message["content"] == "Paris"
    # One token per byte: the thoughts, their tags, and the byte that ends the answer.
    details = body["usage"]["completion_tokens_details"]
    assert details["reasoning_tokens"] == len(f"{begin}let me see</think>")
    assert body["usage"]["completion_tokens"] == len(text) + 1


@pytest.mark.parametrize("size", [1, 3, 100])
def test_chat_streamed(thinking, size):
    server, begin = thinking
    server.engine.tokens_per_delta = size
    with server.client() as client:
        chunks = list(
            client.chat.completions.create(
                model=MODEL,
                messages=[
                    {"role": "user", "content": said(f"{begin}let me\nsee</think>\n\nParis")}
                ],
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    thoughts = [getattr(delta, "reasoning_content", None) or "" for delta in deltas]
    contents = [delta.content or "" for delta in deltas]
    assert "".join(thoughts) == "let me\nsee"
    assert "".join(contents) == "Paris"
    first_answer = next(i for i, content in enumerate(contents) if content)
    assert not any(thoughts[first_answer:])
    details = chunks[-1].usage.completion_tokens_details
    assert details.reasoning_tokens == len(f"{begin}let me\nsee</think>")


def test_thoughts_that_never_end_are_no_answer(opens):
    opens.engine.reset()
    choice = opens.chat(said("on and on"), max_tokens=5).json()["choices"][0]
    assert choice["message"]["reasoning_content"] == "on an"
    assert choice["message"]["content"] is None
    assert choice["finish_reason"] == "length"


def test_stop_strings_are_looked_for_in_the_answer(thinking):
    server, begin = thinking
    text = f"{begin}one. two.</think>three. four."
    choice = server.chat(said(text), stop=".").json()["choices"][0]
    assert choice["message"]["reasoning_content"] == "one. two."
    assert choice["message"]["content"] == "three"


def test_calls_in_thoughts_are_none(thinking):
    server, begin = thinking
    call = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
    tools = [{"type": "function", "function": {"name": "add"}}]
    message = server.chat(said(f"{begin}{call}</think>no"), tools=tools).json()["choices"][0][
        "message"
    ]
    assert "tool_calls" not in message and message["content"] == "no"
    message = server.chat(said(f"{begin}hm</think>{call}"), tools=tools).json()["choices"][0][
        "message"
    ]
    assert message["tool_calls"][0]["function"]["name"] == "add"
    assert (message["reasoning_content"], message["content"]) == ("hm", None)


def test_a_model_without_thoughts_says_tags_as_text(server):
    message = server.chat(said("<think>hm</think>yes")).json()["choices"][0]["message"]
    assert message["content"] == "<think>hm</think>yes"
    bounded = server.chat(said("<think>hm</think>yes"), thinking_token_budget=5).json()
    assert bounded["choices"][0]["message"]["content"] == "<think>hm</think>yes"


@pytest.mark.parametrize(
    "fields",
    [{"chat_template_kwargs": {"enable_thinking": False}}, {"think": False},
     {"thinking": {"type": "disabled"}}, {"reasoning_effort": "none"}],
    ids=str,
)  # fmt: skip
def test_thoughts_are_turned_off_where_the_template_has_no_switch(opens, text_parts, fields):
    response = opens.chat("hi", **fields)
    assert response.status_code == 200, response.text
    assert prompt_of(opens, text_parts).endswith("<think>\n\n</think>\n\n")
    assert "x-chunkllama-ignored-fields" not in response.headers


def test_configured_tags(start_server):
    server = start_server(reasoning_tags=("[T]", "[/T]"))
    message = server.chat(said("[T]hm[/T]yes")).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm", "yes")
    off = start_server(template_source=SWITCH, reasoning_tags=("none",))
    message = off.chat(said("<think>hm</think>yes")).json()["choices"][0]["message"]
    assert message["content"] == "<think>hm</think>yes"


@pytest.mark.parametrize("given", ["<a>,</a>", ["<a>,</a>"], ["<a>", "</a>"]])
def test_tags_are_one_text_or_two(given):
    loaded = load_settings({"reasoning_tags": given}, {})
    assert loaded.settings.reasoning_tags == ("<a>", "</a>")


def test_tags_of_a_list_keep_their_white_space():
    loaded = load_settings({"reasoning_tags": ["<a>\n", "\n</a>"]}, {})
    assert loaded.settings.reasoning_tags == ("<a>\n", "\n</a>")


@pytest.mark.parametrize("given", ["<a>", "<a>,<a>", "<a>,<b>,<c>"])
def test_other_numbers_of_tags_are_refused(given):
    with pytest.raises(ConfigError, match="reasoning_tags must be"):
        load_settings({"reasoning_tags": given}, {})


def test_responses_whole(thinking):
    server, begin = thinking
    with server.client() as client:
        response = client.responses.create(model=MODEL, input=said(f"{begin}hm</think>Paris"))
    kinds = [item.type for item in response.output]
    assert kinds == ["reasoning", "message"]
    assert response.output[0].content[0].text == "hm"
    assert response.output_text == "Paris"
    assert response.usage.output_tokens_details.reasoning_tokens == len(f"{begin}hm</think>")


def test_responses_streamed(thinking):
    server, begin = thinking
    with server.client() as client:
        events = list(
            client.responses.create(
                model=MODEL, input=said(f"{begin}let me see</think>Paris"), stream=True
            )
        )
    thoughts = [e.delta for e in events if e.type == "response.reasoning_text.delta"]
    assert "".join(thoughts) == "let me see"
    done = next(e for e in events if e.type == "response.reasoning_text.done")
    assert done.text == "let me see"
    indices = [e.output_index for e in events if e.type == "response.output_item.added"]
    assert indices == [0, 1]
    final = events[-1].response
    assert [item.type for item in final.output] == ["reasoning", "message"]
    assert [item.status for item in final.output] == ["completed", "completed"]
    assert final.output_text == "Paris"
    assert [e.sequence_number for e in events] == list(range(len(events)))


def test_a_response_with_thoughts_can_be_continued(thinking, text_parts):
    server, begin = thinking
    with server.client() as client:
        first = client.responses.create(model=MODEL, input=said(f"{begin}hm</think>Paris"))
        client.responses.create(model=MODEL, input="and?", previous_response_id=first.id)
        items = [item.model_dump(exclude_none=True) for item in first.output]
        client.responses.create(model=MODEL, input=[*items, {"role": "user", "content": "and?"}])
    assert "assistant\nParis<|im_end|>" in prompt_of(server, text_parts)


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning_effort": "none"},
        {"thinking_token_budget": 0},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ],
    ids=["effort", "budget", "argument"],
)
def test_thoughts_turned_off_by_the_template(switch, text_parts, fields):
    switch.engine.reset()
    assert (
        switch.chat(said("Paris"), **fields).json()["choices"][0]["message"]["content"] == "Paris"
    )
    assert prompt_of(switch, text_parts).endswith("assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize("fields", [{"reasoning_effort": "none"}, {"thinking_token_budget": 0}])
def test_thoughts_that_the_template_opens_are_closed(opens, text_parts, fields):
    opens.engine.reset()
    message = opens.chat(said("Paris"), **fields).json()["choices"][0]["message"]
    assert message["content"] == "Paris" and "reasoning_content" not in message
    assert prompt_of(opens, text_parts).endswith("<think>\n\n</think>\n\n")
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], **fields}
    shown = opens.post("/v1/chat/completions/render", body).json()
    assert shown["prompt"].endswith("<think>\n\n</think>\n\n")


def test_an_effort_turns_thoughts_on(switch, text_parts):
    switch.engine.reset()
    switch.chat("x", reasoning_effort="low")
    assert prompt_of(switch, text_parts).endswith("assistant\n")
    switch.chat("x", reasoning_effort="low", chat_template_kwargs={"enable_thinking": False})
    assert prompt_of(switch, text_parts).endswith("</think>\n\n"), "the client's own argument stays"


def test_an_effort_that_the_template_prints(start_server, text_parts):
    server = start_server(template_source=EFFORT)
    server.chat("x", reasoning_effort="high")
    assert prompt_of(server, text_parts).endswith("effort=high")


def test_a_budget_reaches_the_engine(opens):
    opens.engine.reset()
    opens.chat("x", thinking_token_budget=7)
    grammar = opens.engine.requests[0].sampling.grammar
    assert (grammar.kind, grammar.thinking.budget, grammar.thinking.is_open) == ("any", 7, True)
    opens.chat("x", response_format={"type": "json_object"})
    grammar = opens.engine.requests[1].sampling.grammar
    assert (grammar.kind, grammar.thinking.budget) == ("json_object", None)


def test_a_typed_answer_follows_thoughts(thinking):
    server, begin = thinking
    text = begin + 'hm</think>{"a": 1}'
    message = server.chat(said(text), response_format={"type": "json_object"}).json()["choices"][0][
        "message"
    ]
    assert json.loads(message["content"]) == {"a": 1}
    assert message["reasoning_content"] == "hm"


def test_the_next_prompt_hits_up_to_the_answer(thinking, text_parts):
    """Thoughts are dropped from the next prompt, which shares all that stood before them."""
    server, begin = thinking
    messages = [{"role": "user", "content": said(f"{begin}let me see</think>Paris")}]
    body = {"model": MODEL, "messages": messages}
    first = server.post("/v1/chat/completions", body).json()
    message = first["choices"][0]["message"]
    body["messages"] = [*messages, message, {"role": "user", "content": "and Italy?"}]
    second = server.post("/v1/chat/completions", body).json()
    prompt = prompt_of(server, text_parts)
    assert "let me see" not in prompt.partition("assistant\n")[2]
    shared = prompt.partition("assistant\n")
    expected = len((shared[0] + shared[1]).replace("<|im_start|>", "*").replace("<|im_end|>", "*"))
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= expected
