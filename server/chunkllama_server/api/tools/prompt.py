"""Tools for chat templates that know none: described in the system message, calls written as text.

The words are those of Hermes function calling, which small chat models (SmolLM2 among them) were
trained on; `HermesCalls` reads the answers.
"""

from __future__ import annotations

import json
from typing import Any

from chunkllama_server.api.common.text_service import Message

_INSTRUCTIONS = (
    "You have access to these functions:\n<tools>\n{tools}\n</tools>\n\n"
    "To call a function, answer with its name and arguments as JSON inside tool_call tags:\n"
    '<tool_call>\n{{"name": "function name", "arguments": {{...}}}}\n</tool_call>'
)


def describe_tools(messages: list[Message], tools: list[dict[str, Any]]) -> list[Message]:
    """The conversation with the tools described at the end of its system message."""
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    text = _INSTRUCTIONS.format(tools=listed)
    if messages[0]["role"] == "system":
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def write_calls(messages: list[Message]) -> list[Message]:
    """The conversation with each tool call as text of the message that made it."""
    return [_with_calls_as_text(message) for message in messages]


def _with_calls_as_text(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    calls = [
        f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"
        for call in message["tool_calls"]
    ]
    text = "\n".join([message["content"], *calls] if message["content"] else calls)
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**rest, "content": text}
