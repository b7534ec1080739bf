"""Sequences wait for chunks that are read from the tier; chunks of four tokens."""

from __future__ import annotations

from typing import Any

import pytest

from chunkllama.cache.manager import Match
from chunkllama.cache.node import Node
from chunkllama.cache.tier import Tier
from chunkllama.cache.tier_entry import Wait
from chunkllama.scheduler import starts
from chunkllama.simulation.cost_model import StepCost
from chunkllama.simulation.engine import SimulatedEngine

PREFIX = list(range(16))


def engine(num_chunks: int = 32, read_seconds: float = 0.02, **limits: object) -> SimulatedEngine:
    defaults = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "spare_chunks": 0}
    return SimulatedEngine(
        num_chunks,
        4,
        vocab_size=50,
        tier_chunks=100,
        read_seconds=read_seconds,
        **{**defaults, "min_wait_tokens": 3, **limits},
    )


def evict_prefix(run: SimulatedEngine) -> None:
    run.add([*PREFIX, 30], 2)
    run.run()
    run.cache.tree.evict(run.cache.num_chunks)


def running(run: SimulatedEngine) -> list[str]:
    return [s.group.request_id for s in run.scheduler._running.by_age]


def test_others_compute_while_a_prompt_waits_for_its_chunks() -> None:
    run = engine()
    evict_prefix(run)
    other = run.add([40, 41, 42], 20)
    run.step()
    late = run.add([*PREFIX, 31], 2)
    for _ in range(7):
        run.step()
        assert running(run) == [other]
    for _ in range(3):
        run.step()
    assert running(run) == [other, late]
    run.run()
    run.check_outputs()
    stats = run.scheduler.stats()
    assert run.cached[late] == 16 == stats.prefix_tokens_hit_tier_total
    assert stats.prefill_tokens_computed_total == 17 + 3 + 1
    assert stats.tier_chunks_promoted_total == 4


def test_a_read_is_charged_as_what_it_could_have_computed() -> None:
    run = engine(cost=StepCost(step=0.01, token=0.001), read_seconds=0.002)
    evict_prefix(run)
    accounts = run.scheduler._lifecycle.accounts
    idle = accounts[""].clock  # where the clock of a new tenant begins
    late = run.add([*PREFIX, 31], 2, tenant="A")
    run.run()
    assert run.cached[late] == 16
    token = run.scheduler._pace.prompt_seconds(64) / 64
    read = accounts["A"].clock - idle - accounts["A"].charged
    assert abs(read - 4 * 0.002 / token) < 0.05 * read
    run.check_charges()


def test_an_explanation_tells_what_is_read_from_the_tier() -> None:
    run = engine()
    evict_prefix(run)
    assert run.tier is not None
    run.tier.turn(run.now)  # what was evicted is written
    asked = run.scheduler.explain([*PREFIX, 31], "", "")
    assert (asked.num_matched_tokens, asked.num_tier_tokens) == (16, 16)
    late = run.add([*PREFIX, 31], 2, explain=True)
    run.run()
    (told,) = [run.first_deltas[late].explanation]
    assert told is not None and (told.num_matched_tokens, told.num_tier_tokens) == (16, 16)
    again = run.add([*PREFIX, 31], 2, explain=True)
    run.run()
    told = run.first_deltas[again].explanation
    assert told is not None and (told.num_matched_tokens, told.num_tier_tokens) == (16, 0)


def test_two_prompts_wait_for_the_same_read() -> None:
    run = engine()
    evict_prefix(run)
    names = [run.add([*PREFIX, 31 + i], 2) for i in range(2)]
    run.run()
    run.check_outputs()
    assert [run.cached[name] for name in names] == [16, 16]
    assert run.scheduler.stats().tier_chunks_promoted_total == 4


def test_a_pin_is_not_ended_early_for_a_read() -> None:
    run = engine()
    evict_prefix(run)
    run.add([45] * 9, 1, pin_seconds=1000.0)
    run.run()
    pinned = run.cache.pins.num_chunks
    late = run.add([*PREFIX, 31], 2)
    assert run.step() == [] and run.cache.is_promoting
    run.run()
    assert run.cached[late] == 16 and run.cache.pins.num_chunks == pinned == 3


