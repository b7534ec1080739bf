"""Tool-call parsers: whatever the pieces the text comes in, the same content and calls."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkllama_server.api.tools.brackets import ObjectReader
from chunkllama_server.api.tools.call_forms import JsonCall, NamedCall
from chunkllama_server.api.tools.families import FAMILY_TAGS, all_tags
from chunkllama_server.api.tools.parameter_call import ParameterCall
from chunkllama_server.api.tools.parsers import CallReader, PlainText
from chunkllama_server.api.tools.python_call import PythonCall

FUNCTIONS = {
    "get_weather": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    },
    "add": {
        "type": "object",
        "properties": {
            "a": {"type": "integer"},
            "b": {"anyOf": [{"type": "number"}, {"type": "null"}]},
            "on": {"type": "boolean"},
            "list": {"type": "array"},
            "text": {"type": ["string", "null"]},
        },
    },
    "now": {},
}


def reader(family=None, **options) -> CallReader:
    """A reader of all families, or of a configured one."""
    tags = all_tags(None) if family is None else FAMILY_TAGS[family]
    return CallReader(FUNCTIONS, tags, bare_python=family == "pythonic", **options)


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
ONE = [("add", '{"a": 1}')]
BOTH = [*ONE, ("get_weather", WEATHER_ARGUMENTS)]
OSLO = [("get_weather", '{"city": "Oslo"}')]
OSLO_JSON = '{"city": "Oslo"}'
# Per family: what it is taught to write, then what weak models of it write; (text, content, calls).
TAUGHT = {
    "hermes": [
        (f"<tool_call>\n{ADD}\n</tool_call>", "", ONE),
        (
            f"Sure. <tool_call>{ADD}</tool_call>\n<tool_call>\n{WEATHER}\n</tool_call>",
            "Sure. ",
            BOTH,
        ),
        (f"<tool_call>[{ADD}, {WEATHER}]</tool_call>", "", BOTH),
        (f"<tool_call>{ADD}</tool_call>  \n Done.", "Done.", ONE),
        (f"\n\n<tool_call>{ADD}</tool_call>", "", ONE),
        (f"<tool_calls>[{ADD}]</tool_calls>", "", ONE),
    ],
    "llama3_json": [
        (WEATHER, "", [("get_weather", WEATHER_ARGUMENTS)]),
        (f"<|python_tag|>{WEATHER}", "", [("get_weather", WEATHER_ARGUMENTS)]),
        (f" \n{ADD}; {WEATHER}\n", "", BOTH),
        (f"<function=get_weather>{OSLO_JSON}</function>", "", OSLO),
        ('<|python_tag|>get_weather.call(city="Oslo")', "", OSLO),
        ('{"name": "add"}', "", [("add", "{}")]),
    ],
    "mistral": [
        (f"[TOOL_CALLS][{ADD}, {WEATHER}]", "", BOTH),
        ('[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}, "id": "a1B2c3D4e"}]', "", ONE),
        (f"[TOOL_CALLS]get_weather[ARGS]{OSLO_JSON}", "", OSLO),
        (f"[TOOL_CALLS]get_weather[CALL_ID]a1B2c3D4e[ARGS]{OSLO_JSON}", "", OSLO),
        (f'[TOOL_CALLS]add{{"a": 1}}[TOOL_CALLS]get_weather{OSLO_JSON}', "", ONE + OSLO),
        (f"Let me look.[TOOL_CALLS]get_weather{OSLO_JSON}", "Let me look.", OSLO),
    ],
    "pythonic": [
        ('[get_weather(city="Oslo")]', "", OSLO),
        ('[add(a=1), get_weather(city="Oslo")]', "", ONE + OSLO),
        ('<|python_start|>[get_weather(city="Oslo")]<|python_end|>', "", OSLO),
        ('<function_calls>\nadd(a=1)\nget_weather(city="Oslo")\n</function_calls>', "", ONE + OSLO),
        ("<|tool_call_start|>[add(a=1)]<|tool_call_end|>Done.", "Done.", ONE),
        ('```tool_code\nget_weather(city="Oslo")\n```', "", OSLO),
        ("get_weather(city='Oslo')", "", OSLO),
        (
            "[add(a=-1, b=1.5, on=True, list=[1, {'k': None}], text='a)\"')]",
            "",
            [("add", '{"a": -1, "b": 1.5, "on": true, "list": [1, {"k": null}], "text": "a)\\""}')],
        ),
        ("[add(a=1, on=true, text=null)]", "", [("add", '{"a": 1, "on": true, "text": null}')]),
        ('[get_weather("Oslo", 3)]', "", [("get_weather", '{"city": "Oslo", "days": 3}')]),
        ("[now()]", "", [("now", "{}")]),
        (
            '[get_weather(city="""a\n"b" \'c)""")]',
            "",
            [("get_weather", json.dumps({"city": 'a\n"b" \'c)'}))],
        ),
    ],
    "qwen3_coder": [
        (
            "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n"
            "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
            "",
            [("get_weather", '{"city": "Oslo", "days": 3}')],
        ),
        ("<tool_call>\n<function=now>\n</function>\n</tool_call>", "", [("now", "{}")]),
        (
            "I look.\n<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n"
            "</tool_call>\n<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n"
            "</function>\n</tool_call>",
            "I look.\n",
            ONE + OSLO,
        ),
        (
            "<function=get_weather>\n<parameter=city>\na < b\n<i>\n\n</parameter>\n</function>",
            "",
            [("get_weather", '{"city": "a < b\\n<i>\\n"}')],
        ),
        (
            "<seed:tool_call><function=add><parameter=a>1</parameter></function></seed:tool_call>",
            "",
            ONE,
        ),
        ('<invoke name="add"><parameter name="a">1</parameter></invoke>', "", ONE),
        (
            "<function=add><parameter=a>1</parameter><parameter=b>null</parameter>"
            "<parameter=on>True</parameter><parameter=list>[1, 2]</parameter>"
            "<parameter=text>null</parameter></function>",
            "",
            [("add", '{"a": 1, "b": null, "on": true, "list": [1, 2], "text": null}')],
        ),
    ],
    "deepseek_v3": [
        (
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
            f"{OSLO_JSON}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            "",
            OSLO,
        ),
        (
            f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{OSLO_JSON}"
            '<｜tool▁call▁end｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>'
            "<｜tool▁calls▁end｜>",
            "",
            OSLO + ONE,
        ),
    ],
    "granite": [
        (f"<|tool_call|>[{ADD}, {WEATHER}]", "", BOTH),
        (f"<tool_call>[{ADD}]", "", ONE),
        (f"<function_call> {ADD}", "", ONE),
    ],
    "phi4_mini_json": [
        (f"functools[{ADD}, {WEATHER}]", "", BOTH),
        (f"<|tool_call|>[{ADD}]<|/tool_call|>", "", ONE),
    ],
    "functionary": [
        (f">>>get_weather\n{OSLO_JSON}", "", OSLO),
        (f'get_weather\n{OSLO_JSON}>>>add\n{{"a": 1}}', "", OSLO + ONE),
        (f"<|recipient|>get_weather\n<|content|>{OSLO_JSON}", "", OSLO),
        (f"<function=get_weather>{OSLO_JSON}</function>", "", OSLO),
    ],
    "kimi_k2": [
        (
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
            f"<|tool_call_argument_begin|>{OSLO_JSON}<|tool_call_end|><|tool_calls_section_end|>",
            "",
            OSLO,
        ),
    ],
}
# Read whatever the family: objects as weak models write them, at the answer's beginning.
INNER = '{"name": "add", "arguments": {"a": 1}'
WRAPPED = '{"type": "function", "function": ' + INNER
SHAPES = [
    (INNER, ONE),
    (INNER + "}}", ONE),
    (WRAPPED + "}}", ONE),
    (WRAPPED + "}", ONE),
    (f"```json\n{INNER}}}\n```", ONE),
    (f"```\n{INNER}}}\n```", ONE),
    (f"[{INNER}}}, {INNER}}}]", ONE * 2),
    (f"[{INNER}, {INNER}]", ONE * 2),
    (f'{{"tool_calls": [{INNER}}}, {INNER}}}]}}', ONE * 2),
    (f'{{"tool_call": {INNER}}}}}', ONE),
    (f'{{"function_call": {INNER}}}}}', ONE),
    ('{"function": "add", "arguments": {"a": 1}}', ONE),
    ('{"tool": "add", "args": {"a": 1}}', ONE),
    ('{"action": "add", "action_input": {"a": 1}}', ONE),
    ('{"tool_call_id": "0", "tool_name": "add", "parameters": {"a": 1}}', ONE),
    ('{"name": "functions.add", "arguments": {"a": 1}}', ONE),
    ('{"add": {"a": 1}}', ONE),
    ('{"name": "add", "arguments": "{\\"a\\": 1}"}', ONE),
    ("{'name': 'add', 'arguments': {'a': 1}}", ONE),
    ('{"name": "add", "arguments": {"a": 1,}}', ONE),
    ('{"name": "add", "arguments": {"a": 1}, "parameters": {"bcd": 2}}', ONE),
    ('{"name": "add", "arguments": null}', [("add", "{}")]),
    ('{"name": "add", "arguments": [1]}', [("add", "{}")]),
    (
        "{\"name\": \"add\", \"arguments\": {'on': True, 'text': 'say \"it\\'s\"', 'b': None}}",
        [("add", '{"on": true, "text": "say \\"it\'s\\"", "b": null}')],
    ),
    (
        '{"name": "add", "arguments": {"text": "two\nlines\t\\_"}}',
        [("add", '{"text": "two\\nlines\\t\\\\_"}')],
    ),
]
ODD = [
    *((shape, "", calls) for shape, calls in SHAPES),
    *((f"<tool_call>\n{shape}\n</tool_call>", "", calls) for shape, calls in SHAPES),
    (f"<tool_call>\n{INNER}\n</tool_call>\n<tool_call>{ADD}</tool_call>", "", ONE * 2),
    ('<tool_call>{"name": "add", "arguments": {"a": 1</tool_call>', "", ONE),
    (
        '<tool_call>{"name": "add", "arguments": {"list": [1</tool_call>',
        "",
        [("add", '{"list": [1]}')],
    ),
    ("<tool_call>\n<function=add>\n<parameter=a>\n1\n</tool_call>", "", ONE),
    (
        "<function=add><parameter=a>1<parameter=on>false</function>",
        "",
        [("add", '{"a": 1, "on": false}')],
    ),
    ("<function=add><parameter=a>1</parameter>", "", ONE),
    (f"<tool_call>{ADD}", "", ONE),
    (f"<tool_call>{ADD}</tool_", "", ONE),
    (f"<tool_call><tool_call>{ADD}</tool_call>", "", ONE),
    (
        f"<tool_call>nothing</tool_call><tool_call>{ADD}</tool_call>",
        "<tool_call>nothing</tool_call>",
        ONE,
    ),
    (f"<tool_call>{ADD}</tool_call>{ADD}", "", ONE * 2),
    ('{"name": "add", "argum', "", [("add", "")]),
    # A member that no call has: behind the arguments it is left out, before them it is no call.
    (f'{INNER}, "reason": "y"}}', "", ONE),
    (f'{INNER}, "reason": {{"b": 2}}}}; {ADD}', "", ONE * 2),
    (f'{INNER}, "tool_calls": [{ADD}]}}', "", ONE),
    ('{"arguments": {"a": 1}, "reason": "y", "name": "add"}', "", ONE),
    (
        f'{{"name": "add", "description": "x"}} <tool_call>{ADD}</tool_call>',
        '{"name": "add", "description": "x"} ',
        ONE,
    ),
    (
        f'{{"name": "add", "description": "x" <tool_call>{ADD}</tool_call>',
        '{"name": "add", "description": "x" ',
        ONE,
    ),
]
# What only looks like the beginning of a call is content, character for character.
NO_CALLS = [
    "",
    "just text",
    "  plain",
    "It is {sunny}.",
    "a < b <tool",
    "<|python",
    "[1, 2]",
    "address book",
    "add (a) and (b)",
    "add(a=1) is a call in Python",
    "[add(a=unknown)]",
    "[add(1, 2, 3, 4, 5, 6)]",
    ">>> add(1)",
    '{"nam',
    '{"answer": 42} is it',
    '{"name": "unknown", "parameters": {}}',
    '{"name": "Bob", "age": 3}',
    '{"name": "get_weather", "description": "x"}',
    '{"type": "function", "function": {"name": "add", "description": "x"}}',
    '{"arguments": {"a": 1}, "name": "other"}',
    '```json\n{"a": 1}\n```',
    "```python\nx\n```",
    "<tool_call>no json</tool_call>",
    '<tool_call>{"name": "other"}</tool_call>',
    '<tool_call>\n {"name": "other"}\n</tool_call>',
    '<tool_call>{"title": "x"}</tool_call>',
    '<tool_call>{"na',
    "<function=other><parameter=a>1</parameter></function>",
    "<function=add",
    "[TOOL_CALLS]other{}",
    "functools[1, 2]",
    "Use `<tool_call>` tags.",
    "<|python_tag|>print(1)",
]
FORCED = [
    ('[{"name": "add", "arguments": {"a": 1} \n} ]', "", ONE),
    (f"[{ADD}, {WEATHER}]", "", BOTH),
    (f"[ {ADD}", "", ONE),
]
ANY = (
    "llama3_json",
    "mistral",
    "qwen3_coder",
    "deepseek_v3",
    "granite",
    "phi4_mini_json",
    "kimi_k2",
)
CASES = [
    *((lambda f=family: reader(f), *case) for family, cases in TAUGHT.items() for case in cases),
    *((reader, *case) for family in ("hermes", *ANY) for case in TAUGHT[family]),
    *((reader, *case) for case in ODD),
    *((reader, text, text, []) for text in NO_CALLS),
    *((lambda: reader(forced=True), *case) for case in FORCED),
    (PlainText, WEATHER, WEATHER, []),
]


