"""A generation turned into a response object, whole or as events with sequence numbers."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, cast

from chunkllama.text.output_processor import OutputDelta
from chunkllama_server.api.chat.response import whole_calls
from chunkllama_server.api.common.logprobs import LogprobFormatter
from chunkllama_server.api.common.request_stream import RequestStream
from chunkllama_server.api.responses.items import item_id, output_text, reasoning_item
from chunkllama_server.api.schema.chat_response import ChatTokenLogprob
from chunkllama_server.api.schema.response_object import (
    OutputFunctionCall,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    Response,
)
from chunkllama_server.api.schema.responses import ResponseRequest
from chunkllama_server.api.schema.usage import ResponseUsage
from chunkllama_server.api.tools.config import ToolConfig
from chunkllama_server.api.tools.parsers import CallDelta, Parsed
from chunkllama_server.transport.errors import as_api_error
from chunkllama_server.transport.sse import sse


@dataclass(slots=True)
class ResponseAnswer:
    """What the response object and its events have in common.

    Attributes:
        on_finished: called with the finished response (the store keeps it).
    """

    body: ResponseRequest
    generation: RequestStream
    tools: ToolConfig
    formatter: LogprobFormatter
    wants_logprobs: bool
    on_finished: Callable[[Response], None]
    created: int = field(default_factory=lambda: int(time.time()))

    def usage(self) -> ResponseUsage:
        generation = self.generation
        prompt = len(generation.request.prompt_token_ids)
        usage: ResponseUsage = {
            "input_tokens": prompt,
            "input_tokens_details": {
                "cached_tokens": generation.output.num_cached_tokens,
                "cache_write_tokens": generation.output.num_cache_write_tokens,
            },
            "output_tokens": generation.output.num_tokens,
            "output_tokens_details": {"reasoning_tokens": generation.output.num_reasoning_tokens},
            "total_tokens": prompt + generation.output.num_tokens,
        }
        if explanations := generation.explanations():
            usage["input_tokens_details"]["cache_explanations"] = explanations
        return usage

    def response(self) -> Response:
        """Return the object before any output."""
        body, sampling = self.body, self.generation.request.sampling
        echoed = {"reasoning", "text", "tool_choice", "tools"}
        given = body.model_dump(include=echoed, exclude_none=True, by_alias=True)
        tier = body.service_tier or "default"
        return {
            "id": self.generation.request.request_id,
            "object": "response",
            "created_at": self.created,
            "completed_at": None,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "model": body.model,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "prompt_cache_key": body.prompt_cache_key,
            "prompt_cache_retention": body.prompt_cache_retention,
            "reasoning": {"effort": None, "summary": None, **given.get("reasoning", {})},
            "safety_identifier": body.safety_identifier,
            "service_tier": "default" if tier in ("auto", "scale") else tier,
            "store": body.store is not False,
            "temperature": sampling.temperature,
            "text": {"format": {"type": "text"}, **given.get("text", {})},
            "tool_choice": given.get("tool_choice", "auto"),
            "tools": given.get("tools", []),
            "top_logprobs": body.top_logprobs or 0,
            "top_p": sampling.top_p,
            "truncation": body.truncation or "disabled",
            "usage": None,
            "user": body.user,
            "metadata": body.metadata or {},
        }

    def finished(self, output: list[OutputItem], reason: str | None) -> Response:
        """The object with its output; ``reason`` is why generation ended."""
        response = self.response()
        response["completed_at"] = int(time.time())
        response["status"] = "completed"
        if reason == "length":
            response["status"] = "incomplete"
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        response["output"] = output
        response["usage"] = self.usage()
        self.on_finished(response)
        return response

    def logprobs(self, piece: OutputDelta) -> list[ChatTokenLogprob]:
        if not self.wants_logprobs:
            return []
        return self.formatter.chat(piece.logprobs)["content"] or []

    async def whole(self) -> Response:
        """Run the generation and put the response together."""
        piece = (await self.generation.collect())[0]
        parser = self.tools.parser()
        parsed, rest = parser.feed(piece.text), parser.finish()
        content = parsed.content + rest.content
        calls = whole_calls([*parsed.calls, *rest.calls])
        output: list[OutputItem] = []
        if piece.reasoning:
            output.append(reasoning_item(piece.reasoning, "completed"))
        if content or not (output or calls):
            message: OutputMessage = {
                "id": item_id("msg"),
                "type": "message",
                "role": "assistant",
                "status": "completed",
                "content": [output_text(content, self.logprobs(piece))],
            }
            output.append(message)
        for call in calls:
            item: OutputFunctionCall = {
                "id": item_id("fc"),
                "type": "function_call",
                "call_id": call["id"],
                "name": call["function"]["name"],
                "arguments": call["function"]["arguments"],
                "status": "completed",
            }
            output.append(item)
        if piece.finish_reason == "length":
            output[-1]["status"] = "incomplete"
        return self.finished(output, piece.finish_reason)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events; an error after the first of them is ``response.failed``."""
        stream = _EventStream(self)
        has_begun = False
        try:
            async with aclosing(self.generation.pieces()) as generated:
                async for pieces in generated:
                    if not has_begun:
                        has_begun = True
                        yield stream.event("response.created", response=self.response())
                        yield stream.event("response.in_progress", response=self.response())
                    for piece in pieces:
                        for event in stream.take(piece):
                            yield event
            for event in stream.finish():
                yield event
        except Exception as error:
            if not has_begun:
                raise
            failed = self.response()
            failed["status"] = "failed"
            failed["error"] = {"code": "server_error", "message": as_api_error(error).message}
            failed["output"] = stream.output
            yield stream.event("response.failed", response=failed)


