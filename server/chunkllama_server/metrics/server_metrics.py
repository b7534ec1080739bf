"""Prometheus metrics: one registry in the API process, fed by its clocks and engine snapshots."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    UnknownMetricFamily,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from chunkllama.logger import NonBlockingHandler
from chunkllama.messages import EngineReady, EngineStats
from chunkllama_server.metrics.divergence import PromptLog
from chunkllama_server.metrics.engine_names import (
    ENGINE_COUNTERS,
    ENGINE_GAUGES,
    ENGINE_HISTOGRAMS,
    HITS,
    SUPERVISOR_COUNTERS,
    TENANT_COUNTERS,
)
from chunkllama_server.metrics.exposition import metrics_text
from chunkllama_server.metrics.prompt_heads import PromptHeads
from chunkllama_server.metrics.request_timer import RequestTimer, token_histogram
from chunkllama_server.metrics.tenant_series import TenantSeries
from chunkllama_server.metrics.tenant_view import OwnParts, TenantView
from chunkllama_server.metrics.tracing import Tracing
from chunkllama_server.metrics.usage import UsageRecorder
from chunkllama_server.metrics.vllm_names import VllmNames

CHUNK_STATES = ("free", "cached", "referenced", "private")
# OpenTelemetry's conventions for generative AI, with finer buckets below 10 ms per token.
_FIRST_TOKEN_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    30.0, 60.0,
)  # fmt: skip
_TOKEN_BUCKETS = (
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0,
    2.5,
)  # fmt: skip
_DURATION_BUCKETS = (
    0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92, 300.0,
)  # fmt: skip

# How a request may end, and the statuses of refusals: these begin at 0, so that a rate over the
# first of them is seen.
FINISH_REASONS = ("stop", "length", "abort", "error", "timeout", "refused")
REFUSALS = (400, 401, 403, 404, 405, 408, 409, 410, 413, 415, 429, 500, 503, 504)
TENANT_REFUSALS = ("requests", "tokens", "queue", "model")


class Supervisor(Protocol):
    """Counts of what happened to the engine process since the start."""

    restarts: int
    hangs: int
    replays: int
    slow_readers: int


@dataclass(slots=True)
class NoSupervisor:
    """Stands for the supervisor of an engine that is never restarted."""

    restarts: int = 0
    hangs: int = 0
    replays: int = 0
    slow_readers: int = 0


class EngineStatsCollector:
    """Renders the last engine snapshot and its age; counters keep rising across restarts.

    Attributes:
        last: the snapshot. supervisor: counts the restarts.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.last = EngineStats()
        self._before = EngineStats()
        self._updated_at = clock()
        self.supervisor: Supervisor = NoSupervisor()

    @property
    def age_seconds(self) -> float:
        """Time since the last snapshot arrived."""
        return self._clock() - self._updated_at

    def update(self, stats: EngineStats) -> None:
        """Store a snapshot; one with fewer steps comes from a new engine process."""
        if stats.steps_total < self.last.steps_total:
            self.restarted()
        self.last = stats
        self._updated_at = self._clock()

    def restarted(self) -> None:
        """Add up the counters of an engine process that has ended; its pool is gone."""
        last = self.last
        for name in (*ENGINE_COUNTERS, *HITS):
            setattr(self._before, name, self._count(name))
        for name in ENGINE_HISTOGRAMS:
            getattr(self._before, name).add(getattr(last, name))
        self.last = EngineStats(chunks_total=last.chunks_total, chunks_free=last.chunks_total)
        self._updated_at = self._clock()

    def collect(self) -> Iterator[Metric]:
        stats = self.last
        yield GaugeMetricFamily(
            "chunkllama_engine_stats_age_seconds",
            "Time since the engine's values below were read; a step may take long.",
            self.age_seconds,
        )
        for name, text in ENGINE_COUNTERS.items():
            yield CounterMetricFamily(f"chunkllama_{name}", text, self._count(name))
        hit, public = map(self._count, HITS)
        hits = CounterMetricFamily(
            "chunkllama_prefix_tokens_hit",
            "Prompt tokens whose K/V were found, in the public part of the tree or the tenant's.",
            labels=["scope"],
        )
        hits.add_metric(["public"], public)
        hits.add_metric(["tenant"], hit - public)
        yield hits
        for name, (count, text) in SUPERVISOR_COUNTERS.items():
            yield CounterMetricFamily(f"chunkllama_{name}", text, getattr(self.supervisor, count))
        for name, text in ENGINE_HISTOGRAMS.items():
            yield self._histogram(name, text)
        for name, (metric, text) in ENGINE_GAUGES.items():
            yield GaugeMetricFamily(f"chunkllama_{metric}", text, getattr(stats, name))
        # Without a type: a gauge's name must not end like a counter's.
        former = "Former name of chunkllama_kv_chunks_capacity; will be removed."
        yield UnknownMetricFamily("chunkllama_kv_chunks_total", former, stats.chunks_total)
        chunks = GaugeMetricFamily("chunkllama_kv_chunks", "Chunks by state.", labels=["state"])
        for state in CHUNK_STATES:
            chunks.add_metric([state], getattr(stats, f"chunks_{state}"))
        yield chunks
        used = stats.chunks_referenced + stats.chunks_private
        yield GaugeMetricFamily(
            "chunkllama_kv_usage_ratio",
            "Share of the pool in use by running requests.",
            used / max(stats.chunks_total, 1),
        )

    def _count(self, name: str) -> int:
        count: int = getattr(self._before, name) + getattr(self.last, name)
        return count

    def _histogram(self, name: str, text: str) -> HistogramMetricFamily:
        before, last = getattr(self._before, name), getattr(self.last, name)
        counts = accumulate(map(int.__add__, before.counts, last.counts))
        bounds = [*map(floatToGoString, last.bounds), "+Inf"]
        return HistogramMetricFamily(
            f"chunkllama_{name}",
            text,
            buckets=list(zip(bounds, counts, strict=True)),
            sum_value=before.total + last.total,
        )


