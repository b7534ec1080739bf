"""The beginning of a prompt depends on messages, tools and template arguments alone, and a metric
counts conversations where it changes."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict

import pytest
from fake_engine import MODEL
from prometheus_client import CollectorRegistry

from chunkllama_server.metrics.prompt_heads import PromptHeads

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("add", "get_weather")
]
NAMED = {"type": "function", "function": {"name": "add"}}
CHOICES = [
    None,
    "none",
    "auto",
    "required",
    NAMED,
    *(
        {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [NAMED]}}
        for mode in ("auto", "required")
    ),
]
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
OTHERS = [
    {},
    {"parallel_tool_calls": False},
    {"response_format": SCHEMA},
    {"temperature": 0.5, "max_tokens": 7, "seed": 1, "stop": "x", "n": 2},
    {"user": "u", "metadata": {"a": "b"}, "prompt_cache_key": "k", "service_tier": "flex"},
]
WORDS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


@pytest.fixture(scope="module", params=["template prints tools", "template has no tools"])
def any_template(request, start_server):
    source = None if request.param == "template prints tools" else WORDS
    return start_server(template_source=source)


def test_no_choice_of_tools_changes_the_prompt(any_template):
    """Contract: nothing but messages, tools and template arguments may change the prompt."""
    prompts = set()
    for choice, others in itertools.product(CHOICES, OTHERS):
        any_template.engine.reset()
        fields = {"tools": TOOLS, **others}
        if choice is not None:
            fields["tool_choice"] = choice
        assert any_template.chat("hello", **fields).status_code == 200
        prompts.add(tuple(any_template.engine.requests[0].prompt_token_ids))
    assert len(prompts) == 1


def test_functions_have_the_prompt_of_tools(any_template):
    functions = [tool["function"] for tool in TOOLS]
    prompts = []
    for fields in (
        {"tools": TOOLS},
        {"functions": functions},
        {"functions": functions, "function_call": {"name": "add"}},
        {"functions": functions, "function_call": "none"},
    ):
        any_template.engine.reset()
        assert any_template.chat("hello", **fields).status_code == 200
        prompts.append(any_template.engine.requests[0].prompt_token_ids)
    assert all(prompt == prompts[0] for prompt in prompts)


def counted(server):
    text = server.http().get("/metrics").text
    names = ("kept", "changed")
    return [
        next(
            int(float(line.split()[-1]))
            for line in text.splitlines()
            if line.startswith(f'chunkllama_prompt_heads_total{{head="{name}"}}')
        )
        for name in names
    ]


def ask(server, messages, **fields):
    body = {"model": MODEL, "messages": messages, **fields}
    answer = server.post("/v1/chat/completions", body).json()
    return [*messages, answer["choices"][0]["message"], {"role": "user", "content": "and then?"}]


def test_the_metric_counts_heads_that_change(start_server):
    server = start_server()
    assert counted(server) == [0, 0]
    system = {"role": "system", "content": "It is noon. Answer briefly, and never in French."}
    chat = ask(server, [system, {"role": "user", "content": "hello there"}], tools=TOOLS)
    assert counted(server) == [0, 0], "a first turn"
    chat = ask(server, chat, tools=TOOLS, tool_choice="none")
    assert counted(server) == [1, 0]
    chat[0] = {"role": "system", "content": "It is one o'clock. Answer briefly, never in French."}
    chat = ask(server, chat, tools=TOOLS)
    assert counted(server) == [1, 1], "the system message changed"
    ask(server, chat, tools=TOOLS[:1])
    assert counted(server) == [1, 2], "the tools changed"


def test_forgotten_prompts_are_not_counted():
    heads = PromptHeads(CollectorRegistry(), capacity=2)
    turns = [[{"role": "user", "content": str(i)}] for i in range(3)]
    for turn in turns:
        assert heads.observe("", turn, list(range(100))) is None
    answer = {"role": "assistant", "content": "a"}
    assert heads.observe("", [*turns[0], answer], list(range(120))) is None
    assert heads.observe("", [*turns[2], answer], list(range(120))) is True
    assert heads.observe("other", [*turns[2], answer], list(range(120))) is None


def test_two_threads_may_observe_at_once():
    """The second forgets the first's prompt between its steps, if it gets that far."""
    heads = PromptHeads(CollectorRegistry(), capacity=1)
    prompts = [[{"role": "user", "content": text}] for text in "ab"]
    second = threading.Thread(target=heads.observe, args=("", prompts[1], [1]))

    class Interrupted(OrderedDict):
        def __setitem__(self, key, value) -> None:
            super().__setitem__(key, value)
            if threading.current_thread() is not second:
                second.start()
                second.join(0.2)  # with the lock it waits for this thread

    heads._heads = Interrupted()
    heads.observe("", prompts[0], [1])
    second.join()
    assert len(heads._heads) == 1
