"""Format output deltas as a chat completion, whole or as chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import cast

from chunkllama.text.output_processor import OutputDelta
from chunkllama_server.api.common.joined_stream import Generation
from chunkllama_server.api.common.logprobs import LogprobFormatter
from chunkllama_server.api.schema.chat import ChatCompletionRequest
from chunkllama_server.api.schema.chat_response import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    FinishReason,
    ResponseMessage,
    ToolCall,
    ToolCallDelta,
)
from chunkllama_server.api.schema.usage import CompletionUsage, completion_usage
from chunkllama_server.api.tools.config import ToolConfig
from chunkllama_server.api.tools.parsers import CallDelta, OutputParser
from chunkllama_server.transport.sse import DONE, sse


def _finish_reason(reason: str, has_calls: bool, is_legacy: bool) -> FinishReason:
    if reason == "stop" and has_calls:
        return "function_call" if is_legacy else "tool_calls"
    return cast(FinishReason, reason)


def _call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


@dataclass(slots=True)
class ChatAnswer:
    """One answer; holds the values that all its chunks repeat.

    Attributes:
        prefix: text put before each choice (echo of a continued message).
    """

    body: ChatCompletionRequest
    generation: Generation
    tools: ToolConfig
    formatter: LogprobFormatter
    model: str
    fingerprint: str
    service_tier: str | None
    prefix: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def _logprobs(self, piece: OutputDelta) -> ChatLogprobs | None:
        return self.formatter.chat(piece.logprobs) if self.body.logprobs else None

    def usage(self) -> CompletionUsage:
        """Count the tokens so far; the prompt counts once for all choices."""
        return completion_usage(
            self.generation.counts, self.generation.explanations(), self.generation.precision
        )

    def whole(self, pieces: list[OutputDelta]) -> ChatCompletion:
        """Return the completion of whole choices."""
        completion: ChatCompletion = {
            "id": self.generation.request.request_id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": [self._choice(piece) for piece in pieces],
            "usage": self.usage(),
            "service_tier": self.service_tier,
            "system_fingerprint": self.fingerprint,
        }
        if self.body.metadata is not None:
            completion["metadata"] = self.body.metadata
        if self.body.return_token_ids:
            completion["prompt_token_ids"] = self.generation.request.prompt_token_ids
        if self.body.prompt_logprobs is not None:
            logprobs = self.generation.output.prompt_logprobs or []
            completion["prompt_logprobs"] = self.formatter.prompt(logprobs)
        return completion

    def _choice(self, piece: OutputDelta) -> ChatChoice:
        parser = self.tools.parser()
        parsed = parser.feed(piece.text)
        parsed.extend(parser.finish())
        content = self.prefix + parsed.content
        calls = whole_calls(parsed.calls)
        message: ResponseMessage = {
            "role": "assistant",
            "content": content if content or not (calls or piece.reasoning) else None,
            "refusal": None,
        }
        if piece.reasoning:
            message["reasoning_content"] = piece.reasoning
        if calls and self.tools.is_legacy:
            message["function_call"] = calls[0]["function"]
        elif calls:
            message["tool_calls"] = calls
        assert piece.finish_reason is not None, "a collected choice has ended"
        choice: ChatChoice = {
            "index": piece.index,
            "message": message,
            "finish_reason": _finish_reason(piece.finish_reason, bool(calls), self.tools.is_legacy),
            "logprobs": self._logprobs(piece),
        }
        if piece.stop_reason is not None:
            choice["stop_reason"] = piece.stop_reason
        if self.body.return_token_ids:
            choice["token_ids"] = piece.token_ids
        return choice

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield server-sent events: roles, text, finish reasons, usage if requested, [DONE]."""
        choices = [_StreamedChoice(self) for _ in range(self.generation.request.sampling.n)]
        async with aclosing(self.generation.pieces()) as stream:
            is_first = True
            async for pieces in stream:
                if is_first:
                    is_first = False
                    for index in range(len(choices)):
                        yield sse(self._first_chunk(index))
                        if self.prefix:
                            yield sse(self._chunk([delta_choice(index, {"content": self.prefix})]))
                # One choice per chunk, because many clients read only choices[0].
                changes = (each for piece in pieces for each in choices[piece.index].take(piece))
                if events := b"".join(sse(self._chunk([change])) for change in changes):
                    yield events  # of one step: to send each by itself costs more than to make it
        options = self.body.stream_options
        if options is not None and options.include_usage:
            last = self._chunk([])
            last["usage"] = self.usage()
            yield sse(last)
        yield DONE

    def _first_chunk(self, index: int) -> ChatCompletionChunk:
        role: ChatDelta = {"role": "assistant"}
        if not self.tools.functions:  # else a client would take the empty text for an answer
            role |= {"content": "", "refusal": None}
        chunk = self._chunk([delta_choice(index, role)])
        if self.body.return_token_ids and index == 0:
            chunk["prompt_token_ids"] = self.generation.request.prompt_token_ids
        return chunk

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatCompletionChunk:
        chunk: ChatCompletionChunk = {
            "id": self.generation.request.request_id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "service_tier": self.service_tier,
            "system_fingerprint": self.fingerprint,
        }
        options = self.body.stream_options
        if options is not None and options.include_usage:
            continuous = options.continuous_usage_stats
            chunk["usage"] = self.usage() if continuous else None
        return chunk


