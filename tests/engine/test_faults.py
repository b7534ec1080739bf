"""Fault points: what can be planted, when it happens, and that service refuses it."""

from __future__ import annotations

import pytest

from chunkllama.engine import faults
from chunkllama.engine.faults import Faults, PlantedFault, faults_from
from chunkllama.errors import ConfigError


def test_a_passage_is_counted_at_its_own_point() -> None:
    planted = Faults("step:raise@3, send:memory@1")
    planted.reach("step")
    planted.reach("commit")
    with pytest.raises(MemoryError):
        planted.reach("send")
    planted.reach("step")
    with pytest.raises(PlantedFault, match="planted at step"):
        planted.reach("step")
    planted.reach("step")


@pytest.mark.parametrize(
    ("probability", "least", "most"), [("0", 0, 0), ("1", 200, 200), ("0.5", 50, 150)]
)
def test_a_probability_is_that_of_each_passage(probability, least, most) -> None:
    planted = Faults(f"commit:raise@p={probability}")
    failures = 0
    for _ in range(200):
        try:
            planted.reach("commit")
        except PlantedFault:
            failures += 1
    assert least <= failures <= most


def test_a_file_is_one_failure_each_time_it_is_created(tmp_path) -> None:
    mark = tmp_path / "due"
    planted = Faults(f"step:raise@file={mark}, commit:memory@file={tmp_path / 'other'}")
    for _ in range(2):
        planted.reach("step")
        mark.touch()
        planted.reach("commit")
        with pytest.raises(PlantedFault):
            planted.reach("step")
        assert not mark.exists()


def test_a_failure_follows_its_file_by_so_many_passages(tmp_path) -> None:
    mark = tmp_path / "due"
    planted = Faults(f"step:raise@file={mark}+3")
    for _ in range(2):
        planted.reach("step")
        mark.touch()
        for _ in range(3):
            planted.reach("step")
        with pytest.raises(PlantedFault):
            planted.reach("step")


@pytest.mark.parametrize(
    "text",
    [
        "step",
        "step:raise",
        "step:raise@",
        "nowhere:raise@1",
        "step:sing@1",
        "step:raise@p=x",
        "step:raise@file=",
    ],
)
def test_what_cannot_be_read_is_refused(text) -> None:
    with pytest.raises(ConfigError, match="POINT:ACTION@N"):
        Faults(text)


def test_service_refuses_faults() -> None:
    assert faults_from({}) is None and faults_from({faults.TEST_MODE: "1"}) is None
    with pytest.raises(ConfigError, match="CHUNKLLAMA_TEST_MODE=1"):
        faults_from({faults.VARIABLE: "step:raise@1"})
    assert faults_from({faults.VARIABLE: "step:raise@1", faults.TEST_MODE: "1"}) is not None


@pytest.mark.parametrize(("action", "sent"), [("kill", "SIGKILL"), ("stop", "SIGSTOP")])
def test_signals_go_to_the_process_itself(monkeypatch, action, sent) -> None:
    signals = []
    monkeypatch.setattr(faults.os, "kill", lambda pid, number: signals.append((pid, number.name)))
    Faults(f"step:{action}@1").reach("step")
    assert signals == [(faults.os.getpid(), sent)]
