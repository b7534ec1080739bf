"""When the pool runs out: evict, then the newest goes back to the queue; the oldest never."""

from __future__ import annotations

from typing import Any

import pytest

from chunkllama.cache.manager import SequenceChunks
from chunkllama.messages import BACKGROUND_PRIORITY
from chunkllama.scheduler import memory_pressure
from chunkllama.scheduler.request import Sequence
from chunkllama.scheduler.step_caps import NO_CAP, PATIENCE
from chunkllama.simulation.engine import SimulatedEngine


def engine(num_chunks: int, **limits: Any) -> SimulatedEngine:
    """A pool whose decode reserve is one token: overcommitted on purpose."""
    defaults = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "spare_chunks": 0}
    run = SimulatedEngine(num_chunks, 4, vocab_size=50, **{**defaults, **limits})
    for _ in range(600):
        run.scheduler._admission.lengths.add(1)
    return run


def running(run: SimulatedEngine) -> list[str]:
    return [s.group.request_id for s in run.scheduler._running.by_age]


def test_the_newest_goes_and_its_recompute_is_a_hit() -> None:
    run = engine(9)
    for i in range(3):
        run.add([i] * 12, 8)
    run.step()
    assert running(run) == ["r0", "r1", "r2"]
    run.step()
    assert running(run) == ["r0", "r1"], "r0 needed a chunk, r2 gave three"
    before = run.scheduler.stats().prefill_tokens_computed_total
    run.run()
    run.check_outputs()
    stats = run.scheduler.stats()
    assert stats.preemptions_total >= 1
    # r2 came back with 12 prompt tokens and its outputs; what was not evicted was not recomputed
    assert stats.prefill_tokens_computed_total - before < stats.preemptions_total * 14


def test_what_windows_hide_is_dropped_before_anybody_is_preempted() -> None:
    """Four sequences of ten chunks each, of which a window shows two, in a pool of sixteen."""
    run = engine(16, window=5)
    for i in range(4):
        run.add([i] * 8, 32)
    run.run()
    run.check_outputs()
    stats = run.scheduler.stats()
    assert stats.preemptions_total == 0
    assert stats.evicted_chunks_total > 8


