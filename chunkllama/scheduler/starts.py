"""Starts waiting sequences in the order of the queue, while tokens, slots and chunks last.

One that may not start yet, since its adapter is not in memory, is held until it is released.
A follower of a running leader is parked while waiting saves it enough, and a sequence that another
tier of the cache has chunks for while they are read; they hold nothing meanwhile.
One that does not fit, also beside those that chunks are read for, stops the queue, which prevents
starvation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from chunkllama.cache.manager import CacheManager, Match
from chunkllama.cache.node import Node
from chunkllama.cache.tier_entry import Promotion, ReadLimits, Wait
from chunkllama.scheduler.cache_lookup import match_limit, note_prompt
from chunkllama.scheduler.first_tokens import Arrivals
from chunkllama.scheduler.headroom import Headroom
from chunkllama.scheduler.limits import SchedulerLimits
from chunkllama.scheduler.pace import Pace
from chunkllama.scheduler.request import Sequence
from chunkllama.scheduler.sequence_lifecycle import SequenceLifecycle
from chunkllama.scheduler.tenants import Clocks

MAX_LONG_LOOKED_AT: Final = 16  # long waiting prompts that are matched to find a short remainder
MAX_READS: Final = 2  # for which a sequence waits: what was read may be evicted before it starts


class Starts:
    """Starts sequences of the queue, in one or several passes a step.

    Args:
        take: takes a slice of at most so many tokens of a sequence into the step; returns the
            tokens that are left.
    """

    def __init__(
        self,
        lifecycle: SequenceLifecycle,
        cache: CacheManager,
        limits: SchedulerLimits,
        pace: Pace,
        take: Callable[[Sequence, int], int],
    ) -> None:
        self._lifecycle = lifecycle
        self._cache = cache
        self._limits = limits
        self._pace = pace
        self._take = take
        # Reasons to wait for leaders, in the order in which they came up.
        self._awaited: dict[Node, dict[tuple[Node, int], None]] = {}
        self._reads: dict[Promotion, str] = {}  # with the tenant whose prompt began it
        self._clocks: Clocks | None = None
        self._headroom: Headroom | None = None

    def begin_step(self) -> None:
        """Drop what held for the last step."""
        self._clocks = self._headroom = None

    def clocks(self) -> Clocks:
        """``SequenceLifecycle.clocks``, with the sequences that this step has started."""
        if self._clocks is None:
            self._clocks = self._lifecycle.clocks()
        return self._clocks

    def admit(
        self,
        budget: int,
        *,
        only_short: bool = False,
        only: Arrivals | None = None,
        foreground: bool = False,
    ) -> int:
        """Start waiting sequences; returns the tokens left.

        Args:
            only_short: start only prompts that the budget computes whole, and the first prompt of
                a tenant that has none in progress.
            only: start nothing else; None is all.
            foreground: start no background sequence, except beams that join others: those hold
                slots and chunks until all of them run.
        """
        lifecycle = self._lifecycle
        waiting, running = lifecycle.waiting, lifecycle.running
        if not budget or not len(waiting) or not running.num_free_slots:
            return budget
        self._unpark_followers()
        clocks, long_looked_at = self.clocks(), 0
        for sequence in waiting.candidates(clocks):
            if only_short and not waiting.may_overtake(sequence):
                waiting.close(sequence)
                continue
            gives_way = foreground and sequence.is_background and not sequence.joins_others
            if (
                gives_way
                or (only is not None and not only.may_start(sequence.tenant, clocks))
                or not lifecycle.may_run(sequence)
                or not self._pace.may_start(sequence)
            ):
                waiting.block(sequence)
                continue
            match = self._match(sequence)
            if self._waits_for_leader(sequence, match):
                continue
            wait = self._wait_for_tier(sequence, match)
            if wait is not None and wait.promotion is not None:
                waiting.park(sequence, wait.promotion)
                self._reads.setdefault(wait.promotion, sequence.tenant)
                continue
            if only_short and not self._may_start_early(sequence, match, budget):
                long_looked_at += 1
                if long_looked_at == MAX_LONG_LOOKED_AT:
                    break
                continue
            headroom = self._room()
            if not headroom.remains(sequence, match):
                waiting.block(sequence)
                continue
            left = self._start(sequence, match, headroom, budget) if wait is None else None
            if left is None:
                break
            budget = left
            if budget == 0 or not running.num_free_slots:
                break
        return budget

    def _room(self) -> Headroom:
        """What the running sequences hold in the step being put together."""
        if self._headroom is None:
            self._headroom = Headroom(self._lifecycle, self._cache, self._limits)
        return self._headroom

    def _unpark_followers(self) -> None:
        """Return the followers whose wait is over to the order; the step may compute the chunk."""
        waiting = self._lifecycle.waiting
        for node in self._cache.take_progress():
            reasons = self._awaited.get(node, {})
            for reason in [r for r in reasons if not self._cache.is_pending_node(*r)]:
                waiting.unpark(reason)
                del reasons[reason]
            if not reasons:
                self._cache.tree.awaited.discard(node)
                self._awaited.pop(node, None)
        for read in [r for r in self._reads if r.is_done]:
            waiting.unpark(read)
            tokens = min(
                self._pace.tokens_in(read.seconds), read.num_added * self._cache.chunk_size
            )
            self._lifecycle.accounts.charge_other_work(self._reads.pop(read), tokens)

    def _waits_for_leader(self, sequence: Sequence, match: Match) -> bool:
        """Whether waiting saves enough; parks it until the chunk is computed or abandoned."""
        saved = match.num_later_tokens - match.num_tokens
        if saved <= 0 or saved < self._limits.min_wait_tokens:
            return False
        if match.pending is not None and self._cache.is_pending_node(*match.pending):
            node, tokens = match.pending
            shared = node.depth * self._cache.chunk_size + tokens
            self._lifecycle.waiting.park_alike(sequence, shared, match.pending)
            self._cache.tree.awaited.add(node)
            self._awaited.setdefault(node, {})[match.pending] = None
        return True

    def _wait_for_tier(self, sequence: Sequence, match: Match) -> Wait | None:
        """What the sequence waits for: chunks are read for it, or will be after those of others."""
        if not self._cache.has_files or sequence.joins_others or sequence.num_reads == MAX_READS:
            return None
        headroom = self._room()
        if not headroom.remains(sequence, match):
            return None
        own_path = self._cache.tree.num_evictable_of(match.nodes)
        limits = ReadLimits(
            least_tokens=self._limits.min_wait_tokens,
            needed_chunks=self._lifecycle.admission.num_needed(sequence, match),
            available_chunks=self._cache.num_available - headroom.promised - own_path,
            most_promotions=self._lifecycle.running.num_free_slots,
            compute_seconds=self._pace.prompt_seconds,
        )
        wait = self._cache.promote(
            match,
            sequence.cache_key,
            match_limit(sequence, self._limits),
            sequence.group.request.namespace,
            limits,
        )
        if wait is not None and wait.promotion is not None:
            sequence.num_reads += 1
            sequence.read = wait.promotion
        return wait

    def _start(
        self, sequence: Sequence, match: Match, headroom: Headroom, budget: int
    ) -> int | None:
        """Start the sequence unless it has to wait for its adapter; returns the tokens left.

        None: the pool lacks its chunks.
        """
        lifecycle, cache = self._lifecycle, self._cache
        if not lifecycle.may_start(sequence.group.request_id):
            lifecycle.hold(sequence.group)
            return budget
        admitted = lifecycle.admission.admit(sequence, match, headroom.promised)
        while admitted is None and not len(lifecycle.running) and cache.pins.break_one():
            admitted = lifecycle.admission.admit(sequence, match, headroom.promised)
        if admitted is None:
            return None
        note_prompt(sequence, match, admitted, lifecycle.running.by_age, cache, self._limits)
        lifecycle.start(sequence, *admitted)
        headroom.add(sequence)
        self.clocks().add(sequence.tenant, sequence.num_remaining_tokens)
        left = self._take(sequence, budget)
        self._pace.take_new(sequence, budget - left)
        return left

    def _match(self, sequence: Sequence) -> Match:
        limit = match_limit(sequence, self._limits)
        return self._cache.match(sequence.cache_key, limit, sequence.group.request.namespace)

    def _may_start_early(self, sequence: Sequence, match: Match, budget: int) -> bool:
        """Whether a waiting prompt may use tokens reserved for short and new ones."""
        if sequence.num_tokens - match.num_tokens <= budget:
            return True
        tenant = sequence.tenant
        return self._limits.policy == "fair" and not any(
            s.tenant == tenant and s.num_computed_tokens < s.num_admitted
            for s in self._lifecycle.running.by_age
        )
