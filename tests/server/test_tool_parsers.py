"""Tool-call parsers: the same content and calls for any pieces that the text arrives in."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tool_corpus import (
    ADD,
    CASES,
    FUNCTIONS,
    ONE,
    WEATHER,
    order,
    read,
    reader,
)

from chunkllama_server.api.tools.brackets import ObjectReader
from chunkllama_server.api.tools.call_forms import JsonCall, NamedCall
from chunkllama_server.api.tools.escaped_call import EscapedCall
from chunkllama_server.api.tools.families import all_tags
from chunkllama_server.api.tools.parameter_call import ParameterCall
from chunkllama_server.api.tools.parameter_tags import PARAMETER
from chunkllama_server.api.tools.parsers import CallReader
from chunkllama_server.api.tools.python_call import PythonCall


@pytest.mark.parametrize(("make", "text", "content", "calls"), CASES)
def test_whole_and_at_every_split(make, text, content, calls):
    assert read(make(), [text]) == (content, calls)
    assert read(make(), text) == (content, calls)
    assert order(make(), text) == order(make(), [text])
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


def test_a_text_streams_before_its_end():
    """A file that is written as one parameter comes line by line."""
    parser, arguments = reader(), ""
    for char in '<function=get_weather>\n<parameter=city>\nOne "line"\nand another one':
        arguments += "".join(delta.arguments for delta in parser.feed(char).calls)
    assert arguments.startswith('{"city": "One \\"line\\"\\nand')


@pytest.mark.parametrize("cut", ["", "\n", "\n</para", "</parameter"])
def test_a_text_that_is_cut_is_kept(cut):
    text = f"<function=get_weather>\n<parameter=city>\nOslo\nBergen{cut}"
    expected = ("", [("get_weather", '{"city": "Oslo\\nBergen')])
    assert read(reader(), [text]) == read(reader(), text) == expected


ENDS = PARAMETER.value_ends
LISTS = st.lists(
    st.lists(st.sampled_from([*ENDS, '"', "\\", "\n", "x", "{", "]"]), max_size=5).map("".join),
    max_size=3,
)


@settings(max_examples=100, deadline=None)
@given(LISTS, st.sampled_from([None, 1]), st.booleans())
def test_a_list_may_have_any_text(values, indent, is_last):
    written = json.dumps(values, indent=indent)
    more = "" if is_last else "<parameter=a>1</parameter>"
    text = f"<function=add>\n<parameter=list>\n{written}\n</parameter>\n{more}</function>"
    expected = {"list": values} if is_last else {"list": values, "a": 1}
    ((_, arguments),) = read(reader(), [text])[1]
    assert json.loads(arguments) == expected
    assert read(reader(), text) == ("", [("add", arguments)])


def test_the_end_of_a_string_is_not_waited_for_without_end():
    broken = '<function=add><parameter=list>[5"</parameter></function>'
    parser = reader()
    (call,) = read(parser, [broken, "x" * (1 << 16), "y"])[1]
    assert call == ("add", '{"list": "[5\\""}')
    parser = reader()
    parser.feed(broken)
    assert parser.feed("x" * (1 << 17)).content.startswith("xxx")


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
    *(
        "<parameter=a>",
        "<parameter=list>[",
        "</parameter>",
        "add",
        "(",
        ")",
        "{",
        "}",
        "[",
        "]",
        '"',
        "'",
        ":",
        ",",
    ),
    *('"name": ', '"add"', '"arguments": ', '{"a": 1}', "\\", "\n", " ", "```json\n", "x", "<"),
    *("<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>", "functools[", "<|python_tag|>", "a=1", "null"),
    *("<arg_key>", "a", "</arg_key>", "<arg_value>", "</arg_value>", '<invoke name="add">'),
    *("<start_function_call>", "call:add{", "a:", "<escape>", "<end_function_call>"),
    *('<｜DSML｜invoke name="add">', '<｜DSML｜parameter name="text" string="true">', "now"),
]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=14))
def test_any_text_reads_the_same_whole_and_by_characters(pieces):
    text = "".join(pieces)
    whole = read(reader(), [text])
    assert read(reader(), pieces) == whole
    assert read(reader(), text) == whole
    assert order(reader(), text) == order(reader(), [text])
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
def test_an_escaped_call_may_have_json(arguments):
    text = json.dumps(arguments)
    assert read(reader(), f"<start_function_call>call:add{text}") == ("", [("add", text)])


ESCAPED = [
    *("a:", "b", ":", ",", ", ", "'", '"', "{", "}", "[", "]", "<", "<escape>", '<|"|>', "x y"),
    *("02", "1", "True", "//", "\\", "<end_function_call>"),
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(ESCAPED), max_size=14))
def test_any_escaped_call_is_json_and_the_same_at_every_split(pieces):
    text = f"<start_function_call>call:add{{{''.join(pieces)}"
    closed = read(reader(), text)
    assert read(reader(), [text]) == closed
    for cut in range(1, len(text)):
        assert read(reader(), [text[:cut], text[cut:]]) == closed
    call = EscapedCall(FUNCTIONS, "add", "")
    call.feed("".join(pieces))
    if call.is_complete and "\\" not in text:
        assert isinstance(json.loads(call.take_arguments()), dict)


@pytest.mark.parametrize("part", ["x", ", ", ", a", "<", "[", "]", "'"])
@pytest.mark.parametrize("cut", [1, None])
def test_a_long_unmarked_text_is_searched_and_copied_once(part, cut):
    def cost(size: int) -> int:
        call = EscapedCall(FUNCTIONS, "add", "")
        text = f"text:x{part * (size // len(part))}z}}"
        CountedText.num_chars = 0
        for start in range(0, len(text), cut or len(text)):
            call.feed(CountedText(text[start : start + (cut or len(text))]))
        assert call.is_complete
        assert json.loads(call.take_arguments()) == {"text": text[5:-1]}
        return CountedText.num_chars

    small, middle, large = map(cost, (4000, 8000, 16000))
    assert large - middle < 2.2 * (middle - small)


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

    def lstrip(self, *args):
        return CountedText(str.lstrip(self, *args))

    def removeprefix(self, *args):
        return CountedText(str.removeprefix(self, *args))

    def find(self, *args):
        CountedText.num_chars += len(self)
        return str.find(self, *args)


def parameter_text(kind: str | None, size: int) -> tuple[str, dict]:
    """Tags of parameters with a text of the given size, and the arguments."""
    if kind == "open tag":
        return f"<parameter={'x' * size}</parameter>", {}
    if kind == "many":
        arguments = {f"p{i}": i for i in range(size // 8)}
        tags = (f"<parameter={name}>{i}</parameter>" for name, i in arguments.items())
        return "".join(tags), arguments
    value = ["</invoke>" * (size // 8)] if kind == "array" else "<x" * size
    text = value if isinstance(value, str) else json.dumps(value)
    return f"<parameter=a>{text}</parameter>", {"a": value}


@pytest.mark.parametrize("cut", [1, 7, None])
@pytest.mark.parametrize("kind", [None, "string", "array", "open tag", "many"])
def test_a_long_value_is_searched_and_copied_once(kind, cut):
    schema = {"properties": {"a": {"type": kind}}} if kind else {}

    def cost(size: int) -> int:
        call = ParameterCall({"f": schema}, "f", "<function=f>")
        text, arguments = parameter_text(kind, size)
        text += "</function>"
        CountedText.num_chars = 0
        for start in range(0, len(text), cut or len(text)):
            call.feed(CountedText(text[start : start + (cut or len(text))]))
        assert call.is_complete
        assert json.loads(call.take_arguments()) == arguments
        assert call.raw == "<function=f>" + text
        return CountedText.num_chars

    sizes = (8000, 16000, 32000) if cut is None else (1000, 2000, 4000)
    small, middle, large = map(cost, sizes)
    assert large - middle < 2.2 * (middle - small)


def test_a_tag_is_closed_within_its_limit_whole_and_in_pieces():
    for num_spaces, arguments in ((400, {"a": 1, "list": [2]}), (600, {"list": [2]})):
        tag = f"<parameter=a{' ' * num_spaces}>"
        text = f"<function=add>{tag}1</parameter><parameter=list>[2]</parameter></function>"
        ((_, whole),) = read(reader(), [text])[1]
        assert json.loads(whole) == arguments
        assert read(reader(), text) == ("", [("add", whole)])


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


LEVEL = {"enum": ["1", "2"]}
NUMBER = {"type": "integer"}


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"$ref": "#/$defs/Number"}, "5", 5),
        ({"$ref": "#/$defs/Level"}, "2", "2"),
        ({"anyOf": [{"$ref": "#/$defs/Number"}, {"type": "null"}]}, "null", None),
        ({"allOf": [{"$ref": "#/$defs/Level"}], "default": "1"}, "1", "1"),
        ({"anyOf": [{"type": "number"}]}, "1.5", 1.5),
        ({"type": "INTEGER"}, "5", 5),
        ({"type": "dict"}, '{"a": 1}', {"a": 1}),
        ({"type": "str"}, "5", "5"),
        ({"const": "5"}, "5", "5"),
        ({"enum": [1, 2]}, "2", 2),
        ({"$ref": "#/$defs/Loop"}, "x", "x"),
        ({"$ref": "#/$defs/Missing"}, "5", 5),
        # What is only nearly JSON is a text where one is allowed.
        ({"anyOf": [{"type": "string"}, {"type": "array"}]}, "[1] see note", "[1] see note"),
        ({"anyOf": [{"type": "string"}, {"type": "array"}]}, "['x']", "['x']"),
        ({"type": ["string", "array"]}, "[1]", [1]),
        ({"type": ["string", "boolean"]}, "TRUE", "TRUE"),
        ({"type": ["string", "boolean"]}, "True", True),
        ({"type": ["string", "null"], "enum": ["none", "all", None]}, "none", "none"),
        ({"type": ["string", "null"], "enum": ["None", "all", None]}, "None", "None"),
        ({"anyOf": [{"enum": ["1", "2"]}, NUMBER]}, "1", "1"),
        ({"anyOf": [{"const": "1"}, NUMBER]}, "3", 3),
        ({"type": "boolean"}, "TRUE", True),
        ({"type": "array"}, "['x',]", ["x"]),
        ({"type": "array"}, "[1] see note", "[1] see note"),
        ({"type": "object"}, "{'x': 1} or so", "{'x': 1} or so"),
    ],
    ids=str,
)
def test_a_parameter_has_the_type_that_its_schema_allows(schema, text, value):
    definitions = {"Number": NUMBER, "Level": LEVEL, "Loop": {"$ref": "#/$defs/Loop"}}
    functions = {"f": {"properties": {"a": schema}, "$defs": definitions}}
    parser = CallReader(functions, all_tags(None))
    call = f"<tool_call><function=f><parameter=a>{text}</parameter></function></tool_call>"
    ((_, arguments),) = read(parser, [call])[1]
    assert json.loads(arguments) == {"a": value}
