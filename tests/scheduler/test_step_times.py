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
    if factor * cost(tokens) > 3 * LIMIT:  # so slow that its size is not tried
        assert len(prompt(times, 1100)) <= (9 if factor * cost(tokens) > 1 else 4)
    else:
        assert prompt(times, 1100) == [512, 512, 76]
    assert prompt(times, 600) == [512, 88]


def test_sizes_that_take_too_long_are_tried_three_times() -> None:
    times = StepTimes()
    run(times, [1] * 10)
    sizes = []
    for _ in range(12):
        sizes.append(times.most(0.05, BUDGET))
        run(times, sizes[-1:])
    assert sizes[:3] == [512] * 3
    assert all(cost(size) <= 0.05 for size in sizes[3:])
    assert min(sizes[3:]) >= 196  # interpolated between 1 and 512, not searched from below
    run(times, [1] * 2048)
    for _ in range(2):  # they may have been disturbed
        assert times.most(0.05, BUDGET) == 512
        run(times, [512])
    assert times.most(0.05, BUDGET) < 512


def test_a_size_that_takes_over_three_times_as_long_is_tried_once() -> None:
    """60 s for 8,192 tokens: the next steps have few, and show what others would take."""
    times = StepTimes()
    for _ in range(100):
        times.add(1, 0.05)
    assert times.most(0.15, 8192) == 8192
    for _ in range(3):
        times.add(8192, 60.0)
        for _ in range(1200):
            size = times.most(0.15, 8192)
            assert size < 64
            times.add(size, 0.05 + 0.0073 * size)
            times.add(1, 0.05)


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
