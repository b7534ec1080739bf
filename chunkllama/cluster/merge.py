"""One view of the statistics of several engines."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import msgspec

from chunkllama.cache_messages import TreeNodeInfo
from chunkllama.messages import EngineStats, Histogram, TenantStats

_TAG_BITS = 32  # a chunk's id in the tree of one engine; the replica's number stands above it
_GAUGES = {"chunks_total"}.union(
    field.name
    for field in msgspec.structs.fields(EngineStats)
    if field.type is int and not field.name.endswith("_total")
) - {"invariant_violations"}
_TENANT_GAUGES = frozenset(
    {
        *("requests_running", "requests_waiting"),
        *("chunks_used", "chunks_cached", "chunks_pinned"),
    }
)
_NO_SUMS = frozenset({"is_pushed", "tree", "tenants"})


def tag_chunk(number: int, chunk_id: int) -> int:
    """Make the id of a replica's chunk unique; -1, which is none, stays."""
    return chunk_id if chunk_id < 0 else number << _TAG_BITS | chunk_id


def untag_chunk(tagged: int) -> tuple[int, int]:
    """Return the replica's number and the id of its chunk."""
    return tagged >> _TAG_BITS, tagged & ((1 << _TAG_BITS) - 1)


class StatsMerger:
    """Sums snapshots; what a replica had counted still counts when it is gone."""

    def __init__(self) -> None:
        self._last: dict[str, EngineStats] = {}
        self._gone = EngineStats()

    def update(self, replica: str, stats: EngineStats) -> None:
        """Store the last snapshot of a replica; an older one is not used, absent tenants stay."""
        last = self._last.get(replica)
        if last is not None:
            if stats.steps_total < last.steps_total:
                return
            if not stats.tenants:
                stats = msgspec.structs.replace(stats, tenants=last.tenants)
        self._last[replica] = stats

    def remove(self, replica: str) -> None:
        """Keep the counters of a replica that has ended."""
        stats = self._last.pop(replica, None)
        if stats is not None:
            _add(self._gone, stats, _GAUGES)
            _add_tenants(self._gone, stats, _TENANT_GAUGES)

    def __getitem__(self, replica: str) -> EngineStats:
        """Return the last snapshot of a replica."""
        return self._last.get(replica, EngineStats())

    def total(self) -> EngineStats:
        """Return the sum, without trees and tenants."""
        total = _copy(self._gone)
        for stats in self._last.values():
            _add(total, stats, frozenset())
        total.tenants = {}
        return total

    def tenants(self) -> dict[str, TenantStats]:
        """Return the sums of each tenant."""
        total = _copy(self._gone)
        for stats in self._last.values():
            _add_tenants(total, stats, frozenset())
        return total.tenants

    def tree(self, numbers: Mapping[str, int]) -> list[TreeNodeInfo]:
        """Return the trees one behind the other.

        Args:
            numbers: of each replica, for the ids of its chunks.
        """
        return [
            msgspec.structs.replace(
                node,
                chunk_id=tag_chunk(numbers[replica], node.chunk_id),
                parent_chunk_id=tag_chunk(numbers[replica], node.parent_chunk_id),
            )
            for replica, stats in self._last.items()
            for node in stats.tree
        ]


def _copy(stats: EngineStats) -> EngineStats:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(stats), type=EngineStats)


def _add(total: EngineStats, stats: EngineStats, left_out: Collection[str]) -> None:
    for name in total.__struct_fields__:
        if name in _NO_SUMS or name in left_out:
            continue
        mine, theirs = getattr(total, name), getattr(stats, name)
        if isinstance(mine, Histogram):
            mine.add(theirs)
        else:
            setattr(total, name, mine + theirs)


def _add_tenants(total: EngineStats, stats: EngineStats, left_out: Collection[str]) -> None:
    for tenant, counted in stats.tenants.items():
        sums = total.tenants.setdefault(tenant, TenantStats())
        for name in sums.__struct_fields__:
            if name not in left_out:
                setattr(sums, name, getattr(sums, name) + getattr(counted, name))
