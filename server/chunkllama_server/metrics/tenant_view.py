"""A tenant's part of the metrics: its own series, and its own values of the server's gauges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Final

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from chunkllama_server.metrics.usage import UsageRecorder

LATENCIES: Final = ("time_to_first_token", "inter_token_latency", "e2e_request_latency")
# Constants of the server. Every other series without a tenant is a total of all tenants.
_SHOWN_TO_ALL = frozenset(
    {"chunkllama_info", "chunkllama_kv_chunks_capacity", "chunkllama_kv_chunks_total"}
)


class TenantView(Collector):
    """Collects what a tenant may see: constants, its own series, and its part of some gauges.

    Args:
        source: collects everything.
        tenant: the tenant's name.
        gauges: its values of gauges that are totals of all tenants.
    """

    def __init__(self, source: Collector, tenant: str, gauges: Mapping[str, float]) -> None:
        self._source = source
        self._tenant = tenant
        self._gauges = gauges

    def collect(self) -> Iterator[Metric]:
        for metric in self._source.collect():
            if metric.name in self._gauges:
                yield GaugeMetricFamily(
                    metric.name, metric.documentation, self._gauges[metric.name]
                )
                continue
            shown = Metric(metric.name, metric.documentation, metric.type)
            shown.samples = [
                sample
                for sample in metric.samples
                if metric.name in _SHOWN_TO_ALL or sample.labels.get("tenant") == self._tenant
            ]
            if shown.samples:
                yield shown


class OwnParts:
    """What a tenant sees beside the counters that carry its name."""

    def __init__(self) -> None:
        self._live: Counter[str] = Counter()
        self._latencies: dict[tuple[str, str], tuple[float, int]] = {}

    def begin(self, tenant: str) -> None:
        """Count a request between acceptance and end."""
        self._live[tenant] += 1

    def end(self, tenant: str) -> None:
        """Count its end."""
        self._live[tenant] -= 1

    def note_latency(self, tenant: str, name: str, seconds: float) -> None:
        """Add an observation of one of ``LATENCIES``."""
        total, count = self._latencies.get((tenant, name), (0.0, 0))
        self._latencies[tenant, name] = total + seconds, count + 1

    def latency(self, tenant: str) -> dict[str, dict[str, float]]:
        """Sum and count of each latency."""
        pairs = ((name, self._latencies.get((tenant, name), (0.0, 0))) for name in LATENCIES)
        return {name: {"sum": total, "count": count} for name, (total, count) in pairs}

    def gauges(self, usage: UsageRecorder, tenant: str) -> dict[str, float]:
        """Values of the gauges that a tenant has a part of."""
        engine = usage.engine(tenant)
        return {
            "chunkllama_requests_live": self._live[tenant],
            "chunkllama_requests_running": engine.requests_running,
            "chunkllama_requests_waiting": engine.requests_waiting,
            "chunkllama_kv_chunks_pinned": engine.chunks_pinned,
        }

    def counters(self, usage: UsageRecorder, tenant: str) -> dict[str, int]:
        """Values of the engine's counters, by the names of ``EngineStats``."""
        own, engine = usage[tenant], usage.engine(tenant)
        return {
            "requests_running": engine.requests_running,
            "requests_waiting": engine.requests_waiting,
            "pinned_chunks": engine.chunks_pinned,
            "evicted_chunks_total": engine.evicted_chunks,
            "prompt_tokens_total": own.prompt_tokens,
            "prefix_tokens_queried_total": own.prompt_tokens,
            "prefix_tokens_hit_total": own.cached_tokens,
            "prefill_tokens_computed_total": engine.computed_tokens,
            "generation_tokens_total": own.output_tokens,
        }
