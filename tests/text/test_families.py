"""The templates of model families: what they can express, and conversations adapted to each."""

from __future__ import annotations

import pytest
from template_families import script

from chunkllama.text.template_adapter import adapt
from chunkllama.text.template_capabilities import tool
from chunkllama_server.api.tools.families import tool_family

NAMES = [family.template for family in script.FAMILIES]
# What a reader of the published templates knows; the rest of a record is in docs/chat-templates.md.
EXPECTED = {
    "smollm2": {"tools": False, "tool_calls": False, "thought_tags": None},
    "zephyr": {"tools": False, "tool_results": False, "system_anywhere": True},
    "llama2": {"repeated_roles": False, "system": True, "system_anywhere": False},
    "llama3": {"tools": False, "tool_calls": False, "system_anywhere": True},
    "llama3_1": {"tools": True, "parallel_calls": False, "text_beside_calls": False},
    "llama3_2_pythonic": {"python_calls": True, "parallel_calls": True},
    "functionary_v3_1": {"tool_calls": True, "call_markers": ("<function=",)},
    "mistral_v3": {"call_ids": "short", "repeated_roles": False, "system": False},
    "mistral_v13": {"thought_tags": ("[THINK]", "[/THINK]"), "parallel_calls": True},
    "qwen2_5": {"parallel_calls": True, "thought_tags": None, "tool_results": True},
    "qwen3": {
        "thought_tags": ("<think>", "</think>"),
        "thinking_switch": "enable_thinking",
        "opens_thinking": False,
        "keeps_thoughts": False,
    },
    "qwen3_coder": {"call_markers": ("<tool_call>", "<function=", "<parameter=")},
    "smollm3": {"thinking_switch": "enable_thinking", "tools": True},
    "deepseek_r1": {"opens_thinking": True, "arguments": "text", "tools": False},
    "deepseek_v3_1": {"thinking_switch": "thinking", "tools": True, "opens_thinking": False},
    "deepseek_v3_2": {"thinking_switch": "thinking", "call_markers": ("<｜DSML｜function_calls>",)},
    "glm45": {"thinking_switch": "enable_thinking", "call_markers": ("<tool_call>", "<arg_key>")},
    "kimi_k2": {"call_ids": "named", "tool_calls": True, "parallel_calls": True},
    "minimax_m2": {"opens_thinking": True, "lone_results": False, "tool_results": True},
    "functiongemma": {"tools": True, "tool_calls": True, "lone_results": False},
    "gemma2": {"system": False, "repeated_roles": False, "tools": False},
    "gemma3": {"system": True, "repeated_roles": False, "tools": False},
    "phi3": {"tools": False, "tool_results": False},
    "phi4_mini": {"tool_calls": False},
    "granite3": {"tool_calls": True, "text_beside_calls": False, "thinking_switch": "thinking"},
    "olmo3": {"python_calls": True, "call_markers": ("<function_calls>",)},
    "exaone4": {"opens_thinking": True, "thinking_switch": "enable_thinking"},
    "seed_oss": {"thought_tags": ("<seed:think>", "</seed:think>")},
}
CALLS = {
    "smollm2": "hermes",
    "llama3_1": "llama3_json",
    "llama3_2_pythonic": "pythonic",
    "functionary_v3_1": "functionary",
    "mistral_v3": "mistral",
    "mistral_v13": "mistral",
    "qwen2_5": "hermes",
    "qwen3": "hermes",
    "qwen3_coder": "qwen3_coder",
    "smollm3": "hermes",
    "deepseek_v3_1": "deepseek_v3",
    "deepseek_v3_2": "deepseek_v32",
    "glm45": "glm45",
    "kimi_k2": "kimi_k2",
    "minimax_m2": "minimax_m2",
    "functiongemma": "functiongemma",
    "phi4_mini": "hermes",
    "granite3": "granite",
    "olmo3": "pythonic",
    "exaone4": "hermes",
    "seed_oss": "qwen3_coder",
}


@pytest.fixture(scope="module", params=script.FAMILIES, ids=NAMES)
def family(request):
    return request.param, script.load(request.param)


def test_every_template_belongs_to_a_family():
    files = {path.stem for path in script.TEMPLATES.glob("*.jinja")}
    assert files == set(NAMES) == set(EXPECTED)
    assert len(files) >= 15


