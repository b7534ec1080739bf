"""What templates of the common families can express, and conversations adapted to each of them."""

from __future__ import annotations

import pytest
from tiny_model import byte_tokenizer

from chunkllama.errors import InvalidRequestError
from chunkllama.text.chat_template import ChatTemplate
from chunkllama.text.printed_text import find_dropped
from chunkllama.text.template_adapter import adapt, template_tool
from chunkllama.text.template_capabilities import TemplateCapabilities, tool
from chunkllama.text.tokenizer import Tokenizer
from chunkllama.text.tokenizer_files import DecodeRule

EACH = "{% for m in messages %}"
GENERIC = EACH + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
KNOWN_ROLES = (
    EACH + "{% if m.role in ['system', 'user', 'assistant'] %}"
    "<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endif %}{% endfor %}"
)
# A comment that contains the word tools says nothing about the output.
COMMENTED = "{# no tools, tool_calls, developer here #}" + GENERIC
ALTERNATE = (
    EACH + "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}"
)
SYSTEM_FIRST = (
    EACH + "{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('the system message comes first') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}"
    "{% set lead = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set rest = messages %}{% set lead = '' %}{% endif %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ lead if loop.first else '' }}{{ m.content.strip() }} "
    "[/INST]{% else %} {{ m.content.strip() }} </s>{% endif %}{% endfor %}"
)
GEMMA = (
    EACH
    + "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}"
    "{% endif %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
)
TOOLS = "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
HERMES = (
    TOOLS + EACH + "<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
)
# Llama 3.1: one call per message, whose text is not printed; results have the role ipython.
LLAMA31 = (
    TOOLS + EACH + "{% if 'tool_calls' in m %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}"
    "{% set f = m.tool_calls[0].function %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}<|eot_id|>'
    "{% elif m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>\n\n"
    "{{ m.content | tojson if m.content is mapping else m.content }}<|eot_id|>"
    "{% else %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endif %}{% endfor %}"
)
# Mistral: ids of nine letters and digits, alternating roles apart from calls and results.
MISTRAL = (
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% set ns = namespace(i=0) %}" + EACH + "{% if m.role == 'tool' %}"
    "{% if m.tool_call_id | length != 9 %}{{ raise_exception('9 characters') }}{% endif %}"
    '[TOOL_RESULTS]{"content": {{ m.content | tojson }}, "call_id": "{{ m.tool_call_id }}"}'
    "{% elif m.tool_calls %}[TOOL_CALLS][{% for c in m.tool_calls %}"
    "{% if c.id | length != 9 %}{{ raise_exception('9 characters') }}{% endif %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, '
    '"id": "{{ c.id }}"}{% endfor %}]</s>'
    "{% elif m.role == 'system' and not loop.first %}{{ raise_exception('system') }}"
    "{% elif m.role == 'system' %}[SYS]{{ m.content }}{% else %}"
    "{% if (m.role == 'user') != (ns.i % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}"
    "{% set ns.i = ns.i + 1 %}[INST] {{ m.content }}[/INST]{% endif %}{% endfor %}"
)
# DeepSeek: the arguments are concatenated, so they must be text.
TEXT_ARGUMENTS = (
    TOOLS + EACH + "{{ '<' + m.role + '>' + m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '<call>' + c.function.name + '\n' + c.function.arguments }}{% endfor %}{% endfor %}"
)
PYTHON_ARGUMENTS = (
    TOOLS + EACH + "<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name }} {{ c.function.arguments }}{% endfor %}{% endfor %}"
)
PARTS_ONLY = (
    EACH + "<{{ m.role }}>{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% endif %}{% endfor %}{% endfor %}"
)
DEVELOPER = (
    EACH + "{% if m.role == 'developer' %}<developer>{{ m.content }}{% elif m.role in "
    "['system', 'user', 'assistant', 'tool'] %}<{{ m.role }}>{{ m.content }}{% else %}"
    "{{ raise_exception('unknown role') }}{% endif %}{% endfor %}"
)
THINKING = HERMES + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
RESULT_DROPPED = TOOLS + EACH + "{% if m.role != 'tool' %}<{{ m.role }}>{{ m.content }}"
RESULT_DROPPED += "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
RESULT_DROPPED += "{% endif %}{% endfor %}"
SYSTEM_REQUIRED = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"
)
SYSTEM_REQUIRED += HERMES
TEXT_REQUIRED = (
    EACH + "{% if not m.content %}{{ raise_exception('no text') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}"
)
FIRST_PART = EACH + "<{{ m.role }}>{{ m.content[0].text }}{% endfor %}"
# It prints the tools behind the last user message alone.
TOOLS_AT_THE_END = (
    EACH + "{% if tools and loop.last and m.role == 'user' %}{{ tools | tojson }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}"
    "{% endfor %}{% endfor %}"
)
DESCRIBED = (
    "{% for t in tools or [] %}{{ t.function.name + ': ' + t.function.description }}"
    "{% for name, value in t.function.parameters.properties.items() %}"
    "{{ name + ' (' + value.type + '): ' + value.description }}{% endfor %}{% endfor %}"
    + HERMES.removeprefix(TOOLS)
)
# Falcon: an empty line becomes a line's end.
NO_EMPTY_LINES = EACH + "<{{ m.role }}>{{ m.content.replace('\n\n', '\n') }}{% endfor %}"

