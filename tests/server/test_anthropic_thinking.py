"""Thoughts of Anthropic's Messages API by its own client, and token counts with and without."""

from __future__ import annotations

import pytest
from anthropic.types import MessageTokensCount
from anthropic_helpers import (
    PATH,
    WEATHER,
    accumulated,
    body_of,
    events_of,
    prompt_of,
    say,
    sdk,
)
from fake_engine import MODEL

THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)


@pytest.fixture(scope="module")
def thinker(start_server):
    return start_server(template_source=THINKS)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"system": "rules"},
        {"tools": [WEATHER]},
        {"system": [{"type": "text", "text": "a"}], "tool_choice": {"type": "auto"}},
        {"thinking": {"type": "enabled", "budget_tokens": 50}},
        {"thinking": {"type": "disabled"}, "tools": [WEATHER]},
        {"thinking": {"type": "enabled", "budget_tokens": 50}, "tools": [WEATHER]},
    ],
)
@pytest.mark.parametrize("thinks", [False, True])
def test_count_tokens(server, thinker, fields, thinks) -> None:
    asked = thinker if thinks else server
    asked.engine.reset()
    body = {"model": MODEL, "messages": say("x"), **fields}
    counted = asked.post(f"{PATH}/count_tokens", body)
    assert asked.engine.requests == []
    found = MessageTokensCount.model_validate(counted.json(), strict=True)
    assert found.model_extra == {}
    usage = asked.post(PATH, body_of(**body)).json()["usage"]
    assert found.input_tokens == usage["input_tokens"] > 0
    by_client = sdk(asked).messages.count_tokens(model=MODEL, messages=say("x"), **fields)
    assert by_client.input_tokens == found.input_tokens


def test_thinking(thinker, text_parts) -> None:
    thinker.engine.reset()
    client = sdk(thinker)
    asked = say("<think>let me see</think>\n\nParis")
    with client.messages.stream(
        model=MODEL,
        max_tokens=200,
        messages=asked,
        thinking={"type": "enabled", "budget_tokens": 50},
    ) as got:
        final = got.get_final_message()
    thoughts, text = final.content
    assert (thoughts.type, thoughts.thinking, text.text) == ("thinking", "let me see", "Paris")
    assert thoughts.signature
    assert final.usage.output_tokens_details.thinking_tokens > 0
    follow = [*asked, {"role": "assistant", "content": final.content}, *say("x")]
    client.messages.create(model=MODEL, max_tokens=9, messages=follow)
    assert "<think>let me see</think>Paris" in prompt_of(thinker, text_parts)


def test_a_budget_of_thoughts_reaches_the_engine(start_server) -> None:
    """A template that opens the thoughts itself, as DeepSeek's."""
    opens = start_server(template_source=f"{THINKS}{{% if true %}}<think>\n{{% endif %}}")
    thinking = {"type": "enabled", "budget_tokens": 50}
    body = body_of(say("so</think>\n\nParis"), thinking=thinking)
    blocks = opens.post(PATH, body).json()["content"]
    assert [block["type"] for block in blocks] == ["thinking", "text"]
    assert opens.engine.requests[-1].sampling.grammar.thinking.budget == 50


@pytest.mark.parametrize("config", [None, {"type": "disabled"}])
def test_thoughts_are_off_unless_asked_for(thinker, text_parts, config) -> None:
    thinker.engine.reset()
    fields = {} if config is None else {"thinking": config}
    answer = thinker.post(PATH, body_of(say("Paris"), **fields)).json()
    assert [block["type"] for block in answer["content"]] == ["text"]
    assert prompt_of(thinker, text_parts).endswith("<think>\n\n</think>\n\n")


def test_omitted_thoughts_are_signed(thinker) -> None:
    thinker.engine.reset()
    thinking = {"type": "adaptive", "display": "omitted"}
    body = body_of(say("<think>secret</think>\n\nParis"), thinking=thinking)
    answer = thinker.post(PATH, body).json()
    block = answer["content"][0]
    assert (block["type"], block["thinking"]) == ("thinking", "")
    assert block["signature"]
    streamed = accumulated(events_of(thinker, body))
    assert streamed["content"] == answer["content"]


def test_thinking_of_a_model_without_thoughts_is_named(server) -> None:
    body = body_of(say("x"), thinking={"type": "enabled", "budget_tokens": 99})
    response = server.post(PATH, body)
    assert response.status_code == 200
    assert response.headers["x-chunkllama-ignored-fields"] == "thinking"