@pytest.mark.parametrize(("make", "text", "content", "calls"), CASES)
def test_whole_and_at_every_split(make, text, content, calls):
    assert read(make(), [text]) == (content, calls)
    assert read(make(), text) == (content, calls)
    for cut in range(1, len(text)):
        assert read(make(), [text[:cut], text[cut:]]) == (content, calls), cut


def test_arguments_are_json():
    for _, _, _, calls in CASES:
        for _, arguments in calls:
            assert arguments == "" or isinstance(json.loads(arguments), dict)


def test_an_answer_in_json_streams_although_tools_are_there():
    parser = reader()
    first = parser.feed('{"title": "a long')
    assert first.content == '{"title": "a long'
    assert parser.feed(" text").content == " text"


def test_an_answer_in_words_streams_from_its_first_word():
    assert reader().feed("The").content == "The"


@pytest.mark.parametrize(
    "text",
    [
        f"<tool_call>{ADD.replace('1', '1234')}",
        '[TOOL_CALLS]add[ARGS]{"a": 1234',
        "<function=add><parameter=a>1234</parameter>",
    ],
)
def test_arguments_stream_before_the_call_ends(text):
    parser, arguments = reader(), ""
    for char in text:
        arguments += "".join(delta.arguments for delta in parser.feed(char).calls)
    assert arguments.startswith('{"a": 1234')


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_split_reads_the_same(data):
    make, text, content, calls = data.draw(st.sampled_from(CASES))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    bounds = [0, *cuts, len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(bounds)]
    assert read(make(), pieces) == (content, calls)


