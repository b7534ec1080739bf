"""Sequences wait for chunks that are read from the tier; chunks of four tokens."""

from __future__ import annotations

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


def test_a_scored_prompt_is_computed_whole() -> None:
    run = engine()
    evict_prefix(run)
    run.add([*PREFIX, 31], 0, prompt_logprobs=0)
    run.run()
    run.check_outputs()
    assert run.scheduler.stats().tier_chunks_promoted_total == 0
