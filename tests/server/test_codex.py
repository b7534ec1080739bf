"""What Codex CLI sends, turn by turn, as its requests have been recorded; texts are shortened."""

from __future__ import annotations

import json

import pytest
from fake_engine import MODEL

HEADERS = {
    "openai-beta": "responses=experimental",
    "originator": "codex_cli_rs",
    "session_id": "019f0c5e-4a51-7e02-9d2b-0c7cf7f6c001",
    "user-agent": "codex_cli_rs/0.171.0 (Linux; x86_64) xterm",
    "accept": "text/event-stream",
}
PATCH_GRAMMAR = """start: begin_patch hunk+ end_patch
begin_patch: "*** Begin Patch" LF
end_patch: "*** End Patch" LF?
hunk: "*** Add File: " /(.+)/ LF add_line+
add_line: "+" /(.*)/ LF
%import common.LF
"""
SHELL = {
    "type": "object",
    "properties": {
        "command": {"type": "string", "description": "The script to run"},
        "workdir": {"type": "string"},
        "timeout_ms": {"type": "number"},
    },
    "required": ["command"],
    "additionalProperties": False,
}
PLAN = {
    "type": "object",
    "properties": {
        "explanation": {"type": "string"},
        "plan": {"type": "array", "items": {"type": "object", "additionalProperties": False}},
    },
    "required": ["plan"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "name": "shell_command", "description": "Runs a script.",
     "strict": False, "parameters": SHELL},
    {"type": "function", "name": "update_plan", "description": "Updates the plan.",
     "strict": False, "parameters": PLAN},
    {"type": "custom", "name": "apply_patch", "description": "Edits files.",
     "format": {"type": "grammar", "syntax": "lark", "definition": PATCH_GRAMMAR}},
    {"type": "function", "name": "view_image", "description": "Shows an image.", "strict": False,
     "parameters": {"type": "object", "properties": {"path": {"type": "string"}},
                    "required": ["path"], "additionalProperties": False}},
    {"type": "web_search", "external_web_access": False},
    {"type": "namespace", "name": "multi_agent_v1", "description": "d", "tools": []},
]  # fmt: skip


def text(role, *texts):
    kind = "output_text" if role == "assistant" else "input_text"
    return {
        "type": "message",
        "role": role,
        "content": [{"type": kind, "text": part} for part in texts],
    }


FIRST = [
    text("developer", "<permissions instructions>read-only</permissions instructions>"),
    text("user", "# AGENTS.md instructions for /repo\n\n<INSTRUCTIONS>\nBe brief.\n</INSTRUCTIONS>",
         "<environment_context>\n  <cwd>/repo</cwd>\n</environment_context>"),
    text("user", "list the files"),
]  # fmt: skip
SECOND = [
    *FIRST,
    {"type": "reasoning", "summary": [{"type": "summary_text", "text": "**Listing**"}],
     "content": None, "encrypted_content": "gAAAAABo"},
    {"type": "function_call", "name": "shell_command", "call_id": "call_1",
     "arguments": '{"command":"ls"}'},
    {"type": "function_call_output", "call_id": "call_1",
     "output": "Exit code: 0\nWall time: 0.1 seconds\nOutput:\nsrc\n"},
]  # fmt: skip
THIRD = [
    *SECOND,
    text("assistant", "There is one folder."),
    text("user", "add a file"),
    {"type": "custom_tool_call", "status": "completed", "call_id": "call_2", "name": "apply_patch",
     "input": "*** Begin Patch\n*** Add File: a\n+b\n*** End Patch\n"},
    {"type": "custom_tool_call_output", "call_id": "call_2",
     "output": '{"output":"Success.","metadata":{"exit_code":0}}'},
    {"type": "web_search_call", "status": "completed",
     "action": {"type": "search", "query": "q", "queries": ["q"]}},
    {"type": "ghost_snapshot", "ghost_commit": {"id": "a", "preexisting_untracked_files": []}},
    {"type": "function_call", "name": "view_image", "call_id": "call_3",
     "arguments": '{"path":"a.png"}'},
    {"type": "function_call_output", "call_id": "call_3",
     "output": [{"type": "input_image", "image_url": "data:image/png;base64,AA"}]},
    text("user", "say(done)yas"),
]  # fmt: skip


