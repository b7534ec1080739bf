"""What is known of the time that rows of guesses take, and what follows from it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from chunkllama.scheduler.draft_search import MAX_MATCH, find_continuation
from chunkllama.scheduler.draft_state import DraftState
from chunkllama.scheduler.drafts import MAX_DRAFT, MAX_ROWS
from chunkllama.scheduler.output import SampledTokens, SchedulerOutput
from chunkllama.scheduler.step_cost import MIN_GAIN, StepCost
from chunkllama.simulation.engine import SimulatedEngine


def measured(count: int, plain: float, *drafted: tuple[int, float]) -> StepCost:
    """Plain steps of ``count`` sequences, then steps (guesses, seconds)."""
    cost = StepCost()
    for _ in range(5):
        cost.add(count, 0, plain)
    for rows, seconds in drafted:
        cost.add(count, rows, seconds)
    return cost


def best_gain(cost: StepCost, count: int, chance: float) -> float:
    """The most tokens per second, relative to a plain step, if every guess has such a chance."""
    rows = np.arange(1, cost.most_drafts(count) + 1)
    return float(((count + chance * rows) / count / cost.curve(count, len(rows))).max())


@pytest.mark.parametrize("count", [1, 2, 6, 16, 32, 64])
def test_one_disturbed_step_does_not_end_guesses_that_pay(count: int) -> None:
    """Rows take a fifth of what those of a plain step do; the first one took three steps."""
    cost = measured(count, 0.1, (count, 0.3))
    assert best_gain(cost, count, 0.95) > MIN_GAIN
    for _ in range(3):
        cost.add(count, count, 0.1 * (1.2 if count > 1 else 1.05))
    assert best_gain(cost, count, 0.8) > MIN_GAIN


@pytest.mark.parametrize("count", [1, 6, 32])
def test_guesses_that_never_pay_are_soon_left_out(count: int) -> None:
    cost = measured(count, 0.1)
    tries = 0
    while best_gain(cost, count, 0.9) > MIN_GAIN:
        rows = min(cost.most_drafts(count), 2 * count)
        cost.add(count, rows, 0.1 * (1 + rows / count))
        tries += 1
    assert tries <= 3


def test_what_one_number_of_sequences_shows_is_used_for_others() -> None:
    steps = [(rows, 0.1 + 0.0002 * rows) for rows in (8, 16, 32, 64)]
    cost = measured(8, 0.1, *steps)
    for _ in range(5):
        cost.add(7, 0, 0.09)
    assert cost.most_drafts(7) == 64
    assert cost.seconds(7, 64) == pytest.approx(1 + 0.0128 / 0.09, rel=0.05)


def test_the_curve_is_linear_between_what_was_measured() -> None:
    cost = measured(4, 1.0, *[(rows, 1.0 + rows / 40) for rows in (4, 16) for _ in range(200)])
    expected = 1 + np.arange(1, 33) / 40
    assert np.allclose(cost.curve(4, 32), expected, rtol=0.01)
    assert cost.seconds(4, 7) == cost.curve(4, 32)[6]


def repeating(length: int, period: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.resize(np.arange(100, 100 + period, dtype=np.int32), length)


@pytest.mark.parametrize("period", [1, 3, 8, 50])
def test_a_text_that_repeats_itself_is_followed_without_a_search(period: int) -> None:
    own = repeating(200, period)
    state = DraftState()
    assert state.followed(own) is None
    found = find_continuation(own[:150], own[:150])
    assert found is not None
    state.follow(found[0], 150)
    assert state.followed(own[:150]) == found
    for length in (151, 155, 200):
        followed = state.followed(own[:length])
        assert followed is not None
        start, matched = followed
        assert matched == MAX_MATCH
        assert own[start - MAX_MATCH : start].tolist() == own[length - MAX_MATCH : length].tolist()
    other = np.append(own, np.int32(7))
    assert state.followed(other) is None


def drafting(
    num_sequences: int, eos_token_ids: frozenset[int] = frozenset(), **sampling: Any
) -> list[SchedulerOutput]:
    """Steps of sequences whose answers are predicted, where rows cost little."""

    def run(engine: SimulatedEngine, answers: list[list[int]]) -> list[SchedulerOutput]:
        steps: list[SchedulerOutput] = []
        compute = engine.model.execute

        def execute(output: SchedulerOutput) -> SampledTokens:
            engine.now += 0.1 + 0.0005 * output.num_tokens
            steps.append(output)
            return compute(output)

        engine.model.execute = execute  # type: ignore[method-assign]
        for number, answer in enumerate(answers):
            prompt = [number, number + 1, 0, 1]
            engine.add(prompt, 200, prediction_token_ids=answer, **sampling)
        engine.run()
        engine.check_outputs()
        return steps

    def engine(*, speculates: bool) -> SimulatedEngine:
        return SimulatedEngine(
            900, 16, vocab_size=60, check=False, speculates=speculates, eos_token_ids=eos_token_ids
        )

    plain = engine(speculates=False)
    run(plain, [[]] * num_sequences)
    return run(engine(speculates=True), [[*each, 0] for each in plain.outputs.values()])


@pytest.mark.parametrize("num_sequences", [1, 6, 16, 32, 48])
def test_many_sequences_have_guesses_too(num_sequences: int) -> None:
    steps = drafting(num_sequences)
    rows = [sum(piece.num_drafts for piece in step.slices) for step in steps]
    assert max(rows) == min(MAX_DRAFT * num_sequences, MAX_ROWS)
    assert len(steps) < 120, "much less than the 200 steps of plain decoding"


def test_what_does_not_end_a_sequence_is_guessed_too() -> None:
    """A request that ignores ends of text has guesses at them, and behind them."""
    ends = frozenset(range(30))
    steps = drafting(1, ends, ignore_eos=True)
    guesses = [t for s in steps for p in s.slices for t in p.token_ids[1:].tolist() if p.num_drafts]
    assert ends & set(guesses)
    assert max(piece.num_drafts for step in steps for piece in step.slices) == MAX_DRAFT
