"""Seeded random traffic for the simulated engine, of every kind of request."""

from __future__ import annotations

import random
from typing import Any

from chunkllama.errors import InvalidRequestError, OverloadedError
from chunkllama.sampling_params import SamplingParams
from chunkllama.scheduler.memory_pressure import preemption_victim
from chunkllama.simulation.engine import SimulatedEngine
from chunkllama.simulation.fake_model import ROOM
from chunkllama.tenant_limits import TenantLimits, TenantTable


class RandomTraffic:
    """Adds, cancels, pins, fails, preempts and runs out of memory at random; ``run`` ends with a
    full check.

    Prompts are cut from a few base texts over two tokens, at lengths around the edges of chunks,
    so that sequences share and diverge often.
    """

    def __init__(
        self, seed: int, chunk_size: int, window: int | None = None, **overrides: Any
    ) -> None:
        self.random = random.Random(seed)
        pick = self.random.choice
        self.chunk_size = chunk_size
        limits: dict[str, Any] = {
            "max_num_seqs": pick([1, 2, 4, 8]),
            "max_num_batched_tokens": pick([8, 16, 4 * chunk_size + 8]),
            "max_model_len": 40 * chunk_size,
            "min_wait_tokens": pick([0, 2, max(chunk_size // 2, 1)]),
            "spare_chunks": pick([0, 1, 2]),
            "policy": pick(["fair", "prefix", "fcfs"]),
            "fair_quantum": pick([1, 3 * chunk_size, 1000]),
            "tenant_weights": {"A": 2.0},
            "eos_token_ids": pick([frozenset(), frozenset(), frozenset({2})]),
            "max_waiting": 16,
            "speculates": seed % 2 == 1,
            "enable_prefix_caching": self.random.random() < 0.85,
            **overrides,
        }
        num_chunks = pick([6, 8, 12, 20, 60])
        self.engine = SimulatedEngine(
            num_chunks,
            chunk_size,
            vocab_size=3,
            window=window,
            tier_chunks=(0, 0, 5, 80)[seed // 4 % 4],
            read_seconds=0.03 * (seed % 2),
            tier_options={"bits": (0, 2)[seed // 2 % 2]},
            **limits,
        )
        if self.random.random() < 0.5:
            self.engine.scheduler.set_tenants(
                TenantTable({"A": self._limits(), "B": self._limits()})
            )
        self.engine.model.defer_share = [0.0, 0.0, 0.2, 0.7][seed % 4]
        self.aborted: set[str | tuple[str, int]] = set()
        self.bases = [self._tokens(4 * chunk_size) for _ in range(2)]

    def _limits(self) -> TenantLimits:
        pick = self.random.choice
        return TenantLimits(
            max_concurrent_requests=pick([None, 1, 2]),
            max_queued_requests=pick([None, 0, 4]),
            pin_chunks=pick([None, 0, 3]),
            chunk_share=pick([None, 0.2]),
            chunk_floor=pick([None, 0.0, 0.2]),
        )

    def _tokens(self, count: int) -> list[int]:
        return [self.random.randrange(2) for _ in range(count)]

    def _length(self) -> int:
        edge = self.random.choice([1, 1, 2, 3]) * self.chunk_size
        return max(1, edge + self.random.choice([-2, -1, 0, 1, 2]))

    def add(self) -> None:
        """Queue a request of a random kind, unless it is refused."""
        rnd = self.random
        prompt = rnd.choice(self.bases)[: self._length()]
        if rnd.random() < 0.6:
            prompt = prompt + self._tokens(rnd.randrange(1, self.chunk_size + 2))
        namespace = rnd.choice(["", "", "A", "B"])
        tenant = namespace or rnd.choice(["", "A", "B"])
        options: dict[str, Any] = {"namespace": namespace, "tenant": tenant}
        kind = rnd.random()
        max_tokens: int | None = rnd.choice([1, 2, self.chunk_size, 2 * self.chunk_size + 1])
        if kind < 0.15:
            options["n"] = rnd.choice([1, 2, 3])
            options["best_of"] = rnd.choice([None, 3, 4])
        elif kind < 0.22:
            width = min(rnd.choice([2, 3]), self.engine.limits.max_num_seqs)
            options |= {"beam_width": width, "n": rnd.choice([1, width])}
            max_tokens = rnd.choice([1, 3, self.chunk_size + 1])
        elif kind < 0.27:
            options["prompt_logprobs"] = 0
            max_tokens = rnd.choice([0, 2])
        elif kind < 0.30:
            options["wants_hidden_states"] = "last"
        elif kind < 0.33 and self.engine.num_steps < 50:
            max_tokens = None
        elif kind < 0.40 and max_tokens is not None:
            whole, _, _ = self.engine.oracle.choice(prompt, SamplingParams(), max_tokens, 0)
            options["delivered"] = [whole[: rnd.randrange(max_tokens + 1)]]
        if rnd.random() < 0.1:
            options["cache_until"] = rnd.randrange(len(prompt) + 1)
        if rnd.random() < 0.1:
            options["pin_seconds"] = rnd.choice([0.05, 1.0])
        if rnd.random() < 0.1:
            options["priority"] = rnd.choice([-1, 1])
        try:
            self.engine.add(prompt, max_tokens, **options)
        except (InvalidRequestError, OverloadedError):
            return

    def abort(self) -> None:
        """Abort a live request, or one choice of it."""
        live = [name for name in self.engine.requests if self.is_live(name)]
        if live:
            victim = self.random.choice(live)
            sampling = self.engine.requests[victim].sampling
            index = self.random.choice([None, self.random.randrange(sampling.num_sequences)])
            self.engine.scheduler.abort(victim, index)
            one_of_many = index is not None and sampling.num_sequences > 1
            if index is None or not one_of_many or sampling.beam_width > 1:
                self.aborted.add(victim)
            else:
                self.aborted.add((victim, index))

    def is_live(self, name: str) -> bool:
        """Return whether a choice of the request has not ended."""
        sampling = self.engine.requests[name].sampling
        count = sampling.n if sampling.beam_width > 1 else sampling.num_sequences
        if name in self.aborted or name in self.engine.errors:
            return False
        return any((name, i) not in self.engine.finished for i in range(count))

    def turn(self) -> None:
        """Run one step, with random events before and during it."""
        rnd, engine = self.random, self.engine
        if rnd.random() < 0.35:
            self.add()
        if rnd.random() < 0.05:
            self.abort()
        if rnd.random() < 0.03:
            engine.cache.tree.evict(rnd.randrange(1, 4))
        if rnd.random() < 0.03:
            self.preempt()
        if engine.tier is not None and rnd.random() < 0.05:
            engine.tier.damaged.add(rnd.randrange(100))
        if engine.schedule() is None:
            engine.now += 0.01  # a chunk is being read, perhaps
            return
        assert engine.last_output is not None
        if rnd.random() < 0.05:
            self.abort()
        if rnd.random() < 0.02:
            output = engine.last_output
            slots = [piece.slot for piece in output.slices] or output.awaited
            engine.model.fail_slots = {rnd.choice(slots)}
        if rnd.random() < 0.02:
            engine.model.room = 0
        engine.commit()
        engine.model.fail_slots, engine.model.room = set(), ROOM
        if rnd.random() < 0.01:
            engine.now += 1.0

    def preempt(self) -> None:
        """Requeue the newest running sequence, as if the pool had run out."""
        scheduler = self.engine.scheduler
        if len(scheduler._running):
            victim = preemption_victim(scheduler._running)
            if victim is not None:
                scheduler._lifecycle.preempt(victim)

    def run(self, num_steps: int) -> SimulatedEngine:
        """Run at least ``num_steps``, then until every request has ended; check all outputs."""
        while self.engine.num_steps < num_steps:
            self.turn()
        self.engine.run()
        self.engine.check_charges()
        self.engine.check_outputs(self.aborted)
        return self.engine
