"""An engine without tensors: scheduler, tree and pool, a fake model and a virtual clock."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from chunkllama.cache.adapter_tags import AdapterUse
from chunkllama.cache.manager import CacheManager
from chunkllama.messages import EngineRequest, TokenDelta
from chunkllama.sampling_params import SamplingParams
from chunkllama.scheduler.limits import SchedulerLimits
from chunkllama.scheduler.output import SchedulerOutput
from chunkllama.scheduler.scheduler import Scheduler
from chunkllama.simulation.cost_model import StepCost
from chunkllama.simulation.fairness_monitor import FairnessMonitor
from chunkllama.simulation.fake_model import FakeModel, logprob
from chunkllama.simulation.oracle import Oracle
from chunkllama.simulation.tier import SimulatedTier

LIMITS: dict[str, Any] = {
    "max_num_seqs": 64,
    "max_num_batched_tokens": 2048,
    "max_model_len": 8192,
    "max_waiting": 256,
    "policy": "fair",
    "fair_quantum": 8192,
    "max_tenant_slowdown": 1.5,
    "max_step_seconds": 0.0,
    "min_wait_tokens": 32,
    "enable_prefix_caching": True,
}


def make_limits(**changed: Any) -> SchedulerLimits:
    """Return ``LIMITS`` but for the fields given."""
    return SchedulerLimits(**{**LIMITS, **changed})


class SimulatedEngine:
    """Steps a scheduler over a fake model and compares the outputs with the oracle's.

    Args:
        num_chunks, chunk_size: the pool.
        vocab_size: token ids that the fake model samples.
        cost: time of a step, which passes before its commit; None: 0.01 s after it.
        check: check every invariant after each ``schedule`` and ``commit``.
        history_chunks: chunks of the record of each tenant's prompts.
        window: of the fake model; None: it has none.
        tier_chunks: capacity of a cache tier; 0: there is none.
        read_seconds: of a chunk of the tier.
        tier_options: other arguments of ``SimulatedTier``.
        make_cache, make_scheduler: classes to use, for tests that plant a bug.
        limits: fields of ``SchedulerLimits`` that differ from ``LIMITS``.

    Attributes:
        now: the virtual clock.
        outputs, prints, finished: tokens, fingerprints and finish reason by (request, choice).
        errors: code of each failed request.
        tier: of the cache; None without one.
    """

    def __init__(  # noqa: PLR0913
        self,
        num_chunks: int,
        chunk_size: int,
        *,
        vocab_size: int = 2,
        cost: StepCost | None = None,
        check: bool = True,
        history_chunks: int = 32,
        window: int | None = None,
        tier_chunks: int = 0,
        read_seconds: float = 0.0,
        tier_options: Mapping[str, Any] = MappingProxyType({}),
        make_cache: type[CacheManager] = CacheManager,
        make_scheduler: type[Scheduler] = Scheduler,
        **limits: Any,
    ) -> None:
        self._now = 0.0
        self.chunk_seconds = 0.0  # of chunks that are not free
        self._cost = cost
        self.check = check
        self.limits = make_limits(**limits)
        self.cache = make_cache(
            num_chunks, chunk_size, self.clock, history_chunks=history_chunks, reach=window
        )
        self.scheduler = make_scheduler(self.limits, self.cache, self.clock)
        self.monitor = FairnessMonitor(self.scheduler)
        self.model = FakeModel(num_chunks, chunk_size, vocab_size, window)
        self.tier: SimulatedTier | None = None
        if tier_chunks:
            self.tier = SimulatedTier(
                self.cache,
                tier_chunks,
                read_seconds,
                self.model.read_chunk,
                self.model.paste_chunk,
                **tier_options,
            )
        self.oracle = Oracle(vocab_size, self.limits.eos_token_ids, window)
        self.requests: dict[str, EngineRequest] = {}
        self.outputs: dict[tuple[str, int], list[int]] = {}
        self.prints: dict[tuple[str, int], list[float]] = {}
        self.finished: dict[tuple[str, int], str] = {}
        self.errors: dict[str, str] = {}
        self.cached: dict[str, int] = {}
        self.written: dict[str, int] = {}
        self.first_deltas: dict[str, TokenDelta] = {}
        self.last_output: SchedulerOutput | None = None
        self.num_steps = 0
        self.random = random.Random(0)

    @property
    def now(self) -> float:
        """The clock in seconds; it stands still except at the end of a step."""
        return self._now

    @now.setter
    def now(self, value: float) -> None:
        used = self.cache.num_chunks - self.cache.pool.num_free
        self.chunk_seconds += (value - self._now) * used
        self._now = value

    def clock(self) -> float:
        return self._now

    def check_charges(self) -> None:
        """The tenants' parts add up to what was computed, and to the chunks in use over time."""
        stats = self.scheduler.stats(include_tenants=True)
        tenants = stats.tenants.values()
        assert sum(t.computed_tokens for t in tenants) == stats.prefill_tokens_computed_total
        assert sum(t.requests_running for t in tenants) == stats.requests_running
        assert sum(t.requests_waiting for t in tenants) == stats.requests_waiting
        assert sum(t.evicted_chunks for t in tenants) == stats.evicted_chunks_total
        assert sum(t.evictions_for for t in tenants) == stats.evicted_chunks_total
        assert sum(t.pins_refused for t in tenants) == stats.pins_refused_total
        in_use = sum(t.chunks_used + t.chunks_cached for t in tenants)
        assert abs(in_use - (stats.chunks_total - stats.chunks_free)) < 1e-6
        seconds = sum(t.chunk_seconds + t.cached_chunk_seconds for t in tenants)
        assert abs(seconds - self.chunk_seconds) < 1e-6 * max(self.chunk_seconds, 1.0)

    def write_chunk(self, chunk_id: int, prompt: list[int]) -> None:
        """Write the numbers of the prompt's last chunk, whole, as an import writes K/V."""
        values = np.array(self.oracle.numbers(prompt), np.uint64)
        size = self.cache.chunk_size
        self.model.kv[chunk_id * size : (chunk_id + 1) * size] = values[-size:]

    def add(
        self,
        prompt: list[int],
        max_tokens: int | None = 4,
        adapter: AdapterUse | None = None,
        **options: Any,
    ) -> str:
        """Queue a request; options belong to EngineRequest or else to SamplingParams.

        The fake model knows no adapters: only the tree tells the tokens of one apart.
        """
        name = f"r{len(self.requests)}"
        own = {k: v for k, v in options.items() if k in EngineRequest.__struct_fields__}
        params = {k: v for k, v in options.items() if k not in own}
        sampling = SamplingParams(
            max_tokens=max_tokens, **{"seed": 1, "temperature": 0.0, **params}
        )
        request = EngineRequest(
            request_id=name, prompt_token_ids=list(prompt), sampling=sampling, **own
        )
        self.scheduler.add(request, adapter)
        self.requests[name] = request
        for index in range(sampling.num_sequences):
            self.outputs[name, index] = []
            self.prints[name, index] = []
        return name

    def schedule(self) -> SchedulerOutput | None:
        """Choose the next step's tokens; None if there is nothing to do but to wait for a read."""
        if self.tier is not None:
            self.tier.turn(self.now)
        self.last_output = self.scheduler.schedule()
        if self.check:
            self.scheduler.check_invariants()
        return self.last_output

    def commit(self) -> list[TokenDelta]:
        """Execute and commit the step that ``schedule`` chose."""
        output = self.last_output
        assert output is not None
        self.last_output = None
        if self._cost is not None:
            self.now += self._cost.seconds(output, self.cache.chunk_size)
        deltas = self.scheduler.commit(output, self.model.execute(output))
        for delta in deltas:
            self._take(delta)
        if self.check:
            self.scheduler.check_invariants()
        self.num_steps += 1
        if self._cost is None:
            self.now += 0.01
        return deltas

    def step(self) -> list[TokenDelta]:
        """Run one step; [] if there was nothing to do."""
        return [] if self.schedule() is None else self.commit()

    def run(self, max_steps: int = 100_000) -> None:
        """Run until every request has ended."""
        for _ in range(max_steps):
            if not self.scheduler.has_unfinished():
                break
            before = self.num_steps
            self.step()
            if self.num_steps > before:
                continue
            read_at = None if self.tier is None else self.tier.next_at
            assert read_at is not None, "deadlock: work is left and nothing is scheduled"
            self.now = max(self.now, read_at)
        assert not self.scheduler.has_unfinished(), "still running"
        self.check_idle()

    def _take(self, delta: TokenDelta) -> None:
        name = delta.request_id
        if delta.error is not None:
            self.errors[name] = delta.error.code or ""
            return
        self.first_deltas.setdefault(name, delta)
        self.cached.setdefault(name, delta.num_cached_tokens)
        self.written.setdefault(name, delta.num_cache_write_tokens)
        for choice in delta.choices:
            key = name, choice.index
            assert key not in self.finished, "a delta after the last one"
            self.outputs.setdefault(key, []).extend(choice.token_ids)
            self.prints.setdefault(key, []).extend(e.logprob for e in choice.logprobs or [])
            if choice.finish_reason is not None:
                self.finished[key] = choice.finish_reason

    def check_idle(self) -> None:
        """Check that nothing is referenced or private, and that the pool adds up."""
        self.scheduler.check_invariants()
        self.check_charges()
        stats = self.scheduler.stats()
        assert stats.chunks_referenced == stats.chunks_private == 0
        assert stats.chunks_free + stats.chunks_cached == stats.chunks_total

    def check_outputs(self, aborted: Iterable[str | tuple[str, int]] = ()) -> None:
        """Compare every request's outputs with the oracle's; aborted and failed ones got a prefix.

        Args:
            aborted: requests, or choices as (request, index).
        """
        aborted = {*aborted, *self.errors}
        for name, request in self.requests.items():
            sampling = request.sampling
            if sampling.beam_width > 1:
                if name not in aborted:
                    self._check_beams(name)
                continue
            if request.wants_hidden_states:
                if name not in aborted:
                    last = self.oracle.numbers(request.prompt_token_ids)[-1]
                    assert self.first_deltas[name].embedding == [logprob(last)]
                continue
            if sampling.prompt_logprobs is not None and name in self.first_deltas:
                self._check_prompt_logprobs(name)
            for index in range(sampling.num_sequences):
                is_whole = name not in aborted and (name, index) not in aborted
                self._check_choice(name, index, is_whole=is_whole)

    def _check_beams(self, name: str) -> None:
        request = self.requests[name]
        sampling = request.sampling
        assert sampling.max_tokens is not None
        expected = self.oracle.beams(request.prompt_token_ids, sampling, sampling.max_tokens)
        got = [(self.outputs[name, i], self.finished[name, i]) for i in range(sampling.n)]
        assert got == expected, f"{name}: beams differ"

    def _check_prompt_logprobs(self, name: str) -> None:
        prompt = self.requests[name].prompt_token_ids
        numbers = self.oracle.numbers(prompt)
        entries = self.first_deltas[name].prompt_logprobs
        assert entries is not None and entries[0] is None
        assert [e.logprob for e in entries[1:] if e] == [logprob(v) for v in numbers[:-1]]

    def _check_choice(self, name: str, index: int, *, is_whole: bool) -> None:
        request = self.requests[name]
        prompt, sampling = request.prompt_token_ids, request.sampling
        limit = sampling.max_tokens
        if limit is None:
            pool = self.cache.num_chunks * self.cache.chunk_size + 1
            limit = min(self.limits.max_model_len, pool) - len(prompt)
        tokens, prints, reason = self.oracle.choice(prompt, sampling, limit, index)
        got, got_prints = self.outputs[name, index], self.prints[name, index]
        skip = len(request.delivered[index]) if index < len(request.delivered) else 0
        if is_whole:
            assert (name, index) in self.finished, f"{name}/{index} never ended"
        if (name, index) in self.finished:
            assert got == tokens[skip:], f"{name}/{index}: {got} is not {tokens[skip:]}"
            assert got_prints == prints[skip:], f"{name}/{index} read wrong K/V"
            assert self.finished[name, index] == reason
        else:
            assert got == tokens[skip : skip + len(got)]
            assert got_prints == prints[skip : skip + len(got)]
