"""Trainings between steps: what fits below the ceiling, and answers while one runs."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import write_tiny_model

from chunkllama.config import EngineConfig
from chunkllama.engine.build import build_engine
from chunkllama.engine.core import EngineCore
from chunkllama.engine.tuner import StepBudget, Tuner
from chunkllama.messages import EngineRequest
from chunkllama.models.config import read_spec
from chunkllama.sampling_params import SamplingParams
from chunkllama.tuning.files import write_state
from chunkllama.tuning.folder import ADAPTER, STATE, Example, write_examples
from chunkllama.tuning_messages import StartTuning, StopTuning, TuningOptions, TuningProgress


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_pieces_fit_below_the_ceiling_with_the_longest_recent_step() -> None:
    clock = Clock()
    budget = StepBudget(1.0, clock)

    def step(seconds: float) -> None:
        budget.end()
        clock.now += seconds
        budget.begin()

    def piece(seconds: float) -> None:
        budget.begin_piece()
        clock.now += seconds
        budget.end_piece("forward")

    step(0.5)
    assert budget.fits("forward")  # nothing is known of it yet
    piece(0.2)
    assert budget.fits("forward")  # 0.5 + 0.2 + 1.1 * 0.2
    piece(0.2)
    assert not budget.fits("forward")
    step(0.1)  # the next may again be as long as the one before
    assert budget.fits("forward")
    piece(0.2)
    piece(0.2)
    assert not budget.fits("forward")
    step(1.5)
    assert not budget.fits("forward") and not budget.fits("head")
    for _ in range(40):
        step(0.1)
    assert budget.fits("forward")
    piece(2.0)
    step(0.1)
    assert not budget.fits("forward") and budget.fits("head")
    for _ in range(20):  # longer than the ceiling by itself, and yet it comes to an end
        budget.put_off("forward")
        step(0.1)
    assert budget.fits("forward")


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> EngineCore:
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder)
    made = build_engine(
        EngineConfig.from_flat(model=str(folder), threads=1, num_chunks=32, dtype="float32")
    )
    yield made
    made.close()


def start(folder: Path, max_step_seconds: float = 60.0, **changes: object) -> StartTuning:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(97, 122, (8, 30), generator=generator).tolist()
    write_examples(folder, [Example(row, list(range(10, 30))) for row in ids])
    options = TuningOptions(n_epochs=1, batch_size=2, learning_rate=1e-3)
    fields = {"options": options, "max_bytes": 1 << 30, "slice_tokens": 16, **changes}
    return StartTuning(job_id="j", folder=str(folder), max_step_seconds=max_step_seconds, **fields)  # type: ignore[arg-type]


def answers(core: EngineCore, between: list[TuningProgress] | None) -> dict[str, list[int]]:
    """Greedy answers of several requests, with pieces of the training between their steps."""
    found: dict[str, list[int]] = {}
    for number in range(4):
        core.add(
            EngineRequest(
                request_id=str(number),
                prompt_token_ids=list(range(40, 60 + 7 * number)),
                sampling=SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, seed=1),
            )
        )
    while core.has_work():
        for delta in core.step():
            assert delta.error is None
            for choice in delta.choices:
                found.setdefault(delta.request_id, []).extend(choice.token_ids)
        if between is not None:
            between += core.tune()
    return found


def run(core: EngineCore, reports: list[TuningProgress]) -> list[TuningProgress]:
    deadline = time.monotonic() + 120
    while core.is_tuning():
        assert time.monotonic() < deadline
        reports += core.tune()
    return reports


def test_answers_stay_right_while_a_job_runs_and_the_job_ends(
    core: EngineCore, tmp_path: Path
) -> None:
    expected = answers(core, None)
    reports: list[TuningProgress] = []
    assert core.tuning_command(start(tmp_path)) == []
    while not reports:  # it is loaded in a thread
        reports += core.tune()
    assert reports[0].total_steps == 4 and reports[0].loss is None
    while core.is_tuning():
        assert answers(core, reports) == expected
    losses = [report.loss for report in reports if report.loss is not None]
    assert len(losses) == 4 and reports[-1].state == "succeeded"
    assert (tmp_path / ADAPTER / "adapter_model.safetensors").exists()
    assert answers(core, None) == expected


def test_nothing_is_trained_beside_requests_without_room_below_the_ceiling(
    core: EngineCore, tmp_path: Path
) -> None:
    core.tuning_command(start(tmp_path, max_step_seconds=1e-9))
    reports: list[TuningProgress] = []
    while not reports:
        reports += core.tune()
    answers(core, reports)
    assert [report.loss for report in reports] == [None]
    assert run(core, reports)[-1].state == "succeeded"  # while nothing else runs


def test_a_stopped_job_keeps_its_state_and_continues(core: EngineCore, tmp_path: Path) -> None:
    core.tuning_command(start(tmp_path))
    reports: list[TuningProgress] = []
    while sum(report.loss is not None for report in reports) < 2:
        reports += core.tune()
    (stopped,) = run(core, core.tuning_command(StopTuning(job_id="j")))
    assert stopped == TuningProgress(job_id="j", state="stopped")
    assert (tmp_path / STATE).exists()
    core.tuning_command(start(tmp_path))
    reports = run(core, [])
    assert reports[0].step in (1, 2) and reports[0].loss is None
    assert [report.step for report in reports[1:-1]] == list(range(reports[0].step + 1, 5))
    assert reports[-1].state == "succeeded"


def test_a_stop_does_not_wait_for_the_state_that_is_being_written(
    core: EngineCore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_free = threading.Event()

    def write(*arguments: Any) -> None:
        assert is_free.wait(60)
        write_state(*arguments)

    monkeypatch.setattr("chunkllama.tuning.trainer.write_state", write)
    core.tuning_command(start(tmp_path, run=1))
    reports: list[TuningProgress] = []
    while len(reports) < 2 or core.tuner._run.next_piece != "wait":
        reports += core.tune()
    assert core.tuning_command(StopTuning(job_id="j")) == []
    assert core.tune() == [] and core.is_tuning()
    assert core.tuning_command(start(tmp_path, run=2)) == []
    assert core.tune() == []
    is_free.set()
    reports = run(core, [])
    # The next training of the folder begins behind the state, so that no step is lost.
    assert [(each.state, each.run, each.step) for each in reports[:2]] == [
        ("stopped", 0, 0),
        ("running", 2, 1),
    ]
    assert reports[-1].state == "succeeded" and reports[-1].run == 2


def test_several_ranks_do_not_train(tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    tuner = Tuner(tmp_path, read_spec(tmp_path), "tiny", 64, torch.device("cpu"), num_ranks=2)
    (failed,) = tuner.start(start(tmp_path))
    assert failed.state == "failed" and not tuner.is_active
    assert failed.error == "fine-tuning needs tensor_parallel_size 1"
    tuner.close()


def test_a_job_that_cannot_run_fails_with_one_line(core: EngineCore, tmp_path: Path) -> None:
    core.tuning_command(start(tmp_path, max_bytes=1 << 16))
    (failed,) = run(core, [])
    assert failed.state == "failed" and failed.error.startswith("finetune_memory: an example of")
    core.tuning_command(start(tmp_path))
    (busy,) = core.tuning_command(start(tmp_path))
    assert isinstance(busy, TuningProgress) and "one at a time" in busy.error
    core.tuning_command(StopTuning(job_id="j"))
    (tmp_path / "examples.msgpack").unlink()
    core.tuning_command(
        StartTuning(
            job_id="k", folder=str(tmp_path), options=TuningOptions(), max_step_seconds=1.0,
            max_bytes=1 << 30, slice_tokens=16,
        )
    )  # fmt: skip
    (failed,) = run(core, [])
    assert failed.state == "failed" and "cannot be read" in failed.error
