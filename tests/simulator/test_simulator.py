"""Seeded traffic against the serial oracle.

What a failing seed finds becomes a named test (tests/scheduler/test_regressions.py): the seed means
something else as soon as the traffic changes.
"""

from __future__ import annotations

import numpy as np
import pytest

from chunkllama.simulation.random_traffic import RandomTraffic

CHUNK_SIZES = [1, 2, 4, 8, 64]


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("seed", range(12))
def test_random_traffic_equals_the_serial_oracle(seed: int, chunk_size: int) -> None:
    num_steps = 100 if chunk_size == 64 else 400
    RandomTraffic(seed, chunk_size).run(num_steps)


@pytest.mark.parametrize("chunk_size", [1, 4, 8])
@pytest.mark.parametrize("seed", range(12))
def test_random_traffic_of_a_model_with_a_window_equals_the_oracle(
    seed: int, chunk_size: int
) -> None:
    """Pools are small: what windows hide is dropped while sequences run."""
    RandomTraffic(seed, chunk_size, window=(1, 5, 17)[seed % 3]).run(400)


def test_equal_seeds_give_equal_runs() -> None:
    runs = [RandomTraffic(3, 4).run(200) for _ in range(2)]
    assert runs[0].outputs == runs[1].outputs
    assert runs[0].scheduler.stats() == runs[1].scheduler.stats()
    assert runs[0].num_steps == runs[1].num_steps


@pytest.mark.nightly
@pytest.mark.parametrize("block", range(40))
def test_millions_of_steps(block: int, rng: np.random.Generator) -> None:
    steps = 0
    while steps < 50_000:
        seed, chunk_size = int(rng.integers(2**32)), int(rng.choice(CHUNK_SIZES))
        window = (None, None, 1, 9)[seed % 4]
        print(f"RandomTraffic({seed}, {chunk_size}, {window}).run(600)")
        steps += RandomTraffic(seed, chunk_size, window).run(600).num_steps
