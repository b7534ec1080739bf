"""The events of a response: its items as they open, grow and close."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from typing import Any, cast

import msgspec

from chunkllama.text.output_processor import OutputDelta
from chunkllama_server.api.responses.items import (
    custom_input,
    item_id,
    opened_call,
    output_text,
    reasoning_item,
)
from chunkllama_server.api.responses.tools import OfferedTool
from chunkllama_server.api.schema.chat_response import ChatTokenLogprob
from chunkllama_server.api.schema.response_object import (
    OutputItem,
    OutputMessage,
    OutputReasoning,
)
from chunkllama_server.api.tools.parsers import CallDelta, OutputParser
from chunkllama_server.transport.sse import sse

Logprobs = Callable[[OutputDelta], list[ChatTokenLogprob]]


class EventStream:
    """The items of one response, and the events that announce them.

    Args:
        parser: reads calls in the answer's text.
        tools: that are offered, by the names that the model knows.
        logprobs: log-probabilities of a piece, [] where none are asked for.

    Attributes:
        output: the items so far.
    """

    def __init__(
        self, parser: OutputParser, tools: Mapping[str, OfferedTool], logprobs: Logprobs
    ) -> None:
        self.output: list[OutputItem] = []
        self._parser = parser
        self._tools = tools
        self._logprobs_of = logprobs
        self._sequence_number = 0
        self._reason: str | None = None
        self._is_open = False
        # Arguments of an open call of a custom tool, which are JSON until they are complete.
        self._arguments = ""
        # Of text that the parser holds back.
        self._logprobs: list[ChatTokenLogprob] = []

    @property
    def reason(self) -> str | None:
        """Why generation ended, None before."""
        return self._reason

    def event(self, event_type: str, **members: Any) -> bytes:
        """One event with the next sequence number."""
        payload = {"type": event_type, "sequence_number": self._sequence_number, **members}
        self._sequence_number += 1
        return sse(payload, event_type)

    def take(self, piece: OutputDelta) -> list[bytes]:
        """Events for what a piece adds."""
        parsed = self._parser.feed(piece.text)
        if piece.finish_reason is not None:
            parsed.extend(self._parser.finish())
        self._logprobs += self._logprobs_of(piece)
        events: list[bytes] = []
        if piece.reasoning:
            events += self._add_thoughts(piece.reasoning)
        for part in parsed.parts:
            if isinstance(part, str):
                is_first = self._message() is None and bool(self.output)
                logprobs = _of_text(self._logprobs, part) if is_first else self._logprobs
                events += self._add_text(part, logprobs, piece.branch)
            else:
                events += self._add_call(part)
            self._logprobs = []
        if self._logprobs and self._message() is not None:
            events += self._add_text("", self._logprobs)
            self._logprobs = []
        self._reason = piece.finish_reason
        message = self._message()
        if piece.whole_text is not None and message is not None:
            message["content"][0]["text"] = piece.whole_text  # its branches came mixed
        return events

    def close(self) -> list[bytes]:
        """Close what is open; an answer without any item is an empty message."""
        events: list[bytes] = []
        if not self.output:
            events += self._open_message()
        return events + self._close()

    def interrupt(self) -> None:
        """Leave the open item as incomplete."""
        if self._is_open:
            self._is_open = False
            self._complete_custom_input()
            self.output[-1]["status"] = "incomplete"

    def _message(self) -> OutputMessage | None:
        if self._is_open and self.output[-1]["type"] == "message":
            return self.output[-1]
        return None

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self.output[-1]["id"], "output_index": len(self.output) - 1}

    def _open(self, item: OutputItem) -> list[bytes]:
        self.output.append(item)
        self._is_open = True
        index = len(self.output) - 1
        return [self.event("response.output_item.added", output_index=index, item=item)]

    def _open_message(self) -> list[bytes]:
        events = self._close()
        item: OutputMessage = {
            "id": item_id("msg"),
            "type": "message",
            "role": "assistant",
            "status": "in_progress",
            "content": [],
        }
        events += self._open(item)
        item["content"].append(output_text("", []))
        part = output_text("", [])
        events.append(
            self.event("response.content_part.added", **self._place, content_index=0, part=part)
        )
        return events

    def _add_thoughts(self, text: str) -> list[bytes]:
        events = []
        if not self._is_open:
            item = reasoning_item("", "in_progress")
            events += self._open(item)
            item["content"].append({"type": "reasoning_text", "text": ""})
            part = item["content"][0]
            events.append(
                self.event("response.content_part.added", **self._place, content_index=0, part=part)
            )
        thoughts = cast(OutputReasoning, self.output[-1])
        thoughts["content"][0]["text"] += text
        events.append(
            self.event("response.reasoning_text.delta", **self._place, content_index=0, delta=text)
        )
        return events

    def _add_text(
        self, text: str, logprobs: list[ChatTokenLogprob], branch: int | None = None
    ) -> list[bytes]:
        message = self._message()
        events = []
        if message is None:
            events = self._open_message()
            message = self._message()
            assert message is not None
        part = message["content"][0]
        part["text"] += text
        part["logprobs"] += logprobs
        if text:
            events.append(
                self.event(
                    "response.output_text.delta",
                    **self._place,
                    content_index=0,
                    delta=text,
                    logprobs=logprobs,
                    **({} if branch is None else {"branch": branch}),
                )
            )
        return events

    def _add_call(self, delta: CallDelta) -> list[bytes]:
        events = []
        if delta.name is not None:
            events = self._close()
            call_id = f"call_{uuid.uuid4().hex[:24]}"
            item = opened_call(delta.name, self._tools.get(delta.name), call_id)
            self._arguments = ""
            events += self._open(item)
        call = self.output[-1]
        if delta.arguments and call["type"] == "custom_tool_call":
            self._arguments += delta.arguments
        elif delta.arguments and call["type"] == "function_call":
            call["arguments"] += delta.arguments
            events.append(
                self.event(
                    "response.function_call_arguments.delta", **self._place, delta=delta.arguments
                )
            )
        return events

    def _complete_custom_input(self) -> None:
        item = self.output[-1]
        if item["type"] == "custom_tool_call":
            item["input"] = custom_input(self._arguments)

    def _close(self) -> list[bytes]:
        if not self._is_open:
            return []
        self._is_open = False
        item, place = self.output[-1], self._place
        item["status"] = "incomplete" if self._reason == "length" else "completed"
        if item["type"] == "reasoning":
            thought = item["content"][0]
            events = [
                self.event(
                    "response.reasoning_text.done", **place, content_index=0, text=thought["text"]
                ),
                self.event("response.content_part.done", **place, content_index=0, part=thought),
            ]
        elif item["type"] == "message":
            part = item["content"][0]
            part["logprobs"] = _as_json(part["logprobs"])
            events = [
                self.event(
                    "response.output_text.done",
                    **place,
                    content_index=0,
                    text=part["text"],
                    logprobs=part["logprobs"],
                ),
                self.event("response.content_part.done", **place, content_index=0, part=part),
            ]
        elif item["type"] == "custom_tool_call":
            self._complete_custom_input()
            name = "response.custom_tool_call_input"
            text = item["input"]
            events = [self.event(f"{name}.delta", **place, delta=text)] if text else []
            events.append(self.event(f"{name}.done", **place, input=text))
        else:
            events = [
                self.event(
                    "response.function_call_arguments.done",
                    **place,
                    name=item["name"],
                    arguments=item["arguments"],
                )
            ]
        index = place["output_index"]
        events.append(self.event("response.output_item.done", output_index=index, item=item))
        return events


def _as_json(values: list[Any]) -> Any:
    """A list as its JSON text, which events and the response repeat; other threads run between two
    values."""
    return msgspec.Raw(b"[" + b",".join(map(msgspec.json.encode, values)) + b"]")


def _of_text(logprobs: list[ChatTokenLogprob], text: str) -> list[ChatTokenLogprob]:
    """The entries from the text's first token on: those before it ended the call before."""
    start = "".join(entry["token"] for entry in logprobs).find(text)
    for index, entry in enumerate(logprobs):
        start -= len(entry["token"])
        if start < 0:
            return logprobs[index:]
    return logprobs
