"""Which unused leaf is evicted next: tenants over their share lose theirs first.

Leaves of one tenant go least recently used first. Tenants have three ranks:

1. over the ``chunk_share`` of its limits: loses leaves before all others;
2. the rest;
3. within its floor (``chunk_floor``, else half an equal share of the pool), and "", which owns
   public prefixes on a server with several tenants: loses a leaf only when no other tenant has one.

Between tenants of one rank, a leaf's age counts times the chunks its tenant has, rounded up to a
power of two; equal tenants together are least recently used first.

Tenants of one rank and one power of two form a class with a heap of their oldest leaves, so an
eviction looks at one tenant for each of at most 4 log2(chunks) classes. A tenant has one valid
entry in all these heaps; the others are dropped when they come to the top.
"""

from __future__ import annotations

import heapq
from typing import Generic, Protocol, TypeVar

from chunkllama.tenant_limits import TenantTable

_DEFAULT, _OVER, _BETWEEN, _WITHIN = range(4)  # _DEFAULT: the floor is half an equal share


class Evictable(Protocol):
    """A node of the pool's tree, or an entry of the tier's.

    Attributes:
        owner: tenant that it counts for.
        last_use: tick of its last use.
    """

    owner: str

    @property
    def last_use(self) -> int: ...

    @property
    def is_evictable_leaf(self) -> bool: ...


N = TypeVar("N", bound=Evictable)


class _Owner(Generic[N]):
    """Chunks of one tenant: how many, and a heap of (last use, order of pushing, leaf).

    Attributes:
        share, floor: its limits in chunks; None is no limit, and half an equal share.
        key: its class.
        announced: which push to a class is its valid entry; -1 is none.
    """

    __slots__ = ("announced", "floor", "key", "leaves", "num_nodes", "share")

    def __init__(self, share: int | None, floor: int | None) -> None:
        self.num_nodes = 0
        self.leaves: list[tuple[int, int, N]] = []
        self.share = share
        self.floor = floor
        self.key = -1
        self.announced = -1

    def oldest(self) -> int | None:
        """Last use of the least recently used leaf; drops entries that are out of date."""
        while self.leaves:
            last_use, _, node = self.leaves[0]
            if node.is_evictable_leaf and node.last_use == last_use:
                return last_use
            heapq.heappop(self.leaves)
        return None

    def kind(self) -> int:
        """Which of its limits it is beyond."""
        if self.share is not None and self.num_nodes > self.share:
            return _OVER
        if self.floor is None:
            return _DEFAULT
        return _WITHIN if self.num_nodes <= self.floor else _BETWEEN


