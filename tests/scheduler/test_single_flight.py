"""A prefix is computed once for all concurrent requests; chunks of four tokens."""

from __future__ import annotations

import pytest

from chunkllama.cache.manager import Match
from chunkllama.simulation.engine import SimulatedEngine

PREFIX = list(range(16))


def engine(num_chunks: int = 64, **limits: object) -> SimulatedEngine:
    defaults = {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 128,
        "spare_chunks": 0,
        "min_wait_tokens": 3,
    }
    return SimulatedEngine(num_chunks, 4, vocab_size=50, **{**defaults, **limits})


def computed(run: SimulatedEngine) -> int:
    return run.scheduler.stats().prefill_tokens_computed_total


def running(run: SimulatedEngine) -> list[str]:
    return [s.group.request_id for s in run.scheduler._running.by_age]


class TestJoining:
    def test_followers_join_their_leaders_step(self) -> None:
        run = engine()
        for i in range(5):
            run.add([*PREFIX, 30 + i, 40 + i], 4)
        output = run.schedule()
        assert output is not None
        assert [s.first_position for s in output.slices] == [0, 16, 16, 16, 16]
        assert [s.shared for s in output.slices] == [0, 4, 4, 4, 4]
        run.commit()
        run.run()
        run.check_outputs()
        assert computed(run) == 16 + 5 * 2
        assert sorted(run.cached.values()) == [0, 16, 16, 16, 16]

    def test_followers_wait_for_a_leader_of_several_steps_and_join_its_last(self) -> None:
        run = engine(max_num_batched_tokens=12)
        leader = run.add([*PREFIX, 30, 31], 4)
        follower = run.add([*PREFIX, 40, 41], 4)
        run.step()
        assert running(run) == [leader]
        run.step()
        assert running(run) == [leader, follower]
        run.run()
        run.check_outputs()
        assert computed(run) == 18 + 2

    def test_a_waiting_follower_holds_nothing_and_blocks_nobody(self) -> None:
        run = engine(max_num_batched_tokens=12)
        leader = run.add(PREFIX, 4)
        follower = run.add([*PREFIX, 40], 4)
        run.schedule()
        other = run.add([45, 46], 4)
        run.commit()
        run.schedule()
        assert other in running(run)
        assert follower in running(run)
        before = run.scheduler.stats()
        assert before.chunks_referenced == 4 + 1 + 1
        run.commit()
        run.run()
        run.check_outputs()
        assert leader in run.cached

    def test_min_wait_tokens(self) -> None:
        """The prompt's tail can only be copied one step later: is that worth the step?"""
        for min_wait, waits, cached in ((3, True, 19), (4, False, 16)):
            run = engine(min_wait_tokens=min_wait)
            first = run.add([*PREFIX, 30, 31, 32, 33], 3)
            second = run.add([*PREFIX, 30, 31, 32, 33], 3)
            run.step()
            assert running(run) == ([first] if waits else [first, second])
            run.run()
            run.check_outputs()
            assert run.cached[second] == cached

    def test_a_budget_of_one_slice_still_shares(self) -> None:
        run = engine(max_num_batched_tokens=8)
        for i in range(4):
            run.add([*PREFIX, 30 + i], 2)
        run.run()
        run.check_outputs()
        assert computed(run) == 16 + 4


