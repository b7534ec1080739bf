"""A generation turned into a response object, whole or as events with sequence numbers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from chunkllama.errors import OverloadedError
from chunkllama.text.output_processor import OutputDelta
from chunkllama_server.api.common.joined_stream import Generation
from chunkllama_server.api.common.logprobs import LogprobFormatter
from chunkllama_server.api.common.response_store import EventRecorder
from chunkllama_server.api.responses.event_stream import EventStream
from chunkllama_server.api.responses.tools import OfferedTool
from chunkllama_server.api.schema.chat_response import ChatTokenLogprob
from chunkllama_server.api.schema.response_object import Response, ResponseError
from chunkllama_server.api.schema.responses import ResponseRequest
from chunkllama_server.api.schema.usage import ResponseUsage
from chunkllama_server.api.tools.config import ToolConfig
from chunkllama_server.transport.errors import ApiError, as_api_error

T = TypeVar("T")
# Called with the response and its packed events when it has ended.
OnEnded = Callable[[Response, bytes], Awaitable[None]]


class Beside(Protocol):
    """Returns ``work()``, done in a thread where it has many values to write."""

    async def __call__(self, num_values: int, work: Callable[[], T]) -> T: ...


@dataclass(slots=True)
class ResponseAnswer:
    """What the response object and its events have in common.

    Attributes:
        offered: the tools that the model may call.
        beside: does what takes long in a thread.
        on_ended: stores the response.
    """

    body: ResponseRequest
    generation: Generation
    tools: ToolConfig
    offered: Sequence[OfferedTool]
    formatter: LogprobFormatter
    wants_logprobs: bool
    beside: Beside
    on_ended: OnEnded
    created: int = field(default_factory=lambda: int(time.time()))
    _stream: EventStream = field(init=False)
    _recorder: EventRecorder | None = field(init=False)
    _echoed: dict[str, Any] = field(init=False)
    _has_begun: bool = False

    def __post_init__(self) -> None:
        tools = {tool.name: tool for tool in self.offered}
        self._recorder = EventRecorder() if self.body.store is not False else None
        self._stream = EventStream(self.tools.parser(), tools, self.logprobs)
        self._echoed = self.body.model_dump(include=_ECHOED, exclude_none=True, by_alias=True)

    def usage(self) -> ResponseUsage:
        counts = self.generation.counts
        usage: ResponseUsage = {
            "input_tokens": counts.prompt,
            "input_tokens_details": {
                "cached_tokens": counts.cached,
                "cache_write_tokens": counts.written,
            },
            "output_tokens": counts.output,
            "output_tokens_details": {"reasoning_tokens": counts.reasoning},
            "total_tokens": counts.prompt + counts.output,
        }
        if precision := self.generation.precision:
            usage["input_tokens_details"]["cached_tokens_by_precision"] = precision.split(counts)
        if explanations := self.generation.explanations():
            usage["input_tokens_details"]["cache_explanations"] = explanations
        return usage

    def response(self) -> Response:
        """Return the object before any output."""
        body, sampling = self.body, self.generation.request.sampling
        given = self._echoed
        tier = body.service_tier or "default"
        return {
            "id": self.generation.request.request_id,
            "object": "response",
            "created_at": self.created,
            "completed_at": None,
            "status": "in_progress",
            "background": bool(body.background),
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "model": body.model,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id or None,
            "prompt_cache_key": body.prompt_cache_key,
            "prompt_cache_retention": (body.prompt_cache_retention or "").replace("-", "_") or None,
            "reasoning": {"effort": None, "summary": None, **given.get("reasoning", {})},
            "safety_identifier": body.safety_identifier,
            "service_tier": "default" if tier in ("auto", "scale") else tier,
            "store": body.store is not False,
            "temperature": sampling.temperature,
            "text": _echoed_text(given.get("text", {})),
            "tool_choice": _echoed_choice(given.get("tool_choice", "auto")),
            "tools": _echoed_tools(given.get("tools", [])),
            "top_logprobs": body.top_logprobs or 0,
            "top_p": sampling.top_p,
            "truncation": body.truncation or "disabled",
            "usage": None,
            "user": body.user,
            "metadata": body.metadata or {},
        }

    def snapshot(self) -> Response:
        """Return the response as it is while it runs."""
        response = self.response()
        response["status"] = "in_progress" if self._has_begun else "queued"
        response["output"] = [*self._stream.output]
        return response

    def logprobs(self, piece: OutputDelta) -> list[ChatTokenLogprob]:
        if not self.wants_logprobs:
            return []
        return self.formatter.chat(piece.logprobs)["content"] or []

    async def whole(self) -> Response:
        """Run the generation and put the response together."""
        if self.wants_logprobs and self.tools.functions:
            # Each text among calls has its own tokens, which only pieces tell.
            self._begin()
            async with aclosing(self.generation.pieces()) as generated:
                async for pieces in generated:
                    for piece in pieces:
                        self._note(self._stream.take(piece))
            return (await self._end())[0]
        piece = (await self.generation.collect())[0]
        self._begin()
        await self._in_thread(lambda: self._note(self._stream.take(piece)))
        return (await self._end())[0]

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events; an error after the first of them is ``response.failed``."""
        has_answered = bool(self.body.background)
        if has_answered:
            response = self.snapshot()
            for kind in ("response.created", "response.queued"):
                yield self._note([self._stream.event(kind, response=response)])[0]
        try:
            async with aclosing(self.generation.pieces()) as generated:
                async for pieces in generated:
                    if not self._has_begun:
                        has_answered = True
                        for event in self._begin():
                            yield event
                    for piece in pieces:
                        for event in self._note(self._stream.take(piece)):
                            yield event
            for event in (await self._end())[1]:
                yield event
        except Exception as error:
            if not has_answered:
                raise
            yield await self._fail(error)

    async def cancelled(self) -> bytes:
        """End the response where it is, and return the event that says so."""
        self._stream.interrupt()
        response = self._ended("cancelled")
        # The API has no event for it; the response in it has the status.
        return await self._last(response, "response.incomplete")

    def _note(self, events: list[bytes]) -> list[bytes]:
        if self._recorder is not None:
            self._recorder.add(events)
        return events

    def _begin(self) -> list[bytes]:
        self._has_begun = True
        kinds = ["response.created", "response.in_progress"]
        return self._note(
            [
                self._stream.event(kind, response=self.response())
                for kind in (kinds[1:] if self.body.background else kinds)
            ]
        )

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Return ``work()``, done in a thread where the response has many log-probabilities."""
        return await self._to_end(self.beside(self.generation.num_logprobs, work))

    async def _to_end(self, work: Awaitable[T]) -> T:
        """Await the work at a response's end.

        Cancelling one that runs in the background comes too late here: it has ended otherwise.
        """
        ending = asyncio.ensure_future(work)
        while not ending.done():
            try:
                await asyncio.shield(ending)
            except asyncio.CancelledError:
                if not self.body.background:
                    raise
        return ending.result()

    async def _end(self) -> tuple[Response, list[bytes]]:
        closed = await self._in_thread(lambda: self._note(self._stream.close()))
        is_cut = self._stream.reason == "length"
        response = self._ended("incomplete" if is_cut else "completed")
        if is_cut:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        return response, [*closed, await self._last(response, f"response.{response['status']}")]

    async def _fail(self, error: Exception) -> bytes:
        self._stream.interrupt()
        response = self._ended("failed")
        response["error"] = _response_error(error)
        return await self._last(response, "response.failed")

    def _ended(self, status: Any) -> Response:
        response = self.response()
        response["completed_at"] = int(time.time()) if status in _COMPLETED else None
        response["status"] = status
        response["output"] = self._stream.output
        response["usage"] = self.usage()
        return response

    async def _last(self, response: Response, kind: str) -> bytes:
        """Store the ended response, and return the event that says how it has ended."""

        def write() -> tuple[bytes, bytes]:
            event = self._note([self._stream.event(kind, response=response)])[0]
            return event, b"" if self._recorder is None else self._recorder.packed()

        event, packed = await self._in_thread(write)
        await self._to_end(self.on_ended(response, packed))
        return event


# What a response repeats of its request; members that no model knows are left out.
_ECHOED: Any = {
    "reasoning": {"effort", "summary"},
    "text": {"format", "verbosity"},
    "tool_choice": True,
    "tools": True,
}
_COMPLETED = ("completed", "incomplete")


def _echoed_text(text: dict[str, Any]) -> dict[str, Any]:
    """The format with the members that clients' types require."""
    given = text.get("format", {"type": "text"})
    needed = {"name": "response"} if given["type"] == "json_schema" else {}
    return {**text, "format": {**needed, **given}}


