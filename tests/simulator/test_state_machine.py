"""Hypothesis searches for a sequence of events that breaks an invariant or an output."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

from chunkllama.cache.imports import ChunkImport
from chunkllama.cache.node import encode_tokens
from chunkllama.cache_messages import CacheCommand
from chunkllama.engine.tier_media import Memory, MemoryThenFiles
from chunkllama.errors import InvalidRequestError, OverloadedError
from chunkllama.scheduler.memory_pressure import preemption_victim
from chunkllama.simulation.cost_model import StepCost
from chunkllama.simulation.engine import SimulatedEngine
from chunkllama.tenant_limits import TenantLimits, TenantTable

tokens = st.lists(st.integers(0, 1), max_size=6)


class Import:
    """A file of two prompts whose chunks are inserted a few at a time, between steps."""

    def __init__(self, engine: SimulatedEngine, prompts: list[tuple[list[int], str]]) -> None:
        self.engine = engine
        self.chunks = ChunkImport(engine.cache)
        size = engine.cache.chunk_size
        self.todo: list[tuple[int, list[int], str]] = []  # parent, tokens to its end, namespace
        for prompt, namespace in prompts:
            parent = -1
            for end in range(size, len(prompt) + 1, size):
                self.todo.append((parent, prompt[:end], namespace))
                parent = len(self.todo) - 1
        self.done = 0

    def add(self) -> None:
        """Insert the next chunk; it changes nothing for admission, however full the pool is."""
        if self.done == len(self.todo):
            return
        parent, prompt, namespace = self.todo[self.done]
        self.done += 1
        cache, size = self.engine.cache, self.engine.cache.chunk_size
        before = cache.num_available, cache.pool.peak
        key = encode_tokens(np.array(prompt[-size:], np.int32))
        chunk_id, outcome = self.chunks.add(parent, namespace, key, namespace)
        if outcome == "new":
            self.engine.write_chunk(chunk_id, prompt)
        num_above = len(prompt) // size - 1  # which cannot be evicted for it
        assert outcome != "no room" or before[0] <= num_above
        assert (cache.num_available, cache.pool.peak) == before


class CacheMachine(RuleBasedStateMachine):
    """add, step, cancel, finish, fork, evict, read again, drop, pin, preempt, fail, import.

    The model is a dict of token lists (the oracle's outputs); the invariants hold after every rule.
    """

    requests = Bundle("requests")
    imports = Bundle("imports")
    base: list[int]
    engine: SimulatedEngine

    @initialize(
        chunk_size=st.sampled_from([1, 2, 4, 64]),
        num_chunks=st.integers(6, 24),
        max_num_seqs=st.integers(1, 4),
        budget=st.sampled_from([4, 9, 200]),
        min_wait=st.sampled_from([1, 3, 32]),
        spare=st.integers(0, 2),
        policy=st.sampled_from(["fair", "prefix", "fcfs"]),
        slowdown=st.sampled_from([0, 1, 1.5]),
        tier=st.sampled_from([0, 3, 40]),
        read_seconds=st.sampled_from([0.0, 0.03]),
        bits=st.sampled_from([0, 2]),
        first=st.sampled_from([1, 3]),
        memory=st.sampled_from([None, 1, 5]),
    )
    def start(
        self,
        chunk_size,
        num_chunks,
        max_num_seqs,
        budget,
        min_wait,
        spare,
        policy,
        slowdown,
        tier,
        read_seconds,
        bits,
        first,
        memory,
    ) -> None:
        self.size = chunk_size
        self.memory = None if memory is None else 8 * chunk_size * memory
        self.files = Memory()
        medium = Memory() if self.memory is None else MemoryThenFiles(self.memory, self.files)
        self.base = [(i * i + i // 3) % 2 for i in range(4 * chunk_size)]
        self.aborted: set[str | tuple[str, int]] = set()
        self.engine = SimulatedEngine(
            num_chunks,
            chunk_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=20 * chunk_size,
            min_wait_tokens=min_wait,
            spare_chunks=spare,
            policy=policy,
            fair_quantum=3 * chunk_size,
            max_waiting=8,
            max_tenant_slowdown=slowdown,
            max_step_seconds=slowdown and 0.03,
            cost=StepCost(step=0.01, token=0.002),
            check=False,
            tier_chunks=tier,
            read_seconds=read_seconds,
            tier_options={"medium": medium, "first": first, "bits": bits},
        )
        self.medium = medium

    def _add(self, prompt: list[int], max_tokens: int, **options: object) -> str:
        try:
            return self.engine.add(prompt, max_tokens, **options)
        except (InvalidRequestError, OverloadedError):
            return ""

    @rule(
        target=requests,
        edge=st.sampled_from([1, 2, 3]),
        off=st.integers(-1, 1),
        tail=tokens,
        max_tokens=st.integers(1, 9),
        n=st.sampled_from([1, 1, 1, 3]),
        best_of=st.sampled_from([None, None, 3]),
        namespace=st.sampled_from(["", "A", "B"]),
    )
    def add(self, edge, off, tail, max_tokens, n, best_of, namespace) -> str:
        prompt = self.base[: max(1, edge * self.size + off)] + tail
        return self._add(
            prompt, max_tokens, n=n, best_of=best_of, namespace=namespace, tenant=namespace
        )

    @rule(target=requests, tail=tokens, width=st.integers(2, 3), max_tokens=st.integers(1, 5))
    def fork(self, tail, width, max_tokens) -> str:
        prompt = self.base[: self.size + 1] + tail
        return self._add(prompt, max_tokens, beam_width=width)

    @rule(target=requests, tail=tokens, seconds=st.sampled_from([0.02, 5.0]))
    def pin(self, tail, seconds) -> str:
        return self._add(self.base[: 2 * self.size] + tail, 1, pin_seconds=seconds)

    @rule(target=requests, tail=tokens, max_tokens=st.integers(0, 2))
    def score(self, tail, max_tokens) -> str:
        prompt = self.base[: self.size + 2] + tail
        return self._add(prompt, max_tokens, prompt_logprobs=0)

    @rule(count=st.integers(1, 6))
    def step(self, count) -> None:
        for _ in range(count):
            self.engine.step()
            self.engine.scheduler.check_invariants()

    @rule(request=consumes(requests))
    def cancel(self, request) -> None:
        self.engine.scheduler.abort(request)
        self.aborted.add(request)

    @rule(request=requests, index=st.integers(0, 2))
    def cancel_a_choice(self, request, index) -> None:
        """Of a beam search all; the request stays for others to cancel."""
        self.engine.scheduler.abort(request, index)
        beam_width = self.engine.requests[request].sampling.beam_width if request else 1
        self.aborted.add(request if beam_width > 1 else (request, index))

    @rule(request=consumes(requests))
    def cancel_in_flight(self, request) -> None:
        output = self.engine.schedule()
        self.engine.scheduler.abort(request)
        self.aborted.add(request)
        if output is not None:
            self.engine.commit()

    @rule(which=st.integers(0, 3))
    def fail(self, which) -> None:
        output = self.engine.schedule()
        if output is not None:
            slot = output.slices[which % len(output.slices)].slot
            self.engine.model.fail_slots = {slot}
            self.engine.commit()
            self.engine.model.fail_slots = set()

    @rule(count=st.sampled_from([1, 2, 3, 5, 24]))
    def evict(self, count) -> None:
        self.engine.cache.tree.evict(count)

    @precondition(lambda self: self.engine.tier is not None)
    @rule(
        target=requests,
        edge=st.sampled_from([2, 3, 4]),
        less=st.integers(0, 2),
        tail=st.integers(0, 1),
    )
    def read_again(self, edge, less, tail) -> str:
        """Evict a prompt once it has run, read it from the tier, and add one that ends in it."""
        prompt = self.base[: edge * self.size]
        self._add([*prompt, tail], 1)
        self.engine.run()
        self.engine.cache.tree.evict(24)
        self._add([*prompt, 1 - tail], 1)
        self.engine.run()
        return self._add(prompt[: max(1, len(prompt) - less)], 2)

    @precondition(lambda self: self.engine.tier is not None)
    @rule(which=st.integers(0, 40), is_full=st.booleans())
    def damage(self, which, is_full) -> None:
        """A file of the tier cannot be read any more, and the disk may be full."""
        self.engine.tier.damaged.add(which)
        self.engine.tier.is_full = is_full

    @precondition(lambda self: self.engine.tier is not None)
    @rule(budget=st.sampled_from([1, 3, 30]), lost=st.sets(st.integers(0, 40)))
    def lose_files(self, budget, lost) -> None:
        """The disk is full: what is in memory stays."""
        tier = self.engine.tier.tier
        tier.shrink(min(budget, tier.budget), set(range(1000)) - lost)

    @rule(tenant=st.sampled_from(["A", "B"]))
    def drop_tenant(self, tenant) -> None:
        """No file of the tenant is left."""
        command = CacheCommand(command_id=0, action="drop_tenant", tenant=tenant)
        self.engine.scheduler.cache_command(command)
        cache = self.engine.cache
        assert cache.tier is None or cache.tier.drop(lambda entry: entry.owner == tenant) == 0

    @rule(which=st.integers(0, 30))
    def drop_branch(self, which) -> None:
        command = CacheCommand(command_id=0, action="drop_branch", chunk_id=which)
        self.engine.scheduler.cache_command(command)

    @rule(
        target=imports,
        edges=st.tuples(st.integers(1, 4), st.integers(1, 4)),
        tail=tokens,
        namespaces=st.tuples(st.sampled_from(["", "A", "B"]), st.sampled_from(["", "A", "B"])),
    )
    def begin_import(self, edges, tail, namespaces) -> Import:
        first, second = (self.base[: edge * self.size] for edge in edges)
        rest = (tail * self.size)[: 2 * self.size]
        return Import(self.engine, [(first, namespaces[0]), (second + rest, namespaces[1])])

    @rule(which=imports, count=st.integers(1, 5))
    def import_chunks(self, which, count) -> None:
        for _ in range(count):
            which.add()
            self.engine.scheduler.check_invariants()

    @precondition(lambda self: len(self.engine.scheduler._running) > 1)
    @rule()
    def preempt(self) -> None:
        scheduler = self.engine.scheduler
        victim = preemption_victim(scheduler._running)
        if victim is not None:
            scheduler._lifecycle.preempt(victim)

    @rule(
        concurrent=st.sampled_from([None, 1, 2]),
        queued=st.sampled_from([None, 0, 3]),
        pins=st.sampled_from([None, 0, 2]),
        share=st.sampled_from([None, 0.1, 1.0]),
        floor=st.sampled_from([None, 0.0, 0.1]),
        weight=st.sampled_from([None, 3.0]),
    )
    def limit(self, concurrent, queued, pins, share, floor, weight) -> None:
        """Other limits for one tenant, while its requests run and wait."""
        limits = TenantLimits(
            max_concurrent_requests=concurrent,
            max_queued_requests=queued,
            pin_chunks=pins,
            chunk_share=share,
            chunk_floor=floor,
            weight=weight,
        )
        self.engine.scheduler.set_tenants(TenantTable({"A": limits}))

    @rule(seconds=st.sampled_from([0.01, 3.0]))
    def wait(self, seconds) -> None:
        self.engine.now += seconds

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "engine"):
            self.engine.scheduler.check_invariants()
            self.engine.check_charges()
            self._check_residences()

    def _check_residences(self) -> None:
        """Each chunk of the tier is in memory or in a file, within the budgets; rounded nodes of
        the pool are whole, and none is a prompt's first."""
        if self.engine.tier is None:
            return
        tier, chunk_bytes = self.engine.tier.tier, 8 * self.size
        in_memory, in_files = self.medium.memory_bytes, self.files.memory_bytes
        if self.memory is not None:
            assert in_memory <= self.memory
        assert in_memory + in_files == tier.num_chunks * chunk_bytes
        for node in self.engine.cache.tree.nodes():
            assert not node.bits or (tier.rounds and node.depth and node.filled == self.size)

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.engine.run()
            self.engine.check_outputs(self.aborted)


quick = settings(
    max_examples=250,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


class TestCacheMachine(CacheMachine.TestCase):
    settings = quick


def test_an_imported_chunk_that_covers_another_one_raises_no_peak() -> None:
    """Found at length: the covered chunk counted as in use while it was taken out of the tree."""
    machine = CacheMachine()
    machine.start(
        **{"chunk_size": 2, "num_chunks": 6, "max_num_seqs": 2, "budget": 200, "min_wait": 1},
        **{"spare": 0, "policy": "fair", "slowdown": 0, "tier": 3, "read_seconds": 0.0},
        **{"bits": 0, "first": 1, "memory": None},
    )
    machine.fork(max_tokens=1, tail=[], width=2)
    machine.fork(max_tokens=2, tail=[], width=2)
    imported = machine.begin_import(edges=(1, 2), namespaces=("B", ""), tail=[])
    machine.fork(max_tokens=1, tail=[0], width=2)
    machine.cancel_in_flight(request=machine.fork(max_tokens=1, tail=[0], width=2))
    machine.import_chunks(count=3, which=imported)
    machine.teardown()


@pytest.mark.nightly
def test_cache_machine_at_length() -> None:
    from hypothesis.stateful import run_state_machine_as_test

    long = settings(quick, max_examples=5_000, stateful_step_count=100, derandomize=False)
    run_state_machine_as_test(CacheMachine, settings=long)
