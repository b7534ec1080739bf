"""Requests that clients are known to send and that some servers refuse, from public bug reports:
each is answered here, and what has no effect is named."""

from __future__ import annotations

from typing import Any

import pytest
from fake_engine import MODEL

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES = "/v1/messages"
HI = {"role": "user", "content": "hi"}
PARAMETERS = {"type": "object", "properties": {"q": {"type": "string"}}}
FUNCTION = {"name": "f", "description": "d", "parameters": PARAMETERS}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"q": "x"}'}}
USE = {"type": "tool_use", "id": "c1", "name": "f", "input": {"q": "x"}}
RESULT = {"type": "tool_result", "tool_use_id": "c1", "content": "12"}
CLAUDE_TOOL = {"name": "f", "input_schema": PARAMETERS}


def after_call(**result: Any) -> list[dict[str, Any]]:
    return [HI, {"role": "assistant", "content": None, "tool_calls": [CALL]}, result]


# What sends it, the path, the fields, and what is named as ignored.
REPORTED: list[tuple[str, str, dict[str, Any], str | None]] = [
    ("n8n: null content beside calls", CHAT, {"messages": after_call(
        role="tool", tool_call_id="c1", content="12")}, None),
    ("Zed: parts as a tool's result", CHAT, {"messages": after_call(
        role="tool", tool_call_id="c1", content=[{"type": "text", "text": "12"}])}, None),
    ("autogen: name beside a tool's result", CHAT, {"messages": after_call(
        role="tool", tool_call_id="c1", name="f", content="12")}, None),
    ("LangChain: output_text among parts of chat", CHAT, {"messages": [HI, {
        "role": "assistant", "content": [{"type": "output_text", "text": "a"}]}, HI]}, None),
    ("Qwen-Agent: a part without a type", CHAT, {"messages": [
        {"role": "system", "content": [{"text": "Be brief."}]}, HI]}, None),
    ("Codex: content that is one part", CHAT, {"messages": [
        {"role": "user", "content": {"type": "text", "text": "hi"}}]}, None),
    ("Jan: a text with its annotations", CHAT, {"messages": [{"role": "user", "content": [
        {"type": "text", "text": {"value": "hi", "annotations": []}}]}]}, None),
    ("LocalMind: an empty last answer", CHAT, {"messages": [
        HI, {"role": "assistant", "content": ""}]}, None),
    ("openai-python: a whole message sent back", CHAT, {"messages": [HI, {
        "role": "assistant", "content": "a", "refusal": None, "annotations": [], "audio": None,
        "function_call": None, "tool_calls": None}, HI]}, None),
    ("notebook-intelligence: no tools, no choice", CHAT, {
        "messages": [HI], "tools": None, "tool_choice": None}, None),
    ("pydantic-ai: an automatic choice without tools", CHAT, {
        "messages": [HI], "tool_choice": "auto", "parallel_tool_calls": True}, None),
    ("LiteLLM: no choice, no tools", CHAT, {"messages": [HI], "tool_choice": "none"}, None),
    ("agno: its own members of a function", CHAT, {"messages": [HI], "tools": [{
        **TOOL, "function": {**FUNCTION, "requires_confirmation": False}}]},
     "tools[0].function.requires_confirmation"),
    ("SillyTavern: an effort that is auto", CHAT, {
        "messages": [HI], "reasoning_effort": "auto"}, None),
    ("kimi-cli: an effort that is null", CHAT, {"messages": [HI], "reasoning_effort": None}, None),
    ("LiteLLM: stream options without a stream", CHAT, {
        "messages": [HI], "stream_options": {"include_usage": True}}, None),
    ("Langfuse: metadata that is an object", CHAT, {
        "messages": [HI], "store": True, "metadata": {"response_format": {"type": "json"}}},
     "store"),
    ("Home Assistant: metadata", CHAT, {"messages": [HI], "metadata": {"conversation": "1"}}, None),
    ("instructlab: a temperature that is a text", CHAT, {
        "messages": [HI], "temperature": "1.0"}, None),
    ("vLLM's users: prompt_logprobs that is true", CHAT, {
        "messages": [HI], "prompt_logprobs": True, "logprobs": True, "top_logprobs": 5}, None),
    ("LiteLLM: what is meant for itself", CHAT, {
        "messages": [HI], "drop_params": True, "num_retries": 2, "timeout": 600},
     "num_retries, timeout, drop_params"),
    ("vLLM's users: log-probabilities of a completion", TEXT, {
        "prompt": "hi", "logprobs": False, "echo": None, "suffix": None, "best_of": None}, None),
    ("butterfish: items without a type", RESPONSES, {"input": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"}]}, None),
    ("opencode: items of chat as input", RESPONSES, {"input": [
        HI, {"role": "assistant", "content": [{"type": "text", "text": "b"}]}, HI]}, None),
    ("Codex: results that are images", RESPONSES, {"input": [
        HI, {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": [
            {"type": "input_image", "image_url": "data:image/png;base64,AA"}]}, HI]}, None),
    ("Codex: an action of another type", RESPONSES, {"input": [
        HI, {"type": "web_search_call", "status": "completed", "action": {"type": "other"}}, HI]},
     None),
    ("AI SDK: stored items by their ids alone", RESPONSES, {
        "input": "hi", "store": False, "include": ["reasoning.encrypted_content"]}, None),
    ("Claude Code: a system message among messages", MESSAGES, {"messages": [
        HI, {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}]}, None),
    ("Claude Code: an empty text", MESSAGES, {"messages": [
        {"role": "user", "content": [{"type": "text", "text": ""}, {"type": "text", "text": "a"}]},
        {"role": "assistant", "content": [{"type": "text", "text": " \n"}]}, HI]}, None),
    ("Claude Code: an empty text that ends a prefix", MESSAGES, {"messages": [
        {"role": "user", "content": [{"type": "text", "text": "", "cache_control": {
            "type": "ephemeral"}}, {"type": "text", "text": "a"}]}]}, None),
    ("Claude Code: thoughts without a signature", MESSAGES, {"messages": [
        HI, {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, USE]},
        {"role": "user", "content": [RESULT]}], "tools": [CLAUDE_TOOL]}, None),
    ("Claude Code: thoughts asked for, none in the past", MESSAGES, {
        "messages": [HI, {"role": "assistant", "content": [USE]},
                     {"role": "user", "content": [RESULT]}],
        "tools": [CLAUDE_TOOL], "thinking": {"type": "adaptive"}}, "thinking"),
    ("Cline: an answer without content", MESSAGES, {
        "messages": [HI, {"role": "assistant", "content": []}, HI]}, None),
    ("Claude Code: results among texts", MESSAGES, {
        "messages": [HI, {"role": "assistant", "content": [{"type": "text", "text": "a"}, USE]},
                     {"role": "user", "content": [{"type": "text", "text": "b"}, RESULT]}],
        "tools": [CLAUDE_TOOL]}, None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "fields", "ignored"),
    [case[1:] for case in REPORTED],
    ids=[case[0] for case in REPORTED],
)
def test_a_reported_request_is_answered(server, path, fields, ignored):
    needed = {"max_tokens": 64} if path == MESSAGES else {}
    response = server.post(path, {"model": MODEL, **needed, **fields})
    assert response.status_code == 200, response.text
    assert response.headers.get("x-chunkllama-ignored-fields") == ignored


def test_a_switch_that_is_a_text_is_off(start_server):
    """In a template the text "false" would be true."""
    source = "{{ messages[0].content }} say({{ enable_thinking }})yas"
    server = start_server(template_source=source)
    for fields in ({"enable_thinking": "false"},
                   {"chat_template_kwargs": {"enable_thinking": "False"}}):  # fmt: skip
        answer = server.chat("x", **fields).json()["choices"][0]["message"]
        assert answer["content"] == "False"