class TestHandOver:
    """In the same schedule() a waiting request continues after the leader's last token."""

    def start(self, **limits: object) -> tuple[SimulatedEngine, str, str, str]:
        run = engine(max_num_batched_tokens=8, **limits)
        leader = run.add([*PREFIX, 30, 31], 6)
        waiters = [run.add([*PREFIX, 40 + i, 41], 6) for i in range(2)]
        run.step()
        assert running(run) == [leader]
        return run, leader, *waiters

    def test_abort(self) -> None:
        run, leader, first, second = self.start()
        run.scheduler.abort(leader)
        output = run.schedule()
        assert output is not None
        assert running(run) == [first]
        assert [(s.first_position, s.num_tokens) for s in output.slices] == [(8, 8)]
        run.commit()
        run.run()
        run.check_outputs({leader})
        assert computed(run) == 8 + 8 + 2 + 2
        assert run.cached[second] == 16

    def test_abort_in_flight(self) -> None:
        run, leader, first, _ = self.start()
        run.schedule()
        run.scheduler.abort(leader)
        run.commit()
        output = run.schedule()
        assert output is not None
        assert {s.first_position for s in output.slices} == {16}
        assert first in running(run)
        run.commit()
        run.run()
        run.check_outputs({leader})

    def test_preemption(self) -> None:
        run, leader, first, second = self.start()
        (sequence,) = run.scheduler._running.by_age
        run.scheduler._lifecycle.preempt(sequence)
        output = run.schedule()
        assert output is not None
        assert running(run) == [leader], "older than its waiters, it leads again"
        assert [(s.first_position, s.num_tokens) for s in output.slices] == [(8, 8)]
        run.commit()
        run.run()
        run.check_outputs()
        assert computed(run) == 16 + 3 * 2
        assert {run.cached[first], run.cached[second]} == {16}

    def test_failure_of_a_leader_its_followers_wait_for(self) -> None:
        run, leader, first, second = self.start()
        run.schedule()
        run.model.fail_slots = {0}
        run.commit()
        run.model.fail_slots = set()
        assert run.errors == {leader: "model_nan"}
        assert run.cache.tree.num_nodes == 0
        run.step()
        assert running(run) == [first]
        run.run()
        run.check_outputs()
        assert run.cached == {first: 0, second: 16}

    def test_failure_of_a_leader_whose_step_others_have_joined(self) -> None:
        run = engine()
        leader = run.add([*PREFIX, 30], 5)
        first, second = (run.add([*PREFIX, 40 + i], 5) for i in range(2))
        run.schedule()
        run.model.fail_slots = {0}
        (delta,) = run.commit()
        assert delta.request_id == leader and delta.error is not None
        run.model.fail_slots = set()
        output = run.schedule()
        assert output is not None
        assert sorted(s.first_position for s in output.slices) == [0, 16]
        assert running(run) == [first, second]
        run.commit()
        run.run()
        run.check_outputs()


@pytest.mark.parametrize("length", [7, 8, 9])
@pytest.mark.parametrize("count", [2, 5])
def test_equal_prompts_at_once_around_a_chunk_edge(length: int, count: int) -> None:
    run = engine()
    for _ in range(count):
        run.add(list(range(length)), 6, n=2)
    run.run()
    run.check_outputs()
    whole = (length - 1) // 4 * 4
    assert computed(run) <= length + (2 * count - 1) * (length - whole)


@pytest.mark.parametrize("policy", ["fair", "prefix"])
def test_followers_of_a_leader_are_looked_up_once(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They begin equally, so that what one of them waits for keeps the others waiting, too."""
    limits = {"max_num_seqs": 16, "max_num_batched_tokens": 64, "min_wait_tokens": 16}
    run = SimulatedEngine(400, 16, vocab_size=1000, policy=policy, **limits)
    prefix = [7 * i % 1000 for i in range(300)]
    run.add([*prefix, 1], 2, namespace="A")
    run.step()
    followers = [run.add([*prefix, 2, i], 2, namespace="A") for i in range(6)]
    run.add([*prefix, 2, 9], 2, namespace="B")
    run.add([*prefix, 2, 8], 2, namespace="A", prompt_logprobs=1)
    match, looked_up = run.cache.match, []

    def count(key: bytes, limit: int, namespace: str) -> Match:
        looked_up.append((limit > 0, namespace))
        return match(key, limit, namespace)

    monkeypatch.setattr(run.cache, "match", count)
    run.step()
    assert sorted(looked_up) == [(False, "A"), (True, "A"), (True, "B")]
    run.run()
    run.check_outputs()
    assert min(run.cached[name] for name in followers) >= 288
