"""Batches that go on under stricter limits, or without room, and keys whose lines are always
refused."""

from __future__ import annotations

import errno
import time
from pathlib import Path

import pytest
from batch_helpers import (
    BUDGET,
    answers,
    begin,
    encoded,
    encoded_result,
    ended,
    held_job,
    line,
    runner_of,
    until,
    write_record,
)

from chunkllama_server.api.batch import runner as runner_module
from chunkllama_server.api.batch.disk import append
from chunkllama_server.api.batch.runner import BatchRunner
from chunkllama_server.api.batch.store import FileStore
from chunkllama_server.api.batch.turns import Reply

# -- resumed jobs -----------------------------------------------------------------------------


def interrupted_job(start_server, folder: Path, num_lines: int, num_done: int, status: str):
    """A batch of lines "r0", "r1", ... whose server has ended, and of which the first have
    results."""
    server = start_server(files_dir=folder)
    batch = held_job(server, [line(f"r{i}") for i in range(num_lines)])
    store = runner_of(server).store
    record = store.batches.get(batch.id, "")
    server.stop()
    server.engine.gate.set()
    for number in range(1, num_done + 1):
        append(store.results_path(record), encoded_result(number, f"r{number - 1}"))
    record.value["status"] = status
    write_record(store, record)
    return batch


def check_room(store: FileStore, folder: Path, budget: int = BUDGET) -> None:
    """No results are left, and nothing is charged but files and records."""
    assert not list(folder.rglob("*.results"))
    charged = sum(each.most_bytes for each in [*store.files, *store.batches])
    assert store.room("") == budget - charged


@pytest.mark.parametrize(
    ("most_lines", "last", "code"),
    [
        (4, encoded([line("r5")]), "too_many_lines"),
        (6, b"{", "invalid_json_line"),
        (6, encoded([line("r0")]), "duplicate_custom_id"),
    ],
)
def test_a_file_that_no_longer_passes_keeps_its_results(
    start_server, tmp_path, most_lines, last, code
) -> None:
    """Of the other lines, those that can be read are in the error file."""
    folder = tmp_path / "files"
    batch = interrupted_job(start_server, folder, 6, 3, "in_progress")
    (data,) = folder.rglob("*.data")
    data.write_bytes(encoded([line(f"r{i}") for i in range(5)]) + last)
    second = start_server(files_dir=folder, batch_lines=most_lines)
    with second.client() as client:
        batch = ended(client, client.batches.retrieve(batch.id))
        done = [row["custom_id"] for row in answers(client, batch.output_file_id)]
        rest = answers(client, batch.error_file_id)
    assert (batch.status, batch.errors.data[0].code) == ("failed", code)
    assert (batch.request_counts.completed, batch.request_counts.total) == (3, 6)
    assert done == ["r0", "r1", "r2"]
    assert [row["custom_id"] for row in rest] == ["r3", "r4"]
    assert {row["error"]["code"] for row in rest} == {"batch_failed"}
    assert second.engine.requests == []
    until(lambda: not runner_of(second)._jobs)
    check_room(runner_of(second).store, folder)


def test_a_file_that_no_longer_passes_without_results(start_server, tmp_path) -> None:
    """The first result was cut; its room is given back."""
    folder = tmp_path / "files"
    batch = interrupted_job(start_server, folder, 6, 0, "in_progress")
    (record,) = folder.rglob("batch_*.json")
    record.with_suffix(".results").write_bytes(encoded_result(1, "r0")[:-9])
    second = start_server(files_dir=folder, batch_lines=4)
    with second.client() as client:
        batch = ended(client, client.batches.retrieve(batch.id))
    assert (batch.status, batch.errors.data[0].code) == ("failed", "too_many_lines")
    assert batch.output_file_id is None and batch.error_file_id is None
    until(lambda: not runner_of(second)._jobs)
    check_room(runner_of(second).store, folder)


@pytest.mark.parametrize(
    ("status", "num_done", "expected"),
    [("finalizing", 6, "completed"), ("cancelling", 3, "cancelled")],
)
def test_a_job_that_was_over_ends_as_it_would_have(
    start_server, tmp_path, status, num_done, expected
) -> None:
    """No line is left to run, so that the limits of lines do not count."""
    batch = interrupted_job(start_server, tmp_path / "files", 6, num_done, status)
    second = start_server(files_dir=tmp_path / "files", batch_lines=4)
    with second.client() as client:
        batch = ended(client, client.batches.retrieve(batch.id))
        assert len(answers(client, batch.output_file_id)) == num_done
    assert (batch.status, batch.errors) == (expected, None)


@pytest.mark.parametrize(
    ("status", "end", "codes"),
    [
        ("cancelling", "cancelled", []),
        ("finalizing", "expired", []),
        ("in_progress", "failed", ["file_budget"]),
    ],
)
def test_lines_without_room_are_not_named(start_server, tmp_path, status, end, codes) -> None:
    """The budget is smaller than before; what is answered is kept."""
    folder = tmp_path / "files"
    batch = interrupted_job(start_server, folder, 60, 3, status)
    second = start_server(files_dir=folder, file_bytes=1)
    with second.client() as client:
        batch = ended(client, client.batches.retrieve(batch.id))
        assert len(answers(client, batch.output_file_id)) == 3
    assert (batch.status, batch.error_file_id) == (end, None)
    assert [each.code for each in (batch.errors.data if batch.errors else [])] == codes
    until(lambda: not runner_of(second)._jobs)
    check_room(runner_of(second).store, folder, budget=1)


