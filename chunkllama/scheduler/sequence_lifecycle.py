"""Moves sequences between their states; the only module that starts or ends one.

              start                finish
    waiting ---------> running -----------> gone, its K/V stays cached
       ^                  |    discard
       |  preempt,        |---------------> gone, its K/V is dropped
       +------------------+
          requeue

``abort`` ends a sequence in either state. ``fork`` adds a sequence beside a running one.
"""

from __future__ import annotations

from collections.abc import Callable

from chunkllama.cache.manager import CacheManager, Match, SequenceChunks
from chunkllama.scheduler.admission import AdmissionControl
from chunkllama.scheduler.counters import Counters
from chunkllama.scheduler.draft_search import Int32Array, RecentOutputs
from chunkllama.scheduler.limits import SchedulerLimits
from chunkllama.scheduler.queue import WaitingQueue
from chunkllama.scheduler.request import Sequence, SequenceGroup
from chunkllama.scheduler.running import RunningSequences
from chunkllama.scheduler.tenants import DECODE_WEIGHT, Clocks, TenantAccounts, split_prefill
from chunkllama.tenant_limits import TenantTable


class SequenceLifecycle:
    """Owns every request and its sequences, waiting or running.

    Args:
        limits: bounds and policies.
        cache: chunk pool and prefix tree.
        clock: monotonic seconds.

    Attributes:
        groups: unfinished requests by id.
        waiting: sequences that hold no chunks.
        running: sequences that hold a slot and chunks.
        admission: decides which waiting sequence fits.
        accounts: service received by each tenant.
        counters: monotonic totals.
        recent: outputs that have ended, as far as speculation may look at them.
        may_start: returns whether a request, by its id, may start as far as its adapter goes.
        on_end: gets the id of each request that has ended.
    """

    def __init__(
        self, limits: SchedulerLimits, cache: CacheManager, clock: Callable[[], float]
    ) -> None:
        self.groups: dict[str, SequenceGroup] = {}
        self.admission = AdmissionControl(limits, cache, clock)
        least_shared = min(limits.min_wait_tokens, cache.chunk_size)
        self.waiting = WaitingQueue(
            limits.policy, limits.fair_quantum, least_shared, self.admission.expected_chunks
        )
        self.accounts = TenantAccounts(limits.tenant_weights)
        self.running = RunningSequences(limits.max_num_seqs, cache.chunk_size)
        self.counters = Counters()
        self.recent = RecentOutputs()
        self._keeps_outputs = limits.speculates
        self.may_start: Callable[[str], bool] = lambda request_id: True
        self.on_end: Callable[[str], None] = lambda request_id: None
        self._cache = cache
        self._clock = clock

    def set_tenants(self, limits: TenantTable) -> None:
        """Apply the tenants' limits to their accounts and to the cache."""
        self.accounts.set_limits(limits)
        self._cache.set_tenants(limits)

    def clocks(self) -> Clocks:
        """Clock of every tenant with requests, with the tokens that it still has running."""
        return Clocks(self.accounts.busy, self.running.by_age)

    def may_run(self, sequence: Sequence) -> bool:
        """Whether the sequence may start beside the running requests of its tenant."""
        group = sequence.group
        return self.accounts[group.request.tenant].may_run(group)

    def add(self, group: SequenceGroup) -> None:
        """Queue a new request."""
        self.groups[group.request_id] = group
        self.accounts.join(group.request.tenant)
        for sequence in group.sequences.values():
            self.waiting.add(sequence)
        self.counters.prompt_tokens += group.num_prompt_tokens

    def hold(self, group: SequenceGroup) -> None:
        """Keep a request of which nothing runs from starting until it is released."""
        group.held = True
        for sequence in group.sequences.values():
            self.waiting.park(sequence, group.request_id)

    def start(self, sequence: Sequence, chunks: SequenceChunks, match: Match) -> None:
        """Run a waiting sequence in ``chunks``, of which ``match`` is computed."""
        group = sequence.group
        cost = sequence.num_tokens - match.num_tokens
        account = self.accounts[sequence.tenant]
        self.waiting.started(sequence, cost)
        self.waiting.remove(sequence)
        account.num_running += not group.is_running
        sequence.num_admitted = sequence.num_tokens
        self.running.start(sequence, chunks, match.num_tokens)
        if sequence.wants_prompt_logits:
            group.prompt_logprobs = [None]
        if group.num_cached_tokens < 0:
            group.started_at = self._clock()
            group.num_cached_tokens = min(match.num_tokens, group.num_prompt_tokens)
            shown = min(group.insert_limit, group.num_prompt_tokens)
            group.num_cache_write_tokens = max(shown - group.num_cached_tokens, 0)
            self.counters.prefix_tokens_queried += group.num_prompt_tokens
            self.counters.prefix_tokens_hit += group.num_cached_tokens
            self.counters.prefix_tokens_hit_public += min(
                match.num_public_tokens, group.num_cached_tokens
            )
            if sequence.read is not None:
                self.counters.prefix_tokens_hit_tier += sequence.read.tokens_below(
                    group.num_cached_tokens, self._cache.chunk_size
                )
        tier = self._cache.tier
        if tier is not None and tier.rounds:  # perhaps since the sequence was preempted
            rounded = match.rounded_tokens(group.num_cached_tokens)
            group.num_rounded_tokens = max(group.num_rounded_tokens, rounded)
        sequence.read, sequence.num_reads = None, 0

    def computed(self, sequence: Sequence, start: int, end: int) -> None:
        """Count and charge positions [start, end) of a running sequence."""
        if start >= sequence.num_admitted:
            self.counters.decode_tokens_computed += end - start
            self.accounts.charge_decoded(sequence.tenant, end - start)
            return
        self.counters.prefill_tokens_computed += end - start
        order = self.running.order
        at = order.sequences.index(sequence)
        size = self._cache.chunk_size
        for tenant, tokens in split_prefill(order.sequences, order.shared, at, start, end, size):
            self.accounts.charge_computed(tenant, tokens)

    def end_prefill(self, sequence: Sequence, now: float) -> None:
        """Note that every token known at admission is computed; pin the prompt if asked to."""
        group = sequence.group
        if group.prefilled_at is None:
            group.prefilled_at = now
        if sequence.wants_prompt_logits:
            assert group.prompt_logprobs is not None
            # the last row's next position is the first output token, not the prompt's
            del group.prompt_logprobs[group.num_prompt_tokens :]
            group.collects_prompt_logprobs = False
        if group.request.pin_seconds > 0 and not group.is_pinned:
            group.is_pinned = True
            request = group.request
            prompt = sequence.cache_ids[: group.num_prompt_tokens][: request.cache_until]
            group.pin_refused = not self._cache.pin(
                prompt, request.namespace, request.pin_seconds, request.tenant, request.adapter
            )

    def finish(self, sequence: Sequence) -> None:
        """End a running sequence; what it computed stays in the cache."""
        if sequence.num_output_tokens:
            self.admission.lengths.add(sequence.num_output_tokens)
        self._remember(sequence)
        chunks = self._stop(sequence)
        self.admission.drain.add(chunks.num_own)
        self._cache.release(chunks, sequence.cache_ids, sequence.num_computed_tokens)
        self._forget(sequence)

    def abort(self, request_id: str, index: int | None) -> None:
        """End a request or one choice. Beams have no choices before they end: all are ended."""
        group = self.groups.get(request_id)
        if group is None:
            return
        for sequence in list(group.sequences.values()):
            if index in (None, sequence.index) or group.beam is not None:
                self._remember(sequence)
                self._leave(sequence)
                self._forget(sequence)

    def _remember(self, sequence: Sequence) -> None:
        """Keep the output of a sequence that ends, unless its request hides a part of itself."""
        group = sequence.group
        is_hidden = group.beam is not None or group.request.cache_until is not None
        if self._keeps_outputs and sequence.num_output_tokens and not is_hidden:
            key = _recent_key(group)
            self.recent.add(key, sequence.token_ids, sequence.num_prompt_tokens)

    def recent_of(self, group: SequenceGroup) -> Int32Array | None:
        """Return recent outputs of the request's tenant in its namespace."""
        return self.recent.get(_recent_key(group))

    def preempt(self, sequence: Sequence) -> None:
        """Queue a running sequence again; recomputing it is mostly a cache hit.

        Beams advance together, so they are preempted together.
        """
        group = sequence.group
        together = list(group.sequences.values()) if group.beam else [sequence]
        for each in together:
            if each.chunks is not None:
                self.counters.preemptions += 1
                self.requeue(each)

    def requeue(self, sequence: Sequence) -> None:
        """Queue a running sequence again, to be computed from what the cache has kept."""
        self._leave(sequence)
        if sequence.group.beam is not None:
            sequence.group.beam.forget(sequence.index)
        self.waiting.add(sequence)

    def fork(self, parent: Sequence, index: int) -> Sequence:
        """Add a sequence with the same tokens: running, or queued if no slot or chunk is free."""
        assert parent.chunks is not None
        child = Sequence(parent.group, index, parent.token_ids.copy())
        parent.group.sequences[index] = child
        chunks = None
        if self.running.num_free_slots:
            chunks = self._cache.fork(parent.chunks, parent.num_computed_tokens)
        if chunks is None:
            self.waiting.add(child)
        else:
            self.running.start(child, chunks, parent.num_computed_tokens)
            child.num_admitted = parent.num_computed_tokens
        return child

    def discard(self, sequence: Sequence) -> None:
        """End a sequence and drop what it alone computed."""
        if sequence.chunks is None:
            self.waiting.remove(sequence)
        else:
            self._cache.discard(self._stop(sequence))
        self._forget(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Take a sequence out of its set; what is computed stays in the cache."""
        if sequence.chunks is None:
            self.waiting.remove(sequence)
            return
        computed = sequence.num_computed_tokens
        self._cache.release(self._stop(sequence), sequence.cache_ids, computed)
        sequence.num_computed_tokens = 0

    def _stop(self, sequence: Sequence) -> SequenceChunks:
        """Take a sequence out of the running ones; returns its chunks."""
        chunks = self.running.stop(sequence)
        group = sequence.group
        self.accounts[group.request.tenant].num_running -= not group.is_running
        return chunks

    def _forget(self, sequence: Sequence) -> None:
        group = sequence.group
        del group.sequences[sequence.index]
        if not group.sequences:
            del self.groups[group.request_id]
            self.accounts.leave(group.request.tenant)
            self.on_end(group.request_id)

    def check_invariants(self) -> None:
        """Every sequence is in exactly one set and within its chunks; charges are the work done."""
        self.running.check_invariants()
        counters = self.counters
        work = counters.prefill_tokens_computed + DECODE_WEIGHT * counters.decode_tokens_computed
        assert self.accounts.total_charged == work, "charges differ from the work done"
        charged = sum(account.charged for _, account in self.accounts)
        assert charged == work, "the tenants' charges differ from the work done"
        for tenant, account in self.accounts:
            own = [g for g in self.groups.values() if g.request.tenant == tenant]
            assert account.num_requests == len(own)
            assert account.num_running == sum(group.is_running for group in own)
        self.waiting.check_invariants(self.clocks())
        for reason in self.waiting.reasons():
            if isinstance(reason, tuple):
                is_over = not self._cache.is_pending_node(*reason)
                assert not is_over or reason[0] in self._cache.tree.progress, "a wait has no end"
        waiting, running = list(self.waiting), self.running.by_age
        assert all(s.chunks is None and s.slot < 0 for s in waiting)
        everyone = {id(s) for g in self.groups.values() for s in g.sequences.values()}
        assert everyone == {id(s) for s in [*running, *waiting]}, "a sequence was lost"
        for sequence in running:
            assert sequence.chunks is not None
            capacity = len(sequence.chunks) * self._cache.chunk_size
            assert sequence.num_computed_tokens <= min(capacity, sequence.num_tokens)


def _recent_key(group: SequenceGroup) -> tuple[str, str, str]:
    request = group.request
    return request.tenant, request.namespace, request.adapter