def test_sequences_that_grow_together_are_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen that each need a chunk in the same step of a full pool."""
    run = engine(64, window=5, max_num_seqs=16, max_num_batched_tokens=256)
    asked: list[Any] = []
    count = memory_pressure.num_out_of_sight
    monkeypatch.setattr(
        memory_pressure, "num_out_of_sight", lambda *args: (asked.append(args), count(*args))[1]
    )
    for i in range(16):
        run.add([i] * 16, 9)
    most = 0
    while run.scheduler.has_unfinished():
        del asked[:]
        run.step()
        most = max(most, len(asked))
    run.check_outputs()
    assert most == 16
    assert run.scheduler.stats().preemptions_total == 0


def test_what_windows_hide_is_evicted_for_the_tenant_that_grows() -> None:
    run = engine(14, window=5)
    run.add([1] * 20, 24, tenant="a", namespace="a")
    run.add([2] * 8, 24, tenant="b", namespace="b")
    while not run.scheduler.stats().evicted_chunks_total:
        run.step()
    stats = run.cache.usage.read([])
    counts = {
        name: (each.evicted_chunks, each.evictions_for, each.evictions_of_others)
        for name, each in stats.items()
    }
    assert counts == {"a": (7, 0, 0), "b": (0, 7, 7)}, "a has seven chunks behind its window"


def test_a_sequence_that_has_dropped_chunks_is_preempted_and_computed_again() -> None:
    run = engine(9, window=5)
    for i in range(4):
        run.add([i] * 8, 24)
    dropped = False
    while run.scheduler.has_unfinished():
        run.step()
        holders = [s for s in run.scheduler._running.by_age if s.chunks and s.chunks.num_dropped]
        if holders and not dropped:
            dropped = True
            run.scheduler._lifecycle.preempt(holders[-1])
    run.check_outputs()
    assert dropped


def test_the_oldest_always_finishes() -> None:
    run = engine(6)
    preempted: list[Sequence] = []
    preempt = run.scheduler._lifecycle.preempt
    run.scheduler._lifecycle.preempt = lambda s: (preempted.append(s), preempt(s))[1]
    for i in range(8):
        run.add([i] * 4, 20)
    ended: list[str] = []
    while run.scheduler.has_unfinished():
        oldest = min(run.scheduler._groups.values(), key=lambda g: g.arrival)
        del preempted[:]
        deltas = run.step()
        assert all(s.group is not oldest for s in preempted)
        ended += [d.request_id for d in deltas if d.choices[0].finish_reason]
    assert ended[0] == "r0"
    run.check_outputs()


def test_idle_chunks_go_before_anybody_is_preempted() -> None:
    run = engine(8)
    run.add([9] * 16, 1)
    run.run()
    run.add([1] * 4, 20)
    run.run()
    run.check_outputs()
    stats = run.scheduler.stats()
    assert stats.preemptions_total == 0
    assert stats.evicted_chunks_total == 2


def test_a_preempted_sequence_goes_on_with_its_outputs() -> None:
    run = engine(6)
    for i in range(2):
        run.add([i] * 8, 9)
    while not run.scheduler.stats().preemptions_total:
        run.step()
    (waiting,) = list(run.scheduler._waiting)
    sent = run.outputs[waiting.group.request_id, 0].copy()
    assert sent
    while waiting.chunks is None:
        output = run.schedule()
        assert output is not None
        if waiting.chunks is None:
            run.commit()
    (new,) = output.new_sequences
    assert new.output_token_ids.tolist() == sent
    run.commit()
    run.run()
    run.check_outputs()


def test_beams_are_preempted_together() -> None:
    run = engine(12, max_num_seqs=6)
    run.add([1] * 8, 16)
    run.add([2] * 4, 9, beam_width=3)
    seen: set[int] = set()
    while run.scheduler.has_unfinished():
        run.step()
        seen.add(sum(s.group.beam is not None for s in run.scheduler._running.by_age))
    run.check_outputs()
    assert 3 in seen


@pytest.mark.parametrize("policy", ["fair", "prefix", "fcfs"])
@pytest.mark.parametrize("priorities", [(0, 0, 0), (1, 0, -1), (BACKGROUND_PRIORITY, 0, 1)])
def test_beam_searches_that_block_each_other(priorities: tuple[int, ...], policy: str) -> None:
    """Each holds slots the others need: the newest is preempted, and does not restart first."""
    run = engine(64, max_num_seqs=3, max_num_batched_tokens=32, policy=policy)
    for i, priority in enumerate(priorities):
        run.add([i] * 5, 6, beam_width=3, priority=priority)
    run.run(max_steps=200)
    run.check_outputs()


def test_a_beam_that_lost_its_place_comes_before_all_others() -> None:
    """Its sibling holds chunks that a request of higher priority would need."""
    run = engine(6, max_num_seqs=2)
    run.add([1] * 5, 8, beam_width=2)
    run.step()
    run.step()
    run.scheduler._lifecycle.requeue(run.scheduler._running.by_age[-1])
    run.add([2] * 20, 4, priority=-1)
    run.run()
    run.check_outputs()


def test_a_beam_that_found_no_slot_comes_before_other_tenants() -> None:
    """The tenant with the lowest clock waits for chunks that the other beam holds."""
    run = engine(6, max_num_seqs=2)
    run.add([3], 3, tenant="C")
    run.add([1] * 5, 8, beam_width=2, tenant="A")
    run.add([2] * 20, 4, tenant="B")
    run.run()
    run.check_outputs()


@pytest.mark.parametrize("policy", ["fair", "prefix", "fcfs"])
def test_a_beam_in_the_background_returns_beside_prompts(policy: str) -> None:
    """A prompt is there whenever a slot becomes free; the search holds the other slot."""
    run = engine(64, max_num_seqs=2, policy=policy)
    search = run.add([1] * 5, 8, beam_width=2, tenant="A", priority=BACKGROUND_PRIORITY)
    run.step()
    run.step()
    run.scheduler._lifecycle.requeue(run.scheduler._running.by_age[-1])
    others = [run.add([2 + i] * 5, 3, tenant="B") for i in range(20)]
    while (search, 0) not in run.finished:
        run.step()
    assert sum((name, 0) in run.finished for name in others) <= 2
    run.run()
    run.check_outputs()


def test_every_number_of_free_chunks_at_every_moment() -> None:
    """Sweep the pool's size: each must end with right outputs (SQLite's failing allocator)."""
    for num_chunks in range(4, 24):
        run = engine(num_chunks)
        for i in range(6):
            run.add([7] * 5 + [i] * (i + 1), 4)
        run.run()
        run.check_outputs()


def test_a_step_that_does_not_fit_the_memory_is_divided() -> None:
    """Every choice is answered as if there had been room, forks and beams included."""
    run = engine(64, max_num_batched_tokens=64)
    run.model.room = 20
    for i in range(4):
        run.add([1] * 9 + [i] * 6, 12)
    run.add([2] * 30, 6, n=3)
    run.add([3] * 5, 6, beam_width=2, n=2)
    run.run()
    run.check_outputs()
    assert not run.errors and run.scheduler.stats().preemptions_total > 0


def test_beams_of_a_step_that_does_not_fit_leave_nothing_of_copies_that_were_not_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = engine(64)
    run.add([1] * 6, 6, beam_width=3)
    run.step()
    cache = run.scheduler._cache
    release = cache.release
    copies: list[int] = []

    def record(chunks: SequenceChunks, *rest: Any) -> None:
        copies.append(len(chunks.copies))
        release(chunks, *rest)

    run.model.room = 0
    monkeypatch.setattr(cache, "release", record)
    run.step()
    assert sorted(copies) == [0, 1, 1], "of the parent and of two that were forked from it"
    run.model.room = 64
    run.run()
    run.check_outputs()


def test_steps_grow_again_once_they_fit() -> None:
    run = engine(1024)
    run.model.room = 0
    for i in range(4):
        run.add([i] * 20, 900)
    run.step()
    caps = run.scheduler._running.caps
    assert (caps.sequences, caps.tokens) == (2, 32)
    run.model.room = 64
    for _ in range(2 * PATIENCE):
        run.step()
    assert caps.sequences == caps.tokens == NO_CAP
    assert len(running(run)) == 4


def test_steps_stay_smaller_while_there_is_nothing_to_compute() -> None:
    """Neither a request that may not start yet nor a row that waits for its sample is a reason."""
    run = engine(64)
    run.model.room = 20
    dropped = [run.add([i] * 20, 4) for i in range(3)]
    run.step()
    caps = run.scheduler._running.caps
    expected = caps.sequences, caps.tokens
    assert expected < (NO_CAP, NO_CAP)
    for name in dropped:
        run.scheduler.abort(name)
    held = run.add([9] * 5, 3)
    run.scheduler.hold(held)
    assert run.schedule() is None
    assert (caps.sequences, caps.tokens) == expected
    run.scheduler.release(held)
    run.model.defer_share = 1.0
    for _ in range(3):
        run.step()
    assert any(sequence.awaits_sample for sequence in run.scheduler._running.by_age)
    assert (caps.sequences, caps.tokens) == expected
    run.model.defer_share = 0.0
    run.run()
    run.check_outputs(aborted=dropped)


def test_a_beam_search_that_lacks_slots_alone_has_larger_steps() -> None:
    run = engine(64)
    run.add([1] * 6, 6, beam_width=3)
    run.step()
    run.model.room = 0
    run.step()
    caps = run.scheduler._running.caps
    assert caps.sequences == 1
    run.model.room = 64
    run.run(max_steps=20)
    run.check_outputs()
    assert caps.sequences == NO_CAP


def test_what_never_fits_ends_and_others_go_on() -> None:
    run = engine(64)
    run.model.room = 0
    run.add([1] * 40, 8, beam_width=4, n=4)
    while not run.errors:
        run.step()
    assert run.errors == {"r0": "out_of_memory"}
    run.model.room = 64
    run.add([2] * 20, 5)
    run.run()
    run.check_outputs()
    assert len(run.outputs["r1", 0]) == 5
