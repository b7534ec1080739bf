"""Continuous batching over the prefix tree: who computes how many tokens in each step.

Every sequence is a count of computed tokens catching up with its tokens; prefill, decode, prefix
hits and recompute after a preemption are the same thing. A step serves running sequences first
(those with one token left before those with many), then admits waiting ones while tokens, slots
and chunks last.
"""

from __future__ import annotations

from collections.abc import Callable

from chunkllama.cache.manager import CacheManager, Match, SequenceChunks
from chunkllama.errors import InvalidRequestError, OverloadedError
from chunkllama.messages import EngineRequest, EngineStats, TokenDelta, TreeNodeInfo
from chunkllama.scheduler.admission import AdmissionControl
from chunkllama.scheduler.beam import BeamSearch
from chunkllama.scheduler.counters import Counters, read_stats
from chunkllama.scheduler.limits import SchedulerLimits
from chunkllama.scheduler.output import SampledTokens, SchedulerOutput
from chunkllama.scheduler.queue import WaitingQueue
from chunkllama.scheduler.request import Sequence, SequenceGroup
from chunkllama.scheduler.running import RunningSequences
from chunkllama.scheduler.sequence_lifecycle import SequenceLifecycle

__all__ = ["Scheduler", "SchedulerLimits"]


class Scheduler:
    """Owns the requests. One step is ``schedule()``, execution elsewhere, ``commit()``.

    Args:
        limits: bounds and policies.
        cache: chunk pool and prefix tree; the scheduler is its only user.
        clock: monotonic seconds.
    """

    def __init__(
        self, limits: SchedulerLimits, cache: CacheManager, clock: Callable[[], float]
    ) -> None:
        self._limits = limits
        self._cache = cache
        self._clock = clock
        self._groups: dict[str, SequenceGroup] = {}
        self._waiting = WaitingQueue()
        self._running = RunningSequences(limits.max_num_seqs)
        self._admission = AdmissionControl(limits, cache, clock)
        self._counters = Counters()
        self._arrivals = 0
        self._step = 0
        self._in_flight: SchedulerOutput | None = None
        self._scheduled: list[Sequence] = []
        self._aborts: list[tuple[str, int | None]] = []
        self._plan_key: tuple[int, int] = (0, 0)
        self._plan_version = 0
        self._committer = SequenceLifecycle(
            limits,
            cache,
            self._groups,
            self._waiting,
            self._running,
            self._admission,
            self._counters,
            clock,
        )

    # -- requests ---------------------------------------------------------------------------

    def add(self, request: EngineRequest) -> None:
        """Queue a request.

        A choice whose ``delivered`` tokens end it already is not run again and yields nothing.

        Raises:
            InvalidRequestError: it could never run, or its id is in use.
            OverloadedError: the queue is full.
        """
        group = self._make_group(request)
        if len(self._groups) >= self._limits.max_num_seqs + self._limits.max_waiting:
            raise OverloadedError(
                f"{len(self._groups)} requests are running or waiting, the most this server "
                "accepts; try again later",
                self._admission.drain.seconds_for(self._admission.num_chunks_queued(self._waiting)),
            )
        self._arrivals += 1
        self._groups[request.request_id] = group
        for sequence in group.sequences.values():
            self._waiting.add(sequence)
        self._counters.prompt_tokens += group.num_prompt_tokens

    def hold(self, request_id: str) -> None:
        """A request just added keeps its place but does not start before ``release``."""
        self._groups[request_id].held = True

    def release(self, request_id: str) -> None:
        """What a held request waited for is there. Unknown ids are ignored."""
        if group := self._groups.get(request_id):
            group.held = False

    def _make_group(self, request: EngineRequest) -> SequenceGroup:
        sampling = request.sampling
        if not request.prompt_token_ids:
            raise InvalidRequestError("the prompt must have at least one token", "prompt")
        if request.request_id in self._groups:
            raise InvalidRequestError(f"request_id {request.request_id!r} is in use", "request_id")
        if sampling.max_tokens == 0 and sampling.prompt_logprobs is None:
            raise InvalidRequestError(
                "max_tokens 0 needs prompt_logprobs: nothing would be returned", "max_tokens"
            )
        if request.wants_hidden_states and sampling.num_sequences > 1:
            raise InvalidRequestError(
                f"a prompt has one embedding; n and best_of must be 1, got "
                f"{sampling.num_sequences}",
                "n",
            )
        width = sampling.beam_width
        if width > 1 and sampling.max_tokens == 0:
            raise InvalidRequestError("beam search needs max_tokens of at least 1", "max_tokens")
        if width > 1 and not sampling.num_sequences <= width <= self._limits.max_num_seqs:
            raise InvalidRequestError(
                f"beam_width must be in [n={sampling.num_sequences}, max_num_seqs="
                f"{self._limits.max_num_seqs}], got {width}",
                "beam_width",
            )
        assert sampling.seed is not None, "the client draws the seed"
        group = SequenceGroup(
            request=request,
            arrival=self._arrivals,
            arrived_at=self._clock(),
            max_tokens=self._admission.resolve_max_tokens(request),
            collects_prompt_logprobs=sampling.prompt_logprobs is not None,
        )
        if width > 1:
            eos = self._limits.eos_token_ids
            group.beam = BeamSearch(sampling, group.max_tokens, eos)
        self._make_sequences(group)
        return group

    def _make_sequences(self, group: SequenceGroup) -> None:
        request, asked = group.request, group.request.sampling.num_sequences
        if len(request.delivered) > asked:
            raise InvalidRequestError(
                f"delivered has {len(request.delivered)} choices, the request {asked}", "delivered"
            )
        # beams and pooled prompts yield nothing before their end: one sequence begins anew
        starts_alone = group.beam is not None or request.wants_hidden_states != ""
        for index in range(1 if starts_alone else asked):
            given = not starts_alone and index < len(request.delivered)
            delivered = request.delivered[index] if given else []
            sequence = Sequence(group, index, [*request.prompt_token_ids, *delivered])
            if sequence.finish_reason(self._limits.eos_token_ids)[0] is None:
                group.sequences[index] = sequence
        if not group.sequences:
            raise InvalidRequestError("every choice has been delivered whole", "delivered")

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Drop a request, or one choice of it (of a beam search all); yields no delta.

        Unknown ids are ignored.

        Takes effect after the step in flight commits: its rows still write the chunks.
        """
        if self._in_flight is not None:
            self._aborts.append((request_id, index))
            return
        self._committer.abort(request_id, index)

    def has_unfinished(self) -> bool:
        return bool(self._groups)

    # -- schedule ---------------------------------------------------------------------------

    def schedule(self) -> SchedulerOutput | None:
        """Put the next step together; None when there is nothing to do."""
        assert self._in_flight is None, "the last step has not been committed"
        self._cache.expire_pins()
        self._grow_tails()
        budget = self._schedule_running(self._limits.max_num_batched_tokens)
        self._admit(budget)
        while not self._scheduled and self._break_deadlock():
            self._admit(self._limits.max_num_batched_tokens)
        if not self._scheduled:
            return None
        self._step += 1
        copies = []
        for sequence in self._scheduled:
            assert sequence.chunks is not None
            if sequence.chunks.copies:
                copies += sequence.chunks.copies
                sequence.chunks.copies = []
        self._in_flight = SchedulerOutput(
            step=self._step,
            slices=self._running.slices(),
            plan_version=self._next_plan_version(),
            new_sequences=self._running.take_new_sequences(),
            freed_slots=self._running.take_freed_slots(),
            copies=copies,
        )
        return self._in_flight

    def _grow_tails(self) -> None:
        """Give every sequence the chunk its next token needs, the oldest first.

        When the pool runs out although everything idle was evicted, the newest sequence goes
        back to the queue. The oldest never does, so it always finishes.
        """
        size = self._cache.chunk_size
        full = [
            s
            for s in self._running.by_age
            if s.num_computed_tokens >= len(s.chunks or ()) * size
            and s.num_computed_tokens < s.num_tokens
        ]
        for sequence in full:
            if sequence.chunks is not None:  # else preempted for an older one
                self._grow(sequence)

    def _grow(self, sequence: Sequence) -> None:
        while sequence.chunks is not None:
            held = len(sequence.chunks)
            spare = self._admission.spare_chunks(sequence, held + 1)
            if self._cache.grow(sequence.chunks, 1, spare):
                self._running.order.extended(sequence, held)
                return
            victim = self._newest_but_oldest()
            if victim is not None:
                self._committer.preempt(victim)
            elif not self._cache.pins.break_one():
                # beams of the oldest request, each with its own copy of what they will share
                # once it is published
                assert len(self._running) > 1, "the oldest sequence does not fit the pool alone"
                self._committer.requeue(self._running.by_age[-1])

    def _newest_but_oldest(self) -> Sequence | None:
        """The sequence to preempt: the newest, but neither the oldest nor a beam beside it."""
        oldest = self._running.by_age[0]
        for sequence in reversed(self._running.by_age):
            beside_oldest = sequence.group is oldest.group and oldest.group.beam is not None
            if sequence is not oldest and not beside_oldest:
                return sequence
        return None

    def _schedule_running(self, budget: int) -> int:
        """Tokens for running sequences; returns what is left of the budget."""
        prefills = []
        for sequence in self._running.by_age:
            remaining = sequence.num_tokens - sequence.num_computed_tokens
            if remaining == 1:
                self._take(sequence, 1)
                budget -= 1
            elif remaining:
                prefills.append(sequence)
        for sequence in prefills:
            if budget == 0:
                break
            remaining = sequence.num_tokens - sequence.num_computed_tokens
            count = min(remaining, budget)
            self._take(sequence, count)
            budget -= count
        return budget

    def _take(self, sequence: Sequence, count: int) -> None:
        """``count`` tokens of the sequence are in this step."""
        sequence.num_scheduled = count
        self._scheduled.append(sequence)
        start = sequence.num_computed_tokens
        if start < sequence.num_admitted:
            assert sequence.chunks is not None
            self._cache.will_compute(sequence.chunks, start, start + count)

    def _admit(self, budget: int) -> None:
        """Start waiting sequences while tokens, slots and chunks last.

        A follower of a running leader is passed over while waiting saves it enough; it holds
        nothing meanwhile. One that does not fit stops the queue: nobody overtakes it for ever.
        """
        if not budget or not len(self._waiting) or not self._running.num_free_slots:
            return
        candidates = self._waiting.candidates(
            self._limits.policy,
            self._num_live_tokens,
            self._clock() - self._limits.prefix_max_wait,
        )
        for sequence in candidates:
            if budget == 0 or not self._running.num_free_slots:
                return
            awaited = sequence.match is not None and self._cache.is_awaited(sequence.match)
            if awaited or sequence.group.held:
                continue
            match = self._cache.match(
                sequence.token_ids, self._match_limit(sequence), sequence.group.request.namespace
            )
            saved = match.num_later_tokens - match.num_tokens
            if saved > 0 and saved >= self._limits.min_wait_tokens:
                sequence.match = match
                continue
            sequence.match = None
            admitted = self._admission.admit(sequence, match, self._running.by_age)
            while admitted is None and not len(self._running) and self._cache.pins.break_one():
                admitted = self._admission.admit(sequence, match, self._running.by_age)
            if admitted is None:
                return
            self._start(sequence, *admitted)
            count = min(sequence.num_tokens - sequence.num_computed_tokens, budget)
            self._take(sequence, count)
            budget -= count

    def _start(self, sequence: Sequence, chunks: SequenceChunks, match: Match) -> None:
        group = sequence.group
        self._waiting.remove(sequence)
        sequence.num_admitted = sequence.num_tokens
        self._running.start(sequence, chunks, match.num_tokens)
        if sequence.wants_prompt_logits:
            group.prompt_logprobs = [None]
        if group.num_cached_tokens < 0:
            group.started_at = self._clock()
            group.num_cached_tokens = min(match.num_tokens, group.num_prompt_tokens)
            self._counters.prefix_tokens_queried += group.num_prompt_tokens
            self._counters.prefix_tokens_hit += group.num_cached_tokens
            self._counters.prefix_tokens_hit_public += min(
                match.num_public_tokens, group.num_cached_tokens
            )

    def _match_limit(self, sequence: Sequence) -> int:
        """All tokens but the last, whose row yields the next; nothing where every row is wanted."""
        wants_rows = sequence.wants_prompt_logits or sequence.group.request.wants_hidden_states
        if wants_rows or not self._limits.enable_prefix_caching:
            return 0
        return sequence.num_tokens - 1

    def _num_live_tokens(self, sequence: Sequence) -> int:
        """Tokens of a waiting sequence in chunks that running sequences use now."""
        limit, namespace = self._match_limit(sequence), sequence.group.request.namespace
        node = self._cache.live_node(sequence.token_ids, limit, namespace, sequence.live_node)
        sequence.live_node = node
        return (node.depth + 1) * self._cache.chunk_size

    def _break_deadlock(self) -> bool:
        """Beams that wait for one another across requests: the newest gives way."""
        victim = self._newest_but_oldest() if len(self._running) else None
        if victim is None:
            could_start = any(not sequence.group.held for sequence in self._waiting)
            return could_start and self._cache.pins.break_one()
        self._committer.preempt(victim)
        return True

    def _next_plan_version(self) -> int:
        """0 where a slice has several tokens; else a number that stands for this very row list."""
        if any(sequence.num_scheduled > 1 for sequence in self._scheduled):
            return 0
        key = (self._running.order.version, len(self._scheduled))
        if key != self._plan_key or len(self._scheduled) < len(self._running):
            self._plan_key = key
            self._plan_version += 1
        return self._plan_version

    # -- commit -----------------------------------------------------------------------------

    def commit(self, output: SchedulerOutput, sampled: SampledTokens) -> list[TokenDelta]:
        """Take in what the step computed; one delta per request that gained tokens or ended."""
        assert output is self._in_flight, "not the step in flight"
        scheduled, self._scheduled = self._scheduled, []
        self._in_flight = None
        aborts, self._aborts = self._aborts, []
        return self._committer.commit(scheduled, sampled, aborts)

    # -- inspection -------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """Counters since the start and gauges of this moment."""
        waiting = sum(
            all(s.chunks is None for s in g.sequences.values()) for g in self._groups.values()
        )
        stats = read_stats(self._counters, self._cache)
        stats.requests_waiting = waiting
        stats.requests_running = len(self._groups) - waiting
        return stats

    def tree(self) -> list[TreeNodeInfo]:
        """Every node of the prefix tree, for a dashboard."""
        return self._cache.describe()

    def check_invariants(self) -> None:
        """Raise AssertionError if pool, tree, order and sequences do not agree."""
        running = self._running.by_age
        live = [s.chunks for s in running if s.chunks is not None]
        assert len(live) == len(running)
        self._cache.check_invariants(live, in_step=self._in_flight is not None)
        self._running.check_invariants()
        waiting = list(self._waiting)
        assert all(s.chunks is None and s.slot < 0 for s in waiting)
        everyone = {id(s) for g in self._groups.values() for s in g.sequences.values()}
        assert everyone == {id(s) for s in [*running, *waiting]}, "a sequence was lost"
        for sequence in running:
            assert sequence.chunks is not None
            capacity = len(sequence.chunks) * self._cache.chunk_size
            assert sequence.num_computed_tokens <= min(capacity, sequence.num_tokens)