def test_the_record_of_a_family(family):
    (name, _, added), template = family
    able = template.capabilities
    assert {key: getattr(able, key) for key in EXPECTED[name]} == EXPECTED[name]
    if name in CALLS:
        assert tool_family(None, able, script.byte_tokenizer(added)) == CALLS[name]


def test_the_page_of_families_is_current():
    assert script.PAGE.read_text() == script.page(), "run: python scripts/document_templates.py"


def call(city, call_id):
    function = {"name": "get_weather", "arguments": {"city": city}}
    return {"id": call_id, "type": "function", "function": function}


def result(text, call_id):
    return {"role": "tool", "tool_call_id": call_id, "content": text}


USER = {"role": "user", "content": "ask-one"}
REPLY = {"role": "assistant", "content": "reply-one"}
SYSTEM = {"role": "system", "content": "be-brief"}
CALLING = {"role": "assistant", "content": "let-me-see", "tool_calls": [call("Oslo", "call_1")]}
TWO = {**CALLING, "content": "", "tool_calls": [call("Oslo", "call_1"), call("Bergen", "call_2")]}
CONVERSATIONS = {
    "plain": [USER, REPLY, USER],
    "system": [SYSTEM, USER, REPLY, USER],
    "system in the middle": [USER, REPLY, {"role": "system", "content": "say-blue"}, USER],
    "two systems": [SYSTEM, {"role": "developer", "content": "be-kind"}, USER],
    "two users": [USER, {"role": "user", "content": "ask-two"}],
    "call and result": [SYSTEM, USER, CALLING, result("minus-7", "call_1")],
    "two calls": [USER, TWO, result("minus-7", "call_1"), result("plus-9", "call_2"), REPLY, USER],
    "system and two calls": [SYSTEM, USER, TWO, result("minus-7", "call_1"), result("8", "call_2")],
    "answer first": [REPLY, USER],
    "answer alone": [REPLY],
    "system and answer": [SYSTEM, REPLY, USER],
    "system alone": [SYSTEM],
    "two systems alone": [SYSTEM, {"role": "developer", "content": "be-kind"}],
    "call first": [CALLING, result("minus-7", "call_1"), USER],
    "result without a call": [USER, result("minus-7", "call_9"), USER],
    "result first": [result("minus-7", "call_9"), USER],
    "system before a result": [USER, CALLING, SYSTEM, result("minus-7", "call_1")],
    "results in another order": [
        USER,
        TWO,
        result("plus-9", "call_2"),
        result("minus-7", "call_1"),
    ],
    "user before a result": [USER, CALLING, USER, result("minus-7", "call_1")],
}


with_tools = pytest.mark.parametrize(
    "tools", [None, [tool("get_weather")]], ids=["no tools", "tools"]
)


@with_tools
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_a_family_drops_nothing(family, conversation, tools):
    _, template = family
    messages = CONVERSATIONS[conversation]
    adapted, shown = adapt(messages, tools, template.capabilities)
    text = template.render(adapted, tools=shown, require_all_text=True)
    for message in messages:
        assert message["content"] in text
        for made in message.get("tool_calls", ()):
            assert made["function"]["arguments"]["city"] in text
            assert made["function"]["name"] in text
    assert not tools or "qzdescription" in text


@pytest.fixture(scope="module")
def strict():
    """Llama 3.1's template, which refuses an answer at the beginning where there are tools."""
    (family,) = [each for each in script.FAMILIES if each.template == "llama3_1"]
    template = script.load(family)
    assert not template.capabilities.first_answer and template.capabilities.system_anywhere
    return template


@with_tools
@pytest.mark.parametrize("first", ["system", "developer"])
def test_system_messages_that_begin_a_conversation_need_no_empty_user(strict, first, tools):
    leading = [{"role": first, "content": "be-kind"}, SYSTEM]
    plain = [{**message, "role": "system"} for message in leading]
    adapted, shown = adapt([*leading, USER], tools, strict.capabilities)
    assert (adapted, shown) == ([*plain, USER], tools)
    adapted, _ = adapt(leading, tools, strict.capabilities)
    assert adapted == [plain[0], {**SYSTEM, "role": "user"}]
    adapted, _ = adapt([*leading, REPLY], tools, strict.capabilities)
    assert adapted == [*plain, {"role": "user", "content": ""}, REPLY]