PIECES = [
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<function=add>", "</function>", "[ARGS]"),
    *("<parameter=a>", "</parameter>", "add", "(", ")", "{", "}", "[", "]", '"', "'", ":", ","),
    *('"name": ', '"add"', '"arguments": ', '{"a": 1}', "\\", "\n", " ", "```json\n", "x", "<"),
    *("<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>", "functools[", "<|python_tag|>", "a=1", "null"),
]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=14))
def test_any_text_reads_the_same_whole_and_by_characters(pieces):
    text = "".join(pieces)
    whole = read(reader(), [text])
    assert read(reader(), pieces) == whole
    assert read(reader(), text) == whole
    content, calls = whole
    if not calls:
        assert content == text


MEMBERS = [
    *('"name": "add"', '"name": "other"', '"function": {"name": "add"}', '"add": {"a": 1}'),
    *('"arguments": {"a": 1}', '"parameters": "{}"', '"args": 1', '"reason": "y"', '"x": {"b": 2}'),
    *('"tool_calls": [{"name": "now"}]', '"function": {"x": 1}', '"id": "0"', '"type": "function"'),
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(MEMBERS), max_size=5), st.sampled_from(["}", "", f"}}; {ADD}"]))
def test_any_object_reads_the_same_at_every_split(members, end):
    text = "{" + ", ".join(members) + end
    whole = read(reader(), [text])
    assert read(reader(), text) == whole
    for cut in range(1, len(text)):
        assert read(reader(), [text[:cut], text[cut:]]) == whole, cut


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
ARGUMENTS = st.dictionaries(st.text(max_size=5), JSON, max_size=3)


