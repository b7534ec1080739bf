"""Pins: prefixes that stay cached until a time, inside a budget that tenants share."""

from __future__ import annotations

from collections import Counter

from chunkllama.cache.node import Node
from chunkllama.cache.prefix_tree import PrefixTree
from chunkllama.tenant_limits import TenantTable


class Pins:
    """Nodes protected from eviction until a time; at most ``budget`` chunks at once.

    A pin protects a node and its ancestors. Pinning a node again extends its time.

    A tenant's pins may cover as many chunks as its limits say (``pin_chunks``), or else as the
    budget still has free: one tenant takes at most half of it and k tenants leave 1 / (k + 1). Pins
    of the tenant "" (public prefixes, or a server with one tenant) are bounded by the budget alone.
    """

    def __init__(self, tree: PrefixTree, budget: int) -> None:
        self.budget = budget
        self.num_chunks = 0
        self.refused: Counter[str] = Counter()  # by tenant
        self.limits = self._no_limits = TenantTable()
        self._tree = tree
        self._expiry: dict[tuple[Node, str], float] = {}
        self._askers: dict[tuple[Node, str], set[tuple[int, str]]] = {}
        self._covered: dict[str, Counter[Node]] = {}  # by tenant: its pins at or below each node

    def add(self, node: Node, until: float, tenant: str, length: int, adapter: str = "") -> bool:
        """Pin ``node``; False if that would exceed the budget or the tenant's part of it.

        Args:
            length: tokens of the prompt, which may end inside the node or go beyond it.
            adapter: name of the adapter that the request uses, active in the prompt or not.
        """
        key = (node, tenant)
        if key in self._expiry:
            self._expiry[key] = max(self._expiry[key], until)
            self._askers[key].add((length, adapter))
            return True
        price = self._tree.num_unpinned(node)
        free = self.budget - self.num_chunks - price
        covered = self._covered.get(tenant, Counter())
        own = len(covered) + sum(step not in covered for step in node.upward())
        most = self.limits[tenant].pin_chunks
        if free < 0 or (tenant and own > (free if most is None else most)):
            self.refused[tenant] += 1
            return False
        self._place(node, until, tenant, {(length, adapter)})
        return True

    def _place(self, node: Node, until: float, tenant: str, askers: set[tuple[int, str]]) -> None:
        self.num_chunks += self._tree.num_unpinned(node)
        self._tree.pin(node)
        self._expiry[node, tenant] = until
        self._askers[node, tenant] = askers
        self._covered.setdefault(tenant, Counter()).update(node.upward())

    @property
    def refused_total(self) -> int:
        """Pins that were refused."""
        return self.refused.total()

    def num_covered(self, tenant: str) -> int:
        """Chunks that a tenant's pins protect."""
        return len(self._covered.get(tenant, ()))

    def expiry(self) -> dict[tuple[Node, str], float]:
        """Pins as (node, tenant), and when each ends; a copy."""
        return dict(self._expiry)

    def remove(self, node: Node, tenant: str = "") -> set[tuple[int, str]]:
        """End a pin; returns length and adapter of each prompt that was pinned there."""
        del self._expiry[node, tenant]
        askers = self._askers.pop((node, tenant))
        self._tree.unpin(node)
        self.num_chunks -= self._tree.num_unpinned(node)
        covered = self._covered[tenant]
        for step in node.upward():
            covered[step] -= 1
            if not covered[step]:
                del covered[step]
        if not covered:
            del self._covered[tenant]
        return askers

    def move(self, node: Node, duplicate: Node) -> None:
        """Move the pins of ``node`` to ``duplicate``, a sibling with the same tokens."""
        for pinned, tenant in [key for key in self._expiry if key[0] is node]:
            until = self._expiry[pinned, tenant]
            askers = self.remove(pinned, tenant)
            if (duplicate, tenant) in self._expiry:
                self._expiry[duplicate, tenant] = max(until, self._expiry[duplicate, tenant])
                self._askers[duplicate, tenant] |= askers
            else:
                self._place(duplicate, until, tenant, askers)

    def expire(self, now: float) -> list[tuple[Node, str]]:
        """End the pins whose time is over; returns their nodes and tenants."""
        ended = [key for key, until in self._expiry.items() if until <= now]
        for key in ended:
            self.remove(*key)
        return ended

    def break_one(self) -> bool:
        """End a pin early, for a sequence that could not run otherwise.

        The tenant that covers most chunks loses the pin that expires first; pins without a tenant
        are ended last.
        """
        if not self._expiry:
            return False
        size = {tenant: len(covered) for tenant, covered in self._covered.items()}
        self.remove(
            *min(
                self._expiry,
                key=lambda key: (key[1] == "", -size[key[1]], self._expiry[key]),
            )
        )
        return True

    def check_invariants(self) -> None:
        """Each node's pins are those at or below it; the price of all is what was counted."""
        counts: Counter[Node] = Counter()
        covered: dict[str, Counter[Node]] = {}
        for leaf, tenant in self._expiry:
            assert leaf.chunk_id >= 0, "a pinned node has left the tree"
            counts.update(leaf.upward())
            covered.setdefault(tenant, Counter()).update(leaf.upward())
        for node in self._tree.nodes():
            assert node.num_pins == counts[node]
        assert self.num_chunks == len(+counts) <= self.budget
        assert self._covered == covered
        assert self._askers.keys() == self._expiry.keys()
        if self.limits is self._no_limits:
            largest = max((len(c) for tenant, c in covered.items() if tenant), default=0)
            assert largest <= max(self.budget // 2, 1), "a tenant has most of the pin budget"