def _echoed_choice(choice: Any) -> Any:
    if isinstance(choice, dict) and choice["type"] == "allowed_tools":
        return {"mode": "auto", **choice}
    return choice


def _echoed_tools(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that are offered: others may be of types that clients cannot read either."""
    kinds = ("function", "custom")
    shown = [t for t in tools if t["type"] in kinds or (t["type"] == "namespace" and "tools" in t)]
    return list(map(_echoed_tool, shown))


def _echoed_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool with the members that clients' types require, without a format they cannot read."""
    if tool["type"] == "function":
        return {"parameters": None, "strict": None, **tool}
    if tool["type"] == "namespace":
        return {"description": "", **tool, "tools": _echoed_tools(tool["tools"])}
    form = tool.get("format", {"type": "text"})
    is_read = form.get("type") in ("grammar", "text")
    if form.get("type") == "grammar":
        is_read = isinstance(form.get("definition"), str) and isinstance(form.get("syntax"), str)
    is_read &= form.get("syntax", "lark") in ("lark", "regex")
    return tool if is_read else {k: v for k, v in tool.items() if k != "format"}


def _response_error(error: Exception) -> ResponseError:
    api_error = as_api_error(error)
    if isinstance(error, OverloadedError):
        return {"code": "rate_limit_exceeded", "message": api_error.message}
    is_refused = isinstance(api_error, ApiError) and api_error.status_code == 400
    return {
        "code": "invalid_prompt" if is_refused else "server_error",
        "message": api_error.message,
    }
