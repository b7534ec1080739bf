"""The dashboard's history: one snapshot a second, of the last minutes and of one engine process."""

from __future__ import annotations

from chunkllama.messages import EngineStats
from chunkllama_server.metrics.history import SECONDS, StatsHistory


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_one_snapshot_a_second_with_its_age() -> None:
    clock = Clock()
    history = StatsHistory(clock)
    for step in range(20):
        history.add(EngineStats(steps_total=step, generation_tokens_total=10 * step))
        clock.now += 0.5
    rows = history.rows()
    assert [row["steps_total"] for row in rows] == [*range(0, 20, 2)]
    assert [row["age_seconds"] for row in rows] == [10.0 - second for second in range(10)]
    assert rows[-1]["generation_tokens_total"] == 180


def test_what_is_old_or_of_another_engine_process_is_left_out() -> None:
    clock = Clock()
    history = StatsHistory(clock)
    for step in range(2 * SECONDS):
        history.add(EngineStats(steps_total=step))
        clock.now += 1
    assert len(history.rows()) == SECONDS
    clock.now += SECONDS - 10
    assert len(history.rows()) == 10
    history.add(EngineStats(steps_total=1))
    assert [row["steps_total"] for row in history.rows()] == [1]