def body(items):
    return {
        "model": MODEL, "instructions": "You are Codex, a coding agent.", "input": items,
        "tools": TOOLS, "tool_choice": "auto", "parallel_tool_calls": True,
        "reasoning": {"effort": "medium", "summary": "auto"}, "store": False, "stream": True,
        "include": ["reasoning.encrypted_content"], "prompt_cache_key": HEADERS["session_id"],
        "text": {"verbosity": "low"}, "client_metadata": {"x-codex-installation-id": "a"},
    }  # fmt: skip


@pytest.mark.parametrize("items", [FIRST, SECOND, THIRD], ids=["first", "call", "patch"])
def test_each_turn_is_answered(server, text_parts, items):
    answer = server.post("/v1/responses", body(items), **HEADERS)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    events = [json.loads(line) for line in lines]
    assert events[0]["type"] == "response.created"
    assert events[-1]["type"] == "response.completed"
    # What Codex reads of a finished item and of the end.
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert [item["type"] for item in done] == ["message"]
    assert events[-1]["response"]["usage"]["output_tokens"] > 0
    prompt = text_parts[0].decode(server.engine.requests[0].prompt_token_ids)
    for said in ("You are Codex", "read-only", "list the files", "<cwd>/repo</cwd>"):
        assert said in prompt
    if items is THIRD:
        for said in ("src", "There is one folder.", "*** Add File: a", "Success.", "[input_image]"):
            assert said in prompt


def test_the_prompt_of_a_turn_continues_that_of_the_last(server):
    for items in (FIRST, SECOND):
        assert server.post("/v1/responses", body(items), **HEADERS).status_code == 200
    first, second = (request.prompt_token_ids for request in server.engine.requests)
    pairs = enumerate(zip(first, second, strict=False))
    common = next((i for i, (a, b) in pairs if a != b), len(first))
    # Only the opening of the answer differs, where the call follows.
    assert common > len(first) - 32


@pytest.mark.parametrize("name", ["shell_command", "apply_patch"])
def test_a_call_can_be_read_by_codex(server, name):
    made = {
        "shell_command": '{"name": "shell_command", "arguments": {"command": "ls"}}',
        "apply_patch": '{"name": "apply_patch", "arguments": {"input": "*** Begin Patch"}}',
    }[name]
    items = [*FIRST[:2], text("user", f"say(<tool_call>{made}</tool_call>)yas")]
    answer = server.post("/v1/responses", body(items), **HEADERS)
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    events = [json.loads(line) for line in lines]
    (item,) = [e["item"] for e in events if e["type"] == "response.output_item.done"]
    assert item["name"] == name and item["call_id"]
    given = item["arguments"] if item["type"] == "function_call" else item["input"]
    assert given == ('{"command": "ls"}' if name == "shell_command" else "*** Begin Patch")


def test_a_typed_answer_beside_the_tools(server):
    """With ``--output-schema`` each turn has both."""
    schema = {
        "type": "object",
        "properties": {"summary": {"type": "string"}},
        "required": ["summary"],
        "additionalProperties": False,
    }
    typed = {"type": "json_schema", "name": "codex_output_schema", "strict": True, "schema": schema}
    for said in (
        '{"summary": "done"}',
        '<tool_call>{"name": "shell_command", "arguments": {"command": "ls"}}</tool_call>',
    ):
        asked = body([*FIRST[:2], text("user", f"say({said})yas")])
        asked["text"] = {"verbosity": "low", "format": typed}
        answer = server.post("/v1/responses", asked, **HEADERS)
        assert answer.status_code == 200, answer.text
        lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
        (item,) = json.loads(lines[-1])["response"]["output"]
        if said.startswith("{"):
            assert item["content"][0]["text"] == said
        else:
            assert json.loads(item["arguments"]) == {"command": "ls"}
        grammar = server.engine.requests[-1].sampling.grammar.text
        assert "shell_command" in grammar and "summary" in grammar
