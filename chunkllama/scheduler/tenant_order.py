"""Tenants that could start a sequence, the one with the lowest clock first; kept between steps."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from chunkllama.scheduler.tenant_queue import TenantQueue
from chunkllama.scheduler.tenants import Clocks

Entry = tuple[float, tuple[int, int], str]  # clock, age of the oldest sequence, tenant


class TenantOrder:
    """A heap with one valid entry for each tenant in it.

    An entry is never above its tenant's clock and age. Where it is below, it is raised when it
    comes to the top, and lowered again for the next step, in which the clock may be lower. So a
    step looks at tenants whose queues have changed and at those that it serves, not at all of them.

    Args:
        ready: queues of the tenants with a sequence that is not parked.
    """

    def __init__(self, ready: Mapping[str, TenantQueue]) -> None:
        self._ready = ready
        self._heap: list[Entry] = []
        self._valid: dict[str, Entry] = {}
        self._changed: set[str] = set()
        self._raised: set[str] = set()  # in the step being put together
        self._clocks: Clocks | None = None

    def changed(self, tenant: str) -> None:
        """Note that a tenant has become ready, or that its oldest sequence is another one."""
        self._changed.add(tenant)

    def begin(self, clocks: Clocks) -> None:
        """Lower the entries that may be above their tenants' clocks, and add missing ones."""
        if self._clocks is not clocks:
            self._clocks = clocks
            self._changed |= self._raised
            self._raised.clear()
        for tenant in self._changed:
            queue = self._ready.get(tenant)
            if queue is not None:
                entry = clocks.least(tenant), queue.oldest_age, tenant
                valid = self._valid.get(tenant)
                if valid is None or entry < valid:
                    self._valid[tenant] = entry
                    heapq.heappush(self._heap, entry)
        self._changed.clear()
        if len(self._heap) > 2 * len(self._valid) + 64:
            self._heap = list(self._valid.values())
            heapq.heapify(self._heap)

    def _entry(self, tenant: str) -> Entry:
        assert self._clocks is not None
        return self._clocks[tenant], self._ready[tenant].oldest_age, tenant

    def first(self) -> tuple[float, str] | None:
        """Return the lowest clock and its tenant; of equal ones that with the oldest sequence."""
        while self._heap:
            entry = self._heap[0]
            tenant = entry[2]
            if self._valid.get(tenant) is not entry:
                heapq.heappop(self._heap)
            elif tenant not in self._ready:
                self._drop_first()
            elif (now := self._entry(tenant)) != entry:
                self._valid[tenant] = now
                self._raised.add(tenant)
                heapq.heapreplace(self._heap, now)
            else:
                return entry[0], tenant
        return None

    def check_invariants(self, clocks: Clocks) -> None:
        """No entry is above its tenant's clock but of those that ``begin`` will look at."""
        for tenant in self._ready.keys() - self._changed - self._raised:
            now = clocks[tenant], self._ready[tenant].oldest_age, tenant
            assert tenant in self._valid and self._valid[tenant] <= now

    def pass_over(self) -> None:
        """Leave the first tenant out until the next ``begin``."""
        self._changed.add(self._drop_first())

    def _drop_first(self) -> str:
        tenant = heapq.heappop(self._heap)[2]
        del self._valid[tenant]
        return tenant
