"""A generation in Ollama's format, whole or as lines of JSON."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec

from chunkllama.text.output_processor import OutputDelta
from chunkllama_server.api.chat.history import readable_arguments
from chunkllama_server.api.common.request_stream import RequestStream
from chunkllama_server.api.schema.ollama import OllamaCounts, OllamaToolCall
from chunkllama_server.api.tools.parsers import CallDelta, OutputParser, PlainText
from chunkllama_server.transport.sse import StreamForm

_NANOSECONDS = 1_000_000_000
OLLAMA_STREAM = StreamForm(
    media_type="application/x-ndjson",
    error=lambda error: _line({"error": error.message}),
    waiting=None,  # clients read every line as JSON
    silent=None,
)


def _line(part: Any) -> bytes:
    return msgspec.json.encode(part) + b"\n"


def now() -> str:
    """The time as Ollama writes it."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


@dataclass(slots=True)
class _New:
    """What a piece adds to the answer; calls are whole."""

    content: str = ""
    thinking: str = ""
    calls: list[OllamaToolCall] = field(default_factory=list)


@dataclass(slots=True)
class OllamaAnswer:
    """One answer of POST /api/chat or /api/generate.

    Attributes:
        is_chat: the answer is a message, else a text.
        parser: reads calls in the answer's text.
        started: the request's arrival, in monotonic seconds.
    """

    model: str
    generation: RequestStream
    is_chat: bool
    parser: OutputParser = field(default_factory=PlainText)
    started: float = field(default_factory=time.monotonic)
    _call: tuple[str, str] | None = None
    _reason: str | None = None

    async def whole(self) -> dict[str, Any]:
        """Run the generation and return the answer."""
        piece = (await self.generation.collect())[0]
        return {**self._part(self._take(piece)), **self._end()}

    async def lines(self) -> AsyncGenerator[bytes, None]:
        """Yield lines of JSON; the last one has counts and times."""
        async with aclosing(self.generation.pieces()) as stream:
            async for pieces in stream:
                for piece in pieces:
                    new = self._take(piece)
                    if new.content or new.thinking or new.calls:
                        yield _line({**self._part(new), "done": False})
        yield _line({**self._part(_New()), **self._end()})

    def _take(self, piece: OutputDelta) -> _New:
        parsed = self.parser.feed(piece.text)
        if piece.finish_reason is not None:
            parsed.extend(self.parser.finish())
            self._reason = piece.finish_reason
        calls = [made for call in parsed.calls if (made := self._add(call)) is not None]
        if piece.finish_reason is not None and self._call is not None:
            calls.append(self._complete())
        return _New(parsed.content, piece.reasoning, calls)

    def _add(self, delta: CallDelta) -> OllamaToolCall | None:
        """Add to the open call; returns the one before, which is complete."""
        ended = None
        if delta.name is not None:
            ended = self._complete() if self._call is not None else None
            self._call = (delta.name, "")
        assert self._call is not None, "a call begins with its name"
        self._call = (self._call[0], self._call[1] + delta.arguments)
        return ended

    def _complete(self) -> OllamaToolCall:
        assert self._call is not None
        (name, arguments), self._call = self._call, None
        return {
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "function": {"name": name, "arguments": readable_arguments(arguments)[0]},
        }

    def _part(self, new: _New) -> dict[str, Any]:
        part: dict[str, Any] = {"model": self.model, "created_at": now()}
        if not self.is_chat:
            part["response"] = new.content
            if new.thinking:
                part["thinking"] = new.thinking
            return part
        message: dict[str, Any] = {"role": "assistant", "content": new.content}
        if new.thinking:
            message["thinking"] = new.thinking
        if new.calls:
            message["tool_calls"] = new.calls
        part["message"] = message
        return part

    def _end(self) -> dict[str, Any]:
        timer = self.generation.timer
        assert timer is not None, "an answer ends after the engine has run"
        counts: OllamaCounts = {
            "total_duration": int((time.monotonic() - self.started) * _NANOSECONDS),
            "load_duration": 0,
            "prompt_eval_count": len(self.generation.request.prompt_token_ids),
            "prompt_eval_duration": int(timer.prefill_seconds * _NANOSECONDS),
            "eval_count": self.generation.output.num_tokens,
            "eval_duration": int((timer.decode_seconds or 0.0) * _NANOSECONDS),
        }
        return {"done": True, "done_reason": self._reason or "stop", **counts}
