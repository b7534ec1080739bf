"""Metrics of a cluster: each replica's figures, and where requests went."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from chunkllama_server.metrics.engine_names import ENGINE_COUNTERS, ENGINE_GAUGES
from chunkllama_server.metrics.server_metrics import CHUNK_STATES

if TYPE_CHECKING:
    from chunkllama.cluster.client import ClusterEngineClient

_FAILOVER_REASONS = ("death", "hang", "drain")


def describe(client: ClusterEngineClient) -> list[dict[str, Any]]:
    """Return name, state and figures of each replica.

    ``number`` times 2**32 is added to the ids of its chunks in the tree.
    """
    names = [*(f"chunks_{state}" for state in CHUNK_STATES), *ENGINE_GAUGES]
    return [
        {
            "name": replica.channel.name,
            "number": replica.number,
            "state": "draining" if replica.is_draining else "running",
            **{name: getattr(stats, name) for name in names},
        }
        for replica, stats in client.replica_stats()
    ]


class ClusterSeries(Collector):
    """Renders what a front end knows of its replicas.

    Series of engines without the label ``replica`` are the sums of all.
    """

    def __init__(self, client: ClusterEngineClient) -> None:
        self._client = client

    def collect(self) -> Iterator[Metric]:
        client = self._client
        states = GaugeMetricFamily(
            "chunkllama_replicas", "Replicas that this server uses.", labels=["state"]
        )
        for state, count in client.replica_states().items():
            states.add_metric([state], count)
        yield states
        routed = CounterMetricFamily(
            "chunkllama_routed",
            "Requests sent to a replica: it has most of the prompt (match), none has any (cold), "
            "one that has more is too busy (spill), or another one failed or refused (retry).",
            labels=["why"],
        )
        for why, number in client.routing.counts.items():
            routed.add_metric([why], number)
        yield routed
        failovers = CounterMetricFamily(
            "chunkllama_failovers",
            "Requests continued on another replica, by what became of theirs.",
            labels=["reason"],
        )
        for reason in _FAILOVER_REASONS:
            failovers.add_metric([reason], client.failovers[reason])
        yield failovers
        yield CounterMetricFamily(
            "chunkllama_failover_seconds",
            "Time from losing a replica to the next token, over all requests continued.",
            client.failover_seconds,
        )
        yield CounterMetricFamily(
            "chunkllama_replayed_tokens",
            "Tokens of prompts and answers submitted again to another replica.",
            client.replayed_tokens,
        )
        yield from self._engines()

    def _engines(self) -> Iterator[Metric]:
        found = {each.channel.name: stats for each, stats in self._client.replica_stats()}
        families: list[tuple[str, CounterMetricFamily | GaugeMetricFamily]] = []
        for name, text in ENGINE_COUNTERS.items():
            base = name.removesuffix("_total")
            counter = CounterMetricFamily(f"chunkllama_replica_{base}", text, labels=["replica"])
            families.append((name, counter))
        for name, (metric, text) in ENGINE_GAUGES.items():
            gauge = GaugeMetricFamily(f"chunkllama_replica_{metric}", text, labels=["replica"])
            families.append((name, gauge))
        for name, family in families:
            for replica, stats in found.items():
                family.add_metric([replica], getattr(stats, name))
            yield family
        chunks = GaugeMetricFamily(
            "chunkllama_replica_kv_chunks", "Chunks by state.", labels=["replica", "state"]
        )
        for replica, stats in found.items():
            for state in CHUNK_STATES:
                chunks.add_metric([replica, state], getattr(stats, f"chunks_{state}"))
        yield chunks
