"""One engine request as text: detokenized, cut at stop strings, counted, choice by choice."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from chunkllama.engine.client import EngineClient
from chunkllama.errors import InvalidRequestError, OverloadedError, RequestFailedError
from chunkllama.logger import init_logger
from chunkllama.messages import ChoiceDelta, EngineRequest, TokenDelta, TokenLogprob
from chunkllama.text.detokenizer import IncrementalDetokenizer, StopChecker
from chunkllama_server.api.common.text_service import Tokenizer
from chunkllama_server.api.schema.usage import CompletionUsage, completion_usage
from chunkllama_server.metrics.server_metrics import RequestTimer, ServerMetrics

logger = init_logger(__name__)


@dataclass(slots=True)
class OutputDelta:
    """What one choice gained: complete characters, and the tokens that made them.

    ``finish_reason`` is set on the choice's last piece, which may carry no text.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def extend(self, other: OutputDelta) -> None:
        """Append a later piece of the same choice."""
        self.text += other.text
        self.token_ids += other.token_ids
        self.logprobs += other.logprobs
        self.finish_reason = other.finish_reason
        self.stop_reason = other.stop_reason


class _Choice:
    """Text state of one running choice; tokens wait here until their characters are complete."""

    def __init__(
        self, index: int, request: EngineRequest, tokenizer: Tokenizer, continues_prompt: bool
    ) -> None:
        sampling = request.sampling
        self._sampling = sampling
        self._detokenizer = IncrementalDetokenizer(
            cast(Any, tokenizer),
            sampling.skip_special_tokens,
            request.prompt_token_ids if continues_prompt else (),
        )
        self._stop = StopChecker(sampling.stop, sampling.include_stop_str_in_output)
        self._held = OutputDelta(index)
        self.num_tokens = 0
        self.finished = False

    def add(self, delta: ChoiceDelta) -> OutputDelta | None:
        """The piece this delta completes, or None while characters or stop strings are partial."""
        held = self._held
        held.token_ids += delta.token_ids
        held.logprobs += delta.logprobs or []
        self.num_tokens += len(delta.token_ids)
        shown = delta.token_ids
        ends_in_stop = delta.stop_token_id is not None and shown[-1:] == [delta.stop_token_id]
        if ends_in_stop and not self._sampling.include_stop_str_in_output:
            shown = shown[:-1]
        text = self._detokenizer.add(shown)
        if delta.finish_reason is not None:
            text += self._detokenizer.finish()
        if self.num_tokens < self._sampling.min_tokens:
            matched = None
            held.text += text
        else:
            emitted, matched = self._stop.feed(text)
            held.text += emitted
        if matched is not None:
            held.finish_reason, held.stop_reason = "stop", matched
        elif delta.finish_reason is not None:
            held.text += self._stop.flush()
            held.finish_reason = delta.finish_reason
            if (
                self._sampling.stop_token_ids
                and delta.stop_token_id in self._sampling.stop_token_ids
            ):
                held.stop_reason = delta.stop_token_id
        self.finished = held.finish_reason is not None
        if not held.text and not self.finished:
            return None
        self._held = OutputDelta(held.index)
        return held


