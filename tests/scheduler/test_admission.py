"""Who may start: the formula, the refusals, the queue's end; chunks of four tokens."""

from __future__ import annotations

import pytest

from chunkllama.errors import InvalidRequestError, OverloadedError
from chunkllama.scheduler.admission import (
    DEFAULT_RETRY_AFTER,
    FIRST_EXPECTED_TOKENS,
    DrainRate,
    OutputLengths,
)
from chunkllama.simulation.engine import SimulatedEngine


def engine(num_chunks: int, **limits: object) -> SimulatedEngine:
    defaults = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "spare_chunks": 0}
    return SimulatedEngine(num_chunks, 4, vocab_size=50, **{**defaults, **limits})


def num_running(run: SimulatedEngine) -> int:
    return len(run.scheduler._running)


class TestFormula:
    def test_room_for_the_expected_output_is_kept(self) -> None:
        # each: 2 chunks of prompt and 3 of 12 output tokens (the last needs no slot)
        for num_chunks, fitting in ((9, 1), (10, 2), (14, 2), (15, 3)):
            run = engine(num_chunks)
            for i in range(3):
                run.add([i] * 8, 13)
            run.step()
            assert num_running(run) == fitting, num_chunks
            run.run()
            run.check_outputs()
            assert run.scheduler.stats().preemptions_total == 0

    def test_shared_chunks_are_not_needed_twice(self) -> None:
        run = engine(7)
        for i in range(3):
            run.add([9] * 16 + [i], 1)
        run.step()
        assert num_running(run) == 0  # all three came and went in one step
        run.check_outputs()
        assert run.scheduler.stats().chunks_peak == 7

    def test_evictable_chunks_count_but_not_the_own_path(self) -> None:
        run = engine(6)
        run.add([9] * 16, 1)
        run.run()
        assert run.scheduler.stats().chunks_cached == 4
        run.add([9] * 16 + [1], 5)  # 4 shared, 2 new: fits exactly
        run.step()
        assert num_running(run) == 1
        assert run.cached["r1"] == 16
        run.add([8] * 4, 1)  # nothing left: the path of r1 cannot be evicted
        run.step()
        assert num_running(run) == 1
        run.run()
        run.check_outputs()

    def test_spare_chunks_are_part_of_the_need(self) -> None:
        for spare, fitting in ((0, 3), (1, 2)):
            run = engine(5, spare_chunks=spare)
            for i in range(3):
                run.add([i] * 4, 1 if not spare else 5)
            run.step()
            assert len(run.first_deltas) == (3 if not spare else fitting)
            run.run()
            run.check_outputs()

    def test_beams_to_be_forked_are_part_of_the_need(self) -> None:
        run = engine(16)
        run.add([1] * 8, 30)  # ten chunks in the end
        run.step()
        run.add([2] * 4, 17, beam_width=3)  # one chunk of prompt and four for each beam
        run.run()
        run.check_outputs()
        assert run.scheduler.stats().preemptions_total == 0

    def test_a_head_that_does_not_fit_is_not_overtaken(self) -> None:
        run = engine(8)
        run.add([1] * 16, 9)
        run.step()
        run.add([2] * 16, 9)
        small = run.add([3], 1)
        run.step()
        assert small not in run.first_deltas
        run.run()
        run.check_outputs()

    def test_finished_lengths_replace_the_first_guess(self) -> None:
        lengths = OutputLengths(0.75)
        assert lengths.expected == FIRST_EXPECTED_TOKENS
        for length in (10, 20, 30, 40):
            lengths.add(length)
        assert lengths.expected == 40
        for _ in range(600):
            lengths.add(7)
        assert lengths.expected == 7

    def test_short_outputs_let_more_start(self) -> None:
        run = engine(40)
        run.scheduler._admission.lengths.add(5)
        for i in range(4):
            run.add([i] * 8, 100)
        run.step()
        assert num_running(run) == 4
        run.run()
        run.check_outputs()
        assert run.scheduler.stats().preemptions_total > 0