def test_what_is_slow_to_read_is_computed() -> None:
    run = engine(cost=StepCost(step=0.01, token=0.001))
    evict_prefix(run)
    assert run.cache.tier is not None
    run.cache.tier.price.add(100.0)
    late = run.add([*PREFIX, 31], 2)
    run.run()
    run.check_outputs()
    assert run.cached[late] == 0 and run.scheduler.stats().prefix_tokens_hit_tier_total == 0


def test_a_request_that_is_aborted_leaves_its_read_to_others() -> None:
    run = engine()
    evict_prefix(run)
    name = run.add([*PREFIX, 31], 2)
    run.step()
    run.scheduler.abort(name)
    late = run.add([*PREFIX, 32], 2)
    run.run()
    run.check_outputs({name})
    assert run.cached[late] == 16 and not run.cache.is_promoting


def test_a_damaged_file_is_computed() -> None:
    run = engine()
    evict_prefix(run)
    assert run.tier is not None
    run.tier.damaged = set(range(2))  # the leaves, which were evicted first
    late = run.add([*PREFIX, 31], 2)
    run.run()
    run.check_outputs()
    assert run.cached[late] == 8 == run.scheduler.stats().prefix_tokens_hit_tier_total
    assert run.scheduler.stats().tier_chunks_damaged_total == 1


def test_prompts_that_evict_one_another_all_end() -> None:
    run = engine(num_chunks=8, max_num_seqs=2)
    prompts = [[i, *PREFIX] for i in range(8)]
    for _ in range(3):
        for prompt in prompts:
            run.add(prompt, 6)
        run.run()
    run.check_outputs()
    stats = run.scheduler.stats()
    assert stats.tier_chunks_promoted_total > 0
    assert stats.prefix_tokens_hit_tier_total > 16 * 8


def large_among_small(num_steps: int) -> tuple[SimulatedEngine, str, int]:
    """Send a prompt of 19 of 24 chunks into a steady load of small ones; all are in the tier.

    Returns:
        The engine, the large request, and how many later ones have ended when it has, or after
        ``num_steps``.
    """
    run = engine(24, 0.01, max_num_seqs=8, fair_quantum=16)
    small = [[i, *range(10)] for i in range(30)]
    large = [45, *range(40), *range(35)]
    for prompt in [*small, large]:
        run.add(prompt, 1)
        run.run()
    run.cache.tree.evict(run.cache.num_chunks)
    assert run.tier is not None
    num_small, late = 0, ""
    for step in range(num_steps):
        while len(run.scheduler._waiting) < 4:
            run.add(small[num_small % len(small)], 2)
            num_small += 1
        if step == 20:
            late = run.add(large, 1)
        if run.schedule() is not None:
            run.commit()
        elif run.tier.next_at is not None:
            run.now = max(run.now, run.tier.next_at)
        if (late, 0) in run.finished:
            break
    names = list(run.requests)
    return run, late, sum((name, 0) in run.finished for name in names[names.index(late) + 1 :])


def test_a_large_prompt_does_not_starve_while_small_ones_are_read() -> None:
    run, late, num_overtaking = large_among_small(200)
    assert (late, 0) in run.finished and num_overtaking <= 8
    run.run()
    run.check_outputs()
    assert run.cached[late] == 72


def test_the_simulation_sees_a_prompt_that_waits_for_the_reads_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    promote = Tier.promote

    def park(self: Tier, match: Match, root: Node, *args: Any) -> Wait | None:
        *where, limits = args
        chain, reads = self.chain(match.nodes, *where), self.promotions
        needed = limits.needed_chunks + sum(each.num_needed for each in reads)
        if chain and not chain[0].promotion and reads and needed > limits.available_chunks:
            return Wait(reads[0])
        return promote(self, match, root, *args)

    monkeypatch.setattr(Tier, "promote", park)
    monkeypatch.setattr(starts, "MAX_READS", -1)  # any number
    with pytest.raises(AssertionError, match="a request starves"):
        large_among_small(600)


def test_a_scored_prompt_is_computed_whole() -> None:
    run = engine()
    evict_prefix(run)
    run.add([*PREFIX, 31], 0, prompt_logprobs=0)
    run.run()
    run.check_outputs()
    assert run.scheduler.stats().tier_chunks_promoted_total == 0