class RequestStream:
    """A request on its way through the engine.

    Args:
        engine: where it runs.
        request: token ids and sampling parameters; its stop strings are applied here.
        tokenizer: for the text.
        metrics: counts it from acceptance to its one end, for this ``tenant``.
        continues_prompt: the text goes on where the prompt's ends (completions); else it is a text
            of its own (chat).
        param_names: what the endpoint calls the fields the engine names in a refusal.
        on_pin: told once, with the first delta, whether the pin asked for was granted.
    """

    def __init__(
        self,
        engine: EngineClient,
        request: EngineRequest,
        tokenizer: Tokenizer,
        metrics: ServerMetrics,
        *,
        tenant: str,
        continues_prompt: bool = False,
        param_names: Mapping[str, str] | None = None,
        on_pin: Callable[[bool], None] | None = None,
    ) -> None:
        self.request = request
        self.num_cached_tokens = 0
        self.num_cache_write_tokens = 0
        self.prompt_logprobs: list[TokenLogprob | None] | None = None
        self.embedding: list[float] | None = None
        self._engine = engine
        self._metrics = metrics
        self._tenant = tenant
        self._param_names = param_names or {}
        self._on_pin = on_pin if request.pin_seconds > 0 else None
        sampling = request.sampling
        count = sampling.n if sampling.beam_width > 1 else sampling.num_sequences
        self._choices = [
            _Choice(index, request, tokenizer, continues_prompt) for index in range(count)
        ]

    @property
    def num_completion_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self._choices)

    def usage(self) -> CompletionUsage:
        """Token counts so far; the prompt counts once however many choices there are."""
        return completion_usage(
            len(self.request.prompt_token_ids),
            self.num_completion_tokens,
            self.num_cached_tokens,
            self.num_cache_write_tokens,
        )

    async def pieces(self) -> AsyncGenerator[list[OutputDelta], None]:
        """Pieces as steps produce them; the first list (perhaps empty) comes with the first delta.

        Closing the generator aborts the request.

        Raises:
            InvalidRequestError, OverloadedError, RequestFailedError, EngineDeadError: from the
            engine.
        """
        timer = self._metrics.start_request(self._tenant)
        deltas = self._engine.generate(self.request)
        try:
            async with contextlib.aclosing(cast(AsyncGenerator[TokenDelta, None], deltas)):
                async for pieces in self._consume(deltas, timer):
                    yield pieces
            timer.finish(timer.reason or "stop")
        except (InvalidRequestError, OverloadedError) as error:
            timer.finish("refused")
            if isinstance(error, InvalidRequestError):
                error.param = self._param_names.get(error.param or "", error.param)
            raise
        except Exception:
            timer.finish("error")
            raise
        finally:
            timer.finish("abort")
            self._log(timer)

    def _log(self, timer: RequestTimer) -> None:
        first = timer.first_token_seconds
        counts = {
            "reason": timer.reason,
            "prompt_tokens": len(self.request.prompt_token_ids),
            "cached_tokens": self.num_cached_tokens,
            "output_tokens": self.num_completion_tokens,
            "first_token_ms": None if first is None else round(first * 1000),
        }
        logger.info("generation ended", extra=counts)

    async def _consume(
        self, deltas: AsyncIterator[TokenDelta], timer: RequestTimer
    ) -> AsyncIterator[list[OutputDelta]]:
        async for delta in deltas:
            if self._on_pin is not None:
                self._on_pin(not delta.pin_refused)
                self._on_pin = None
            self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
            self.num_cache_write_tokens = max(
                self.num_cache_write_tokens, delta.num_cache_write_tokens
            )
            self.prompt_logprobs = delta.prompt_logprobs or self.prompt_logprobs
            self.embedding = delta.embedding or self.embedding
            timer.add(delta)
            pieces = []
            for choice_delta in delta.choices:
                if choice_delta.index < len(self._choices):
                    piece = await self._add(choice_delta, timer)
                    if piece is not None:
                        pieces.append(piece)
            yield pieces
            if all(choice.finished for choice in self._choices):
                return

    async def _add(self, delta: ChoiceDelta, timer: RequestTimer) -> OutputDelta | None:
        choice = self._choices[delta.index]
        if choice.finished:
            return None
        if delta.finish_reason in ("abort", "error"):
            raise RequestFailedError("The engine ended this request", "engine_error")
        piece = choice.add(delta)
        if piece is not None and piece.finish_reason is not None:
            timer.reason = piece.finish_reason
            others_run = not all(other.finished for other in self._choices)
            if delta.finish_reason is None and others_run:
                await self._engine.abort(self.request.request_id, delta.index)
        return piece

    async def collect(self) -> list[OutputDelta]:
        """Run to the end and return each choice whole; of ``best_of`` the n most likely per
        token."""
        whole = [OutputDelta(index) for index in range(len(self._choices))]
        async with contextlib.aclosing(self.pieces()) as stream:
            async for pieces in stream:
                for piece in pieces:
                    whole[piece.index].extend(piece)
        n = self.request.sampling.n
        if len(whole) > n:
            whole = sorted(whole, key=_mean_logprob, reverse=True)[:n]
            for index, piece in enumerate(whole):
                piece.index = index
        return whole


def _mean_logprob(piece: OutputDelta) -> float:
    return sum(entry.logprob for entry in piece.logprobs) / max(len(piece.logprobs), 1)
