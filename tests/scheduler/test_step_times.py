"""Estimates of step times: what disturbed steps may change, under a given cost of a step."""

from __future__ import annotations

import pytest

from chunkllama.scheduler.step_times import StepTimes

LIMIT = 0.1
BUDGET = 512


def cost(tokens: int) -> float:
    return 0.012 + 0.00016 * tokens


def run(times: StepTimes, sizes: list[int], factor: float = 1.0) -> None:
    for size in sizes:
        times.add(size, factor * cost(size))


def prompt(times: StepTimes, length: int) -> list[int]:
    """Compute a prompt; returns the tokens of its steps."""
    sizes = []
    while length:
        sizes.append(min(times.most(LIMIT, BUDGET), length))
        run(times, sizes[-1:])
        length -= sizes[-1]
    return sizes


@pytest.mark.parametrize("tokens", [2, 3, 9, 31, 64, 127, 300, 512])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("factor", [1.5, 5.0, 50.0])
def test_slow_first_steps_cut_no_later_prompt(tokens: int, count: int, factor: float) -> None:
    """The first steps of a process touch memory for the first time."""
    times = StepTimes()
    run(times, [tokens] * count, factor)
    run(times, [1] * 100)
    assert prompt(times, 1100) == [512, 512, 76]
    assert prompt(times, 600) == [512, 88]


def test_sizes_that_take_too_long_are_tried_three_times_and_then_again_after_1024_steps() -> None:
    times = StepTimes()
    run(times, [1] * 10)

    sizes = []
    for _ in range(12):
        sizes.append(times.most(0.03, BUDGET))
        run(times, sizes[-1:])
    assert sizes[:3] == [512] * 3
    assert all(cost(size) <= 0.03 for size in sizes[3:])
    assert min(sizes[3:]) >= 64  # interpolated between 1 and 512, not searched from below
    run(times, [1] * 2048)
    assert times.most(0.03, BUDGET) == 512, "only steps of one token are known"


def test_larger_steps_are_estimated_by_those_that_are_known() -> None:
    times = StepTimes()
    run(times, [1] * 10 + [60] * 10)
    assert times.most(LIMIT, BUDGET) == 512
    assert times.most(0.05, BUDGET) == 229
    assert times.most(0.02, BUDGET) == 50


def test_a_disturbance_ends() -> None:
    """Other work slows steps down; then larger ones are computed again as time allows."""
    times = StepTimes()
    run(times, [1] * 10)
    for _ in range(40):
        size = times.most(LIMIT, BUDGET)
        run(times, [1, size], 3.0)
    assert times.most(LIMIT, BUDGET) < 256
    sizes = [size for _ in range(40) for size in prompt(times, 1024)]
    assert sizes[-1] >= 128
    run(times, [1] * 2048)
    assert max(prompt(times, 1024)) == 512
