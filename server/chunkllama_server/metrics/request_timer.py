"""Time one request and count it for its tenant."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Histogram

from chunkllama.messages import TokenDelta

if TYPE_CHECKING:
    from chunkllama_server.metrics.server_metrics import ServerMetrics

_TOKEN_COUNTS = (
    1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000,
)  # fmt: skip


def token_histogram(registry: CollectorRegistry, kind: str, text: str) -> Histogram:
    """Make the histogram of how many tokens of a kind finished requests have."""
    name = f"chunkllama_request_{kind}_tokens"
    return Histogram(name, text, buckets=_TOKEN_COUNTS, registry=registry)


class RequestTimer:
    """Times one request; calls after the first ``finish`` have no effect.

    Attributes:
        reason: finish reason of its last choice; after the end, that of the request.
        first_token_seconds: from acceptance to the first token, None before it.
        queue_seconds, prefill_seconds, decode_seconds: by the engine's clock; the first and the
            last are None before the first delta.
        total_seconds: from acceptance to the end.
    """

    def __init__(self, metrics: ServerMetrics, tenant: str, prompt_tokens: int = 0) -> None:
        self._metrics = metrics
        self._tenant = tenant
        self._prompt_tokens = prompt_tokens
        self._generation_tokens = 0
        self._started = self._last = time.monotonic()
        self.queue_seconds: float | None = None
        self.prefill_seconds = 0.0
        self.decode_seconds: float | None = None
        self.total_seconds = 0.0
        self._ended = False
        self.reason: str | None = None
        self.first_token_seconds: float | None = None

    @property
    def is_new(self) -> bool:
        """No delta has arrived."""
        return self.decode_seconds is None

    def add(self, delta: TokenDelta) -> None:
        """Observe a delta of the engine."""
        metrics = self._metrics
        if self.decode_seconds is None:
            self.queue_seconds, self.prefill_seconds = delta.queue_seconds, delta.prefill_seconds
            metrics.queue.observe(delta.queue_seconds)
            metrics.prefill.observe(delta.prefill_seconds)
            self.decode_seconds = 0.0
        # The engine client reports an aborted choice without durations.
        self.decode_seconds = max(self.decode_seconds, delta.decode_seconds)
        count = 0  # of the choice with the most
        for choice in delta.choices:
            self._generation_tokens += len(choice.token_ids)
            count = max(count, len(choice.token_ids))
        if not count:
            return
        now = time.monotonic()
        if self.first_token_seconds is None:
            self.first_token_seconds = now - self._started
            metrics.first_token.observe(self.first_token_seconds)
            metrics.own.note_latency(self._tenant, "time_to_first_token", self.first_token_seconds)
        else:
            each = (now - self._last) / count
            metrics.inter_token.observe(each)
            metrics.own.note_latency(self._tenant, "inter_token_latency", each)
        self._last = now

    def finish(self, reason: str) -> None:
        """Observe the end of the request."""
        if self._ended:
            return
        self._ended = True
        self.reason = reason
        metrics = self._metrics
        metrics.finish_request(self._tenant, reason)
        self.total_seconds = time.monotonic() - self._started
        metrics.latency.observe(self.total_seconds)
        metrics.own.note_latency(self._tenant, "e2e_request_latency", self.total_seconds)
        if self.first_token_seconds is not None:
            assert self.decode_seconds is not None
            metrics.decode.observe(self.decode_seconds)
            metrics.inference.observe(self.prefill_seconds + self.decode_seconds)
        if reason != "refused":
            metrics.prompt_tokens.observe(self._prompt_tokens)
            metrics.generation_tokens.observe(self._generation_tokens)