class EvictionOrder(Generic[N]):
    """Leaves of the tree by tenant; the tree reports every node and every unused leaf."""

    def __init__(self, num_chunks: int) -> None:
        self._num_chunks = num_chunks
        self._limits = TenantTable()
        self._owners: dict[str, _Owner[N]] = {}
        self._num_sizes = num_chunks.bit_length() + 1
        # by class: (last use, order of pushing, owner)
        self._classes: list[list[tuple[int, int, str]]] = [[] for _ in range(4 * self._num_sizes)]
        self._pushes = 0

    @property
    def num_entries(self) -> int:
        """Entries of all heaps, those out of date included."""
        leaves = sum(len(owner.leaves) for owner in self._owners.values())
        return leaves + sum(map(len, self._classes))

    def num_nodes(self, owner: str) -> int:
        """Nodes of the tree that were added for a tenant."""
        return self._owners[owner].num_nodes if owner in self._owners else 0

    def set_limits(self, limits: TenantTable) -> None:
        """Apply other shares and floors."""
        self._limits = limits
        for name, entry in self._owners.items():
            entry.share, entry.floor = self._limits_of(name)
            self._classify(name)

    def resize(self, num_chunks: int) -> None:
        """Take shares and floors of fewer chunks than before."""
        self._num_chunks = num_chunks
        self.set_limits(self._limits)

    def add(self, owner: str, count: int = 1) -> None:
        """Count nodes that joined the tree."""
        entry = self._owners.get(owner)
        if entry is None:
            entry = self._owners[owner] = _Owner(*self._limits_of(owner))
            self._reclassify_public()
        entry.num_nodes += count
        self._classify(owner)

    def remove(self, owner: str) -> None:
        """Count a node that left the tree."""
        entry = self._owners[owner]
        entry.num_nodes -= 1
        if entry.num_nodes == 0:
            del self._owners[owner]
            self._reclassify_public()
        else:
            self._classify(owner)

    def _limits_of(self, owner: str) -> tuple[int | None, int | None]:
        limits = self._limits[owner]
        share, floor = limits.chunk_share, limits.chunk_floor
        return (
            None if share is None else int(share * self._num_chunks),
            None if floor is None else int(floor * self._num_chunks),
        )

    def push(self, node: N) -> None:
        """Add an unused leaf, or one that was used again."""
        entry = self._owners[node.owner]
        self._pushes += 1
        heapq.heappush(entry.leaves, (node.last_use, self._pushes, node))
        if entry.leaves[0][2] is node:
            self._announce(node.owner)
        # a prefix that is hit again and again leaves an entry out of date each time
        if len(entry.leaves) > 2 * entry.num_nodes + 64:
            fresh = {id(n): (use, i, n) for use, i, n in entry.leaves if n.last_use == use}
            entry.leaves = [e for e in fresh.values() if e[2].is_evictable_leaf]
            heapq.heapify(entry.leaves)

    def pop(self, now: int) -> N | None:
        """Take the leaf to evict; None if every node is in use or pinned.

        Args:
            now: the tick that ``Node.last_use`` is compared with.
        """
        floor = self._num_chunks // (2 * max(len(self._owners), 1))
        best: tuple[int, int, str] | None = None
        for key, heap in enumerate(self._classes):
            owner = self._first(key, heap) if heap else None
            if owner is None:
                continue
            kind, size = divmod(key, self._num_sizes)
            if kind == _DEFAULT:
                kind = _WITHIN if (1 << size) - 1 <= floor else _BETWEEN
            score = (now - heap[0][0] + 1) << size
            if best is None or (-kind, score) > best[:2]:
                best = (-kind, score, owner)
        if best is None:
            return None
        node = heapq.heappop(self._owners[best[2]].leaves)[2]
        self._announce(best[2])
        return node

    def _classify(self, owner: str) -> None:
        """Note the owner's class, and push its oldest leaf there if that is another one."""
        entry = self._owners[owner]
        if owner == "" and len(self._owners) > 1:
            key = 0  # no chunks: always within the floor
        else:
            key = entry.kind() * self._num_sizes + entry.num_nodes.bit_length()
        if key != entry.key:
            entry.key = key
            self._announce(owner)

    def _reclassify_public(self) -> None:
        """Move "" between classes when the second owner comes or goes."""
        if "" in self._owners and len(self._owners) <= 2:
            self._classify("")

    def _first(self, key: int, heap: list[tuple[int, int, str]]) -> str | None:
        """The owner of the class whose leaf is oldest."""
        while heap:
            last_use, _, owner = heap[0]
            if self._is_valid(heap[0]):
                if self._owners[owner].key == key and self._owners[owner].oldest() == last_use:
                    return owner
                heapq.heappop(heap)
                self._announce(owner)
            else:
                heapq.heappop(heap)
        return None

    def _is_valid(self, entry: tuple[int, int, str]) -> bool:
        """Whether this is the last entry that was pushed for its owner."""
        owner = self._owners.get(entry[2])
        return owner is not None and owner.announced == entry[1]

    def _announce(self, owner: str) -> None:
        """Push the owner's oldest leaf to its class, in place of its last entry."""
        entry = self._owners[owner]
        oldest = entry.oldest()
        if oldest is None:
            entry.announced = -1
            return
        self._pushes += 1
        entry.announced = self._pushes
        heap = self._classes[entry.key]
        heapq.heappush(heap, (oldest, self._pushes, owner))
        if len(heap) > 4 * len(self._owners) + 64:
            heap[:] = sorted(filter(self._is_valid, heap))
