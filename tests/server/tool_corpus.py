"""What models of each family write for calls, what weak ones make of it, and what is read."""

from __future__ import annotations

import json

from chunkllama_server.api.tools.families import FAMILY_TAGS, all_tags
from chunkllama_server.api.tools.parsers import CallReader, PlainText

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


def order(parser, pieces) -> list[str | list[str]]:
    """Texts and calls in the order in which they were written."""
    found: list[str | list[str]] = []
    for parsed in [*map(parser.feed, pieces), parser.finish()]:
        for part in parsed.parts:
            if isinstance(part, str):
                if found and isinstance(found[-1], str):
                    found[-1] += part
                else:
                    found.append(part)
            elif part.name is not None:
                found.append([part.name, part.arguments])
            else:
                call = found[-1]
                assert isinstance(call, list), "no text stands inside a call"
                call[1] += part.arguments
    return found


WEATHER = '{"name": "get_weather", "parameters": {"city": "Pa\\"r}is", "days": [1, {"a": 2}]}}'
WEATHER_ARGUMENTS = '{"city": "Pa\\"r}is", "days": [1, {"a": 2}]}'
ADD = '{"arguments": {"a": 1}, "name": "add"}'
ONE = [("add", '{"a": 1}')]
BOTH = [*ONE, ("get_weather", WEATHER_ARGUMENTS)]
OSLO = [("get_weather", '{"city": "Oslo"}')]
OSLO_JSON = '{"city": "Oslo"}'
# A list whose texts have tags of calls, and are no ends.
TAGS = json.dumps(["</parameter>", "x\n</parameter>\n</function>\n</tool_call>", "<parameter=a>"])
# Per family: what it is taught to write, then what weak models of it write; (text, content, calls).
# Unmarked values in the braces of FunctionGemma's calls, of which the last may be missing.
ESCAPED_PAIRS = [
    ("zip:02134,n:-0.5}", '{"zip": "02134", "n": -0.5}'),
    ("time:10:30}", '{"time": "10:30"}'),
    ("q:Paris, France}", '{"q": "Paris, France"}'),
    ("q:Paris, France,n:1,000}", '{"q": "Paris, France", "n": "1,000"}'),
    ("q:see this, http://x.org/a, b : 2,}", '{"q": "see this, http://x.org/a", "b": 2}'),
    ('q:don\'t,r:a "b" c}', '{"q": "don\'t", "r": "a \\"b\\" c"}'),
    ("expr:x<5", '{"expr": "x<5"}'),
    ("expr:x<5 && y<e, on:true}", '{"expr": "x<5 && y<e", "on": true}'),
    ("e:<b>,a:1,<escape>k<escape>:t, 'l': u}", '{"e": "<b>", "a": 1, "k": "t", "l": "u"}'),
    ("at:[9:00,10:30, don't],a:f[1, 2]}", '{"at": ["9:00", "10:30", "don\'t"], "a": "f[1, 2]"}'),
    ("a:{1:2,3:4},on:,b:", '{"a": {"1": 2, "3": 4}, "on": null, "b": null}'),
    ("city:Oslo<escape>,days:3}", '{"city": "Oslo", "days": 3}'),
]

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
        (f"<TOOLCALL>[{ADD}, {WEATHER}]</TOOLCALL>", "", BOTH),
        (f"<longcat_tool_call>{ADD}</longcat_tool_call>", "", ONE),
        (f"<|START_ACTION|>[\n  {ADD}\n]<|END_ACTION|>", "", ONE),
        ('<|tools_prefix|>[{"add": {"a": 1}}]<|tools_suffix|>', "", ONE),
        (f"<|action_start|><|plugin|>\n{ADD}<|action_end|>", "", ONE),
        (
            f"<tool_calls>\n<tool_call>get_weather\n```json\n{OSLO_JSON}\n```\n</tool_call>"
            "\n</tool_calls>",
            "",
            OSLO,
        ),
        # A name alone, of a function without parameters.
        ("<tool_call>now</tool_call>", "", [("now", "{}")]),
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
        (
            "<function=add><parameter=a>1</parameter><parameter=b>null</parameter>"
            "<parameter=on>True</parameter><parameter=list>[1, 2]</parameter>"
            "<parameter=text>null</parameter></function>",
            "",
            [("add", '{"a": 1, "b": null, "on": true, "list": [1, 2], "text": null}')],
        ),
        (
            f"<tool_call>\n<function=add>\n<parameter=list>\n{TAGS}\n</parameter>\n"
            "<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>",
            "",
            [("add", f'{{"list": {TAGS}, "a": 1}}')],
        ),
    ],
    "minimax_m2": [
        ('<invoke name="add"><parameter name="a">1</parameter></invoke>', "", ONE),
        (
            '<minimax:tool_call>\n<invoke name="add">\n<parameter name="a">1</parameter>\n'
            "</invoke>\n</minimax:tool_call>",
            "",
            ONE,
        ),
    ],
    "glm45": [
        (
            "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n"
            "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>",
            "",
            [("get_weather", '{"city": "Oslo", "days": 3}')],
        ),
        (
            "I look.\n<tool_call>now\n</tool_call>\n<tool_call>get_weather<arg_key>city</arg_key>"
            "<arg_value>\n a < <b> \n</arg_value></tool_call>",
            "I look.\n",
            [("now", "{}"), ("get_weather", '{"city": "\\n a < <b> \\n"}')],
        ),
        (
            f"<tool_call>add\n<arg_key>list</arg_key>\n<arg_value>{TAGS}</arg_value>\n"
            "<arg_key>text</arg_key>\n<arg_value>null</arg_value>\n</tool_call>",
            "",
            [("add", f'{{"list": {TAGS}, "text": null}}')],
        ),
    ],
    "deepseek_v32": [
        (
            '<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n'
            '<｜DSML｜parameter name="city" string="true">Oslo\n</｜DSML｜parameter>\n'
            '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n'
            '</｜DSML｜invoke>\n<｜DSML｜invoke name="now">\n</｜DSML｜invoke>\n'
            "</｜DSML｜function_calls>",
            "",
            [("get_weather", '{"city": "Oslo\\n", "days": 3}'), ("now", "{}")],
        ),
        # Its schema says nothing of the parameter.
        (
            '<｜DSML｜tool_calls><｜DSML｜invoke name="now">'
            '<｜DSML｜parameter name="x" string="true">5</｜DSML｜parameter>'
            '<｜DSML｜parameter name="y" string="false">5</｜DSML｜parameter></｜DSML｜invoke>',
            "",
            [("now", '{"x": "5", "y": 5}')],
        ),
    ],
    "functiongemma": [
        (
            '<start_function_call>call:get_weather{city:<escape>Os"l{o\n<escape>,days:3}'
            "<end_function_call><start_function_call>call:add{a:-1,b:null,on:true,"
            "list:[<escape>x<escape>,{k:1.5e3}],text:<escape><escape>}<end_function_call>",
            "",
            [
                ("get_weather", '{"city": "Os\\"l{o\\n", "days": 3}'),
                (
                    "add",
                    '{"a": -1, "b": null, "on": true, "list": ["x", {"k": 1.5e3}], "text": ""}',
                ),
            ],
        ),
        ('<|tool_call>call:get_weather{city:<|"|>Oslo<|"|>}<tool_call|>', "", OSLO),
        (f"<start_function_call>call:get_weather{OSLO_JSON}<end_function_call>Hm.", "Hm.", OSLO),
        # What has no marks is text, and a brace may be missing.
        (
            "<start_function_call>call:get_weather{city:New York,days:2<end_function_call>",
            "",
            [("get_weather", '{"city": "New York", "days": 2}')],
        ),
        ("<start_function_call>call:now{}<end_function_call>", "", [("now", "{}")]),
        *(
            (f"<start_function_call>call:now{{{pairs}<end_function_call>", "", [("now", arguments)])
            for pairs, arguments in ESCAPED_PAIRS
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
        (
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
            f"<|tool_call_argument_begin|>{OSLO_JSON}<|tool_call_end|>"
            "<|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
            "<|tool_calls_section_end|>",
            "",
            [*OSLO, ("now", "{}")],
        ),
    ],
}
# Read with every family: objects as weak models write them, at the answer's beginning.
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
    ('{"name": "add", "params": {"a": 1}}', ONE),
    ('{"name": "add", "kwargs": {"a": 1}}', ONE),
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
    ("<function=add><parameter=a>1.0</parameter></function>", "", [("add", '{"a": 1.0}')]),
    ("<function=add><parameter=on>TRUE</parameter></function>", "", [("add", '{"on": true}')]),
    # Lists that are nearly JSON.
    (
        "<function=add><parameter=list>['x', True,]</parameter></function>",
        "",
        [("add", '{"list": ["x", true]}')],
    ),
    (
        '<function=add>\n<parameter=list>\n["a\n</parameter>\n<parameter=a>1</parameter></function>',
        "",
        [("add", '{"list": ["a"], "a": 1}')],
    ),
    # No string, though a quotation mark begins one.
    (
        f'<function=add><parameter=list>[5"</parameter></function><tool_call>{ADD}</tool_call>',
        "",
        [("add", '{"list": "[5\\""}'), *ONE],
    ),
    (
        '<function=add><parameter=list>[5"</parameter></function>'
        '<function=add><parameter=list>["x"]</parameter></function>',
        "",
        [("add", '{"list": "[5\\""}'), ("add", '{"list": ["x"]}')],
    ),
    # Tags without a name, or not closed.
    (
        "<function=add>\n<parameter=\nls\n</parameter>\n<parameter=a>\n1\n</parameter>\n</function>",
        "",
        ONE,
    ),
    (
        "<function=add><parameter=list: [1]</parameter><parameter=a>1</parameter></function>",
        "",
        ONE,
    ),
    ('<function=add>{"a": 1}<parameter=on>true</parameter></function>', "", ONE),
    (f"<tool_call>{ADD}", "", ONE),
    (f"<tool_call>{ADD}</tool_", "", ONE),
    (f"<tool_call>{ADD}<tool_call>", "", ONE),
    (f"<tool_call>{ADD}\n<tool_call>\n", "", ONE),
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
# Functionary names whom it addresses, and "all" is before text.
ADDRESSED = [
    ("all\nHello.", "Hello.", []),
    (">>>all\nHello.", "Hello.", []),
    (f"all\nHi.>>>get_weather\n{OSLO_JSON}", "Hi.", OSLO),
    (f"get_weather\n{OSLO_JSON}>>>all\nDone.", "Done.", OSLO),
    ("allow me", "allow me", []),
    ("all", "all", []),
]
ANY = (
    "llama3_json",
    "mistral",
    "qwen3_coder",
    "deepseek_v3",
    "granite",
    "phi4_mini_json",
    "kimi_k2",
    "minimax_m2",
    "glm45",
    "deepseek_v32",
    "functiongemma",
)
CASES = [
    *((lambda f=family: reader(f), *case) for family, cases in TAUGHT.items() for case in cases),
    *((reader, *case) for family in ("hermes", *ANY) for case in TAUGHT[family]),
    *((reader, *case) for case in ODD),
    *((reader, text, text, []) for text in NO_CALLS),
    *((lambda: reader(forced=True), *case) for case in FORCED),
    *((lambda: reader("functionary", addressed=True), *case) for case in ADDRESSED),
    (PlainText, WEATHER, WEATHER, []),
]