@pytest.mark.parametrize(
    ("error", "code"),
    [(RuntimeError("a bug"), "internal"), (OSError(errno.EIO, "I/O error"), "disk_error")],
)
def test_an_error_of_the_job_keeps_its_results(
    start_server, tmp_path, monkeypatch, error, code
) -> None:
    folder = tmp_path / "files"
    batch = interrupted_job(start_server, folder, 6, 3, "in_progress")

    def broken(reader, max_lines):
        raise error

    monkeypatch.setattr(runner_module, "check_file", broken)
    second = start_server(files_dir=folder)
    with second.client() as client:
        batch = ended(client, client.batches.retrieve(batch.id))
        assert (batch.status, batch.errors.data[0].code) == ("failed", code)
        assert len(answers(client, batch.output_file_id)) == 3
    until(lambda: not runner_of(second)._jobs)
    check_room(runner_of(second).store, folder)


def test_a_job_that_cannot_be_recorded_fails_with_all_lines_named(
    start_server, tmp_path, monkeypatch
) -> None:
    """The disk is full when the job begins, and has room when it ends."""
    server = start_server(files_dir=tmp_path / "files")
    store = runner_of(server).store
    write = store.write_batch

    async def full_at_first(record) -> None:
        if record.value["status"] == "in_progress":
            raise OSError(errno.ENOSPC, "No space left on device")
        await write(record)

    monkeypatch.setattr(store, "write_batch", full_at_first)
    with server.client() as client:
        batch = ended(client, begin(client, [line("a"), line("b")]))
        assert (batch.status, batch.errors.data[0].code) == ("failed", "disk_error")
        assert [row["custom_id"] for row in answers(client, batch.error_file_id)] == ["a", "b"]
    assert server.engine.requests == []


# -- lines that are always refused ------------------------------------------------------------


def refuse(server, tenant: str) -> list[str]:
    """Answer a tenant's lines with 429 while the list, which gets their bodies, is not closed."""
    lines = runner_of(server)._lines
    call, refused = lines._call, []

    async def refusing(caller, path, body, request_id, on_queued):
        if caller == tenant and refused[-1:] != [""]:
            refused.append(body["messages"][0]["content"])
            return Reply(429, {"retry-after": "0.2"}, b"{}")
        return await call(caller, path, body, request_id, on_queued)

    lines._call = refusing
    return refused


def test_lines_of_other_keys_run_beside_those_that_are_always_refused(
    start_server, tmp_path
) -> None:
    """With one place: a line that waits to be tried again has none, and few lines wait."""
    server = start_server(
        files_dir=tmp_path / "files", api_keys={"a": "ka", "b": "kb"}, batch_requests=1
    )
    refused = refuse(server, "a")
    with server.client("ka") as own, server.client("kb") as other:
        stuck = begin(own, [line(f"a{i:02}", f"a{i:02}") for i in range(40)])
        until(lambda: len(refused) >= 2)
        batch = ended(other, begin(other, [line(f"b{i}") for i in range(20)]))
        assert batch.request_counts.completed == 20
        until(lambda: len(refused) > len(set(refused)) + 8)  # some have been tried again
        assert len(set(refused)) <= 8
        (job,) = runner_of(server)._jobs.values()
        assert len(job.running) <= 8
        assert len(runner_of(server)._lines._turns._waiting) <= 1
        refused.append("")
        stuck = ended(own, stuck)
        assert stuck.request_counts.completed == 40
    assert runner_of(server)._lines._turns.num_running == 0


def test_an_answer_is_stored_as_its_route_wrote_it(start_server, tmp_path) -> None:
    """To read and write ten megabytes of JSON again would hold the event loop for 0.3 s."""
    server = start_server(files_dir=tmp_path / "files")
    body = b'{"usage":{"prompt_tokens":3,"completion_tokens":2},"n":1.50e0,"s":"\\u0041"}'

    async def answer(*_) -> Reply:
        return Reply(200, {}, body)

    runner_of(server)._lines._call = answer
    with server.client() as client:
        batch = ended(client, begin(client, [line("a")]))
        assert body in client.files.content(batch.output_file_id).content
    assert (batch.usage.input_tokens, batch.usage.output_tokens) == (3, 2)


def test_waiting_jobs_cost_nothing(start_server, tmp_path, monkeypatch) -> None:
    """Each start and each end of a job looks at the first jobs of its key, and nothing else
    does."""
    looks: list[str] = []
    look = BatchRunner._let_begin

    def noting(runner: BatchRunner, tenant: str) -> None:
        looks.append(tenant)
        look(runner, tenant)

    monkeypatch.setattr(BatchRunner, "_let_begin", noting)
    server = start_server(files_dir=tmp_path / "files", batch_requests=1)
    first = held_job(server, [line("a")])
    with server.client() as client:
        others = [begin(client, [line(f"b{i}")]) for i in range(9)]
        jobs = runner_of(server)._jobs
        until(lambda: jobs[others[0].id].value["status"] == "in_progress")
        assert [job.may_begin.is_set() for job in jobs.values()] == [True] * 2 + [False] * 8
        time.sleep(0.5)
        assert len(looks) == 10
        server.engine.gate.set()
        for batch in (first, *others):
            assert ended(client, batch).status == "completed"
    assert len(looks) == 19


def test_a_batch_whose_lines_wait_to_be_tried_again_can_be_cancelled(
    start_server, tmp_path
) -> None:
    server = start_server(files_dir=tmp_path / "files", batch_requests=2)
    refused = refuse(server, "")
    with server.client() as client:
        batch = begin(client, [line(f"r{i}") for i in range(20)])
        until(lambda: len(refused) >= 5)
        client.batches.cancel(batch.id)
        batch = ended(client, batch)
        assert batch.status == "cancelled"
        assert len(answers(client, batch.error_file_id)) == 20
    turns = runner_of(server)._lines._turns
    assert (turns.num_running, turns.is_taken, len(turns._waiting)) == (0, False, 0)