def with_rounded_prefix(prefix: list[int], **options: object) -> SimulatedEngine:
    """An engine whose pool has a prefix, rounded but for its first chunk."""
    run = SimulatedEngine(
        16, 64, vocab_size=50, tier_chunks=40, tier_options={"bits": 2}, **options
    )
    for last in (1, 2):
        run.add([*prefix, last], 2)
        run.run()
        if last == 1:
            run.cache.tree.evict(16)
    assert [node.bits for node in run.cache.tree.nodes() if node.num_tokens == 64] == [0, 2, 2]
    return run


@pytest.mark.parametrize("count", [2 * 64 + 33, 2 * 64 + 63, 3 * 64])
def test_a_prompt_that_ends_in_a_rounded_chunk_starts_at_once(count: int) -> None:
    """It has more tokens there than a sequence waits for where another one computes them."""
    prefix = [i * 7 % 50 for i in range(3 * 64)]
    run = with_rounded_prefix(prefix)
    assert count - 1 - 2 * 64 >= run.limits.min_wait_tokens
    names = [run.add([*prefix[:count], *tail], 2) for tail in ([], [49, 48])]
    if count == 3 * 64:  # with more tokens the whole chunk is shared
        del names[1]
    run.run(max_steps=20)
    run.check_outputs()
    assert [run.cached[name] for name in names] == [2 * 64] * len(names)
    assert [run.first_deltas[name].num_rounded_tokens for name in names] == [64] * len(names)


def decoding_path(run: SimulatedEngine) -> tuple[list[int], int]:
    """Bits of the nodes of the one running sequence, and its chunks outside the tree."""
    (sequence,) = run.scheduler._running.by_age
    assert sequence.chunks is not None
    return [node.bits for node in sequence.chunks.path], sequence.chunks.num_private


@pytest.mark.parametrize("is_leaf", [True, False])
def test_what_a_request_computes_is_not_replaced_by_a_rounded_chunk(is_leaf: bool) -> None:
    """It takes the place of an idle leaf; a chunk above others stays, and its own is private."""
    prefix = [i * 7 % 50 for i in range(3 * 64)]
    run = with_rounded_prefix(prefix)
    if is_leaf:
        for node in list(run.cache.tree.nodes()):
            if node.depth == 3:
                run.cache.tree.remove(node)
    name = run.add(prefix, 4)
    while len(run.outputs[name, 0]) < 2:
        run.step()
    path, num_private = decoding_path(run)
    assert path == ([0, 2, 0] if is_leaf else [0, 2])
    assert num_private >= (1 if is_leaf else 2)
    run.run()
    run.check_outputs()
    bits = [node.bits for node in run.cache.tree.nodes() if node.num_tokens == 64]
    assert bits == ([0, 2, 0] if is_leaf else [0, 2, 2])
    assert run.first_deltas[name].num_rounded_tokens == 64


def test_a_chunk_of_one_tenant_takes_no_shared_place() -> None:
    prefix = [i * 7 % 50 for i in range(3 * 64)]
    run = with_rounded_prefix(prefix)
    for node in list(run.cache.tree.nodes()):
        if node.depth == 3:
            run.cache.tree.remove(node)
    run.add(prefix, 4, tenant="A", namespace="A")
    run.run()
    assert [(node.bits, node.namespace) for node in run.cache.tree.nodes()] == [
        (0, ""),
        (2, ""),
        (2, ""),
    ]


def test_what_is_rounded_during_a_preemption_is_counted() -> None:
    """Of the cached tokens only: those that the request had computed are no cached ones."""
    run = SimulatedEngine(16, 8, tier_chunks=200, tier_options={"bits": 2}, min_wait_tokens=1)
    prompt = [0, 1, 1, 0, 1] * 5
    run.add(prompt, 1)
    run.run()
    name = run.add([*prompt, 1, 1], 40)
    deltas = run.step()
    (sequence,) = run.scheduler._running.by_age
    while len(run.outputs[name, 0]) < 20:
        run.step()
    run.scheduler._lifecycle.preempt(sequence)
    run.cache.tree.evict(16)
    while run.scheduler.has_unfinished():
        deltas += run.step()
        if run.scheduler._running.by_age:
            path, _ = decoding_path(run)
    run.check_outputs()
    assert path.count(2) > 2
    cached = [delta.num_cached_tokens for delta in deltas]
    assert set(cached) == {25}
    assert (deltas[0].num_rounded_tokens, deltas[-1].num_rounded_tokens) == (0, 17)
