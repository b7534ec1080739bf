"""The content blocks of one answer, and the events that announce them."""

from __future__ import annotations

import base64
import hashlib
import uuid
from typing import Any

from chunkllama.text.output_processor import OutputDelta
from chunkllama_server.api.chat.history import readable_arguments
from chunkllama_server.api.schema.anthropic_response import AnswerBlock
from chunkllama_server.api.tools.parsers import CallDelta, OutputParser
from chunkllama_server.transport.sse import sse


def event(kind: str, **members: Any) -> bytes:
    """One server-sent event, whose name is its type."""
    return sse({"type": kind, **members}, kind)


def _signature(thoughts: str) -> str:
    """Clients send thoughts back only if they are signed; nothing verifies it."""
    return base64.b64encode(hashlib.sha256(thoughts.encode()).digest()).decode()


class BlockStream:
    """The blocks of an answer as they open, grow and close.

    Args:
        parser: reads calls in the answer's text.
        shows_thoughts: whether the text of thoughts is sent.

    Attributes:
        blocks: so far; the arguments of an open call are not in it yet.
        has_calls: one of them is a call.
    """

    def __init__(self, parser: OutputParser, *, shows_thoughts: bool = True) -> None:
        self.blocks: list[AnswerBlock] = []
        self.has_calls = False
        self._parser = parser
        self._shows_thoughts = shows_thoughts
        self._is_open = False
        self._thoughts = ""
        self._arguments = ""

    def take(self, piece: OutputDelta) -> list[bytes]:
        """Events for what a piece adds."""
        events: list[bytes] = []
        if piece.reasoning:
            events += self._add_thoughts(piece.reasoning)
        for part in self._parts(piece):
            events += self._add_text(part) if isinstance(part, str) else self._add_call(part)
        return events

    def _parts(self, piece: OutputDelta) -> list[str | CallDelta]:
        """Text and parts of calls, in the order in which they were written."""
        parsed = self._parser.feed(piece.text)
        if piece.finish_reason is not None:
            parsed.extend(self._parser.finish())
        return parsed.parts

    def close(self) -> list[bytes]:
        """Close the open block, if there is one."""
        if not self._is_open:
            return []
        self._is_open = False
        block, index = self.blocks[-1], len(self.blocks) - 1
        events: list[bytes] = []
        if block["type"] == "thinking":
            block["signature"] = _signature(self._thoughts)
            delta = {"type": "signature_delta", "signature": block["signature"]}
            events.append(event("content_block_delta", index=index, delta=delta))
        elif block["type"] == "tool_use":
            block["input"] = readable_arguments(self._arguments)[0]
        return [*events, event("content_block_stop", index=index)]

    def _open(self, block: AnswerBlock) -> list[bytes]:
        events = self.close()
        self.blocks.append(block)
        self._is_open = True
        index = len(self.blocks) - 1
        return [*events, event("content_block_start", index=index, content_block=block)]

    def _is_in(self, kind: str) -> bool:
        return self._is_open and self.blocks[-1]["type"] == kind

    def _delta(self, **delta: str) -> bytes:
        return event("content_block_delta", index=len(self.blocks) - 1, delta=delta)

    def _add_thoughts(self, text: str) -> list[bytes]:
        events: list[bytes] = []
        if not self._is_in("thinking"):
            events = self._open({"type": "thinking", "thinking": "", "signature": ""})
            self._thoughts = ""
        self._thoughts += text
        block = self.blocks[-1]
        if self._shows_thoughts and block["type"] == "thinking":
            block["thinking"] += text
            events.append(self._delta(type="thinking_delta", thinking=text))
        return events

    def _add_text(self, text: str) -> list[bytes]:
        events: list[bytes] = []
        if not self._is_in("text"):
            events = self._open({"type": "text", "text": "", "citations": None})
        block = self.blocks[-1]
        if block["type"] == "text":
            block["text"] += text
        events.append(self._delta(type="text_delta", text=text))
        return events

    def _add_call(self, call: CallDelta) -> list[bytes]:
        events: list[bytes] = []
        if call.name is not None:
            block_id = f"toolu_{uuid.uuid4().hex[:24]}"
            events = self._open(
                {"type": "tool_use", "id": block_id, "name": call.name, "input": {}}
            )
            self.has_calls = True
            self._arguments = ""
        if call.arguments:
            self._arguments += call.arguments
            events.append(self._delta(type="input_json_delta", partial_json=call.arguments))
        return events
