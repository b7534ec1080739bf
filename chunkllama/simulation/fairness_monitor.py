"""Checks the two bounds of ``chunkllama/scheduler/queue.py`` at every start of a sequence."""

from __future__ import annotations

from chunkllama.cache.manager import Match, SequenceChunks
from chunkllama.cache.tier_entry import Promotion
from chunkllama.scheduler.request import Sequence
from chunkllama.scheduler.scheduler import Scheduler
from chunkllama.scheduler.starts import MAX_READS
from chunkllama.scheduler.tenant_queue import queue_key


class FairnessMonitor:
    """Watches a scheduler's starts.

    Attributes:
        most_overtaken: the most tokens of younger requests that started before one request.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.most_overtaken = 0
        self._scheduler = scheduler
        self._policy = scheduler._limits.policy
        self._quantum = scheduler._limits.fair_quantum
        self._overtaken: dict[Sequence, int] = {}
        self._older_starts: dict[Sequence, int] = {}
        self._reads: dict[Sequence, set[Promotion]] = {}  # for which a sequence was overtaken
        self._longest = 1
        self._start = scheduler._lifecycle.start
        if self._policy != "fcfs":
            scheduler._lifecycle.start = self._checked_start  # type: ignore[method-assign]

    def _checked_start(self, sequence: Sequence, chunks: SequenceChunks, match: Match) -> None:
        cost = sequence.num_tokens - match.num_tokens
        self._longest = max(self._longest, cost)
        if self._policy == "fair" and queue_key(sequence)[0]:
            self._check_tenants(sequence)
        for waiting in self._scheduler._waiting:
            if waiting is not sequence and self._is_rival(waiting, sequence):
                self._check_order(waiting, sequence, cost)
        self._overtaken.pop(sequence, None)
        self._older_starts.pop(sequence, None)
        self._reads.pop(sequence, None)
        self._start(sequence, chunks, match)

    def _check_tenants(self, sequence: Sequence) -> None:
        """No tenant that could start a sequence is more than a quantum behind the one served.

        Tenants that have background sequences alone yield to the others.
        """
        clocks = self._scheduler._lifecycle.clocks()
        served = sequence.tenant
        in_progress = {
            s.tenant
            for s in self._scheduler._running.by_age
            if s.num_computed_tokens < s.num_admitted
        }
        for tenant in {s.tenant for s in self._scheduler._waiting} - in_progress:
            oldest = self._scheduler._waiting._tenants[tenant].by_age[0]
            gives_way = oldest.is_background and not sequence.is_background
            if not gives_way and not self._is_blocked(oldest):
                ahead = clocks[served] - clocks[tenant]
                assert ahead <= self._quantum + 1e-6, f"{served} is {ahead} ahead of {tenant}"

    def _check_order(self, waiting: Sequence, started: Sequence, cost: int) -> None:
        """Younger requests overtake by at most a quantum and one request for each older start."""
        if queue_key(started) < queue_key(waiting):
            self._older_starts[waiting] = self._older_starts.get(waiting, 0) + 1
        elif not self._is_blocked(waiting):
            total = self._overtaken.get(waiting, 0) + cost
            self._overtaken[waiting] = total
            self.most_overtaken = max(self.most_overtaken, total)
            turns = self._older_starts.get(waiting, 0) + 1
            assert total <= turns * (self._quantum + self._longest), "a request starves"

    def _is_rival(self, waiting: Sequence, started: Sequence) -> bool:
        """Both are in one order: the same tenant, unless the policy knows none."""
        same = waiting.tenant == started.tenant
        return same or self._policy == "prefix"

    def _is_blocked(self, waiting: Sequence) -> bool:
        """It waits for a leader or one of its first ``MAX_READS`` reads, is held, or its tenant has
        running what it may: others may start before it without limit."""
        reason = self._scheduler._waiting._parked.get(waiting)
        if isinstance(reason, Promotion) and not reason.is_done:
            reads = self._reads.setdefault(waiting, set())
            if reason in reads or len(reads) < MAX_READS:
                reads.add(reason)
                return True
        if isinstance(reason, tuple) and self._scheduler._cache.is_pending_node(*reason):
            return True
        tenant = waiting.tenant
        may_run = self._scheduler._lifecycle.may_run(waiting)
        return waiting.group.held or not may_run or tenant in self._scheduler._waiting.blocked
