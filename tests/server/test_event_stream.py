"""The events of a response, however the answer's text is cut into pieces."""

from __future__ import annotations

import json

import pytest

from chunkllama.text.output_processor import OutputDelta
from chunkllama_server.api.responses.event_stream import EventStream
from chunkllama_server.api.responses.tools import OfferedTool
from chunkllama_server.api.schema.chat import FunctionDefinition
from chunkllama_server.api.schema.responses import ResponseTool
from chunkllama_server.api.tools.families import all_tags
from chunkllama_server.api.tools.parsers import CallReader

FUNCTIONS = {"add": {"type": "object", "properties": {"a": {"type": "integer"}}}}


CUSTOM = OfferedTool(
    "tools[0]", "add", ResponseTool(type="custom", name="add"), FunctionDefinition(name="add")
)


def items(pieces, *, custom=False):
    tools = {"add": CUSTOM} if custom else {}
    stream = EventStream(CallReader(FUNCTIONS, all_tags(None)), tools, lambda _: [])
    for number, text in enumerate(pieces, start=1):
        reason = "stop" if number == len(pieces) else None
        stream.take(OutputDelta(0, text, finish_reason=reason))
    stream.close()
    return stream.output


@pytest.mark.parametrize(
    ("text", "arguments", "content"),
    [
        ("<function=add><parameter=a>1</parameter>Done now", {"a": 1}, "Done now"),
        ('{"name": "add", "arguments": {"a": 1}, "reason": "y"}', {"a": 1}, ""),
    ],
)
@pytest.mark.parametrize("custom", [False, True])
def test_arguments_are_whole_where_text_follows_a_call(text, arguments, content, custom):
    member = "input" if custom else "arguments"
    (expected,) = (i[member] for i in items([text], custom=custom) if "call" in i["type"])
    if not custom:
        assert json.loads(expected) == arguments
    for cut in range(1, len(text) - 1):
        found = items([text[:cut], *text[cut:]], custom=custom)
        assert [item[member] for item in found if "call" in item["type"]] == [expected], cut
        texts = [item["content"][0]["text"] for item in found if item["type"] == "message"]
        assert "".join(texts) == content, cut


def test_a_call_behind_an_object_that_is_no_call_has_its_item():
    text = '{"name": "add", "description": "x"} <tool_call>{"name": "add", "arguments": {"a": 1}}'
    assert [item["type"] for item in items(text)] == ["message", "function_call"]