class _EventStream:
    """The items of one streamed response as they open, grow and close."""

    def __init__(self, answer: ResponseAnswer) -> None:
        self.output: list[OutputItem] = []
        self._answer = answer
        self._parser = answer.tools.parser()
        self._sequence_number = 0
        self._reason: str | None = None
        self._is_open = False
        # Of text that the parser holds back.
        self._logprobs: list[ChatTokenLogprob] = []

    def event(self, event_type: str, **members: Any) -> bytes:
        """One event with the next sequence number."""
        payload = {"type": event_type, "sequence_number": self._sequence_number, **members}
        self._sequence_number += 1
        return sse(payload, event_type)

    def take(self, piece: OutputDelta) -> list[bytes]:
        """Events for what a piece adds."""
        parsed = self._parser.feed(piece.text)
        if piece.finish_reason is not None:
            rest = self._parser.finish()
            parsed = Parsed(parsed.content + rest.content, parsed.calls + rest.calls)
        self._logprobs += self._answer.logprobs(piece)
        events: list[bytes] = []
        if piece.reasoning:
            events += self._add_thoughts(piece.reasoning)
        if parsed.content or (self._logprobs and self._message() is not None):
            events += self._add_text(parsed.content, self._logprobs)
            self._logprobs = []
        for call in parsed.calls:
            events += self._add_call(call)
            self._logprobs = []
        self._reason = piece.finish_reason
        return events

    def finish(self) -> list[bytes]:
        """Close what is open, and end."""
        events: list[bytes] = []
        if not self.output:
            events += self._open_message()
        events += self._close()
        response = self._answer.finished(self.output, self._reason)
        events.append(self.event(f"response.{response['status']}", response=response))
        return events

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
            events.append(
                self.event(
                    "response.content_part.added",
                    **self._place,
                    content_index=0,
                    part=item["content"][0],
                )
            )
        thoughts = cast(OutputReasoning, self.output[-1])
        thoughts["content"][0]["text"] += text
        events.append(
            self.event("response.reasoning_text.delta", **self._place, content_index=0, delta=text)
        )
        return events

    def _add_text(self, text: str, logprobs: list[ChatTokenLogprob]) -> list[bytes]:
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
                )
            )
        return events

    def _add_call(self, delta: CallDelta) -> list[bytes]:
        events = []
        if delta.name is not None:
            events = self._close()
            item: OutputFunctionCall = {
                "id": item_id("fc"),
                "type": "function_call",
                "call_id": f"call_{uuid.uuid4().hex[:24]}",
                "name": delta.name,
                "arguments": "",
                "status": "in_progress",
            }
            events += self._open(item)
        if delta.arguments:
            call = cast(OutputFunctionCall, self.output[-1])
            call["arguments"] += delta.arguments
            events.append(
                self.event(
                    "response.function_call_arguments.delta", **self._place, delta=delta.arguments
                )
            )
        return events

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
