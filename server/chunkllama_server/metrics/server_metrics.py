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
)
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from chunkllama.logger import NonBlockingHandler
from chunkllama.messages import EngineReady, EngineStats, TokenDelta
from chunkllama_server.metrics.vllm_names import VllmNames

CHUNK_STATES = ("free", "cached", "referenced", "private")
MAX_TENANT_LABELS = 100
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

ENGINE_COUNTERS = {
    "prefix_tokens_queried_total": "Prompt tokens looked up in the prefix tree.",
    "prefill_tokens_computed_total": "Prompt tokens whose K/V were computed.",
    "prompt_tokens_total": "Prompt tokens of admitted requests.",
    "generation_tokens_total": "Tokens sampled.",
    "preemptions_total": "Sequences preempted due to insufficient chunks.",
    "evicted_chunks_total": "Cached chunks evicted.",
    "pins_refused_total": "Pins refused because the pin budget was used up.",
}
# Exported together as prefix_tokens_hit_total{scope}.
# How a request may end, and the statuses of refusals: these begin at 0, so that a rate over the
# first of them is seen.
FINISH_REASONS = ("stop", "length", "abort", "error", "timeout", "refused")
REFUSALS = (400, 401, 403, 404, 405, 408, 413, 415, 429, 500, 503, 504)
_HITS = ("prefix_tokens_hit_total", "prefix_tokens_hit_public_total")
ENGINE_HISTOGRAMS = {
    "step_seconds": "Duration of a step.",
    "batch_size": "Sequences in a step.",
}
SUPERVISOR_COUNTERS = {
    "engine_restarts": ("restarts", "Restarts of the engine process."),
    "watchdog_kills": ("hangs", "Engine processes killed because they made no progress."),
    "replayed_requests": ("replays", "Requests continued in another engine process."),
}
ENGINE_GAUGES = {
    "requests_running": ("requests_running", "Requests in the running batch."),
    "requests_waiting": ("requests_waiting", "Requests waiting for admission."),
    "chunks_peak": ("kv_chunks_peak", "Highest number of chunks in use at once."),
    "chunks_total": ("kv_chunks_capacity", "Chunks of the pool."),
    "pinned_chunks": ("kv_chunks_pinned", "Chunks pinned by prompt_cache_options."),
    "invariant_violations": (
        "invariant_violations",
        "Violated cache invariants; non-zero indicates a bug.",
    ),
}


class Supervisor(Protocol):
    """Counts of what happened to the engine process since the start."""

    restarts: int
    hangs: int
    replays: int


@dataclass(slots=True)
class NoSupervisor:
    """Stands for the supervisor of an engine that is never restarted."""

    restarts: int = 0
    hangs: int = 0
    replays: int = 0


