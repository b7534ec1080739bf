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

from bisect import bisect_left
from collections.abc import Callable, Container, Hashable, Iterator
from typing import Literal

from chunkllama.cache.node import Node
from chunkllama.scheduler.request import Sequence
from chunkllama.scheduler.tenant_order import TenantOrder
from chunkllama.scheduler.tenant_queue import TenantQueue
from chunkllama.scheduler.tenants import Clocks

Policy = Literal["fair", "prefix", "fcfs"]


class WaitingQueue:
    """Sequences that hold no chunks.

    Args:
        policy: ``fair`` groups by prefix within fair shares of tenants, ``prefix`` groups by prefix
            as if there were one tenant, ``fcfs`` goes by priority and arrival alone.
        quantum: virtual tokens that a group may run ahead.
        least_shared: tokens that a follower must share with the sequence started last.
        expected_chunks: estimates the chunks that a sequence will hold.

    Attributes:
        ready: queues of the tenants with a sequence that is not parked.
        num_chunks: sum of ``expected_chunks`` of the sequences when they joined.
    """

    def __init__(
        self,
        policy: Policy,
        quantum: int,
        least_shared: int,
        expected_chunks: Callable[[Sequence], int],
    ) -> None:
        self._policy = policy
        self._quantum = quantum
        self._least_shared = max(least_shared, 1)
        self._expected_chunks = expected_chunks
        self.num_chunks = 0
        self._chunks: dict[Sequence, int] = {}
        self._tenants: dict[str, TenantQueue] = {}
        self.ready: dict[str, TenantQueue] = {}
        self._order = TenantOrder(self.ready)
        self._open: dict[str, int] = {}  # tenants that have started one, numbered in that order
        self._num_opened = 0
        self._groups: list[tuple[int, str]] = []  # of them, sorted, those that may have a follower
        self._next_group = 0  # number of the group that is asked next
        self._emptied: set[str] = set()  # tenants whose last sequence has left, to be dropped
        self._parked: dict[Sequence, Hashable] = {}  # with the reason, which several may share
        self._by_reason: dict[Hashable, list[Sequence]] = {}
        self._beams: set[Sequence] = set()  # sequences of beam searches
        self.blocked: set[str] = set()  # tenants left out of the order being made
        self._closed: set[str] = set()  # queues left out of it

    def __len__(self) -> int:
        return len(self._chunks)

    def __iter__(self) -> Iterator[Sequence]:
        for queue in self._tenants.values():
            yield from queue.by_age

    def _tenant(self, sequence: Sequence) -> str:
        return sequence.tenant if self._policy == "fair" else ""

    def add(self, sequence: Sequence) -> None:
        tenant = self._tenant(sequence)
        queue = self._tenants.get(tenant)
        if queue is None:
            queue = self._tenants[tenant] = TenantQueue(self._parked)
        queue.add(sequence)
        if sequence.group.beam is not None:
            self._beams.add(sequence)
        self._chunks[sequence] = chunks = self._expected_chunks(sequence)
        self.num_chunks += chunks
        self._changed(tenant, queue)

    def remove(self, sequence: Sequence) -> None:
        tenant = self._tenant(sequence)
        queue = self._tenants[tenant]
        queue.remove(sequence)
        self._beams.discard(sequence)
        self.num_chunks -= self._chunks.pop(sequence)
        if not queue.by_age:
            self._emptied.add(tenant)
        if sequence in self._parked:
            reason = self._parked.pop(sequence)
            self._by_reason[reason].remove(sequence)
            if not self._by_reason[reason]:
                del self._by_reason[reason]
        self._changed(tenant, queue)

    def _changed(self, tenant: str, queue: TenantQueue) -> None:
        """Note that a queue has other sequences, or others that are ready."""
        if queue.ready:
            self.ready[tenant] = queue
            self._order.changed(tenant)
        else:
            self.ready.pop(tenant, None)
        number = self._open.get(tenant)
        if number is not None:
            at = bisect_left(self._groups, (number, tenant))
            if self._groups[at : at + 1] != [(number, tenant)]:
                self._groups.insert(at, (number, tenant))

    def park(self, sequence: Sequence, reason: Hashable) -> None:
        """Leave a waiting sequence out of the order, at its place, until ``unpark``."""
        if sequence in self._parked:
            return
        self._parked[sequence] = reason
        self._by_reason.setdefault(reason, []).append(sequence)
        tenant = self._tenant(sequence)
        queue = self._tenants[tenant]
        queue.park(sequence)
        self._changed(tenant, queue)

    def park_alike(self, sequence: Sequence, num_tokens: int, reason: Hashable) -> None:
        """Park a sequence and those like it, which would usually be found to wait for the same.

        Args:
            num_tokens: they share so many, and go on.
        """
        self.park(sequence, reason)
        for other in self._tenants[self._tenant(sequence)].neighbours(sequence, num_tokens):
            if other not in self._parked and _look_up_alike(other, sequence):
                self.park(other, reason)

    def unpark(self, reason: Hashable) -> None:
        """Return the sequences of a reason to the order."""
        for sequence in self._by_reason.pop(reason, ()):
            del self._parked[sequence]
            tenant = self._tenant(sequence)
            queue = self._tenants[tenant]
            queue.unpark(sequence)
            self._changed(tenant, queue)

    def reasons(self) -> list[Hashable]:
        """Reasons of the sequences that are parked."""
        return list(self._by_reason)

    def awaited_nodes(self) -> dict[Node, set[str]]:
        """Nodes of the prefix tree that sequences wait for which are not in the background.

        Returns:
            The tenants of those sequences, by node.
        """
        awaited: dict[Node, set[str]] = {}
        for reason, parked in self._by_reason.items():
            if isinstance(reason, tuple):
                tenants = {s.tenant for s in parked if not s.is_background}
                if tenants:
                    awaited.setdefault(reason[0], set()).update(tenants)
        return awaited

    def check_invariants(self, clocks: Clocks) -> None:
        """What is kept beside the sequences is what they say."""
        assert self.num_chunks == sum(self._chunks.values())
        for tenant, queue in self._tenants.items():
            assert queue.ready == [s for s in queue.by_age if s not in self._parked]
            assert (tenant in self.ready) == bool(queue.ready)
        if self._policy == "fair":
            self._order.check_invariants(clocks)

    def started(self, sequence: Sequence, cost: int) -> None:
        """Note that a sequence which costs ``cost`` virtual tokens is about to start."""
        tenant = self._tenant(sequence)
        self._tenants[tenant].started(sequence, cost)
        if tenant not in self._open:
            self._num_opened += 1
            self._open[tenant] = self._num_opened

    def num_ready(self, tenant: str) -> int:
        """A tenant's waiting sequences that are not parked."""
        queue = self.ready.get(tenant)
        return 0 if queue is None else len(queue.ready)

    def num_tokens(self, tenant: str) -> int:
        """Tokens of a tenant's waiting sequences."""
        queue = self._tenants.get(tenant)
        return 0 if queue is None else queue.num_tokens

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
            self.blocked.add(sequence.tenant)

    def close(self, sequence: Sequence) -> None:
        """Leave the sequences behind this one in its queue out of the rest of ``candidates``."""
        self._closed.add(self._tenant(sequence))

    def candidates(self, clocks: Clocks) -> Iterator[Sequence]:
        """The order of admission; the caller may start each sequence it is given.

        Args:
            clocks: of every tenant with waiting sequences, the cost of running ones included; the
                caller adds that of each sequence it starts.
        """
        self.blocked.clear()
        self._closed.clear()
        if self._policy == "fcfs":
            for queue in list(self.ready.values()):
                yield from list(queue.ready)
            return
        self._drop_emptied()
        self._order.begin(clocks)
        passed: set[Sequence] = set()
        for sequence in self._missing_beams():
            if self._tenant(sequence) not in self.blocked:
                passed.add(sequence)
                yield sequence
        self._next_group, groups_end = 0, self._num_opened + 1
        oldest: dict[str, Iterator[Sequence]] = {}
        while (first := self._order.first()) is not None:
            lowest, tenant = first
            if tenant in self.blocked or tenant in self._closed:
                self._order.pass_over()
                continue
            chosen = self._continuation(clocks, lowest, groups_end, passed)
            if chosen is None:
                queue = self.ready[tenant]
                if tenant not in oldest:
                    oldest[tenant] = iter(list(queue.ready))
                chosen = self._next_of(queue, oldest[tenant], passed)
            if chosen is None:
                self._order.pass_over()
                continue
            passed.add(chosen)
            yield chosen

    def _drop_emptied(self) -> None:
        """Drop the queues of tenants that have no sequence left, and their groups."""
        for tenant in self._emptied:
            if not self._tenants[tenant].by_age:
                del self._tenants[tenant]
                number = self._open.pop(tenant, None)
                if number is not None:
                    self._leave_group(number, tenant)
        self._emptied.clear()

    def _leave_group(self, number: int, tenant: str) -> None:
        at = bisect_left(self._groups, (number, tenant))
        if self._groups[at : at + 1] == [(number, tenant)]:
            del self._groups[at]

    def _missing_beams(self) -> list[Sequence]:
        """Beams without which running searches cannot advance, the oldest first."""
        missing = (s for s in self._beams if s.joins_others and s.group.is_running)
        return sorted((s for s in missing if s not in self._parked), key=lambda s: s.age)

    def _continuation(
        self, clocks: Clocks, lowest: float, groups_end: int, passed: Container[Sequence]
    ) -> Sequence | None:
        """The next of the groups in progress whose tenants may continue, the first begun first.

        A group without an answer is not asked again in this order, and not in the next ones before
        its queue has changed if nothing there follows.

        Args:
            groups_end: number of the first group that was begun in this order.
        """
        while (at := bisect_left(self._groups, (self._next_group, ""))) < len(self._groups):
            number, tenant = self._groups[at]
            if number >= groups_end:
                break
            self._next_group = number  # those before are asked no more, whatever starts of them
            queue = self.ready.get(tenant)
            may_continue = tenant not in self.blocked and tenant not in self._closed
            if queue is not None and may_continue and clocks[tenant] < lowest + self._quantum:
                follower = self._follower(queue, passed)
                if follower is not None:
                    return follower
            self._next_group = number + 1
            if queue is None or queue.may_follow is False:
                del self._groups[at]
        self._next_group = groups_end
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


def _look_up_alike(a: Sequence, b: Sequence) -> bool:
    """Whether the cache has the same of two sequences that begin equally."""
    first, second = a.group.request, b.group.request
    return (
        first.namespace == second.namespace
        and a.is_background == b.is_background
        and first.wants_hidden_states == second.wants_hidden_states
        and a.wants_prompt_logits == b.wants_prompt_logits
        and a.group.beam is None
    )
