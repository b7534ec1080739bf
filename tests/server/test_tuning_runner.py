"""What becomes of a fine-tuning job when its model, its file or the disk is in the way."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from fake_engine import MODEL, FakeEngine

from chunkllama.errors import EngineDeadError
from chunkllama.tuning.folder import EXAMPLES, STATE, Example
from chunkllama.tuning_messages import TuningOptions, TuningProgress
from chunkllama_server.api.batch.store import FileStore
from chunkllama_server.api.tuning import jobs as stored_jobs
from chunkllama_server.api.tuning.examples import StoppedError
from chunkllama_server.api.tuning.jobs import Job
from chunkllama_server.api.tuning.runner import TuningRunner
from chunkllama_server.config.tuning import TuningConfig

BUDGET = 100_000
ROWS = [Example([1, 2, 3, 4], [2, 3])]


class Place:
    """A runner over an engine whose loads wait, with one uploaded file."""

    def __init__(self, folder: Path, text_parts: tuple[Any, Any]) -> None:
        self.engine = FakeEngine(text_parts[0])
        self.store = FileStore(folder, lambda _: BUDGET, 3600)
        self.store.open()
        self.read: Callable[[Path, Callable[[], bool]], list[Example]] = lambda *_: ROWS
        self.weights = "of the model"
        self.digest: Callable[[Callable[[], None]], str] = lambda _: self.weights
        self.may_load = asyncio.Event()
        self.loading = 0
        load = self.engine.load_adapter

        async def gated(name: str, path: str) -> Any:
            self.loading += 1
            await self.may_load.wait()
            return await load(name, path)

        self.engine.load_adapter = gated  # type: ignore[method-assign]
        self.runner = self.make()

    def make(self) -> TuningRunner:
        return TuningRunner(
            self.store, self.engine, lambda *given: self.read(*given), TuningConfig(),
            lambda _: True, lambda check: self.digest(check),
        )  # fmt: skip

    async def start_again(self) -> None:
        """Another process over the same folder."""
        await self.runner.close()
        self.engine.adapters.clear()
        self.engine.tunings.clear()
        self.loading, self.runner = 0, self.make()
        await self.runner.resume()
        await self.runner.open()
        await self.runner.weights.identify()

    async def begin(self) -> Job:
        await self.runner.resume()
        file = await self.store.add_file("a", "f", iter([b"x"]), 1, purpose="fine-tune")
        await self.runner.open()
        await self.runner.weights.identify()
        chosen = {"n_epochs": 3, "batch_size": 4, "learning_rate_multiplier": 1.0}
        value: Any = {
            "id": "ftjob-12345678", "object": "fine_tuning.job", "created_at": 0,
            "finished_at": None, "estimated_finish": None, "model": MODEL,
            "fine_tuned_model": None, "organization_id": "a", "status": "validating_files",
            "hyperparameters": chosen, "training_file": file["id"], "validation_file": None,
            "method": {"type": "supervised", "supervised": {"hyperparameters": chosen}},
            "result_files": [], "trained_tokens": None, "error": None, "seed": 0,
            "user_provided_suffix": None, "integrations": [], "metadata": None,
        }  # fmt: skip
        return self.runner.add("a", value, TuningOptions())

    def used(self) -> int:
        """Bytes that jobs are charged for."""
        return BUDGET - self.store.room("a") - self.files

    async def train(self, job: Job) -> None:
        """Train until the adapter is loaded."""
        await until(lambda: self.engine.tunings)
        job.adapter.mkdir(exist_ok=True)
        (job.adapter / "adapter_model.safetensors").write_bytes(b"x" * 1000)
        self.engine.on_tuning(TuningProgress(job_id=job.id, state="succeeded"))
        await until(lambda: self.loading)

    @property
    def files(self) -> int:
        return sum(record.most_bytes for record in self.store.files)


async def until(is_true: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not is_true():
            await asyncio.sleep(0.001)


@pytest.fixture
def run(tmp_path: Path, text_parts: tuple[Any, Any]) -> Callable[..., None]:
    def whole(test: Callable[[Place], Awaitable[None]]) -> None:
        async def inner() -> None:
            place = Place(tmp_path / "files", text_parts)
            try:
                await test(place)
            finally:
                await place.runner.close()
                await place.store.close()

        asyncio.run(inner())

    return whole


def name_of(job: Job) -> str:
    return f"ft:{MODEL}::{job.id[-8:]}"


def full(*_: Any) -> None:
    """Write nothing: the disk is full."""
    raise OSError(errno.ENOSPC, "full")


def test_a_model_that_is_deleted_while_it_loads_is_seen_by_no_key(run: Any) -> None:
    async def test(place: Place) -> None:
        job = await place.begin()
        place.may_load.set()
        await place.train(job)
        await until(lambda: job.model)
        name = name_of(job)
        assert place.runner.owner(name) == "a" and place.used() == 1000
        place.may_load.clear()
        await place.start_again()
        await until(lambda: place.loading)
        (job,) = place.runner.jobs
        await place.runner.delete(job)
        assert job.model is None and place.used() == 0
        seen: list[str | None] = []
        unload = place.engine.unload_adapter

        async def noted(given: str) -> bool:
            seen.append(place.runner.owner(given))
            return await unload(given)

        place.engine.unload_adapter = noted  # type: ignore[method-assign]
        place.may_load.set()
        await until(lambda: seen)
        await until(lambda: not place.engine.adapters)
        assert seen == ["\0"] == [place.runner.owner(name)]

    run(test)


def test_jobs_and_models_of_other_weights_wait_for_them(
    run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(place: Place) -> None:
        job = await place.begin()
        place.may_load.set()
        await place.train(job)
        await until(lambda: job.model)
        other: Any = {**job.value, "status": "validating_files", "fine_tuned_model": None}
        queued = place.runner.add("a", {**other, "id": "ftjob-2"}, TuningOptions())
        await until(lambda: place.engine.tunings[-1].job_id == queued.id)
        place.weights = "of another model"
        caplog.set_level(logging.INFO, logger="chunkllama")
        caplog.clear()
        await place.start_again()
        fresh = place.runner.add("a", {**other, "id": "ftjob-3"}, TuningOptions())
        await until(lambda: place.engine.tunings)
        assert [each.job_id for each in place.engine.tunings] == [fresh.id]
        assert place.loading == 0 and place.runner.owner(name_of(job)) == "a"
        (noted,) = caplog.records
        assert noted.levelname == "INFO" and "2 jobs of another model" in noted.getMessage()
        place.weights = "of the model"
        await place.start_again()
        await until(lambda: place.engine.tunings)
        assert [each.job_id for each in place.engine.tunings] == [queued.id]
        assert list(place.engine.adapters) == [name_of(job)]

    run(test)


def test_weights_are_hashed_for_jobs_alone_and_until_the_server_ends(run: Any) -> None:
    """Requests about jobs do not wait for a hash, and neither does the end of the server."""

    async def test(place: Place) -> None:
        hashing, ended = threading.Event(), threading.Event()

        def digest(check: Callable[[], None]) -> str:
            hashing.set()
            try:
                while True:
                    check()
            finally:
                ended.set()

        model_digest, place.digest = place.digest, digest
        looked = asyncio.Event()

        async def load_all(_: Any) -> None:
            looked.set()

        place.runner._models.load_all = load_all  # type: ignore[method-assign]
        await place.runner.resume()
        await until(looked.is_set)
        assert not hashing.is_set(), "there is no job"
        await place.runner.close()
        place.digest, place.runner = model_digest, place.make()
        job = await place.begin()
        await until(lambda: place.engine.tunings)
        await place.runner.close()
        place.digest, place.runner = digest, place.make()
        await place.runner.resume()
        await place.runner.open()
        assert [each.id for each in place.runner.jobs.of("a")] == [job.id]
        await until(hashing.is_set)
        await place.runner.close()
        await place.store.close()
        assert ended.is_set()

    run(test)


def test_a_job_of_a_version_that_noted_no_weights_is_of_those_served(run: Any) -> None:
    async def test(place: Place) -> None:
        job = await place.begin()
        await until(lambda: place.engine.tunings)
        path = job.folder / "job.json"
        await place.runner.close()
        record = json.loads(path.read_bytes())
        del record["weights"]
        path.write_text(json.dumps(record))
        await place.start_again()
        await until(lambda: place.engine.tunings)
        assert json.loads(path.read_bytes())["weights"] == place.weights

    run(test)


@pytest.mark.parametrize(("stop", "ends"), [("cancel", "cancelled"), ("pause", "paused")])
def test_an_adapter_is_unloaded_though_the_engine_restarts(run: Any, stop: str, ends: str) -> None:
    async def test(place: Place) -> None:
        job = await place.begin()
        await place.train(job)
        getattr(place.runner, stop)(job)
        unload, tries = place.engine.unload_adapter, []

        async def fails_once(name: str) -> bool:
            tries.append(place.runner.owner(name))
            if len(tries) == 1:
                raise EngineDeadError("restarting")
            return await unload(name)

        place.engine.unload_adapter = fails_once  # type: ignore[method-assign]
        place.may_load.set()
        await until(lambda: len(tries) == 2 and place.runner._running is None)
        assert tries == ["\0", "\0"] and not place.engine.adapters
        assert (job.value["status"], job.model) == (
            ends,
            None,
        )
        assert (place.used() == 0) == (stop == "cancel")  # what a paused one needs stays

    run(test)


def test_a_full_disk_leaves_jobs_and_models_as_they_are(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(place: Place) -> None:
        job = await place.begin()
        await until(lambda: place.engine.tunings)
        with monkeypatch.context() as patch:
            patch.setattr(stored_jobs, "replace_file", full)
            for change in (place.runner.cancel, place.runner.pause):
                with pytest.raises(OSError, match="full"):
                    change(job)
            assert job.value["status"] == "running" and job.value["finished_at"] is None
            assert place.engine.stopped_tunings == []
        place.may_load.set()
        await place.train(job)
        await until(lambda: job.model)
        with monkeypatch.context() as patch:
            patch.setattr(stored_jobs, "replace_file", full)
            with pytest.raises(OSError, match="full"):
                await place.runner.delete(job)
            assert job.model == name_of(job) and place.runner.jobs.made_by(job.model, "a") is job
        await place.runner.delete(job)
        assert job.model is None and place.used() == 0 and not job.adapter.exists()

    run(test)


def test_a_job_that_cannot_be_written_ends_in_this_process(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(place: Place) -> None:
        job = await place.begin()
        await until(lambda: place.engine.tunings)
        with monkeypatch.context() as patch:
            patch.setattr(stored_jobs, "replace_file", full)
            place.may_load.set()
            await place.train(job)
            await until(lambda: job.has_ended and not place.engine.adapters)
        assert job.value["status"] == "failed" and job.value["fine_tuned_model"] is None
        assert job.value["error"]["code"] == "disk_error" and place.used() == 0

    run(test)


def test_files_of_a_job_are_charged_and_fit_the_room_of_its_key(run: Any) -> None:
    async def test(place: Place) -> None:
        job = await place.begin()
        await until(lambda: place.engine.tunings)
        assert place.used() == (job.folder / EXAMPLES).stat().st_size
        (job.folder / STATE).write_bytes(b"x" * 5000)
        step = TuningProgress(job_id=job.id, state="running", step=1, total_steps=3, loss=1.0)
        place.engine.on_tuning(step)
        assert place.used() > 5000 and not job.has_ended
        (job.folder / STATE).write_bytes(b"x" * BUDGET)
        place.engine.on_tuning(step)
        await until(lambda: job.has_ended)
        assert job.value["error"]["code"] == "file_budget"
        assert place.engine.stopped_tunings == [job.id] and place.used() == 0

    run(test)


def test_a_file_of_more_examples_than_the_room_is_refused(run: Any) -> None:
    async def test(place: Place) -> None:
        place.read = lambda *_: [Example(list(range(BUDGET)), [1])]
        job = await place.begin()
        await until(lambda: job.has_ended)
        assert job.value["error"]["code"] == "file_budget"
        assert place.used() == 0 and not place.engine.tunings

    run(test)


def test_a_file_is_no_longer_read_when_its_job_or_the_server_ends(run: Any) -> None:
    async def test(place: Place) -> None:
        begun: list[int] = []

        def read(_: Path, is_stopped: Callable[[], bool]) -> list[Example]:
            begun.append(0)
            deadline = time.monotonic() + 60
            while not is_stopped():
                assert time.monotonic() < deadline
                time.sleep(0.001)
            raise StoppedError

        place.read = read
        job = await place.begin()
        await until(lambda: len(begun) == 1)
        place.runner.pause(job)
        place.runner.unpause(job)  # before the thread has ended
        await until(lambda: len(begun) == 2)
        place.runner.cancel(job)
        await until(lambda: place.runner._running is None)
        assert job.value["status"] == "cancelled"
        other = place.runner.add(
            "a", {**job.value, "id": "ftjob-2", "status": "validating_files"}, TuningOptions()
        )
        await until(lambda: len(begun) == 3)
        async with asyncio.timeout(30):
            await place.runner.close()
            await place.store.close()
        assert other.value["status"] == "validating_files"  # the next process goes on

    run(test)
