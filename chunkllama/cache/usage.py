"""Chunk-seconds and evictions of each tenant.

A chunk that a sequence has for itself counts for the sequence's tenant. A tree node in use is
divided among the sequences through it: each edge keeps the integral of 1 / num_sequences over time,
and a sequence's part is the difference between its value at release and at acquisition, so both
cost O(1) per edge. A node that no sequence uses counts as cached for the tenant that added it. At
any moment the parts of all tenants add up to the chunks that are not free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from chunkllama.cache.edge import edges_of
from chunkllama.cache.node import Node
from chunkllama.cache.sequence_chunks import SequenceChunks
from chunkllama.messages import TenantStats


class ChunkUsage:
    """Totals by tenant since the start.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.now = clock
        self._tenants: dict[str, TenantStats] = {}
        self._updated: dict[str, float] = {}

    def _of(self, tenant: str) -> TenantStats:
        found = self._tenants.get(tenant)
        if found is None:
            found = self._tenants[tenant] = TenantStats()
            self._updated[tenant] = self.now()
        return found

    def add_cached(self, tenant: str, count: int) -> None:
        """Count nodes that became unused (or, if negative, used or removed) for their owner."""
        stats = self._of(tenant)
        self._integrate(tenant, stats)
        stats.chunks_cached += count

    def _integrate(self, tenant: str, stats: TenantStats) -> None:
        now = self.now()
        stats.cached_chunk_seconds += stats.chunks_cached * (now - self._updated[tenant])
        self._updated[tenant] = now

    def add_used(self, tenant: str, chunk_seconds: float) -> None:
        """Charge a sequence that has released its chunks."""
        self._of(tenant).chunk_seconds += chunk_seconds

    def add_eviction(self, node: Node, tenant: str) -> None:
        """Count an evicted node for its owner and for the tenant that needed the chunk."""
        lost, caused = self._of(node.owner), self._of(tenant)
        lost.evicted_chunks += 1
        lost.evicted_tokens += node.filled
        caused.evictions_for += 1
        caused.evictions_of_others += node.owner != tenant

    def read(self, live: Iterable[SequenceChunks]) -> dict[str, TenantStats]:
        """Return totals and gauges of every tenant.

        Args:
            live: chunks of all running sequences.
        """
        result: dict[str, TenantStats] = {}
        for tenant, stats in self._tenants.items():
            self._integrate(tenant, stats)
            result[tenant] = _copy(stats)
        now = self.now()
        for chunks in live:
            stats = result.setdefault(chunks.tenant, TenantStats())
            stats.chunks_used += chunks.num_private
            stats.chunk_seconds += chunks.meter + chunks.num_private * now
            for edge in edges_of(chunks.path):
                stats.chunks_used += len(edge.nodes) / edge.num_sequences
                stats.chunk_seconds += edge.shared_seconds(now)
        return result


def _copy(stats: TenantStats) -> TenantStats:
    return TenantStats(**{name: getattr(stats, name) for name in TenantStats.__struct_fields__})
