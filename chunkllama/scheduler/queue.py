"""The waiting queue: sequences grouped by prefix, tenants served by what they have received.

Each tenant has a *turn*. Its oldest request leads it; the waiting requests that share the longest
prefix with the last one started follow, so a prefix is computed once and used by all of them. A
turn lets at most ``quantum`` tokens of younger requests start before the oldest, then the oldest
starts with any prefix. Between tenants, the one with the lowest clock (``tenants.py``) is
served next; tenants in the middle of a group continue while their clock is less than ``quantum``
ahead of the lowest. Beams that a running search lacks precede the requests of all tenants.

Two bounds follow, which every simulated run checks, with L the virtual tokens of the longest
request:

- A waiting tenant's clock is never passed by more than ``quantum`` by a tenant that is served
  instead.
- Younger requests of one tenant that start before a request with ``n`` older ones are at most
  ``(n + 1) * (quantum + L)`` tokens.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Container, Hashable, Iterator, Mapping
from typing import Final, Literal

from chunkllama.cache.node import TOKEN_BYTES, Node, common_prefix, encode_tokens
from chunkllama.scheduler.request import Sequence

Policy = Literal["fair", "prefix", "fcfs"]
NEAR: Final = 8  # neighbours in token order that are compared when a group continues


def queue_key(sequence: Sequence) -> tuple[bool, int, int, int]:
    """Priority, then order of arrival: a preempted sequence returns to its former place.

    Beams of a search that has begun precede all others: their siblings hold chunks and cannot
    advance without them. Those of several searches go by arrival alone, the reverse of the order of
    preemption: a search that was preempted for an older one does not restart before it.
    """
    if sequence.joins_others:
        return False, 0, *sequence.age
    return True, sequence.group.request.priority, *sequence.age


class TenantQueue:
    """Waiting sequences of one tenant, by age and by token order.

    Args:
        parked: sequences of all tenants that may not start now.

    Attributes:
        overtaken: tokens of younger requests started since an oldest one did. An oldest that leaves
            without a start, or comes back, resets nothing: the next one has waited meanwhile.
        num_ready: its sequences that are not among ``parked``.
        oldest_age: age of the oldest one.
    """

    def __init__(self, parked: Container[Sequence]) -> None:
        self.by_age: list[Sequence] = []
        self.overtaken = 0
        self.num_ready = 0
        self.oldest_age = (0, 0)
        self._parked = parked
        self._may_follow: bool | None = None  # whether a neighbour shares enough; None: not known
        self._by_prefix: list[tuple[bytes, tuple[int, int], Sequence]] = []
        self._keys: dict[Sequence, bytes] = {}  # a queued beam may still be given its last token
        self._last = b""

    def add(self, sequence: Sequence) -> None:
        insort(self.by_age, sequence, key=queue_key)
        self.num_ready += 1
        if self.by_age[0] is sequence:
            self.oldest_age = sequence.age
        self._may_follow = None
        self._keys[sequence] = key = encode_tokens(sequence.cache_ids)
        insort(self._by_prefix, (key, sequence.age, sequence), key=lambda e: e[:2])

    def remove(self, sequence: Sequence) -> None:
        at = bisect_left(self.by_age, queue_key(sequence), key=queue_key)
        assert self.by_age[at] is sequence
        del self.by_age[at]
        self.num_ready -= sequence not in self._parked
        if at == 0:
            self.oldest_age = self.by_age[0].age if self.by_age else (0, 0)
        if not self.by_age:
            self.overtaken = 0
        self._may_follow = None
        entry = (self._keys.pop(sequence), sequence.age)
        at = bisect_left(self._by_prefix, entry, key=lambda e: e[:2])
        assert self._by_prefix[at][2] is sequence
        del self._by_prefix[at]

    def started(self, sequence: Sequence, cost: int) -> None:
        """Note a sequence that is about to leave the queue to run."""
        self._last = self._keys[sequence]
        self._may_follow = None
        self.overtaken = 0 if sequence is self.by_age[0] else self.overtaken + cost

    def follower(self, least: int, passed: Container[Sequence]) -> Sequence | None:
        """The waiting sequence that shares most, at least ``least`` tokens, with the last started.

        Only sequences of the oldest one's priority follow, and none that is parked or passed.
        """
        if self._may_follow is False:
            return None
        start = self._last[: least * TOKEN_BYTES]
        at = bisect_left(self._by_prefix, self._last, key=lambda e: e[0])
        if self._may_follow is None:
            near = self._by_prefix[max(at - 1, 0) : at + 1]
            # the neighbours share most of all
            self._may_follow = len(start) == least * TOKEN_BYTES and any(
                key.startswith(start) for key, _, _ in near
            )
            if not self._may_follow:
                return None
        found: list[tuple[bytes, Sequence]] = []
        for low, high, step in ((at - 1, max(at - 1 - NEAR, -1), -1), (at, at + NEAR, 1)):
            for i in range(low, min(high, len(self._by_prefix)), step):
                key, _, sequence = self._by_prefix[i]
                if sequence in passed or sequence in self._parked:
                    continue
                if key.startswith(start) and self._is_of_first_rank(sequence):
                    found.append((key, sequence))
                break
        if len(found) < 2:
            return found[0][1] if found else None
        return max(found, key=lambda entry: common_prefix(entry[0], self._last))[1]

    def _is_of_first_rank(self, sequence: Sequence) -> bool:
        """Whether the sequence has the priority of the oldest one."""
        group, first = sequence.group, self.by_age[0].group
        if group.beam is None and first.beam is None:  # which is faster
            return group.request.priority == first.request.priority
        return queue_key(sequence)[:2] == queue_key(self.by_age[0])[:2]


class WaitingQueue:
    """Sequences that hold no chunks.

    Args:
        policy: ``fair`` groups by prefix within fair shares of tenants, ``prefix`` groups by prefix
            as if there were one tenant, ``fcfs`` goes by priority and arrival alone.
        quantum: virtual tokens that a group may run ahead.
        least_shared: tokens that a follower must share with the sequence started last.
    """

    def __init__(self, policy: Policy, quantum: int, least_shared: int) -> None:
        self._policy = policy
        self._quantum = quantum
        self._least_shared = max(least_shared, 1)
        self._tenants: dict[str, TenantQueue] = {}
        self._open: dict[str, None] = {}  # tenants that have started one, in order of start
        self._emptied: set[str] = set()  # tenants whose last sequence has left, to be dropped
        self._parked: dict[Sequence, Hashable] = {}  # with the reason, which several may share
        self._by_reason: dict[Hashable, list[Sequence]] = {}
        self._beams: set[Sequence] = set()  # sequences of beam searches
        self.blocked: set[str] = set()  # tenants left out of the order being made
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Sequence]:
        for queue in self._tenants.values():
            yield from queue.by_age

    def _tenant(self, sequence: Sequence) -> str:
        return sequence.group.request.tenant if self._policy == "fair" else ""

    def add(self, sequence: Sequence) -> None:
        tenant = self._tenant(sequence)
        queue = self._tenants.get(tenant)
        if queue is None:
            queue = self._tenants[tenant] = TenantQueue(self._parked)
        queue.add(sequence)
        if sequence.group.beam is not None:
            self._beams.add(sequence)
        self._size += 1

    def remove(self, sequence: Sequence) -> None:
        tenant = self._tenant(sequence)
        queue = self._tenants[tenant]
        queue.remove(sequence)
        self._beams.discard(sequence)
        if not queue.by_age:
            self._emptied.add(tenant)
        self._size -= 1
        if sequence in self._parked:
            reason = self._parked.pop(sequence)
            self._by_reason[reason].remove(sequence)
            if not self._by_reason[reason]:
                del self._by_reason[reason]

    def park(self, sequence: Sequence, reason: Hashable) -> None:
        """Leave a waiting sequence out of the order, at its place, until ``unpark``."""
        if sequence in self._parked:
            return
        self._parked[sequence] = reason
        self._by_reason.setdefault(reason, []).append(sequence)
        self._tenants[self._tenant(sequence)].num_ready -= 1

    def unpark(self, reason: Hashable) -> None:
        """Return the sequences of a reason to the order."""
        for sequence in self._by_reason.pop(reason, ()):
            del self._parked[sequence]
            self._tenants[self._tenant(sequence)].num_ready += 1

    def reasons(self) -> list[Hashable]:
        """Reasons of the sequences that are parked."""
        return list(self._by_reason)

    def awaited_nodes(self, other_than: str | None = None) -> set[Node]:
        """Nodes of the prefix tree that sequences wait for which are not in the background.

        Args:
            other_than: a tenant whose own sequences do not count.
        """
        return {
            reason[0]
            for reason, parked in self._by_reason.items()
            if isinstance(reason, tuple)
            and any(not s.is_background and s.group.request.tenant != other_than for s in parked)
        }

    def started(self, sequence: Sequence, cost: int) -> None:
        """Note that a sequence which costs ``cost`` virtual tokens is about to start."""
        tenant = self._tenant(sequence)
        self._tenants[tenant].started(sequence, cost)
        self._open.setdefault(tenant)

    def ready_tenants(self) -> Iterator[str]:
        """Tenants with a waiting sequence that is not parked."""
        for name, queue in self._tenants.items():
            if queue.num_ready:
                yield name

    def num_ready(self, tenant: str) -> int:
        """A tenant's waiting sequences that are not parked."""
        queue = self._tenants.get(tenant)
        return 0 if queue is None else queue.num_ready

    def of(self, tenant: str) -> list[Sequence]:
        """A tenant's waiting sequences, the oldest first."""
        queue = self._tenants.get(tenant)
        return [] if queue is None else queue.by_age

    def may_overtake(self, sequence: Sequence) -> bool:
        """Whether the sequence may start before its tenant's oldest one."""
        queue = self._tenants[self._tenant(sequence)]
        return sequence is queue.by_age[0] or queue.overtaken < self._quantum

    def block(self, sequence: Sequence) -> None:
        """Leave the sequence's tenant out of the rest of ``candidates``.

        With a policy that knows no tenants the caller has to pass over each of its sequences.
        """
        if self._policy == "fair":
            self.blocked.add(sequence.group.request.tenant)

    def candidates(self, clocks: Mapping[str, float]) -> Iterator[Sequence]:
        """The order of admission; the caller may start each sequence it is given.

        Args:
            clocks: of every tenant with waiting sequences, the cost of running ones included; the
                caller adds that of each sequence it starts.
        """
        self.blocked.clear()
        if self._policy == "fcfs":
            for queue in list(self._tenants.values()):
                yield from [s for s in queue.by_age if s not in self._parked]
            return
        heap = self._heap(clocks)
        passed: set[Sequence] = set()
        for sequence in self._missing_beams():
            if self._tenant(sequence) not in self.blocked:
                passed.add(sequence)
                yield sequence
        continuing = list(self._open)
        continuing.reverse()
        oldest: dict[str, Iterator[Sequence]] = {}
        while heap:
            clock, age, tenant = heap[0]
            queue = self._tenants[tenant]
            if not queue.by_age or tenant in self.blocked:
                heapq.heappop(heap)
                continue
            now = clocks.get(tenant, 0.0)
            if now != clock:
                heapq.heapreplace(heap, (now, age, tenant))
                continue
            chosen = self._continuation(continuing, clocks, clock, passed)
            if chosen is None:
                if tenant not in oldest:
                    oldest[tenant] = iter(list(queue.by_age))
                chosen = self._next_of(queue, oldest[tenant], passed)
            if chosen is None:
                heapq.heappop(heap)
                continue
            passed.add(chosen)
            yield chosen

    def _missing_beams(self) -> list[Sequence]:
        """Beams without which running searches cannot advance, the oldest first."""
        missing = (s for s in self._beams if s.joins_others and s.group.is_running)
        return sorted((s for s in missing if s not in self._parked), key=lambda s: s.age)

    def _heap(self, clocks: Mapping[str, float]) -> list[tuple[float, tuple[int, int], str]]:
        """Tenants that could start a sequence, the one with the lowest clock first."""
        for name in self._emptied:
            if not self._tenants[name].by_age:
                del self._tenants[name]
                self._open.pop(name, None)
        self._emptied.clear()
        heap = [
            (clocks.get(name, 0.0), queue.oldest_age, name)
            for name, queue in self._tenants.items()
            if queue.num_ready
        ]
        heapq.heapify(heap)
        return heap

    def _continuation(
        self,
        continuing: list[str],
        clocks: Mapping[str, float],
        lowest: float,
        passed: Container[Sequence],
    ) -> Sequence | None:
        """The next of the groups in progress whose tenants may continue, the first begun first.

        Args:
            continuing: tenants to ask, the last one first; those without an answer are removed.
        """
        while continuing:
            queue = self._tenants[continuing[-1]]
            if (
                continuing[-1] not in self.blocked
                and queue.num_ready
                and clocks.get(continuing[-1], 0.0) < lowest + self._quantum
            ):
                follower = self._follower(queue, passed)
                if follower is not None:
                    return follower
            continuing.pop()
        return None

    def _follower(self, queue: TenantQueue, passed: Container[Sequence]) -> Sequence | None:
        """The next of the tenant's group, unless its oldest sequence has to start first."""
        if queue.overtaken >= self._quantum or queue.by_age[0].joins_others:
            return None
        return queue.follower(self._least_shared, passed)

    def _next_of(
        self, queue: TenantQueue, oldest: Iterator[Sequence], passed: Container[Sequence]
    ) -> Sequence | None:
        """A follower of the tenant's last start, else its oldest sequence not passed yet."""
        follower = self._follower(queue, passed)
        if follower is not None:
            return follower
        for sequence in oldest:
            if sequence.slot < 0 and sequence not in passed and sequence not in self._parked:
                return sequence
        return None
