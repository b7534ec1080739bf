"""What waiting costs: jobs and lines that cannot run yet, and files that have not expired."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from chunkllama_server.api.batch import turns as turns_module
from chunkllama_server.api.batch.store import FileStore
from chunkllama_server.api.batch.turns import Turn, Turns


class WaitingJob:
    """What a turn needs of a job."""

    def __init__(self) -> None:
        self.is_stopped = False
        self.asking = asyncio.Lock()


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each task has slept between two looks."""
    counted: Counter[str] = Counter()
    sleep = asyncio.sleep

    async def noting(seconds: float) -> None:
        task = asyncio.current_task()
        assert task is not None
        counted[task.get_name()] += 1
        await sleep(0)

    monkeypatch.setattr(turns_module.asyncio, "sleep", noting)
    return counted


def test_one_job_looks_for_a_gap_however_many_wait(sleeps: Counter[str]) -> None:
    """Hundreds of keys have a job each: a hundred looks a second of each would hold the loop."""

    async def main() -> None:
        has_gap = False
        turns = Turns(lambda: has_gap, lambda: 1)
        jobs: list[Any] = [WaitingJob() for _ in range(50)]
        tasks = [
            asyncio.create_task(turns.take(job), name=f"job {i}") for i, job in enumerate(jobs)
        ]
        while sleeps["job 0"] < 200:
            await asyncio.sleep(0)
        assert [name for name in sleeps if name.startswith("job")] == ["job 0"]
        jobs[7].is_stopped = jobs[49].is_stopped = True
        assert await tasks[7] is None and await tasks[49] is None, "though there is no gap"
        has_gap = True
        order: list[Turn] = []
        for number, task in enumerate(tasks):
            turn = await task
            if number not in (7, 49):
                assert turn is not None and turns.num_running == 1
                turn.leave()
                order.append(turn)
        assert len(order) == 48 and not turns._waiting

    asyncio.run(main())


def test_a_job_that_leaves_lets_the_next_one_look(sleeps: Counter[str]) -> None:
    """Its task is cancelled while it is the first, as its server ends or its batch expires."""

    async def main() -> None:
        turns = Turns(lambda: False, lambda: 1)
        first: Any = WaitingJob()
        second: Any = WaitingJob()
        tasks = [asyncio.create_task(turns.take(job), name=name)
                 for job, name in ((first, "first"), (second, "second"))]  # fmt: skip
        while sleeps["first"] < 3:
            await asyncio.sleep(0)
        tasks[0].cancel()
        while sleeps["second"] < 3:
            await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.wait(tasks)
        assert not turns._waiting

    asyncio.run(main())


def test_files_are_not_looked_through_before_one_expires(tmp_path, monkeypatch) -> None:
    """A look at all files of all keys each second grows with them."""
    now = 1000.0
    looks: list[str] = []
    end = FileStore._end

    def noting(store: FileStore, record: Any) -> float:
        looks.append(record.id)
        return end(store, record)

    async def main() -> None:
        nonlocal now
        store = FileStore(tmp_path / "files", lambda _: 1 << 20, 100.0, lambda: now)
        store.open()
        short, long = [
            (await store.add_file("a", "x", iter([b"ab"]), 2, seconds))["id"]
            for seconds in (50.0, None)
        ]
        monkeypatch.setattr(FileStore, "_end", noting)
        for found in ((short, long), (None, long), (None, None)):
            for _ in range(40):
                now += 1
                paths = [store.file_path("a", file_id) for file_id in (short, long)]
                assert [path is not None for path in paths] == [each is not None for each in found]
            assert len(looks) <= 3
            looks.clear()
            now += 10
        assert store.room("a") == 1 << 20
        await store.close()

    asyncio.run(main())
