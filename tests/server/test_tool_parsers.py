"""Tool-call parsers: whatever the pieces the text comes in, the same content and calls."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkllama_server.api.tools.parsers import HermesCalls, JsonCalls, PlainText

NAMES = frozenset({"get_weather", "add"})


def read(parser, pieces) -> tuple[str, list[tuple[str, str]]]:
    """Content and (name, arguments) of each call; checks the order of the deltas."""
    content, calls = "", []
    for parsed in [*map(parser.feed, pieces), parser.finish()]:
        content += parsed.content
        for delta in parsed.calls:
            if delta.name is not None:
                assert delta.index == len(calls)
                calls.append((delta.name, ""))
            assert delta.index == len(calls) - 1
            name, arguments = calls[-1]
            calls[-1] = (name, arguments + delta.arguments)
    return content, calls


WEATHER = '{"name": "get_weather", "parameters": {"city": "Pa\\"r}is", "days": [1, {"a": 2}]}}'
WEATHER_ARGUMENTS = '{"city": "Pa\\"r}is", "days": [1, {"a": 2}]}'
ADD = '{"arguments": {"a": 1}, "name": "add"}'
LLAMA = [
    (WEATHER, "", [("get_weather", WEATHER_ARGUMENTS)]),
    (f"<|python_tag|>{WEATHER}", "", [("get_weather", WEATHER_ARGUMENTS)]),
    (f" \n{ADD}; {WEATHER}\n", "", [("add", '{"a": 1}'), ("get_weather", WEATHER_ARGUMENTS)]),
    ('{"name": "add"}', "", [("add", "{}")]),
    ('{"name": "add", "arguments": "{\\"a\\": 1}"}', "", [("add", '{"a": 1}')]),
    ('{"name": "add", "arguments": {"a": 1}, "parameters": {"bcd": 2}}', "", [("add", '{"a": 1}')]),
    ('{"name": "unknown", "parameters": {}}', '{"name": "unknown", "parameters": {}}', []),
    ('{"answer": 42} is it', '{"answer": 42} is it', []),
    ("It is {sunny}.", "It is {sunny}.", []),
    ("  plain", "  plain", []),
    ('{"name": "add", "argum', "", [("add", "")]),
    ('{"nam', '{"nam', []),
    ("<|python", "<|python", []),
    ("", "", []),
]
HERMES = [
    (f"<tool_call>\n{ADD}\n</tool_call>", "", [("add", '{"a": 1}')]),
    (
        f"Sure. <tool_call>{ADD}</tool_call>\n<tool_call>\n{WEATHER}\n</tool_call>",
        "Sure. ",
        [("add", '{"a": 1}'), ("get_weather", WEATHER_ARGUMENTS)],
    ),
    (
        f"<tool_call>[{ADD}, {WEATHER}]</tool_call>",
        "",
        [("add", '{"a": 1}'), ("get_weather", WEATHER_ARGUMENTS)],
    ),
    (f"<tool_call>{ADD}</tool_call> Done.", "Done.", [("add", '{"a": 1}')]),
    ("a < b <tool", "a < b <tool", []),
    ("<tool_call>no json</tool_call>", "<tool_call>no json</tool_call>", []),
    ('<tool_call>{"name": "other"}</tool_call>', '<tool_call>{"name": "other"}</tool_call>', []),
    (
        '<tool_call>\n {"name": "other"}\n</tool_call>',
        '<tool_call>\n {"name": "other"}\n</tool_call>',
        [],
    ),
    (f"<tool_call>{ADD}", "", [("add", '{"a": 1}')]),
    (f"<tool_call>{ADD}</tool_", "", [("add", '{"a": 1}')]),
    ('<tool_call>{"na', '<tool_call>{"na', []),
    ("just text", "just text", []),
]
# What weak models write around a call: arguments end with their own bracket, nothing leaks.
INNER = '{"name": "add", "arguments": {"a": 1}'
ONE = [("add", '{"a": 1}')]
WRAPPED = '{"type": "function", "function": ' + INNER
SHAPES = [
    (INNER, 1),
    (INNER + "}}", 1),
    (WRAPPED + "}}", 1),
    (WRAPPED + "}", 1),
    (f"```json\n{INNER}}}\n```", 1),
    (f"```\n{INNER}}}\n```", 1),
    (f"[{INNER}}}, {INNER}}}]", 2),
]
ODD_HERMES = [(f"<tool_call>\n{shape}\n</tool_call>", "", ONE * count) for shape, count in SHAPES]
ODD_HERMES += [
    (f"<tool_call>\n{INNER}\n</tool_call>\n<tool_call>{ADD}</tool_call>", "", ONE * 2),
    ('<tool_call>{"title": "x"}</tool_call>', '<tool_call>{"title": "x"}</tool_call>', []),
]
ODD_LLAMA = [(shape, "", ONE * count) for shape, count in SHAPES[2:]]
ODD_LLAMA += [
    (f"[TOOL_CALLS][{INNER}}}, {INNER}}}]", "", ONE * 2),
    ("[1, 2]", "[1, 2]", []),
    ('```json\n{"a": 1}\n```', '```json\n{"a": 1}\n```', []),
    ("```python\nx\n```", "```python\nx\n```", []),
    ('{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
]
FORCED = [
    ('[{"name": "add", "arguments": {"a": 1} \n} ]', "", ONE),
    (f"[{ADD}, {WEATHER}]", "", [("add", '{"a": 1}'), ("get_weather", WEATHER_ARGUMENTS)]),
    (f"[ {ADD}", "", [("add", '{"a": 1}')]),
]
CASES = [
    *((lambda: JsonCalls(NAMES), *case) for case in LLAMA),
    *((lambda: HermesCalls(NAMES), *case) for case in HERMES),
    *((lambda: JsonCalls(NAMES, forced=True), *case) for case in FORCED),
    *((lambda: JsonCalls(NAMES), *case) for case in ODD_LLAMA),
    *((lambda: HermesCalls(NAMES), *case) for case in ODD_HERMES),
    (PlainText, WEATHER, WEATHER, []),
]


@pytest.mark.parametrize(("make", "text", "content", "calls"), CASES)
def test_whole_and_character_by_character(make, text, content, calls):
    assert read(make(), [text]) == (content, calls)
    assert read(make(), text) == (content, calls)


def test_an_answer_in_json_streams_although_tools_are_there():
    parser = JsonCalls(NAMES)
    first = parser.feed('{"title": "a long')
    assert first.content == '{"title": "a long'
    assert parser.feed(" text").content == " text"


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_split_reads_the_same(data):
    make, text, content, calls = data.draw(st.sampled_from(CASES))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    bounds = [0, *cuts, len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(bounds)]
    assert read(make(), pieces) == (content, calls)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=5),
        st.text(max_size=12) | st.lists(st.text(max_size=4) | st.integers(), max_size=3),
        max_size=3,
    )
)
def test_arguments_come_through_unchanged(arguments):
    text = json.dumps({"name": "add", "arguments": arguments}, ensure_ascii=False)
    for parser, written in (
        (JsonCalls(NAMES), text),
        (HermesCalls(NAMES), f"<tool_call>{text}</tool_call>"),
    ):
        _, calls = read(parser, written)
        assert [(name, json.loads(given)) for name, given in calls] == [("add", arguments)]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet='{}[]":,\\<tool_call>/ name"add', max_size=60))
def test_nothing_is_lost_where_there_is_no_call(text):
    for parser in (JsonCalls(NAMES), HermesCalls(NAMES)):
        content, calls = read(parser, text)
        if not calls and content.strip(" ,;"):
            assert content == text


@pytest.mark.parametrize(
    "parser",
    [JsonCalls(NAMES, max_calls=1), HermesCalls(NAMES, max_calls=1)],
    ids=["json", "hermes"],
)
def test_calls_beyond_the_limit_are_dropped(parser):
    text = f"{ADD};{WEATHER}"
    if isinstance(parser, HermesCalls):
        text = f"<tool_call>{ADD}</tool_call><tool_call>{WEATHER}</tool_call>"
    assert read(parser, [text]) == ("", [("add", '{"a": 1}')])
