"""Replay a trace through the real scheduler and cache, with the time of each step computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from chunkllama.cache.chunk_pool import ChunkState
from chunkllama.cache.manager import CacheManager
from chunkllama.errors import InvalidRequestError, OverloadedError
from chunkllama.messages import EngineRequest, EngineStats, TokenDelta
from chunkllama.sampling_params import SamplingParams
from chunkllama.scheduler.limits import SchedulerLimits
from chunkllama.scheduler.output import SampledTokens, SchedulerOutput
from chunkllama.scheduler.scheduler import Scheduler
from chunkllama.simulation.fairness_monitor import FairnessMonitor
from chunkllama.simulation.tier import SimulatedTier
from chunkllama.simulation.trace import TraceRequest

StepSeconds = Callable[[SchedulerOutput, int], float]


@dataclass(slots=True)
class Outcome:
    """What became of one request; times are seconds from the trace's start.

    Attributes:
        refusal: "" if it ran, "429" if the queue was full, "400" if it can never run.
        first_token_at, ended_at: 0 if it was refused.
        queue_seconds: arrival to first scheduling.
    """

    request: TraceRequest
    refusal: str = ""
    queue_seconds: float = 0.0
    first_token_at: float = 0.0
    ended_at: float = 0.0
    cached_tokens: int = 0

    @property
    def first_token_seconds(self) -> float:
        """Arrival to first token."""
        return self.first_token_at - self.request.at


@dataclass(slots=True)
class Replayed:
    """The result of a replay.

    Attributes:
        outcomes: in order of arrival.
        stats: the scheduler's counters at the end.
        seconds: simulated time from the first arrival to the last token.
        busy_seconds: time in steps.
        peak_chunks: most chunks that running sequences held at once.
    """

    outcomes: list[Outcome]
    stats: EngineStats = field(default_factory=EngineStats)
    seconds: float = 0.0
    busy_seconds: float = 0.0
    num_steps: int = 0
    peak_chunks: int = 0


class Replay:
    """Feeds requests to a scheduler at their times and advances the clock by each step's cost.

    Args:
        limits: of the scheduler.
        num_chunks, chunk_size: the pool.
        step_seconds: duration of a step, given its output and the chunk size.
        tier_chunks: capacity of a cache tier; 0: there is none.
        read_seconds: of a chunk of the tier.
        tier_options: other arguments of ``SimulatedTier``.
        check: check the bounds of the order at every start, and at the end that the tenants'
            charges are the work done.

    Attributes:
        scheduler: the scheduler, for observers.
        now: the clock, in seconds.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        num_chunks: int,
        chunk_size: int,
        step_seconds: StepSeconds,
        *,
        tier_chunks: int = 0,
        read_seconds: float = 0.0,
        tier_options: Mapping[str, Any] = MappingProxyType({}),
        check: bool = False,
    ) -> None:
        self.now = 0.0
        self.check = check
        self._chunk_size = chunk_size
        self._step_seconds = step_seconds
        self._cache = CacheManager(num_chunks, chunk_size, self._clock)
        self._tier: SimulatedTier | None = None
        if tier_chunks:
            self._tier = SimulatedTier(self._cache, tier_chunks, read_seconds, **tier_options)
        self.scheduler = Scheduler(limits, self._cache, self._clock)
        if check:
            FairnessMonitor(self.scheduler)
        self._live: dict[str, Outcome] = {}
        self._ended: list[Outcome] = []

    @property
    def cache(self) -> CacheManager:
        """The chunks and the prefix tree."""
        return self._cache

    def _clock(self) -> float:
        return self.now

    def add_public_prefix(self, token_ids: Sequence[int]) -> None:
        """Compute a prefix that every tenant matches, and pin it; takes no time of the replay."""
        now = self.now
        self._submit("public", TraceRequest(now, "", len(token_ids), 1, tuple(token_ids)), 1e12)
        while self.scheduler.has_unfinished():
            self.step(None)
        self.now = now

    def run(
        self,
        requests: Sequence[TraceRequest],
        on_progress: Callable[[int], None] = lambda done: None,
    ) -> Replayed:
        """Replay requests, which are in order of arrival, until all have ended."""
        result = Replayed([Outcome(request) for request in requests])
        waiting = 0
        if requests:
            self.now = max(self.now, requests[0].at)
        started = self.now
        while True:
            while waiting < len(requests) and requests[waiting].at <= self.now:
                self.arrive(f"r{waiting}", result.outcomes[waiting])
                waiting += 1
                on_progress(waiting)
            if self.scheduler.has_unfinished():
                self.step(result)
            elif waiting < len(requests):
                self.now = requests[waiting].at
            else:
                break
        if self.check:
            self.scheduler.check_invariants()
        result.seconds = self.now - started
        result.stats = self.scheduler.stats()
        return result

    def arrive(self, name: str, outcome: Outcome) -> None:
        """Queue a request now; a refusal is noted in its outcome."""
        try:
            self._submit(name, outcome.request)
        except OverloadedError:
            outcome.refusal = "429"
        except InvalidRequestError:
            outcome.refusal = "400"
        else:
            self._live[name] = outcome

    def _submit(self, name: str, request: TraceRequest, pin_seconds: float = 0.0) -> None:
        sampling = SamplingParams(
            max_tokens=request.num_output_tokens, ignore_eos=True, temperature=0.0, seed=0
        )
        self.scheduler.add(
            EngineRequest(
                request_id=name,
                prompt_token_ids=request.prompt(),
                sampling=sampling,
                namespace="" if request.is_public else request.tenant,
                tenant=request.tenant,
                priority=request.priority,
                pin_seconds=pin_seconds,
            )
        )

    def step(self, result: Replayed | None) -> list[Outcome]:
        """Run one step and advance the clock; returns the requests that ended with it."""
        if self._tier is not None:
            self._tier.turn(self.now)
        output = self.scheduler.schedule()
        if output is None:
            read_at = None if self._tier is None else self._tier.next_at
            assert read_at is not None, "work is left and nothing is scheduled"
            self.now = max(self.now, read_at)
            return []
        sampled = SampledTokens({piece.slot: 0 for piece in output.slices if piece.samples})
        seconds = self._step_seconds(output, self._chunk_size)
        self.now += seconds
        deltas = self.scheduler.commit(output, sampled)
        for delta in deltas:
            self._take(delta)
        if result is not None:
            pool = self._cache.pool
            in_use = pool.count(ChunkState.REFERENCED) + pool.count(ChunkState.PRIVATE)
            result.peak_chunks = max(result.peak_chunks, in_use)
            result.busy_seconds += seconds
            result.num_steps += 1
        ended, self._ended = self._ended, []
        return ended

    def _take(self, delta: TokenDelta) -> None:
        outcome = self._live.get(delta.request_id)
        if outcome is None:  # a public prefix
            return
        if not outcome.first_token_at:
            outcome.first_token_at = self.now
            # the time of a preemption before the first token is waiting too
            outcome.queue_seconds = delta.queue_seconds
            outcome.cached_tokens = delta.num_cached_tokens
        if any(choice.finish_reason is not None for choice in delta.choices):
            outcome.ended_at = self.now
            self._ended.append(outcome)
            del self._live[delta.request_id]
