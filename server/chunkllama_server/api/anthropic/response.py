"""A generation as a message of Anthropic's API, whole or as events."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from chunkllama.text.output_processor import OutputDelta
from chunkllama_server.api.anthropic.blocks import BlockStream, event
from chunkllama_server.api.common.request_stream import RequestStream
from chunkllama_server.api.schema.anthropic import MessagesRequest
from chunkllama_server.api.schema.anthropic_response import (
    AnthropicMessage,
    MessageDeltaUsage,
    MessageUsage,
    StopReason,
)
from chunkllama_server.api.tools.config import ToolConfig
from chunkllama_server.transport.error_shapes import anthropic_body
from chunkllama_server.transport.sse import COMMENT, StreamForm, sse

HOUR = 3600.0

ANTHROPIC_STREAM = StreamForm(
    media_type="text/event-stream",
    error=lambda error: sse(anthropic_body(error), "error"),
    waiting=COMMENT,  # clients expect message_start as the first event
    silent=event("ping"),
)


@dataclass(slots=True)
class MessageAnswer:
    """One message and what its events have in common.

    Attributes:
        marks: tokens before each cache mark, and the seconds that they are kept.
        is_clamped: max_tokens was lowered to what fits the context.
    """

    body: MessagesRequest
    generation: RequestStream
    tools: ToolConfig
    marks: tuple[tuple[int, float], ...] = ()
    is_clamped: bool = False
    _blocks: BlockStream = field(init=False)
    _last: OutputDelta | None = None

    def __post_init__(self) -> None:
        thinking = self.body.thinking
        is_omitted = thinking is not None and thinking.display == "omitted"
        self._blocks = BlockStream(self.tools.parser(), shows_thoughts=not is_omitted)

    async def whole(self) -> AnthropicMessage:
        """Run the generation and return the message."""
        piece = (await self.generation.collect())[0]
        self._take(piece)
        self._blocks.close()
        message = self._message()
        message["content"] = self._blocks.blocks
        message["stop_reason"] = self._stop_reason()
        message["stop_sequence"] = self._stop_sequence()
        return message

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield server-sent events in the order that Anthropic's clients expect."""
        has_begun = False
        async with aclosing(self.generation.pieces()) as stream:
            async for pieces in stream:
                if not has_begun:
                    has_begun = True
                    yield event("message_start", message=self._message())
                for piece in pieces:
                    for made in self._take(piece):
                        yield made
        for made in self._blocks.close():
            yield made
        end = {"stop_reason": self._stop_reason(), "stop_sequence": self._stop_sequence()}
        yield event("message_delta", delta=end, usage=self._delta_usage())
        yield event("message_stop")

    def _take(self, piece: OutputDelta) -> list[bytes]:
        self._last = piece
        if self.body.max_tokens == 0:  # the prompt was to be stored; its one token is not wanted
            return []
        return self._blocks.take(piece)

    def _message(self) -> AnthropicMessage:
        return {
            "id": self.generation.request.request_id,
            "type": "message",
            "role": "assistant",
            "model": self.body.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(),
        }

    def _stop_sequence(self) -> str | None:
        reason = self._last.stop_reason if self._last is not None else None
        return reason if isinstance(reason, str) else None

    def _stop_reason(self) -> StopReason:
        last = self._last
        if self.body.max_tokens == 0:
            return "max_tokens"
        if last is not None and last.finish_reason == "length":
            return "model_context_window_exceeded" if self.is_clamped else "max_tokens"
        if self._blocks.has_calls:
            return "tool_use"
        return "end_turn" if self._stop_sequence() is None else "stop_sequence"

    def _created(self) -> tuple[int, int]:
        """Tokens added to the cache and kept for five minutes and for an hour at least."""
        output = self.generation.output
        if not self.marks or not self.generation.is_pinned:
            return 0, 0
        added = output.num_cache_write_tokens
        until_hour = max((tokens for tokens, seconds in self.marks if seconds == HOUR), default=0)
        for_hour = min(max(until_hour - output.num_cached_tokens, 0), added)
        return added - for_hour, for_hour

    def _delta_usage(self) -> MessageDeltaUsage:
        output, created = self.generation.output, sum(self._created())
        prompt = len(self.generation.request.prompt_token_ids)
        return {
            "input_tokens": prompt - output.num_cached_tokens - created,
            "cache_creation_input_tokens": created,
            "cache_read_input_tokens": output.num_cached_tokens,
            "output_tokens": 0 if self.body.max_tokens == 0 else output.num_tokens,
            "output_tokens_details": {"thinking_tokens": output.num_reasoning_tokens},
        }

    def _usage(self) -> MessageUsage:
        for_minutes, for_hour = self._created()
        return {
            **self._delta_usage(),
            "cache_creation": {
                "ephemeral_5m_input_tokens": for_minutes,
                "ephemeral_1h_input_tokens": for_hour,
            },
            "service_tier": "standard",
        }