# Members that differ from the template that can express everything but a developer.
FAMILIES = {
    "generic": (GENERIC, {"tools": False, "tool_calls": False}),
    "commented": (COMMENTED, {"tools": False, "tool_calls": False}),
    "known roles": (KNOWN_ROLES, {"tools": False, "tool_calls": False, "tool_results": False}),
    "alternating": (ALTERNATE, {"system": False, "repeated_roles": False, "tool_results": False}),
    "system first": (SYSTEM_FIRST, {"system": True, "system_anywhere": False, "tools": False}),
    "llama 2": (LLAMA2, {"system": True, "system_anywhere": False, "repeated_roles": False}),
    "gemma": (GEMMA, {"system": False, "repeated_roles": False, "tool_results": False}),
    "hermes": (HERMES, {"tools": True, "parallel_calls": True, "call_markers": ("<tool_call>",)}),
    "llama 3.1": (LLAMA31, {"parallel_calls": False, "text_beside_calls": False, "tools": True}),
    "mistral": (
        MISTRAL,
        {"call_ids": "short", "system_anywhere": False, "call_markers": ("[TOOL_CALLS]",)},
    ),
    "text arguments": (TEXT_ARGUMENTS, {"arguments": "text", "tool_calls": True}),
    "python arguments": (PYTHON_ARGUMENTS, {"arguments": "text", "tool_calls": True}),
    "parts only": (PARTS_ONLY, {"content": "parts", "tools": False}),
    "developer": (DEVELOPER, {"developer": True, "tool_results": True, "tools": False}),
    "thinking": (THINKING, {"opens_thinking": True, "tool_calls": True}),
    "system required": (SYSTEM_REQUIRED, {"system_optional": False, "tools": True}),
    "text required": (TEXT_REQUIRED, {"empty_text": False, "content": "text"}),
    "first part": (FIRST_PART, {"empty_text": False, "content": "parts"}),
    "tools at the end": (TOOLS_AT_THE_END, {"tools": False, "tool_calls": True}),
    "described": (DESCRIBED, {"bare_tools": False, "tools": True, "system_optional": True}),
    "no empty lines": (NO_EMPTY_LINES, {"empty_text": True, "bare_tools": True}),
    "result dropped": (RESULT_DROPPED, {"tool_calls": True, "tool_results": False}),
}


@pytest.fixture(scope="module")
def tokenizer():
    backend = byte_tokenizer(("<|im_start|>", "<|im_end|>"))
    return Tokenizer(backend, DecodeRule(True, False, 0), {}, [257])


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tokenizer):
    source, expected = FAMILIES[request.param]
    return ChatTemplate(source, tokenizer), expected