@settings(max_examples=100, deadline=None)
@given(ARGUMENTS, st.booleans(), st.sampled_from([None, 2]))
def test_valid_arguments_come_through_byte_for_byte(arguments, ascii_only, indent):
    given_text = json.dumps(arguments, ensure_ascii=ascii_only, indent=indent)
    call = f'{{"name": "add", "arguments": {given_text}}}'
    for text in (call, f"<tool_call>{call}</tool_call>", f"[TOOL_CALLS]add[ARGS]{given_text}"):
        assert read(reader(), text) == ("", [("add", given_text)])


@settings(max_examples=100, deadline=None)
@given(ARGUMENTS)
def test_python_arguments_have_the_same_values(arguments):
    named = {f"k{i}": value for i, value in enumerate(arguments.values())}
    written = ", ".join(f"{key}={value!r}" for key, value in named.items())
    (call,) = read(reader(), f"[add({written})]")[1]
    assert json.loads(call[1]) == named


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="{}[]\"':,\\ \n\tTrue1e", max_size=30))
def test_what_follows_an_open_bracket_becomes_json(text):
    parser, written = ObjectReader(), ""
    for char in "{" + text:
        if parser.is_complete:
            break
        written += parser.feed(char)
    if not parser.is_complete:
        written += parser.end()
    assert written.startswith("{") and written.endswith("}")
    try:
        expected = json.loads("{" + text)
    except ValueError:
        return
    assert json.loads(written) == expected


