"""Streams under load, kills, hangs, failing steps and exhausted memory equal a serial oracle's.

CI runs counts; the nightly sizes run for minutes and write their outcome to
``benchmarks/results/soak/``. ``tests/soak.py`` is the program.
"""

from __future__ import annotations

from typing import Any

import pytest
from soak import Options, main, run


@pytest.fixture
def seed(child_environment) -> str:
    """The seed of this run of the tests."""
    return child_environment["CHUNKLLAMA_TEST_SEED"]


def check(outcome: dict[str, Any], streams: int = 0) -> dict[str, Any]:
    assert not outcome["failures"], outcome
    assert outcome["whole_streams"] >= streams
    return outcome


def check_saved(name: str, arguments: str) -> dict[str, Any]:
    """Run a command line of the program; its outcome is kept."""
    return check(main([*arguments.split(), "--save", f"benchmarks/results/soak/{name}.json"]))


@pytest.mark.nightly
def test_streams_of_all_kinds_survive_three_kills() -> None:
    options = Options(
        seed=5, faults=("kill",), num_faults=3, streams=12, concurrency=8, num_cases=14,
        max_tokens=120, cancels=False,
    )  # fmt: skip
    outcome = check(run(options), options.streams)
    assert outcome["engine_restarts"] >= 3 and outcome["replayed_requests"] >= 1
    assert outcome["fuzzed"] > 0


def test_load_fuzzer_and_faults_at_once() -> None:
    options = Options(
        seed=6, faults=("stop", "memory", "raise"), num_faults=3, streams=30, concurrency=8,
        num_cases=14, max_tokens=60,
    )  # fmt: skip
    outcome = check(run(options), options.streams)
    assert {name.rpartition(":")[2] for name in outcome["faults"]} == {*options.faults}
    assert outcome["left_streams"] > 0 and outcome["engine_restarts"] >= 3


@pytest.mark.nightly
@pytest.mark.parametrize("fault", ["kill", "stop", "memory", "raise"])
def test_sixty_four_streams_survive_fifty_faults(fault, seed) -> None:
    outcome = check_saved(
        f"64-streams-{fault}",
        f"--seed {seed} --faults {fault} --num-faults 50 --streams 200 --concurrency 64"
        " --num-cases 140 --max-tokens 400 --no-cancels",
    )
    assert outcome["engine_restarts"] >= 50 and outcome["most_streams_at_once"] == 64


@pytest.mark.nightly
def test_loops_without_end_are_hangs(seed) -> None:
    outcome = check_saved(
        "16-streams-spin",
        f"--seed {seed} --faults spin --num-faults 3 --streams 30 --num-cases 21 --no-cancels",
    )
    assert outcome["watchdog_kills"] >= 3


@pytest.mark.nightly
def test_a_thousand_streams_beside_two_thousand_idle_connections(seed) -> None:
    outcome = check_saved(
        "1000-streams",
        f"--seed {seed} --faults= --streams 1000 --concurrency 1000 --idle-sockets 2000"
        " --num-cases 140 --no-cancels --flags=--max-waiting=2000",
    )
    assert outcome["most_streams_at_once"] == 1000 and outcome["most_descriptors"] >= 3000


@pytest.mark.nightly
def test_an_hour_of_everything(seed) -> None:
    outcome = check_saved(
        "60-minutes",
        f"--seed {seed} --minutes 60 --fault-seconds 10 --concurrency 32 --num-cases 140"
        " --max-tokens 300",
    )
    assert outcome["api_memory_drift_mb"] < 20