def delta_choice(
    index: int, delta: ChatDelta, finish_reason: FinishReason | None = None
) -> ChatChunkChoice:
    """Make one choice of a chunk."""
    return {"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": None}


class _StreamedChoice:
    """State of one streamed choice: its parser and what has been sent."""

    def __init__(self, answer: ChatAnswer) -> None:
        self._answer = answer
        self._parser: OutputParser = answer.tools.parser()
        self._has_calls = False

    def take(self, piece: OutputDelta) -> list[ChatChunkChoice]:
        """Return the chunk choices of a piece: its text or calls, then its end."""
        answer = self._answer
        parsed = self._parser.feed(piece.text)
        if piece.finish_reason is not None:
            parsed.extend(self._parser.finish())
        deltas: list[ChatDelta] = []
        if piece.reasoning:
            deltas.append({"reasoning_content": piece.reasoning})
        for part in parsed.parts:
            if isinstance(part, str):
                deltas.append({"content": part})
            else:
                self._has_calls = True
                deltas.append(self._call_delta(part))
        choices = [delta_choice(piece.index, delta) for delta in deltas]
        if piece.finish_reason is not None:
            reason = _finish_reason(piece.finish_reason, self._has_calls, answer.tools.is_legacy)
            choices.append(delta_choice(piece.index, {}, reason))
            if piece.stop_reason is not None:
                choices[-1]["stop_reason"] = piece.stop_reason
        shows_tokens = answer.body.logprobs or answer.body.return_token_ids
        if not choices and shows_tokens and piece.token_ids:
            choices = [delta_choice(piece.index, {})]
        if piece.branch is not None:
            for choice in choices:
                choice["branch"] = piece.branch
        if choices and piece.token_ids:
            choices[0]["logprobs"] = answer._logprobs(piece)
            if answer.body.return_token_ids:
                choices[0]["token_ids"] = piece.token_ids
        return choices

    def _call_delta(self, call: CallDelta) -> ChatDelta:
        if self._answer.tools.is_legacy:
            if call.name is not None:
                return {"function_call": {"name": call.name, "arguments": call.arguments}}
            return {"function_call": {"arguments": call.arguments}}
        delta: ToolCallDelta = {
            "index": call.index,
            "function": {"arguments": call.arguments},
        }
        if call.name is not None:
            delta["id"] = _call_id()
            delta["type"] = "function"
            delta["function"]["name"] = call.name
        return {"tool_calls": [delta]}


def whole_calls(deltas: Sequence[CallDelta]) -> list[ToolCall]:
    """Join the parts of each call."""
    calls: list[ToolCall] = []
    for delta in deltas:
        if delta.name is not None:
            function = {"name": delta.name, "arguments": ""}
            calls.append(
                cast(ToolCall, {"id": _call_id(), "type": "function", "function": function})
            )
        calls[-1]["function"]["arguments"] += delta.arguments
    return calls
