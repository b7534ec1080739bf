"""Run one engine request and stream its text, with metrics, a log line and errors in our names."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from typing import cast

from chunkllama.engine.client import EngineClient
from chunkllama.errors import (
    ENDED_ON_DEMAND,
    DeadlineError,
    InvalidRequestError,
    OverloadedError,
    RequestFailedError,
)
from chunkllama.logger import init_logger
from chunkllama.messages import EngineRequest, TokenDelta
from chunkllama.text.output_processor import OutputCollector, OutputDelta, OutputProcessor
from chunkllama.text.thoughts import NO_THOUGHTS, Thoughts
from chunkllama.text.tokenizer import Tokenizer
from chunkllama_server.api.common.cache_explanation import explanation_body
from chunkllama_server.api.common.sampling import num_logprobs
from chunkllama_server.api.schema.usage import CacheExplanationBody, Precision, TokenCounts
from chunkllama_server.metrics.request_timer import RequestTimer
from chunkllama_server.metrics.server_metrics import ServerMetrics
from chunkllama_server.metrics.tracing import GenerationTimes
from chunkllama_server.transport.request_context import RequestInfo

logger = init_logger(__name__)


class RequestStream:
    """One request and the stream of its output.

    Args:
        engine: runs the request.
        request: token ids and sampling parameters; its stop strings are applied here.
        tokenizer: decodes the output.
        metrics: counts the request from acceptance to its end, for the tenant of ``info``.
        info: the HTTP request, which is charged for the tokens and notes whether a pin was granted.
        continues_prompt: the text continues the prompt's (completions), rather than being a text
            of its own (chat).
        param_names: the endpoint's names of fields that the engine may refuse.
        thoughts: how the model's thoughts are separated from its answer.
        on_piece: called with each piece of output.

    Attributes:
        output: the text state, with token counts, prompt log-probabilities and embedding.
        timer: of the request; None before it is handed to the engine.
        is_pinned: the prefix is kept for as long as was asked, known from the first output on.
    """

    def __init__(  # noqa: PLR0913 - each is a part of the request
        self,
        engine: EngineClient,
        request: EngineRequest,
        tokenizer: Tokenizer,
        metrics: ServerMetrics,
        *,
        info: RequestInfo,
        continues_prompt: bool = False,
        param_names: Mapping[str, str] | None = None,
        thoughts: Thoughts = NO_THOUGHTS,
        on_piece: Callable[[OutputDelta], None] | None = None,
    ) -> None:
        self.request = request
        self.output = OutputProcessor(
            request,
            tokenizer,
            continues_prompt=continues_prompt,
            thoughts=thoughts,
        )
        self.timer: RequestTimer | None = None
        self._engine = engine
        self._metrics = metrics
        self._info = info
        self._param_names = param_names or {}
        self._on_piece = on_piece
        self._tokenizer = tokenizer
        self._on_pin = info.name_pin if request.pin_seconds > 0 else None
        self.is_pinned = False

    @property
    def num_logprobs(self) -> int:
        """Log-probabilities that the answer holds so far."""
        return num_logprobs(
            len(self.request.prompt_token_ids), self.output.num_tokens, self.request.sampling
        )

    @property
    def counts(self) -> TokenCounts:
        """Tokens so far."""
        return TokenCounts(
            prompt=len(self.request.prompt_token_ids),
            cached=self.output.num_cached_tokens,
            written=self.output.num_cache_write_tokens,
            output=self.output.num_tokens,
            reasoning=self.output.num_reasoning_tokens,
            accepted=self.output.num_accepted_predicted,
            rejected=self.output.num_rejected_predicted,
            rounded=self.output.num_rounded_tokens,
        )

    @property
    def precision(self) -> Precision | None:
        """The types of cached K/V; None if all have the one that the model computes in."""
        info = self._engine.info
        if not (info.is_kv_quantized or info.tier_bits):
            return None
        return Precision(info.kv_dtype, f"int{info.tier_bits}" if info.tier_bits else "")

    def explanations(self) -> list[CacheExplanationBody]:
        """Return the explanation of the prompt's match, if one was asked for and is known."""
        explanation = self.output.explanation
        if explanation is None:
            return []
        return [explanation_body(explanation, self.request.prompt_token_ids, self._tokenizer)]

    async def pieces(self) -> AsyncGenerator[list[OutputDelta], None]:
        """Yield output as steps produce it; the first list may be empty.

        Closing the generator aborts the request.

        Raises:
            InvalidRequestError, OverloadedError, DeadlineError, EngineDeadError: from the engine.
        """
        num_prompt_tokens = len(self.request.prompt_token_ids)
        timer = self.timer = self._metrics.start_request(self._info.tenant, num_prompt_tokens)
        self._info.charge.use(num_prompt_tokens)
        deltas = self._engine.generate(self.request)
        try:
            async with contextlib.aclosing(cast(AsyncGenerator[TokenDelta, None], deltas)):
                async for pieces in self._consume(deltas, timer):
                    yield pieces
            timer.finish(timer.reason or "stop")
        except (InvalidRequestError, OverloadedError) as error:
            timer.finish("refused")
            self._info.charge.use(-num_prompt_tokens)
            if isinstance(error, OverloadedError):
                self._metrics.reject_tenant(self._info.tenant, "queue")
            if isinstance(error, InvalidRequestError):
                error.param = self._param_names.get(error.param or "", error.param)
            raise
        except DeadlineError as error:
            timer.finish("timeout")
            if error.code == "queue_timeout":  # it never ran
                self._info.charge.use(-num_prompt_tokens)
            raise
        except Exception as error:
            is_abort = isinstance(error, RequestFailedError) and error.code == ENDED_ON_DEMAND
            timer.finish("abort" if is_abort else "error")
            raise
        finally:
            timer.finish("abort")
            self._log(timer)
            self._trace(timer)

    def _log(self, timer: RequestTimer) -> None:
        first = timer.first_token_seconds
        counts = {
            "reason": timer.reason,
            "prompt_tokens": len(self.request.prompt_token_ids),
            "cached_tokens": self.output.num_cached_tokens,
            "output_tokens": self.output.num_tokens,
            "first_token_ms": None if first is None else round(first * 1000),
        }
        logger.info("generation ended", extra=counts)

    def _trace(self, timer: RequestTimer) -> None:
        tracing = self._metrics.tracing
        if tracing is None:
            return
        tracing.record(
            GenerationTimes(
                total=timer.total_seconds,
                queue=timer.queue_seconds,
                prefill=timer.prefill_seconds,
                decode=timer.decode_seconds or 0.0,
                reason=timer.reason or "",
                num_prompt_tokens=len(self.request.prompt_token_ids),
                num_cached_tokens=self.output.num_cached_tokens,
                num_output_tokens=self.output.num_tokens,
            )
        )

    async def _consume(
        self, deltas: AsyncIterator[TokenDelta], timer: RequestTimer
    ) -> AsyncIterator[list[OutputDelta]]:
        async for delta in deltas:
            if self._on_pin is not None:
                self.is_pinned = not delta.pin_refused
                self._on_pin(self.is_pinned)
                self._on_pin = None
            if delta.explanation is not None:
                self._info.name_explanation(delta.explanation)
            is_first, before = timer.is_new, self.output.num_tokens
            timer.add(delta)
            pieces = self.output.add(delta)
            self._charge(delta, is_first=is_first, output_tokens=self.output.num_tokens - before)
            for piece in pieces:
                if self._on_piece is not None:
                    self._on_piece(piece)
                timer.reason = piece.finish_reason or timer.reason
                # Closing the generator ends the last choice.
                is_last = self.output.is_finished and piece is pieces[-1]
                if piece.needs_abort and not is_last:
                    await self._engine.abort(self.request.request_id, piece.index)
            yield pieces
            if self.output.is_finished:
                return

    def _charge(self, delta: TokenDelta, *, is_first: bool, output_tokens: int) -> None:
        """Charge the tenant; the prompt counts as usage once the answer begins."""
        metrics, tenant = self._metrics, self._info.tenant
        self._info.charge.use(output_tokens)
        if is_first:
            prompt, cached = self.request.prompt_token_ids, delta.num_cached_tokens
            metrics.prompts.record(tenant, self.request.namespace, prompt, cached)
            metrics.add_prompt(
                tenant,
                prompt_tokens=len(prompt),
                cached_tokens=cached,
                queue_seconds=delta.queue_seconds,
            )
        metrics.add_output(tenant, output_tokens)

    async def collect(self) -> list[OutputDelta]:
        """Run to the end and return whole choices; of ``best_of`` the n most likely per token."""
        collector = OutputCollector(self.request.sampling)
        async with contextlib.aclosing(self.pieces()) as stream:
            async for pieces in stream:
                collector.add(pieces)
        return collector.result()
