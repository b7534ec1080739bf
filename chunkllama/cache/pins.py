"""Pins: prefixes that stay cached for a while, inside a budget."""

from __future__ import annotations

from chunkllama.cache.node import Node
from chunkllama.cache.prefix_tree import PrefixTree


class Pins:
    """Nodes kept from eviction until a time; at most ``budget`` chunks are held by pins at once.

    A pin protects a node and its ancestors. Pinning a node again extends its time.
    """

    def __init__(self, tree: PrefixTree, budget: int) -> None:
        self.budget = budget
        self.num_chunks = 0
        self.refused_total = 0
        self._tree = tree
        self._expiry: dict[Node, float] = {}

    def add(self, node: Node, until: float) -> bool:
        """Pin ``node``; False if that would exceed the budget."""
        if node in self._expiry:
            self._expiry[node] = max(self._expiry[node], until)
            return True
        price = self._tree.num_unpinned(node)
        if self.num_chunks + price > self.budget:
            self.refused_total += 1
            return False
        self._tree.pin(node)
        self.num_chunks += price
        self._expiry[node] = until
        return True

    def remove(self, node: Node) -> None:
        del self._expiry[node]
        self._tree.unpin(node)
        self.num_chunks -= self._tree.num_unpinned(node)

    def move(self, node: Node, duplicate: Node) -> None:
        """``duplicate``, a sibling with the same tokens, takes the place of ``node``."""
        until = self._expiry.get(node)
        if until is not None:
            self.remove(node)
            self.add(duplicate, until)

    def expire(self, now: float) -> None:
        """End the pins whose time is over."""
        if self._expiry:
            for node in [n for n, until in self._expiry.items() if until <= now]:
                self.remove(node)

    def break_one(self) -> bool:
        """End the pin that expires first, for a sequence that could not run otherwise."""
        if not self._expiry:
            return False
        self.remove(min(self._expiry, key=self._expiry.__getitem__))
        return True

    def check_invariants(self) -> None:
        """Each node's pins are those at or below it; the price of all is what was counted."""
        counts: dict[Node, int] = {}
        for leaf in self._expiry:
            assert leaf.chunk_id >= 0, "a pinned node has left the tree"
            step: Node | None = leaf
            while step is not None and step.parent is not None:
                counts[step] = counts.get(step, 0) + 1
                step = step.parent
        for node in self._tree.nodes():
            assert node.num_pins == counts.get(node, 0)
        assert self.num_chunks == len(counts) <= self.budget
