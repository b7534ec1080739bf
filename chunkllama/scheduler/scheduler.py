"""Continuous batching over the prefix tree: which sequence computes how many tokens in each step.

Every sequence is a count of computed tokens catching up with its tokens; prefill, decode, prefix
hits and recompute after a preemption are the same thing. A step's token budget is spent in this
order: a token for each decode; a reserved quarter for short prompts, running or new, if long ones
are running; long running prompts in fair order; then waiting sequences in the order of
``queue.py``, while tokens, slots and chunks last. Background sequences compute nothing in a step
that computes prompts of others, except in every ``MAX_PAUSED``-th such step, and beams that a
search lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from chunkllama.cache.adapter_tags import AdapterUse
from chunkllama.cache.admin import drop_adapter, run_command
from chunkllama.cache.manager import CacheManager
from chunkllama.cache_messages import CacheCommand, CacheEvent, TreeNodeInfo
from chunkllama.errors import InvalidRequestError
from chunkllama.messages import (
    CacheExplanation,
    CommandReply,
    EngineRequest,
    EngineStats,
    TokenDelta,
)
from chunkllama.scheduler.adapter_numbers import AdapterNumbers
from chunkllama.scheduler.cache_lookup import explain_prompt, record_running
from chunkllama.scheduler.drafts import Drafts
from chunkllama.scheduler.failures import usable
from chunkllama.scheduler.first_tokens import FirstTokens
from chunkllama.scheduler.intake import check_places, make_group
from chunkllama.scheduler.limits import SchedulerLimits
from chunkllama.scheduler.memory_pressure import break_deadlock, grow_tails
from chunkllama.scheduler.output import SampledTokens, SchedulerOutput
from chunkllama.scheduler.pace import LEAST, Pace
from chunkllama.scheduler.request import Sequence
from chunkllama.scheduler.samples import use_sample
from chunkllama.scheduler.sequence_lifecycle import SequenceLifecycle
from chunkllama.scheduler.starts import Starts
from chunkllama.scheduler.stats import read_stats
from chunkllama.scheduler.step_deltas import StepDeltas
from chunkllama.tenant_limits import TenantTable

__all__ = ["Scheduler", "SchedulerLimits"]

MAX_PAUSED: Final = 8  # steps in a row in which background sequences compute nothing


class Scheduler:
    """Decides every step: ``schedule()``, execution elsewhere, ``commit()``.

    Args:
        limits: bounds and policies.
        cache: chunk pool and prefix tree; the scheduler is its only user.
        clock: monotonic seconds.

    Attributes:
        adapters, drafts: numbers of the loaded adapters, and guesses at next tokens.
        nodes: iterates over the cache's tree, parents before children.
    """

    def __init__(
        self, limits: SchedulerLimits, cache: CacheManager, clock: Callable[[], float]
    ) -> None:
        self.adapters = AdapterNumbers()
        self._limits = limits
        self._cache = cache
        self.nodes = cache.tree.nodes
        self._clock = clock
        self._lifecycle = SequenceLifecycle(limits, cache, clock)
        self._groups = self._lifecycle.groups
        self._waiting = self._lifecycle.waiting
        self._running = self._lifecycle.running
        self._admission = self._lifecycle.admission
        self._pace = Pace(self._lifecycle, limits, clock)
        self._starts = Starts(self._lifecycle, cache, limits, self._pace, self._take_slice)
        self.drafts = Drafts(limits, self._lifecycle, cache.chunk_size, clock)
        self._first_tokens = FirstTokens(self._lifecycle, limits, self._starts.clocks, self._pace)
        self._arrivals = 0
        self._step = 0
        self._in_flight: SchedulerOutput | None = None
        self._scheduled: list[Sequence] = []
        self._awaiting: list[Sequence] = []
        self._aborts: list[tuple[str, int | None]] = []
        self._num_paused = 0

    # -- requests ---------------------------------------------------------------------------

    def add(self, request: EngineRequest, adapter: AdapterUse | None = None) -> None:
        """Queue a request, which uses ``adapter`` or the base model.

        A choice that its ``delivered`` tokens end is not run again and yields nothing. A replay
        has a place already: limits may have become lower since it was accepted.

        Raises:
            InvalidRequestError: it could never run, or its id is in use.
            OverloadedError: the queue is full.
        """
        if request.request_id in self._groups:
            raise InvalidRequestError(f"request_id {request.request_id!r} is in use", "request_id")
        now = self._clock()
        group = make_group(request, self._limits, self._admission, self._arrivals, now, adapter)
        if not request.is_replay:
            check_places(request.tenant, self._limits, self._lifecycle)
        self._arrivals += 1
        self._lifecycle.add(group)

    def hold(self, request_id: str) -> None:
        """Keep a request that was just added from starting before ``release``."""
        self._lifecycle.hold(self._groups[request_id])

    def release(self, request_id: str) -> None:
        """Let a held request start. Unknown ids are ignored."""
        if group := self._groups.get(request_id):
            group.held = False
            self._waiting.unpark(request_id)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Drop a request, or one choice of it (of a beam search all); yields no delta.

        Unknown ids are ignored. Takes effect after the step in flight, which writes the chunks.
        """
        if self._in_flight is not None:
            self._aborts.append((request_id, index))
            return
        self._lifecycle.abort(request_id, index)

    def use_adapters(self, may_start: Callable[[str], bool], on_end: Callable[[str], None]) -> None:
        """Set what decides whether a request may start, and what gets each id that ends."""
        self._lifecycle.may_start, self._lifecycle.on_end = may_start, on_end

    def set_tenants(self, limits: TenantTable) -> None:
        """Apply other limits of tenants; running and waiting requests stay."""
        self._lifecycle.set_tenants(limits)

    def has_unfinished(self) -> bool:
        return bool(self._groups)

    # -- schedule ---------------------------------------------------------------------------

    def schedule(self) -> SchedulerOutput | None:
        """Choose the next step's tokens; None when there is nothing to do."""
        assert self._in_flight is None, "the last step has not been committed"
        self._cache.expire_pins()
        grow_tails(self._lifecycle, self._cache)
        awaiting = self._running.begin_step()
        self._starts.begin_step()
        budget = before = self._pace.begin_step()
        arrivals = self._first_tokens.begin_step()
        if arrivals is not None:
            before = self._take_decodes(budget, but=arrivals.held_back)
            budget = self._starts.admit(before, only=arrivals)
        if budget < before:
            self._first_tokens.end_short_step()
        else:
            self._fill(budget)
        if not self._scheduled and self._pace.lift():
            self._fill(budget)
        while not (self._scheduled or awaiting):
            if not break_deadlock(self._lifecycle, self._cache):
                break
            self._starts.begin_step()
            most = min(self._limits.max_num_batched_tokens, self._running.caps.tokens)
            self._starts.admit(most)
        self._awaiting = awaiting
        if not self._scheduled and not self._awaiting:
            return None
        self._step += 1
        self.drafts.propose(self._scheduled)
        self._pace.launch(self._scheduled, self._awaiting)
        self._in_flight = SchedulerOutput(
            step=self._step,
            slices=self._running.slices(),
            plan_version=self._running.plan_version(self._scheduled),
            new_sequences=self._running.take_new_sequences(),
            freed_slots=self._running.take_freed_slots(),
            copies=self._running.take_copies(),
            awaited=[sequence.slot for sequence in self._awaiting],
            wants_forced=self.drafts.may_pay,
        )
        return self._in_flight

    def _fill(self, budget: int) -> None:
        """Take what the budget allows, first of sequences that are not in the background."""
        paused = self._may_pause()
        if paused and self._num_paused < MAX_PAUSED:
            budget = before = self._take_decodes(budget, paused=paused)
            budget = self._schedule_prefills(budget, paused=paused)
            if self._starts.admit(budget, foreground=True) < before:
                self._num_paused += 1
                return
        budget = self._take_decodes(budget)
        if paused and self._num_paused == MAX_PAUSED:  # their turn, to a part of the step
            part = min(max(budget // (MAX_PAUSED + 1), LEAST), budget)
            turn = self._find_prefills(s for s in self._running.prompts if s in paused)
            budget -= part - self._take_slices(turn, part)
            budget = self._schedule_prefills(budget, paused=paused)
            budget = self._starts.admit(budget, foreground=True)
        self._num_paused = 0
        self._starts.admit(self._schedule_prefills(budget))

    def _may_pause(self) -> frozenset[Sequence]:
        """Find the background sequences that compute nothing which others wait for."""
        if not self._running.num_background:
            return frozenset()
        background = [s for s in self._running.by_age if s.is_background]
        awaited = self._waiting.awaited_nodes().keys()
        return frozenset(
            s for s in background if s.chunks is not None and awaited.isdisjoint(s.chunks.path)
        )

    def _take_decodes(
        self, budget: int, but: str | None = None, *, paused: frozenset[Sequence] = frozenset()
    ) -> int:
        """Take the token of every sequence that has one left; returns the rest of the budget.

        Args:
            but: a tenant whose sequences are left out.
            paused: sequences that are left out.
        """
        pace, is_limiting = self._pace, self._pace.is_limiting
        for sequence in self._running.decodes:
            if sequence.num_scheduled or sequence.tenant == but or sequence in paused:
                continue
            if not is_limiting or pace.most(sequence):
                self._take(sequence, 1)
                budget -= 1
        return budget

    def _schedule_prefills(self, budget: int, *, paused: frozenset[Sequence] = frozenset()) -> int:
        """Take slices of running prompts; returns the rest of the budget.

        A part of the step is reserved for prompts that fit in it, running or new. The rest goes to
        long prompts in fair order.
        """
        prefills = self._find_prefills(s for s in self._running.prompts if s not in paused)
        if len(prefills) > 1 and self._limits.policy == "fair":
            clocks = self._starts.clocks()
            prefills.sort(key=lambda s: (clocks[s.tenant], s.age))
        reserve = min(budget, self._pace.reserve)
        short = [s for s in prefills if s.num_remaining_tokens <= reserve]
        if len(short) < len(prefills):
            rest = self._starts.admit(
                self._take_slices(short, reserve), only_short=True, foreground=bool(paused)
            )
            budget -= reserve - rest
            prefills = [s for s in prefills if not s.num_scheduled]
        return self._take_slices(prefills, budget)

    def _find_prefills(self, among: Iterable[Sequence]) -> list[Sequence]:
        """Find the prompts that may have a slice of this step and have none yet."""
        return [s for s in among if not s.num_scheduled and self._pace.most(s)]

    def _take_slices(self, prefills: list[Sequence], budget: int) -> int:
        for sequence in prefills:
            if budget == 0:
                break
            budget = self._take_slice(sequence, budget)
        return budget

    def _take_slice(self, sequence: Sequence, budget: int) -> int:
        """Take what is left of a prompt, as far as the budget reaches; returns its rest."""
        count = min(sequence.num_remaining_tokens, budget, self._pace.most(sequence))
        if sequence.wants_prompt_logits:
            count = min(count, self._limits.scored_tokens_per_step)
        self._take(sequence, count)
        return budget - count

    def _take(self, sequence: Sequence, count: int) -> None:
        """Put ``count`` tokens of the sequence into this step."""
        sequence.num_scheduled = count
        self._scheduled.append(sequence)
        start = sequence.num_computed_tokens
        if start < sequence.num_admitted:
            assert sequence.chunks is not None
            self._cache.will_compute(sequence.chunks, start, start + count)

    # -- commit -----------------------------------------------------------------------------

    def commit(self, output: SchedulerOutput, sampled: SampledTokens) -> list[TokenDelta]:
        """Take in what the step computed: publish chunks, append tokens, end sequences.

        Returns one delta per request that gained tokens or ended; aborted requests have none.
        """
        assert output is self._in_flight, "not the step in flight"
        scheduled = [*self._scheduled, *self._awaiting]
        self._scheduled, self._awaiting = [], []
        self._in_flight = None
        deltas = StepDeltas(self._clock())
        self._running.end_step()
        self._cache.end_step()
        if not sampled.ran_out:  # its time says nothing of steps that fit
            self.drafts.end_step()
        scheduled = usable(scheduled, output, sampled, deltas, self._lifecycle, self._cache)
        for sequence in scheduled:
            if sequence.awaits_sample:
                continue
            start = sequence.num_computed_tokens
            sequence.num_computed_tokens = end = start + sequence.num_scheduled
            sequence.num_scheduled = 0
            self._lifecycle.computed(sequence, start, end + len(sequence.draft.token_ids))
            if sequence.draft.token_ids:
                self.drafts.accept(sequence, sampled)
            if start < sequence.num_admitted:
                assert sequence.chunks is not None
                self._cache.did_compute(sequence.chunks, start, end)
        aborts, self._aborts = self._aborts, []
        for request_id, index in aborts:
            self._lifecycle.abort(request_id, index)
        for sequence in scheduled:
            if sequence.chunks is None:
                continue  # aborted
            if sequence.awaits_sample:
                use_sample(sequence, sampled, deltas, self._lifecycle, self._limits)
            else:
                self._commit_sequence(sequence, sampled, deltas)
        if not sampled.ran_out:
            self._pace.end_step()
        self._pace.lift()
        return deltas.all()

    def _commit_sequence(
        self, sequence: Sequence, sampled: SampledTokens, deltas: StepDeltas
    ) -> None:
        chunks, group, computed = sequence.chunks, sequence.group, sequence.num_computed_tokens
        assert chunks is not None
        if computed >= chunks.next_publish:
            adopted = self._cache.publish(chunks, sequence.cache_ids, computed)
            if adopted:
                self._running.order.move(sequence)
        if sequence.wants_prompt_logits:
            assert group.prompt_logprobs is not None
            group.prompt_logprobs += sampled.prompt_logprobs.get(sequence.slot, [])
        if computed < sequence.num_tokens:
            return
        if computed == sequence.num_admitted:
            self._lifecycle.end_prefill(sequence, deltas.now)
        if group.max_tokens == 0:
            deltas.end_prompt(sequence, sampled.embeddings.get(sequence.slot))
            self._lifecycle.finish(sequence)
        else:
            use_sample(sequence, sampled, deltas, self._lifecycle, self._limits)

    # -- inspection -------------------------------------------------------------------------

    def stats(self, *, include_tenants: bool = False) -> EngineStats:
        """Counters since the start and current gauges, on request of each tenant too."""
        return read_stats(self._lifecycle, self._cache, include_tenants=include_tenants)

    def explain(
        self,
        prompt_token_ids: list[int],
        namespace: str,
        tenant: str,
        adapter: AdapterUse | None = None,
    ) -> CacheExplanation:
        """Explain why the match of a prompt would end now; charges its tenant for the time."""
        begun = self._clock()
        record_running(tenant, self._running.by_age, self._cache)
        explanation = explain_prompt(
            prompt_token_ids, namespace, tenant, self._cache, self._limits, adapter
        )
        tokens = self._pace.tokens_in(self._clock() - begun)
        self._lifecycle.accounts.charge_other_work(tenant, tokens)
        return explanation

    def cache_command(self, command: CacheCommand) -> CommandReply:
        """Run an operator's command on the cache; not while a step is in flight."""
        self.drafts.after_command(command)
        return run_command(command, self._cache, self._clock())

    def remove_adapter(self, number: int, reply: CommandReply) -> None:
        """Drop what is cached under an adapter that no request uses, and free its number."""
        drop_adapter(self._cache, number, reply)
        assert reply.num_kept == 0, "chunks remain under a number that is given again"
        self.adapters.release(number)

    def watch_cache(self, *, is_watched: bool, with_contents: bool = False) -> list[CacheEvent]:
        """Record changes of the cache from now on, or no longer; returns what is stored now."""
        events = self._cache.tree.events
        events.is_on, events.with_contents = is_watched, with_contents
        return events.snapshot(self.nodes() if is_watched else ())

    def take_cache_events(self) -> list[CacheEvent]:
        """Return the changes of the cache since the last call; [] while it is not watched."""
        return self._cache.tree.events.take()

    def tree(self) -> list[TreeNodeInfo]:
        """Every node of the prefix tree, for a dashboard."""
        return self._cache.tree.describe()

    def check_invariants(self) -> None:
        """Raise AssertionError if pool, tree, order and sequences do not agree."""
        live = [s.chunks for s in self._running.by_age if s.chunks is not None]
        self._cache.check_invariants(live, in_step=self._in_flight is not None)
        self._lifecycle.check_invariants()