def test_special_tags_are_never_content():
    parser = reader(hidden=frozenset({"<tool_call>", "</tool_call>"}))
    assert read(parser, "a<tool_call>b</tool_call>c") == ("abc", [])


@pytest.mark.parametrize(
    "text",
    [
        f"{ADD};{WEATHER}",
        f"<tool_call>{ADD}</tool_call><tool_call>{WEATHER}</tool_call>",
        '[add(a=1), get_weather(city="Oslo")]',
    ],
)
def test_calls_beyond_the_limit_are_dropped(text):
    assert read(reader(max_calls=1), [text]) == ("", ONE)


def test_a_long_opening_without_a_call_is_given_up():
    text = "[" * 400
    assert read(reader(), text) == (text, [])
    assert len(reader().feed(text).content) > 300


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "[NaN]", '{"x": Infinity}'])
def test_constants_that_json_lacks_are_text(value):
    text = f"<function=now><parameter=n>{value}</parameter></function>"
    assert read(reader(), text) == ("", [("now", json.dumps({"n": value}))])


def test_odd_types_of_a_parameter_are_passed_over():
    functions = {"f": {"properties": {"a": {"type": [{"type": "string"}, "integer", ["x"]]}}}}
    parser = CallReader(functions, all_tags(None))
    text = "<function=f><parameter=a>1</parameter></function>"
    assert read(parser, [text]) == ("", [("f", '{"a": 1}')])


def test_a_python_call_beyond_its_limit_is_text_whole_and_in_pieces():
    longest, longer = (f"[add(text='{'x' * (65536 - 7 + more)}')]" for more in (0, 1))
    for text, num_calls in ((longest, 1), (longer + f"<tool_call>{ADD}", 1), (longer, 0)):
        whole = read(reader(), [text])
        assert len(whole[1]) == num_calls
        assert read(reader(), [text[:40000], text[40000:]]) == whole
        assert read(reader(), [text[:65530], *text[65530:]]) == whole


class CountedText(str):
    """Counts the characters that are searched or copied, in all texts made of it."""

    num_chars = 0

    def _made(self, text: str) -> CountedText:
        CountedText.num_chars += len(text)
        return CountedText(text)

    def __add__(self, other):
        return self._made(str(self) + str(other))

    def __radd__(self, other):
        return self._made(str(other) + str(self))

    def __getitem__(self, key):
        return self._made(str(self)[key])

    def find(self, *args):
        CountedText.num_chars += len(self)
        return str.find(self, *args)


@pytest.mark.parametrize("cut", [1, 7])
def test_a_long_value_is_searched_and_copied_once(cut):
    def cost(size: int) -> int:
        call = ParameterCall({"f": {}}, "f", "<function=f>")
        text = f"<parameter=a>{'<x' * size}</parameter></function>"
        CountedText.num_chars = 0
        for start in range(0, len(text), cut):
            call.feed(CountedText(text[start : start + cut]))
        assert call.is_complete
        assert json.loads(call.take_arguments()) == {"a": "<x" * size}
        assert call.raw == "<function=f>" + text
        return CountedText.num_chars

    assert 1.5 * cost(1000) < cost(2000) < 2.1 * cost(1000)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (NamedCall(FUNCTIONS, "add", ""), '"text": "%s"}'),
        (JsonCall(FUNCTIONS), '{"name": "add", "arguments": {"text": "%s"}}'),
        (PythonCall(FUNCTIONS, "add", ""), 'text="%s")'),
    ],
)
def test_what_a_call_has_read_in_pieces(call, text):
    text %= "x" * 100
    for start in range(0, len(text), 7):
        call.feed(text[start : start + 7])
    assert call.is_complete
    assert call.raw == text
    assert json.loads(call.take_arguments()) == {"text": "x" * 100}
