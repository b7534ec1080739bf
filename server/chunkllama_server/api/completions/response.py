"""Format output deltas as a text completion, whole or as chunks, for one prompt or several."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, cast

from chunkllama.messages import TokenLogprob
from chunkllama.text.output_processor import OutputDelta
from chunkllama_server.api.common.joined_stream import Generation
from chunkllama_server.api.common.logprobs import LogprobFormatter, TextOffsets
from chunkllama_server.api.common.merged import MAX_AT_ONCE, merged
from chunkllama_server.api.schema.completions import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from chunkllama_server.api.schema.usage import CompletionUsage, TokenCounts, completion_usage
from chunkllama_server.transport.sse import DONE, gather_or_cancel, sse


@dataclass(slots=True)
class CompletionAnswer:
    """The generations of one request, one per prompt.

    Attributes:
        prompt_texts: text of each prompt, for echo.
    """

    body: CompletionRequest
    completion_id: str
    generations: Sequence[Generation]
    prompt_texts: list[str]
    formatter: LogprobFormatter
    fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))
    _slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_AT_ONCE))

    @property
    def _n(self) -> int:
        return self.generations[0].request.sampling.n

    def usage(self) -> CompletionUsage:
        """Sum the usage of all prompts."""
        return completion_usage(
            TokenCounts.total(g.counts for g in self.generations),
            [body for g in self.generations for body in g.explanations()],
            self.generations[0].precision,
        )

    def _completion(self, choices: list[CompletionChoice]) -> Completion:
        return {
            "id": self.completion_id,
            "object": "text_completion",
            "created": self.created,
            "model": self.body.model,
            "choices": choices,
            "system_fingerprint": self.fingerprint,
        }

    async def collect(self) -> list[list[OutputDelta]]:
        """Run all prompts and return the choices of each; the failure of one ends all."""

        async def collect(generation: Generation) -> list[OutputDelta]:
            async with self._slots:
                return await generation.collect()

        return await gather_or_cancel([collect(g) for g in self.generations])

    def whole(self, collected: list[list[OutputDelta]]) -> Completion:
        """Return the completion of what was collected."""
        completion = self._completion(
            [
                self._choice(number, piece, self._offsets(number), is_first=True)
                for number, pieces in enumerate(collected)
                for piece in pieces
            ]
        )
        completion["usage"] = self.usage()
        return completion

    def _offsets(self, number: int) -> TextOffsets:
        """Make the offsets of one choice, whose text begins with the prompt or after it."""
        request = self.generations[number].request
        before = () if self.body.echo else request.prompt_token_ids
        return self.formatter.offsets(before, request.sampling.skip_special_tokens)

    def _choice(
        self, number: int, shown: OutputDelta, offsets: TextOffsets, *, is_first: bool
    ) -> CompletionChoice:
        """Make a choice or its next chunk; ``is_first`` includes the prompt's fields."""
        generation = self.generations[number]
        echoes = bool(self.body.echo) and is_first
        prompt_text = self.prompt_texts[number] if echoes else ""
        choice: CompletionChoice = {
            "text": prompt_text + shown.text,
            "index": number * self._n + shown.index,
            "finish_reason": cast(Any, shown.finish_reason),
            "logprobs": self._logprobs(generation, shown, offsets, echoes),
        }
        if shown.stop_reason is not None:
            choice["stop_reason"] = shown.stop_reason
        if shown.branch is not None:
            choice["branch"] = shown.branch
        if self.body.return_token_ids:
            choice["token_ids"] = shown.token_ids
            if is_first:
                choice["prompt_token_ids"] = generation.request.prompt_token_ids
        if self.body.prompt_logprobs is not None and is_first:
            choice["prompt_logprobs"] = self.formatter.prompt(
                generation.output.prompt_logprobs or []
            )
        return choice

    def _logprobs(
        self, generation: Generation, shown: OutputDelta, offsets: TextOffsets, echoes: bool
    ) -> CompletionLogprobs | None:
        if self.body.logprobs is None:
            return None
        entries: list[TokenLogprob | None] = []
        token_ids: list[int] = []
        if echoes:
            entries += generation.output.prompt_logprobs or []
            token_ids += generation.request.prompt_token_ids
        entries += shown.logprobs
        token_ids += shown.token_ids
        return self.formatter.completion(entries, token_ids, offsets)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield server-sent events of all prompts, usage if requested, [DONE]."""
        options = self.body.stream_options
        wants_usage = options is not None and bool(options.include_usage)
        continuous = options is not None and bool(options.continuous_usage_stats)
        begun: dict[tuple[int, int], TextOffsets] = {}
        async with aclosing(merged([g.pieces() for g in self.generations])) as outputs:
            async for batch in outputs:
                events = []
                for number, pieces in batch:
                    if (number, 0) not in begun:
                        pieces = self._with_starts(pieces)
                    for piece in pieces:
                        key = (number, piece.index)
                        is_first = key not in begun
                        if is_first:
                            begun[key] = self._offsets(number)
                        choice = self._choice(number, piece, begun[key], is_first=is_first)
                        chunk = self._completion([choice])
                        if wants_usage:
                            chunk["usage"] = self.usage() if continuous else None
                        events.append(sse(chunk))
                if events:  # of one step: to send each by itself costs more than to make it
                    yield b"".join(events)
        if wants_usage:
            last = self._completion([])
            last["usage"] = self.usage()
            yield sse(last)
        yield DONE

    def _with_starts(self, pieces: list[OutputDelta]) -> list[OutputDelta]:
        """Begin each choice of a prompt with a chunk, so that headers and echo do not wait."""
        started = {piece.index for piece in pieces}
        return [*(OutputDelta(index) for index in range(self._n) if index not in started), *pieces]