class EngineStatsCollector:
    """Renders the last engine snapshot and its age; counters keep rising across restarts.

    Attributes:
        supervisor: counts the restarts.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = EngineStats()
        self._before = EngineStats()
        self._updated_at = clock()
        self.supervisor: Supervisor = NoSupervisor()

    @property
    def age_seconds(self) -> float:
        """Time since the last snapshot arrived."""
        return self._clock() - self._updated_at

    def update(self, stats: EngineStats) -> None:
        """Store a snapshot; one with fewer steps comes from a new engine process."""
        if stats.steps_total < self._last.steps_total:
            self.restarted()
        self._last = stats
        self._updated_at = self._clock()

    def restarted(self) -> None:
        """Add up the counters of an engine process that has ended; its pool is gone."""
        last = self._last
        for name in (*ENGINE_COUNTERS, *_HITS):
            setattr(self._before, name, self._count(name))
        for name in ENGINE_HISTOGRAMS:
            getattr(self._before, name).add(getattr(last, name))
        self._last = EngineStats(chunks_total=last.chunks_total, chunks_free=last.chunks_total)
        self._updated_at = self._clock()

    def collect(self) -> Iterator[Metric]:
        stats = self._last
        yield GaugeMetricFamily(
            "chunkllama_engine_stats_age_seconds",
            "Time since the engine's values below were read; a step may take long.",
            self.age_seconds,
        )
        for name, text in ENGINE_COUNTERS.items():
            yield CounterMetricFamily(f"chunkllama_{name}", text, self._count(name))
        hit, public = map(self._count, _HITS)
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
        count: int = getattr(self._before, name) + getattr(self._last, name)
        return count

    def _histogram(self, name: str, text: str) -> HistogramMetricFamily:
        before, last = getattr(self._before, name), getattr(self._last, name)
        counts = accumulate(map(int.__add__, before.counts, last.counts))
        bounds = [*map(floatToGoString, last.bounds), "+Inf"]
        return HistogramMetricFamily(
            f"chunkllama_{name}",
            text,
            buckets=list(zip(bounds, counts, strict=True)),
            sum_value=before.total + last.total,
        )


class TenantView(Collector):
    """Collects what a tenant may see: series without a tenant label, and its own."""

    def __init__(self, source: Collector, tenant: str) -> None:
        self._source = source
        self._tenant = tenant

    def collect(self) -> Iterator[Metric]:
        for metric in self._source.collect():
            shown = Metric(metric.name, metric.documentation, metric.type)
            shown.samples = [
                sample
                for sample in metric.samples
                if sample.labels.get("tenant", self._tenant) == self._tenant
            ]
            yield shown


class ServerMetrics:
    """All metrics of one application.

    Args:
        by_tenant: label requests with their tenant; the first ``MAX_TENANT_LABELS`` get their own
            labels, later ones share ``other``.
        vllm_model: repeat the metrics under vLLM's names, for a model of this name.

    Attributes:
        finished, live, first_token, inter_token, latency, queue, prefill, decode: what a
            ``RequestTimer`` observes.
    """

    def __init__(self, *, by_tenant: bool = False, vllm_model: str | None = None) -> None:
        self.registry = CollectorRegistry()
        self._also = None if vllm_model is None else VllmNames(self.registry, vllm_model)
        self.engine = EngineStatsCollector()
        self.registry.register(self.engine)
        self._tenants: set[str] | None = set() if by_tenant else None
        tenant = ["tenant"] if by_tenant else []
        self._accepted = self._counter("request_accepted", "Requests handed to the engine.", tenant)
        self.finished = self._counter(
            "request_finished", "Requests ended, by reason.", ["reason", *tenant]
        )
        self._rejected = self._counter("rejected", "HTTP requests refused, by status.", ["reason"])
        for status in REFUSALS:
            self._rejected.labels(str(status))
        self.begin_at_zero(() if by_tenant else ("",))
        self._ignored = self._counter("ignored_fields", "Unknown request fields ignored.")
        self.live = Gauge(
            "chunkllama_requests_live", "Requests between acceptance and end.",
            registry=self.registry,
        )  # fmt: skip
        self._info = Gauge(
            "chunkllama_info", "Constant 1; labels describe what is served.",
            ["model", "version", "device", "backend"], registry=self.registry,
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

    def _counter(self, name: str, text: str, labels: list[str] | None = None) -> Counter:
        return Counter(f"chunkllama_{name}", text, labels or (), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"chunkllama_{name}_seconds", text, buckets=buckets, registry=self.registry
        )

    def describe(self, model: str, info: EngineReady, version: str) -> None:
        """Name the model, as clients know it, and the engine in the info metric."""
        self._info.labels(model, version, info.device, info.backend).set(1)

    def reject(self, status: int) -> None:
        """Count a request that was answered with an error status."""
        self._rejected.labels(str(status)).inc()

    def ignore_fields(self, count: int) -> None:
        self._ignored.inc(count)

    def start_request(self, tenant: str) -> RequestTimer:
        """Count a request that is handed to the engine, and time it."""
        labels = self._tenant_labels(tenant)
        (self._accepted.labels(**labels) if labels else self._accepted).inc()
        self.live.inc()
        return RequestTimer(self, labels)

    def _tenant_labels(self, tenant: str) -> dict[str, str]:
        if self._tenants is None:
            return {}
        if len(self._tenants) < MAX_TENANT_LABELS:
            self._tenants.add(tenant)
        return {"tenant": tenant if tenant in self._tenants else "other"}

    def begin_at_zero(self, tenants: Iterable[str]) -> None:
        """Export the series of these tenants before their first request."""
        for tenant in tenants:
            labels = self._tenant_labels(tenant)
            if labels:
                self._accepted.labels(**labels)
            for reason in FINISH_REASONS:
                self.finished.labels(reason=reason, **labels)

    def render(self, tenant: str | None = None) -> bytes:
        """Return the metrics in the Prometheus text format.

        Args:
            tenant: leaves out the series of other tenants; None is the operator's view.
        """
        own = self.registry if tenant is None else TenantView(self.registry, tenant)
        text = generate_latest(own)
        return text if self._also is None else text + generate_latest(self._also)


class RequestTimer:
    """Times one request; calls after the first ``finish`` have no effect.

    Attributes:
        reason: finish reason of its last choice; after the end, that of the request.
        first_token_seconds: from acceptance to the first token, None before it.
    """

    def __init__(self, metrics: ServerMetrics, labels: dict[str, str]) -> None:
        self._metrics = metrics
        self._labels = labels
        self._started = self._last = time.monotonic()
        self._decode_seconds: float | None = None
        self._ended = False
        self.reason: str | None = None
        self.first_token_seconds: float | None = None

    def add(self, delta: TokenDelta) -> None:
        """Observe a delta of the engine."""
        metrics = self._metrics
        if self._decode_seconds is None:
            metrics.queue.observe(delta.queue_seconds)
            metrics.prefill.observe(delta.prefill_seconds)
            self._decode_seconds = 0.0
        # The engine client reports an aborted choice without durations.
        self._decode_seconds = max(self._decode_seconds, delta.decode_seconds)
        count = max((len(choice.token_ids) for choice in delta.choices), default=0)
        if not count:
            return
        now = time.monotonic()
        if self.first_token_seconds is None:
            self.first_token_seconds = now - self._started
            metrics.first_token.observe(self.first_token_seconds)
        else:
            metrics.inter_token.observe((now - self._last) / count)
        self._last = now

    def finish(self, reason: str) -> None:
        """Observe the end of the request."""
        if self._ended:
            return
        self._ended = True
        self.reason = reason
        metrics = self._metrics
        metrics.finished.labels(reason=reason, **self._labels).inc()
        metrics.live.dec()
        metrics.latency.observe(time.monotonic() - self._started)
        if self.first_token_seconds is not None:
            assert self._decode_seconds is not None
            metrics.decode.observe(self._decode_seconds)
