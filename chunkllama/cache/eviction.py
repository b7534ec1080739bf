"""Which unused leaf is evicted next: tenants over their share lose theirs first.

Leaves of one tenant go least recently used first. Between tenants, a leaf's age counts times the
chunks its tenant has, rounded up to a power of two; equal tenants together are least recently used
first. Two kinds of tenants lose a leaf only when no other has one: those below a floor of half an
equal share of the pool, and "", which owns public prefixes on a server with several tenants.

Tenants of one power of two form a class with a heap of their oldest leaves, so an eviction looks at
one tenant for each of at most log2(chunks) classes.
"""

from __future__ import annotations

import heapq

from chunkllama.cache.node import Node


class _Owner:
    """Chunks of one tenant: how many, and a heap of (last use, order of pushing, leaf)."""

    __slots__ = ("leaves", "num_nodes")

    def __init__(self) -> None:
        self.num_nodes = 0
        self.leaves: list[tuple[int, int, Node]] = []

    def oldest(self) -> int | None:
        """Last use of the least recently used leaf; drops entries that are out of date."""
        while self.leaves:
            last_use, _, node = self.leaves[0]
            if is_evictable_leaf(node) and node.last_use == last_use:
                return last_use
            heapq.heappop(self.leaves)
        return None


class EvictionOrder:
    """Leaves of the tree by tenant; the tree reports every node and every unused leaf."""

    def __init__(self, num_chunks: int) -> None:
        self._num_chunks = num_chunks
        self._owners: dict[str, _Owner] = {}
        # by class: (last use, order of pushing, owner); out of date unless it is the owner's oldest
        self._classes: list[list[tuple[int, int, str]]] = [
            [] for _ in range(num_chunks.bit_length() + 1)
        ]
        self._pushes = 0

    @property
    def num_entries(self) -> int:
        """Entries of all heaps, those out of date included."""
        leaves = sum(len(owner.leaves) for owner in self._owners.values())
        return leaves + sum(map(len, self._classes))

    def num_nodes(self, owner: str) -> int:
        """Nodes of the tree that were added for a tenant."""
        return self._owners[owner].num_nodes if owner in self._owners else 0

    def add(self, owner: str) -> None:
        """Count a node that joined the tree."""
        entry = self._owners.get(owner)
        if entry is None:
            entry = self._owners[owner] = _Owner()
            self._reclassify_public()
        entry.num_nodes += 1
        if entry.num_nodes & (entry.num_nodes - 1) == 0:
            self._announce(owner)

    def remove(self, owner: str) -> None:
        """Count a node that left the tree."""
        entry = self._owners[owner]
        entry.num_nodes -= 1
        if entry.num_nodes == 0:
            del self._owners[owner]
            self._reclassify_public()
        elif entry.num_nodes & (entry.num_nodes + 1) == 0:
            self._announce(owner)

    def push(self, node: Node) -> None:
        """Add an unused leaf, or one that was used again."""
        entry = self._owners[node.owner]
        self._pushes += 1
        heapq.heappush(entry.leaves, (node.last_use, self._pushes, node))
        if entry.leaves[0][2] is node:
            self._announce(node.owner)
        # a prefix that is hit again and again leaves an entry out of date each time
        if len(entry.leaves) > 2 * entry.num_nodes + 64:
            fresh = {id(n): (use, i, n) for use, i, n in entry.leaves if n.last_use == use}
            entry.leaves = [e for e in fresh.values() if is_evictable_leaf(e[2])]
            heapq.heapify(entry.leaves)

    def pop(self, now: int) -> Node | None:
        """Take the leaf to evict; None if every node is in use or pinned.

        Args:
            now: the tick that ``Node.last_use`` is compared with.
        """
        floor = self._num_chunks // (2 * max(len(self._owners), 1))
        best: tuple[bool, int, str] | None = None
        for size_class, heap in enumerate(self._classes):
            owner = self._first(size_class, heap)
            if owner is not None:
                is_protected = (1 << size_class) - 1 <= floor
                score = (now - heap[0][0] + 1) << size_class
                if best is None or (not is_protected, score) > best[:2]:
                    best = (not is_protected, score, owner)
        if best is None:
            return None
        node = heapq.heappop(self._owners[best[2]].leaves)[2]
        self._announce(best[2])
        return node

    def _class_of(self, owner: str) -> int:
        several = len(self._owners) > 1
        return 0 if owner == "" and several else self._owners[owner].num_nodes.bit_length()

    def _reclassify_public(self) -> None:
        """Move "" between classes when the second owner comes or goes."""
        if "" in self._owners and len(self._owners) <= 2:
            self._announce("")

    def _first(self, size_class: int, heap: list[tuple[int, int, str]]) -> str | None:
        """The owner of the class whose leaf is oldest."""
        while heap:
            last_use, _, owner = heap[0]
            if owner in self._owners:
                actual = self._class_of(owner)
                oldest = self._owners[owner].oldest()
                if actual == size_class and oldest == last_use:
                    return owner
                if oldest is not None:
                    heapq.heappop(heap)
                    if (actual, oldest) != (size_class, last_use):
                        self._announce(owner)
                    continue
            heapq.heappop(heap)
        return None

    def _announce(self, owner: str) -> None:
        """Push the owner's oldest leaf to its class."""
        oldest = self._owners[owner].oldest()
        if oldest is None:
            return
        self._pushes += 1
        size_class = self._class_of(owner)
        heap = self._classes[size_class]
        heapq.heappush(heap, (oldest, self._pushes, owner))
        if len(heap) > 4 * len(self._owners) + 64:
            members = [name for name in self._owners if self._class_of(name) == size_class]
            uses = [(self._owners[name].oldest(), name) for name in members]
            heap[:] = sorted(
                (use, i, name) for i, (use, name) in enumerate(uses) if use is not None
            )


def is_evictable_leaf(node: Node) -> bool:
    """A leaf of the tree that is neither in use nor pinned."""
    return node.chunk_id >= 0 and node.is_evictable and not node.children
