"""Prometheus metrics: one registry in the API process, fed by its own clocks and by engine
snapshots."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest

from chunkllama.engine.messages import EngineReady, EngineStats

CHUNK_STATES = ("free", "cached", "referenced", "private")
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
    "steps_total": "Steps the engine has run.",
    "prefix_tokens_queried_total": "Prompt tokens looked up in the prefix tree.",
    "prefix_tokens_hit_total": "Prompt tokens whose K/V were found in the prefix tree.",
    "prefill_tokens_computed_total": "Prompt tokens whose K/V were computed.",
    "prompt_tokens_total": "Prompt tokens of admitted requests.",
    "generation_tokens_total": "Tokens sampled.",
    "preemptions_total": "Sequences preempted for want of chunks.",
    "evicted_chunks_total": "Cached chunks evicted.",
    "pins_refused_total": "Pins refused because the pin budget was used up.",
    "step_seconds_total": "Seconds spent in steps.",
}
ENGINE_GAUGES = {
    "requests_running": ("requests_running", "Requests in the running batch."),
    "requests_waiting": ("requests_waiting", "Requests waiting for admission."),
    "chunks_peak": ("kv_chunks_peak", "Most chunks ever in use at once."),
    "chunks_total": ("kv_chunks_total", "Chunks of the pool."),
    "pinned_chunks": ("kv_chunks_pinned", "Chunks pinned by prompt_cache_options."),
    "invariant_violations": ("invariant_violations", "Broken cache invariants; 0 or a bug."),
}


class EngineStatsCollector:
    """Renders the last engine snapshot; counters go on rising when an engine restarts from zero."""

    def __init__(self) -> None:
        self._last = EngineStats()
        self._base = dict.fromkeys(ENGINE_COUNTERS, 0.0)
        self._restarts = 0

    def update(self, stats: EngineStats) -> None:
        """Take a snapshot; one with fewer steps comes from a new engine."""
        if stats.steps_total < self._last.steps_total:
            for name in ENGINE_COUNTERS:
                self._base[name] += getattr(self._last, name)
            self._restarts += 1
        self._last = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._last
        for name, text in ENGINE_COUNTERS.items():
            value = self._base[name] + getattr(stats, name)
            yield CounterMetricFamily(f"chunkllama_{name.removesuffix('_total')}", text, value)
        yield CounterMetricFamily(
            "chunkllama_engine_restarts", "Engine processes started anew.", self._restarts
        )
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


class ServerMetrics:
    """All metrics of one application.

    Attributes:
        finished, live, first_token, inter_token, latency: what a ``RequestTimer`` observes.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.engine = EngineStatsCollector()
        self.registry.register(self.engine)
        self._accepted = self._counter("request_accepted", "Requests handed to the engine.")
        self.finished = self._counter("request_finished", "Requests ended, by reason.", "reason")
        self._rejected = self._counter("request_rejected", "Requests refused, by status.", "why")
        self._ignored = self._counter("ignored_fields", "Unknown request fields ignored.")
        self.live = Gauge(
            "chunkllama_requests_live", "Requests between acceptance and end.",
            registry=self.registry,
        )  # fmt: skip
        self._info = Gauge(
            "chunkllama_info", "Constant 1; what is being served, in labels.",
            ["model", "version", "device", "op_set"], registry=self.registry,
        )  # fmt: skip
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From acceptance to the first token.",
            _FIRST_TOKEN_BUCKETS,
        )  # fmt: skip
        self.inter_token = self._histogram(
            "inter_token_latency_seconds", "Between two deltas of a request, per token.",
            _TOKEN_BUCKETS,
        )  # fmt: skip
        self.latency = self._histogram(
            "e2e_request_latency_seconds", "From acceptance to the end.", _DURATION_BUCKETS
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"chunkllama_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"chunkllama_{name}", text, buckets=buckets, registry=self.registry)

    def describe(self, info: EngineReady, version: str) -> None:
        """Name the model and the engine in the info metric."""
        self._info.labels(info.model_name, version, info.device, info.op_set).set(1)

    def reject(self, status: int) -> None:
        """A request was answered with an error status."""
        self._rejected.labels(str(status)).inc()

    def ignore_fields(self, count: int) -> None:
        self._ignored.inc(count)

    def start_request(self) -> RequestTimer:
        """A request goes to the engine."""
        self._accepted.inc()
        self.live.inc()
        return RequestTimer(self)

    def render(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)


class RequestTimer:
    """Follows one request to its one end; calls after the first ``finish`` change nothing.

    Attributes:
        reason: why its last choice ended; at the end, why the request did.
        first_token_seconds: from acceptance to the first token, None before it.
    """

    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics = metrics
        self._started = self._last = time.monotonic()
        self._ended = False
        self.reason: str | None = None
        self.first_token_seconds: float | None = None

    def tokens(self, count: int) -> None:
        """Each choice of a delta gained up to ``count`` tokens."""
        if not count:
            return
        now = time.monotonic()
        if self.first_token_seconds is None:
            self.first_token_seconds = now - self._started
            self._metrics.first_token.observe(self.first_token_seconds)
        else:
            self._metrics.inter_token.observe((now - self._last) / count)
        self._last = now

    def finish(self, reason: str) -> None:
        """The request has ended."""
        if self._ended:
            return
        self._ended = True
        self.reason = reason
        self._metrics.finished.labels(reason).inc()
        self._metrics.live.dec()
        self._metrics.latency.observe(time.monotonic() - self._started)
