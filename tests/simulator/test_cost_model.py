"""Cost models: the work of a step, fitting, and the files of users."""

from __future__ import annotations

import json

import numpy as np
import pytest

from chunkllama.errors import ConfigError
from chunkllama.scheduler.output import ScheduledSlice, SchedulerOutput
from chunkllama.simulation.cost_model import StepCost, fit_cost, read_cost, step_work


def piece(start: int, count: int, shared: int) -> ScheduledSlice:
    return ScheduledSlice(0, start, np.zeros(count, np.int32), np.zeros(9, np.int32), shared, True)


def test_shared_chunks_are_read_once() -> None:
    slices = [piece(40, 1, 0), piece(36, 1, 2), piece(0, 5, 0)]
    assert step_work(SchedulerOutput(1, slices, 0), 16) == (
        1,
        1 + 1 + 5,
        3,
        41 + (37 - 32) + 5,
        40 + 36 + (0 + 1 + 2 + 3 + 4),
    )


def test_seconds_are_the_sum_of_the_work() -> None:
    output = SchedulerOutput(1, [piece(10, 2, 0)], 0)
    cost = StepCost(step=1, token=10, sequence=100, read=1000, attention=10_000)
    assert cost.seconds(output, 16) == 1 + 20 + 100 + 12_000 + 21 * 10_000


def test_a_fit_recovers_the_cost_it_was_made_from() -> None:
    rng = np.random.default_rng(0)
    truth = StepCost(step=8e-3, token=1e-4, sequence=2e-4, read=1e-6, attention=0.0)
    work = np.column_stack(
        [
            np.ones(200),
            rng.integers(1, 512, 200),
            rng.integers(1, 64, 200),
            rng.integers(1, 9000, 200),
            rng.integers(0, 1000, 200),
        ]
    )
    values = np.array([truth.step, truth.token, truth.sequence, truth.read, truth.attention])
    fitted, error = fit_cost(work.tolist(), (work @ values).tolist())
    assert error < 1e-9
    assert list(fitted.as_dict().values()) == pytest.approx(values.tolist(), abs=1e-12)


def test_a_fit_makes_nothing_negative() -> None:
    work = [(1, n, 1, 10 * n, 0) for n in range(1, 50)]
    seconds = [1 + n - 0.01 * 10 * n for n in range(1, 50)]
    fitted, error = fit_cost(work, seconds)
    assert min(fitted.as_dict().values()) >= 0
    assert error < 1e-6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a JSON object"),
        ("[]", "not a JSON object"),
        ('{"seconds": 3}', "seconds"),
        ('{"seconds": {"tokens": 1}}', "unknown field tokens"),
        ('{"token": -1}', r"token in .* must be seconds in \[0, 1e6\)"),
        ('{"token": true}', "token in"),
        ('{"read": 1}', "makes steps free"),
    ],
)
def test_unusable_cost_files_are_one_line(tmp_path, text, message) -> None:
    file = tmp_path / "cost.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_cost(file)
    assert "\n" not in str(caught.value)


def test_a_missing_cost_file_is_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*none\.json: No such file"):
        read_cost(tmp_path / "none.json")


def test_a_written_cost_file_is_read_again(tmp_path) -> None:
    cost = StepCost(step=0.5, token=0.25)
    file = tmp_path / "cost.json"
    file.write_text(json.dumps({"seconds": cost.as_dict(), "source": {}}))
    assert read_cost(file) == cost