def test_capabilities_are_read_from_the_output(family):
    template, expected = family
    found = template.capabilities.as_dict()
    expected = {k: list(v) if isinstance(v, tuple) else v for k, v in expected.items()}
    assert {name: found[name] for name in expected} == expected


def call(city, call_id):
    function = {"name": "get_weather", "arguments": {"city": city}}
    return {"id": call_id, "type": "function", "function": function}


def result(text, call_id):
    return {"role": "tool", "tool_call_id": call_id, "content": text}


USER = {"role": "user", "content": "ask-one"}
CALLING = {"role": "assistant", "content": "let-me-see", "tool_calls": [call("Oslo", "call_1")]}
TWO_CALLS = {**CALLING, "tool_calls": [call("Oslo", "call_1"), call("Bergen", "call_2")]}
BARE = template_tool(
    {
        "name": "get_weather",
        "description": "qzdescription",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Oslo"]}, "day": {}}},
    }
)
CONVERSATIONS = {
    "plain": [USER, {"role": "assistant", "content": "reply-one"}, USER],
    "system": [{"role": "system", "content": "be-brief"}, USER],
    "two systems": [
        {"role": "system", "content": "be-brief"},
        {"role": "developer", "content": "be-kind"},
        USER,
    ],
    "an empty answer": [USER, {"role": "assistant", "content": ""}, USER],
    "system in the middle": [
        USER,
        {"role": "assistant", "content": "reply-one"},
        {"role": "system", "content": "say-blue"},
        USER,
    ],
    "two users": [USER, {"role": "user", "content": "ask-two"}],
    "two assistants": [
        USER,
        {"role": "assistant", "content": "reply-one"},
        {"role": "assistant", "content": "reply-two"},
        USER,
    ],
    "call and result": [USER, CALLING, result("minus-7", "call_1")],
    "two calls": [USER, TWO_CALLS, result("minus-7", "call_1"), result("plus-9", "call_2"), USER],
    "call without result": [USER, CALLING, USER],
    "answer after a result": [
        USER,
        CALLING,
        result("minus-7", "call_1"),
        {"role": "assistant", "content": "reply-one"},
        USER,
    ],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("tools", [None, [tool("get_weather")]], ids=["no tools", "tools"])
def test_nothing_of_a_conversation_is_dropped(family, name, tools):
    template, _ = family
    conversation = CONVERSATIONS[name]
    messages, shown = adapt(conversation, tools, template.capabilities)
    text = template.render(messages, tools=shown, require_all_text=True)
    for message in conversation:
        assert message["content"] in text
        for made in message.get("tool_calls", ()):
            assert "get_weather" in text and made["function"]["arguments"]["city"] in text
    assert not tools or "qzdescription" in text


def test_parameters_need_no_type_and_no_description(family):
    template, _ = family
    messages, shown = adapt([USER], [BARE], template.capabilities)
    text = template.render(messages, tools=shown, require_all_text=True)
    assert "ask-one" in text and "qzdescription" in text


def test_results_follow_their_calls_where_one_call_is_shown_at_a_time(tokenizer):
    template = ChatTemplate(LLAMA31, tokenizer)
    messages, _ = adapt(CONVERSATIONS["two calls"], None, template.capabilities)
    text = template.render(messages)
    places = [text.index(part) for part in ("Oslo", "minus-7", "Bergen", "plus-9")]
    assert places == sorted(places)


def test_results_have_the_names_of_their_calls():
    """Templates of tools may print the name, not the id."""
    calls = [
        {"id": i, "type": "function", "function": {"name": name, "arguments": {}}}
        for i, name in (("c1", "f"), ("c2", "g"))
    ]
    asked = [{"role": "user", "content": "a"}]
    asked.append({"role": "assistant", "content": "", "tool_calls": calls})

    def names(*results):
        answered = [{"role": "tool", "content": "x", **result} for result in results]
        adapted, _ = adapt([*asked, *answered], None, TemplateCapabilities())
        return [message.get("name") for message in adapted[2:]]

    assert names({"tool_call_id": "c2"}, {"tool_call_id": "c1"}) == ["g", "f"]
    assert names({"tool_call_id": "c1", "name": "own"}) == ["own"]
    # Ids of no call: in the order of the calls, and none beyond them.
    assert names({"tool_call_id": "x"}, {}, {}) == ["f", "g", None]


def test_ids_have_names_where_the_template_prints_no_other(tokenizer):
    template = ChatTemplate(
        EACH + "{{ m.role }}:{{ m.content }}{% for c in m.tool_calls or [] %}<{{ c.id }}>"
        "{{ c.function.arguments | tojson }}{% endfor %}{{ m.tool_call_id or '' }};{% endfor %}",
        tokenizer,
    )
    assert template.capabilities.call_ids == "named"
    calls = [
        {"id": i, "type": "function", "function": {"name": name, "arguments": {}}}
        for i, name in (("c1", "f"), ("c2", "g"))
    ]
    turn = [
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c2", "content": "x"},
    ]
    adapted, _ = adapt([*turn, *turn], None, template.capabilities)
    shown = "assistant:<functions.f:{}>{{}}<functions.g:{}>{{}};tool:xfunctions.g:{};"
    expected = shown.format(0, 1, 1) + shown.format(2, 3, 3)
    assert template.render(adapted, add_generation_prompt=False) == expected


def test_short_ids_match_their_results(tokenizer):
    template = ChatTemplate(MISTRAL, tokenizer)
    silent = {**TWO_CALLS, "content": ""}
    chat = [USER, silent, result("minus-7", "call_1"), result("plus-9", "call_2")]
    messages, _ = adapt(chat, None, template.capabilities)
    calls = messages[1]["tool_calls"]
    assert [m["tool_call_id"] for m in messages[2:4]] == [made["id"] for made in calls]
    assert len({made["id"] for made in calls}) == 2
    kept = [USER, {**silent, "tool_calls": [call("Oslo", "a1B2c3D4e")]}]
    assert adapt(kept, None, template.capabilities)[0][1]["tool_calls"][0]["id"] == "a1B2c3D4e"


def test_a_dropped_text_is_refused_by_name(tokenizer):
    template = ChatTemplate("{{ messages[-1].content }}", tokenizer)
    chat = [{"role": "system", "content": "rules"}, USER]
    assert template.render(chat) == "ask-one"
    with pytest.raises(InvalidRequestError, match="text of a system message") as caught:
        template.encode(chat, require_all_text=True)
    assert caught.value.code == "chat_template_drops_text"


@pytest.mark.parametrize(
    ("text", "rendered", "dropped"),
    [
        ("  a b ", "<x>a b<y>", None),
        ('say "hi"\n', '{"content": "say \\"hi\\"\\n"}', None),
        ("é", '"\\u00e9"', None),
        ("a\n\nb  c", "<x>a\nb c", None),
        ("a\nb", "ab", 0),
        ("<think>hm</think>yes", "yes", None),
        ("yes", "no", 0),
        ("", "", None),
    ],
)
def test_what_counts_as_printed(text, rendered, dropped):
    assert find_dropped([{"role": "assistant", "content": text}], rendered) == dropped


def test_a_record_is_one_line_of_words():
    able = TemplateCapabilities(
        developer=True,
        system_anywhere=False,
        call_markers=("<tool_call>", "<function="),
        thought_tags=("<think>", "</think>"),
    )
    assert able.describe() == (
        "content text; arguments object; call ids any; call markers <tool_call> <function=; "
        "thought tags <think> </think>; can: system, system optional, first answer, developer, "
        "repeated roles, empty text, tools, bare tools, tool calls, parallel calls, text beside "
        "calls, tool results, lone results; "
        "cannot: system anywhere, python calls, opens thinking, reasoning effort, keeps thoughts"
    )
