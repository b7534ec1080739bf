"""Streams under load, kills, hangs, failing steps and exhausted memory equal a serial oracle's.

CI runs counts; the nightly sizes run for minutes. ``tests/soak.py`` is the program.
"""

from __future__ import annotations

import os

import pytest
from soak import Options, run


def check(options: Options) -> dict:
    outcome = run(options)
    assert not outcome["failures"], outcome
    assert outcome["whole_streams"] >= options.streams
    return outcome


def test_streams_of_all_kinds_survive_three_kills() -> None:
    outcome = check(
        Options(
            seed=5, faults=("kill",), num_faults=3, streams=12, concurrency=8, num_cases=14,
            max_tokens=120, cancels=False,
        )
    )  # fmt: skip
    assert outcome["engine_restarts"] == 3 and outcome["replayed_requests"] >= 3
    assert outcome["fuzzed"] > 0


def test_load_fuzzer_and_faults_at_once() -> None:
    outcome = check(
        Options(
            seed=6, faults=("kill", "stop", "memory", "raise"), num_faults=3, streams=60,
            concurrency=8, num_cases=21, max_tokens=60,
        )
    )  # fmt: skip
    assert outcome["left_streams"] > 0


@pytest.mark.nightly
@pytest.mark.parametrize("fault", ["kill", "stop", "memory"])
def test_sixty_four_streams_survive_fifty_faults(fault) -> None:
    outcome = check(
        Options(
            seed=int(os.environ.get("SOAK_SEED", "1")), faults=(fault,), num_faults=50, streams=200,
            concurrency=64, num_cases=140, max_tokens=400, cancels=False,
        )
    )  # fmt: skip
    print({name: value for name, value in outcome.items() if name != "log"})


@pytest.mark.nightly
def test_sixty_four_streams_survive_failing_steps() -> None:
    outcome = check(
        Options(
            seed=2, faults=("raise",), streams=1000, concurrency=64, num_cases=140, max_tokens=400,
            cancels=False,
        )
    )  # fmt: skip
    assert outcome["engine_restarts"] >= 5


@pytest.mark.nightly
def test_an_hour_of_everything() -> None:
    outcome = check(Options(seed=3, minutes=60, concurrency=32, num_cases=140, max_tokens=300))
    assert outcome["api_memory_grown_mb"] < 20
