"""Pins: prefixes that stay cached until a time, inside a budget that tenants share."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter

from chunkllama.cache.node import Node
from chunkllama.cache.prefix_tree import PrefixTree
from chunkllama.tenant_limits import TenantTable


class _Pin:
    """One pin.

    Attributes:
        until: when it ends.
        askers: length and adapter of each prompt that was pinned there.
    """

    __slots__ = ("askers", "node", "tenant", "until")

    def __init__(self, node: Node, tenant: str, until: float, askers: set[tuple[int, str]]) -> None:
        self.node = node
        self.tenant = tenant
        self.until = until
        self.askers = askers


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
        self._pins: dict[tuple[Node, str], _Pin] = {}
        self._covered: dict[str, Counter[Node]] = {}  # by tenant: its pins at or below each node
        # By tenant a heap of (until, number, pin). A pin that has been extended returns to it.
        self._ends: dict[str, list[tuple[float, int, _Pin]]] = {}
        self._numbers = itertools.count()
        self._next_end = math.inf  # no pin ends before

    def add(self, node: Node, until: float, tenant: str, length: int, adapter: str = "") -> bool:
        """Pin ``node``; False if that would exceed the budget or the tenant's part of it.

        Args:
            length: tokens of the prompt, which may end inside the node or go beyond it.
            adapter: name of the adapter that the request uses, active in the prompt or not.
        """
        pin = self._pins.get((node, tenant))
        if pin is not None:
            pin.until = max(pin.until, until)
            pin.askers.add((length, adapter))
            return True
        price = self._tree.num_unpinned(node)
        free = self.budget - self.num_chunks - price
        covered = self._covered.get(tenant, Counter())
        own = len(covered) + sum(step not in covered for step in node.upward())
        most = self.limits[tenant].pin_chunks
        if free < 0 or (tenant and own > (free if most is None else most)):
            self.refused[tenant] += 1
            return False
        self._place(_Pin(node, tenant, until, {(length, adapter)}))
        return True

    def _place(self, pin: _Pin) -> None:
        node, tenant = pin.node, pin.tenant
        self.num_chunks += self._tree.num_unpinned(node)
        self._tree.pin(node)
        self._pins[node, tenant] = pin
        self._covered.setdefault(tenant, Counter()).update(node.upward())
        heap = self._ends.setdefault(tenant, [])
        heapq.heappush(heap, (pin.until, next(self._numbers), pin))
        self._next_end = min(self._next_end, pin.until)
        if len(heap) > 2 * len(self._pins) + 64:  # of pins that were ended or moved
            heap[:] = [entry for entry in heap if self._has(entry[2])]
            heapq.heapify(heap)

    def _has(self, pin: _Pin) -> bool:
        return self._pins.get((pin.node, pin.tenant)) is pin

    @property
    def refused_total(self) -> int:
        """Pins that were refused."""
        return self.refused.total()

    def num_covered(self, tenant: str) -> int:
        """Chunks that a tenant's pins protect."""
        return len(self._covered.get(tenant, ()))

    def expiry(self) -> dict[tuple[Node, str], float]:
        """Pins as (node, tenant), and when each ends."""
        return {key: pin.until for key, pin in self._pins.items()}

    def remove(self, node: Node, tenant: str = "") -> set[tuple[int, str]]:
        """End a pin; returns length and adapter of each prompt that was pinned there."""
        pin = self._pins.pop((node, tenant))
        self._tree.unpin(node)
        self.num_chunks -= self._tree.num_unpinned(node)
        covered = self._covered[tenant]
        for step in node.upward():
            covered[step] -= 1
            if not covered[step]:
                del covered[step]
        if not covered:
            del self._covered[tenant], self._ends[tenant]
        return pin.askers

    def move(self, node: Node, duplicate: Node) -> None:
        """Move the pins of ``node``, a leaf, to ``duplicate``, a sibling with the same tokens."""
        if not node.num_pins:
            return
        for tenant in list(self._covered):
            pin = self._pins.get((node, tenant))
            if pin is None:
                continue
            self.remove(node, tenant)
            other = self._pins.get((duplicate, tenant))
            if other is not None:
                other.until = max(pin.until, other.until)
                other.askers |= pin.askers
            else:
                self._place(_Pin(duplicate, tenant, pin.until, pin.askers))

    def expire(self, now: float) -> list[tuple[Node, str]]:
        """End the pins whose time is over; returns their nodes and tenants."""
        if now < self._next_end:
            return []
        ended = []
        for tenant in list(self._covered):
            while tenant in self._covered and (first := self._first(tenant)).until <= now:
                self.remove(first.node, tenant)
                ended.append((first.node, tenant))
        self._next_end = min((heap[0][0] for heap in self._ends.values()), default=math.inf)
        return ended

    def _first(self, tenant: str) -> _Pin:
        """The pin of a tenant with pins that ends first."""
        heap = self._ends[tenant]
        while True:
            until, number, pin = heap[0]
            if not self._has(pin):
                heapq.heappop(heap)
            elif pin.until > until:
                heapq.heapreplace(heap, (pin.until, number, pin))
            else:
                return pin

    def break_one(self) -> bool:
        """End a pin early, for a sequence that could not run otherwise.

        The tenant that covers most chunks loses the pin that expires first; pins without a tenant
        are ended last.
        """
        if not self._pins:
            return False
        tenant = min(
            self._covered,
            key=lambda name: (name == "", -len(self._covered[name]), self._first(name).until),
        )
        self.remove(self._first(tenant).node, tenant)
        return True

    def check_invariants(self) -> None:
        """Each node's pins are those at or below it; the price of all is what was counted."""
        counts: Counter[Node] = Counter()
        covered: dict[str, Counter[Node]] = {}
        for leaf, tenant in self._pins:
            assert leaf.chunk_id >= 0, "a pinned node has left the tree"
            counts.update(leaf.upward())
            covered.setdefault(tenant, Counter()).update(leaf.upward())
        for node in self._tree.nodes():
            assert node.num_pins == counts[node]
        assert self.num_chunks == len(+counts) <= self.budget
        assert self._covered == covered
        assert self._ends.keys() == covered.keys()
        for pin in self._pins.values():
            entries = [entry for entry in self._ends[pin.tenant] if entry[2] is pin]
            assert len(entries) == 1 and self._next_end <= entries[0][0] <= pin.until
        if self.limits is self._no_limits:
            largest = max((len(c) for tenant, c in covered.items() if tenant), default=0)
            assert largest <= max(self.budget // 2, 1), "a tenant has most of the pin budget"