class TestAlone:
    @pytest.mark.parametrize("spare", [0, 1, 2])
    @pytest.mark.parametrize("num_prompt", [1, 3, 4, 5, 8, 9])
    @pytest.mark.parametrize("max_tokens", [1, 4, 5, 8])
    def test_in_a_pool_of_exactly_its_size(
        self, num_prompt: int, max_tokens: int, spare: int
    ) -> None:
        num_chunks = -(-(num_prompt + max_tokens - 1) // 4)
        run = engine(num_chunks, spare_chunks=spare)
        run.add(list(range(num_prompt)), max_tokens)
        run.run()
        run.add(list(range(num_prompt)), max_tokens)  # all of it is its own path now
        run.run()
        run.add([*range(num_prompt - 1), 49], max_tokens)  # what it copies from is in the way
        run.run()
        run.check_outputs()
        assert run.scheduler.stats().preemptions_total == 0

    def test_pins_give_way_to_a_request_that_needs_the_pool(self) -> None:
        run = engine(4)
        run.add([1] * 8, 1, pin_seconds=1e9)
        run.run()
        assert run.scheduler.stats().pinned_chunks == 2
        run.add([2] * 12, 5)
        run.run()
        run.check_outputs()
        assert run.scheduler.stats().pinned_chunks == 0

    def test_no_more_pins_than_needed_give_way_the_shortest_first(self) -> None:
        run = engine(8)
        for token, seconds in ((1, 1e9), (2, 1e3), (3, 1e6)):
            run.add([token] * 4, 1, pin_seconds=seconds)
            run.run()
        assert run.scheduler.stats().pinned_chunks == 3
        run.add([4] * 20, 5)  # six of eight chunks
        run.run()
        assert run.scheduler.stats().pinned_chunks == 2
        names = [run.add([token] * 4 + [9], 1) for token in (1, 2, 3)]
        run.run()
        run.check_outputs()
        assert [run.cached[name] for name in names] == [4, 0, 4]

    def test_a_pin_over_the_budget_is_said(self) -> None:
        run = engine(8)
        kept = run.add([1] * 16, 1, pin_seconds=60.0)
        run.run()
        refused = run.add([2] * 4, 1, pin_seconds=60.0)
        run.run()
        assert not run.first_deltas[kept].pin_refused
        assert run.first_deltas[refused].pin_refused
        assert run.scheduler.stats().pins_refused_total == 1


class TestRefusals:
    def refused(self, run: SimulatedEngine, *args: object, **options: object) -> str:
        with pytest.raises(InvalidRequestError) as error:
            run.add(*args, **options)
        assert error.value.code == "context_length_exceeded"
        assert not run.scheduler.has_unfinished()
        return error.value.message

    def test_a_prompt_beyond_the_context(self) -> None:
        message = self.refused(engine(32, max_model_len=10), [1] * 10, 1)
        assert "10 tokens" in message and "at most 9" in message

    def test_a_prompt_and_max_tokens_beyond_the_context(self) -> None:
        message = self.refused(engine(32, max_model_len=10), [1] * 6, 5)
        assert "11 tokens" in message and "at most 10" in message

    def test_a_prompt_beyond_the_pool(self) -> None:
        message = self.refused(engine(2, max_model_len=100), [1] * 9, 1)
        assert "9 tokens" in message and "at most 8" in message

    def test_a_prompt_and_max_tokens_beyond_the_pool(self) -> None:
        message = self.refused(engine(2, max_model_len=100), [1] * 5, 5)
        assert "10 tokens" in message and "at most 9" in message

    def test_the_longest_that_fits_is_served(self) -> None:
        run = engine(2, max_model_len=100)
        run.add([1] * 5, 4)
        run.add([2] * 8, 1)
        run.add([3] * 8, 0, prompt_logprobs=0)
        run.run()
        run.check_outputs()

    def test_beams_that_do_not_fit_together(self) -> None:
        message = self.refused(engine(8), [1] * 6, 20, beam_width=4)
        assert "4 beams" in message
        run = engine(8)
        run.add([1] * 6, 3, beam_width=4)
        run.run()
        run.check_outputs()


class TestFullQueue:
    def test_one_more_is_refused_with_a_time(self) -> None:
        run = engine(8, max_num_seqs=1, max_waiting=2)
        for i in range(3):
            run.add([i], 4)
        with pytest.raises(OverloadedError) as full:
            run.add([9], 4)
        assert full.value.retry_after == DEFAULT_RETRY_AFTER
        run.run()
        run.add([9], 4)
        run.run()
        run.check_outputs()

    def test_the_time_comes_from_the_drain_rate(self) -> None:
        now = 0.0
        drain = DrainRate(lambda: now)
        assert drain.seconds_for(100) == DEFAULT_RETRY_AFTER
        for _ in range(10):
            drain.add(5)
            now += 1.0
        assert drain.seconds_for(50) == 10
        assert drain.seconds_for(1) == 1
        assert drain.seconds_for(10_000) == 30


class TestPrefixOrder:
    def start(self, **limits: object) -> tuple[SimulatedEngine, list[str]]:
        run = engine(64, max_num_seqs=2, policy="prefix", **limits)
        run.add([7] * 8 + [1], 30)
        run.step()
        names = [run.add([i] * 9, 2) for i in (1, 2)]
        names.append(run.add([7] * 8 + [2], 2))
        return run, names

    def test_who_shares_with_the_last_started_goes_first(self) -> None:
        run, (_, _, sharing) = self.start()
        run.step()
        assert sharing in run.first_deltas

    def test_a_group_runs_ahead_by_at_most_the_quantum(self) -> None:
        run, (first, _, sharing) = self.start(fair_quantum=1)
        other = run.add([7] * 8 + [3], 2)
        run.run()
        started = [name for name in run.first_deltas if name in (first, sharing, other)]
        assert started == [sharing, first, other]
