"""Seeded traffic against the serial oracle; a failing seed goes into REGRESSIONS."""

from __future__ import annotations

import pytest
from random_traffic import RandomTraffic

CHUNK_SIZES = [1, 2, 4, 8, 64]
REGRESSIONS = [
    # beams whose prompt is kept out of the cache each hold all of it
    (156, 4, 150),
    # a failing request whose taken-over leaf was being copied in the same step
    (235, 4, 150),
    # a pin put on a node that another sequence was still filling
    (5122, 4, 600),
]


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("seed", range(12))
def test_random_traffic_equals_the_serial_oracle(seed: int, chunk_size: int) -> None:
    num_steps = 100 if chunk_size == 64 else 400
    RandomTraffic(seed, chunk_size).run(num_steps)


@pytest.mark.parametrize(("seed", "chunk_size", "num_steps"), REGRESSIONS)
def test_failing_seeds_of_the_past(seed: int, chunk_size: int, num_steps: int) -> None:
    RandomTraffic(seed, chunk_size).run(num_steps)


def test_equal_seeds_give_equal_runs() -> None:
    runs = [RandomTraffic(3, 4).run(200) for _ in range(2)]
    assert runs[0].outputs == runs[1].outputs
    assert runs[0].scheduler.stats() == runs[1].scheduler.stats()
    assert runs[0].num_steps == runs[1].num_steps


@pytest.mark.nightly
@pytest.mark.parametrize("block", range(40))
def test_millions_of_steps(block: int) -> None:
    steps = 0
    seed = 1_000_000 + 10_000 * block
    while steps < 50_000:
        steps += RandomTraffic(seed, CHUNK_SIZES[seed % 5]).run(600).num_steps
        seed += 1