class ServerMetrics:
    """All metrics of one application.

    Args:
        tenant_labels: tenants with a label of their own, the others share ``other``; None has no
            tenant labels.
        vllm_model: repeat the metrics under vLLM's names, for a model of this name.

    Attributes:
        usage: what each tenant has used.
        own: what a tenant sees beside the counters that carry its name.
        prompts: the last prompts, up to ``recent_prompt_tokens``.
        live, first_token, inter_token, latency, queue, prefill, decode, inference, prompt_tokens,
            generation_tokens: what a ``RequestTimer`` observes.
        tracing: makes the spans of each generation; None makes none.
    """

    def __init__(
        self,
        *,
        tenant_labels: int | None = None,
        vllm_model: str | None = None,
        recent_prompt_tokens: int = 0,
    ) -> None:
        self.registry = CollectorRegistry()
        self.tracing: Tracing | None = None
        self._also = None if vllm_model is None else VllmNames(self.registry, vllm_model)
        self.own = OwnParts()
        self.engine = EngineStatsCollector()
        self.registry.register(self.engine)
        self.usage = UsageRecorder()
        self.prompts = PromptLog(recent_prompt_tokens)
        self._has_tenants = tenant_labels is not None
        self._by_tenant = TenantSeries(tenant_labels)
        self._by_tenant.declare("request_accepted", "Requests handed to the engine.")
        self._by_tenant.declare("request_finished", "Requests ended, by reason.", FINISH_REASONS)
        if self._has_tenants:
            self._declare_tenant_counters()
        self.registry.register(self._by_tenant)
        self._rejected = self._counter("rejected", "HTTP requests refused, by status.", ["reason"])
        for status in REFUSALS:
            self._rejected.labels(str(status))
        if not self._has_tenants:
            self.begin_at_zero([""])
        self._ignored = self._counter("ignored_fields", "Unknown request fields ignored.")
        self.prompt_heads = PromptHeads(self.registry)
        self.live = Gauge(
            "chunkllama_requests_live", "Requests between acceptance and end.",
            registry=self.registry,
        )  # fmt: skip
        self._info = Gauge(
            "chunkllama_info", "Constant 1; labels describe what is served.",
            ["model", "version", "device", "backend", "kv_dtype"], registry=self.registry,
        )  # fmt: skip
        Gauge(
            "chunkllama_log_lines_dropped", "Log lines dropped because the log was not read.",
            registry=self.registry,
        ).set_function(lambda: NonBlockingHandler.num_dropped)  # fmt: skip
        self.first_token = self._histogram(
            "time_to_first_token", "From acceptance to the first token.", _FIRST_TOKEN_BUCKETS
        )
        self.inter_token = self._histogram(
            "inter_token_latency", "Between two deltas of a request, per token.", _TOKEN_BUCKETS
        )
        self.latency = self._histogram(
            "e2e_request_latency", "From acceptance to the end.", _DURATION_BUCKETS
        )
        self.queue = self._histogram(
            "queue_time", "In the engine, from arrival to admission.", _FIRST_TOKEN_BUCKETS
        )
        self.prefill = self._histogram(
            "prefill_time", "From admission to the end of the prompt.", _FIRST_TOKEN_BUCKETS
        )
        self.decode = self._histogram(
            "decode_time", "From the end of the prompt to the last token.", _DURATION_BUCKETS
        )

        self.inference = self._histogram(
            "inference_time", "From admission to the last token.", _DURATION_BUCKETS
        )
        self.prompt_tokens = token_histogram(
            self.registry, "prompt", "Prompt tokens of a finished request."
        )
        self.generation_tokens = token_histogram(
            self.registry, "generation", "Output tokens of all its choices."
        )

    def _declare_tenant_counters(self) -> None:
        declare = self._by_tenant.declare
        declare("tenant_prompt_tokens", "Prompt tokens of requests that began to answer.")
        declare("tenant_cached_tokens", "Those of them whose K/V came from the cache.")
        declare("tenant_output_tokens", "Output tokens sent.")
        declare("tenant_queue_seconds", "Time of requests from arrival to the first step.")
        declare(
            "tenant_rejected", "Requests refused because of a quota or overload.", TENANT_REFUSALS
        )
        for name, text in TENANT_COUNTERS.items():
            declare(f"tenant_{name}", text)

    def _counter(self, name: str, text: str, labels: list[str] | None = None) -> Counter:
        return Counter(f"chunkllama_{name}", text, labels or (), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"chunkllama_{name}_seconds", text, buckets=buckets, registry=self.registry
        )

    def describe(self, model: str, info: EngineReady, version: str) -> None:
        """Name the model, as clients know it, and the engine in the info metric."""
        self._info.labels(model, version, info.device, info.backend, info.kv_dtype).set(1)
        if self._also is not None:
            self._also.describe(info, lambda: self.engine.last.chunks_total or info.num_chunks)

    def reject(self, status: int) -> None:
        """Count a request that was answered with an error status."""
        self._rejected.labels(str(status)).inc()

    def ignore_fields(self, count: int) -> None:
        self._ignored.inc(count)

    def reject_tenant(self, tenant: str, reason: str) -> None:
        """Count a request of a tenant that a quota, or overload, refused."""
        self.usage[tenant].rejections[reason] += 1
        if self._has_tenants:
            self._by_tenant.rank(tenant, 1)
            self._by_tenant.add("tenant_rejected", tenant, 1, reason)

    def start_request(self, tenant: str, prompt_tokens: int = 0) -> RequestTimer:
        """Count a request of so many prompt tokens that is handed to the engine, and time it."""
        self.usage[tenant].requests += 1
        self._by_tenant.rank(tenant, 1)
        self._by_tenant.add("request_accepted", tenant)
        self.live.inc()
        self.own.begin(tenant)
        return RequestTimer(self, tenant, prompt_tokens)

    def finish_request(self, tenant: str, reason: str) -> None:
        """Count the end of a request."""
        self._by_tenant.add("request_finished", tenant, 1, reason)
        self.live.dec()
        self.own.end(tenant)

    def add_prompt(
        self, tenant: str, *, prompt_tokens: int, cached_tokens: int, queue_seconds: float
    ) -> None:
        """Charge a tenant for the prompt of a request that begins to answer."""
        usage = self.usage[tenant]
        usage.prompt_tokens += prompt_tokens
        usage.cached_tokens += cached_tokens
        usage.queue_seconds += queue_seconds
        if self._has_tenants:
            self._by_tenant.rank(tenant, prompt_tokens)
            self._by_tenant.add("tenant_prompt_tokens", tenant, prompt_tokens)
            self._by_tenant.add("tenant_cached_tokens", tenant, cached_tokens)
            self._by_tenant.add("tenant_queue_seconds", tenant, queue_seconds)

    def add_output(self, tenant: str, tokens: int) -> None:
        """Charge a tenant for output tokens."""
        self.usage[tenant].output_tokens += tokens
        if self._has_tenants:
            self._by_tenant.rank(tenant, tokens)
            self._by_tenant.add("tenant_output_tokens", tenant, tokens)

    def restarted(self) -> None:
        """Keep the totals of an engine process that has ended."""
        self.engine.restarted()
        self.usage.restarted()

    def update(self, stats: EngineStats) -> None:
        """Store an engine snapshot that has the tenants' parts."""
        self.engine.update(stats)
        before = {tenant: self.usage.engine(tenant) for tenant in stats.tenants}
        self.usage.update(stats)
        if self._has_tenants:
            for tenant, old in before.items():
                new = self.usage.engine(tenant)
                self._by_tenant.rank(tenant, 0)
                for name in TENANT_COUNTERS:
                    more = max(getattr(new, name) - getattr(old, name), 0.0)
                    self._by_tenant.add(f"tenant_{name}", tenant, more)

    def begin_at_zero(self, tenants: Iterable[str]) -> None:
        """Export the series of these tenants before their first request."""
        for tenant in tenants:
            self._by_tenant.begin(tenant)

    def render(self, tenant: str | None = None) -> bytes:
        """Return the metrics in the Prometheus text format.

        Args:
            tenant: shows the part of this tenant alone; None is the operator's view, of all.
        """
        shown: Collector = self.registry
        if tenant is not None:
            shown = TenantView(self.registry, tenant, self.own.gauges(self.usage, tenant))
        text = metrics_text(shown)
        return text if self._also is None else text + metrics_text(self._also.of(shown))
