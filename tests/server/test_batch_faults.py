"""Batches when something is missing, taken away, full, late or broken."""

from __future__ import annotations

import asyncio
import collections
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from batch_helpers import (
    CHAT,
    answers,
    begin,
    encoded,
    ended,
    held_job,
    line,
    runner_of,
    until,
    upload,
    write_record,
)

from chunkllama_server.api.batch.records import StoredBatch, StoredFile
from chunkllama_server.api.batch.store import FileStore
from chunkllama_server.config.tenants import TenantQuotas

# -- restarts ---------------------------------------------------------------------------------


def test_a_folder_that_becomes_free_is_taken_over(start_server, tmp_path) -> None:
    """The second server starts while the first has the folder; its jobs run without a request."""
    first = start_server(files_dir=tmp_path / "files")
    batch = held_job(first, [line("a"), line("b")])
    second = start_server(files_dir=tmp_path / "files")
    assert not runner_of(second).store.is_open
    first.stop()
    first.engine.gate.set()
    until(lambda: len(second.engine.requests) == 2)
    with second.client() as client:
        assert ended(client, batch).request_counts.completed == 2


def test_a_request_takes_over_the_folder_and_its_jobs(start_server, tmp_path) -> None:
    """Opening the folder for a request and by itself at once starts each job once."""
    first = start_server(files_dir=tmp_path / "files")
    batch = held_job(first, [line(f"r{i}") for i in range(4)])
    second = start_server(files_dir=tmp_path / "files")
    first.stop()
    first.engine.gate.set()
    with ThreadPoolExecutor(4) as pool, second.client() as client:
        list(pool.map(lambda _: client.batches.list(), range(4)))
        assert ended(client, batch).request_counts.completed == 4
    assert len(second.engine.requests) == 4


@pytest.mark.parametrize("status", ["in_progress", "finalizing", "cancelling"])
def test_results_are_counted_once(start_server, tmp_path, status) -> None:
    """A server that ended after the last result, before or while its files were made."""
    first = start_server(files_dir=tmp_path / "files")
    batch = held_job(first, [line(f"r{i}") for i in range(3)])
    store = runner_of(first).store
    record = store.batches.get(batch.id, "")
    first.stop()
    first.engine.gate.set()
    body = {"usage": {"prompt_tokens": 5, "completion_tokens": 2}}
    done = [
        {"line": number, "result": {
            "id": "x", "custom_id": f"r{number - 1}", "error": None,
            "response": {"status_code": 200, "request_id": "q", "body": body},
        }}
        for number in (1, 2, 3, 3)
    ]  # fmt: skip
    store.results_path(record).write_bytes(encoded(done))
    record.value["status"] = status
    record.value["request_counts"] = {"total": 3, "completed": 3, "failed": 0}
    record.value["usage"]["input_tokens"] = 15
    write_record(store, record)
    second = start_server(files_dir=tmp_path / "files")
    with second.client() as client:
        batch = ended(client, client.batches.retrieve(batch.id))
        rows = answers(client, batch.output_file_id)
    assert batch.status == "completed"
    assert second.engine.requests == []
    assert (batch.request_counts.completed, batch.request_counts.total) == (3, 3)
    assert (batch.usage.input_tokens, batch.usage.output_tokens) == (15, 6)
    assert collections.Counter(row["custom_id"] for row in rows) == {"r0": 1, "r1": 1, "r2": 1}


def test_lists_are_in_order_of_age_after_a_restart(start_server, tmp_path) -> None:
    first = start_server(files_dir=tmp_path / "files")
    with first.client() as client:
        batches = [ended(client, begin(client, [line("a")])).id for _ in range(12)]
        files = [each.id for each in client.files.list(purpose="batch")]
        assert [each.id for each in client.batches.list()] == batches[::-1]
    first.stop()
    second = start_server(files_dir=tmp_path / "files")
    with second.client() as client:
        assert [each.id for each in client.batches.list(limit=5)] == batches[::-1]
        assert [each.id for each in client.files.list(purpose="batch")] == files


def test_records_without_a_serial_are_in_order_of_their_creation(tmp_path) -> None:
    """Records of an earlier version have a time in seconds alone."""
    folder = tmp_path / "files"
    store = FileStore(folder, lambda _: 1 << 20, 1e9)
    folder.mkdir()
    for age, name in ((3, "file-a"), (1, "file-c"), (2, "file-b")):
        value = {
            "id": name, "object": "file", "bytes": 1, "created_at": age, "expires_at": None,
            "filename": "x", "purpose": "batch", "status": "processed",
        }  # fmt: skip
        path = store._disk.place("", name, "json")
        path.write_bytes(json.dumps({"tenant": "", "value": value}).encode())
        path.with_suffix(".data").write_bytes(b"x")
    store.open()
    assert [record.id for record in store.files.of("")] == ["file-a", "file-b", "file-c"]


def test_what_no_record_stands_for_is_removed(start_server, tmp_path) -> None:
    """Content without a record, half a file, results of a job that has ended; nothing else."""
    first = start_server(files_dir=tmp_path / "files")
    with first.client() as client:
        batch = ended(client, begin(client, [line("a")]))
    first.stop()
    (folder,) = [path for path in (tmp_path / "files").iterdir() if path.is_dir()]
    kept = {path.name for path in folder.iterdir()} | {"notes.txt"}
    (folder / "notes.txt").write_text("of the operator")
    (tmp_path / "files" / "other").mkdir()
    (tmp_path / "files" / "other" / "file-x.data").write_text("of the operator")
    for name in ("file-1.data", "file-1.json.new", f"{batch.id}.results", "file-2.data.new"):
        (folder / name).write_bytes(b"x" * 100)
    second = start_server(files_dir=tmp_path / "files")
    assert runner_of(second).store.is_open
    assert {path.name for path in folder.iterdir()} == kept
    assert (tmp_path / "files" / "other" / "file-x.data").exists()


# -- lines that cannot be run -----------------------------------------------------------------


def test_an_unexpected_error_is_the_result_of_its_line(start_server, tmp_path) -> None:
    server = start_server(files_dir=tmp_path / "files")
    lines = runner_of(server)._lines
    call = lines._call

    async def broken(tenant, path, body, request_id, on_queued):
        if "BREAK" in body["messages"][0]["content"]:
            raise RuntimeError("a bug")
        return await call(tenant, path, body, request_id, on_queued)

    lines._call = broken
    with server.client() as client:
        rows = [line("a"), line("b", "BREAK"), line("c")]
        batch = ended(client, begin(client, rows))
        assert batch.status == "completed"
        assert (batch.request_counts.completed, batch.request_counts.failed) == (2, 1)
        (failed,) = answers(client, batch.error_file_id)
    assert (failed["custom_id"], failed["response"]) == ("b", None)
    assert failed["error"]["code"] == "internal_error"
    assert "a bug" not in failed["error"]["message"]


def test_a_file_deleted_in_the_middle_ends_the_batch(start_server, tmp_path) -> None:
    server = start_server(files_dir=tmp_path / "files", batch_requests=1)
    server.engine.gate_at = 3  # the answer "a" passes
    batch = held_job(server, [line("a", "say(a)yas"), line("b"), line("c"), line("d")])
    with server.client() as client:
        until(lambda: len(server.engine.requests) >= 2)
        client.files.delete(batch.input_file_id)
        server.engine.gate.set()
        batch = ended(client, batch)
        assert batch.status == "failed"
        assert batch.errors.data[0].code == "file_not_found"
        done = [row["custom_id"] for row in answers(client, batch.output_file_id)]
        rest = answers(client, batch.error_file_id)
    assert sorted([*done, *(row["custom_id"] for row in rest)]) == ["a", "b", "c", "d"]
    assert {row["error"]["code"] for row in rest} == {"batch_failed"}


def test_a_file_without_content_ends_the_batch(start_server, tmp_path) -> None:
    server = start_server(files_dir=tmp_path / "files")
    with server.client() as client:
        stored = upload(client, [line("a")])
        runner_of(server).store.file_path("", stored.id).unlink()
        batch = client.batches.create(
            input_file_id=stored.id, endpoint=CHAT, completion_window="24h"
        )
        batch = ended(client, batch)
    assert (batch.status, batch.errors.data[0].code) == ("failed", "file_not_found")


def completion(text: str) -> bytes:
    row = line("b", url="/v1/completions", prompt="@")
    return json.dumps(row).replace('"@"', text).encode() + b"\n"


@pytest.mark.parametrize(
    "raw",
    [
        completion('"\\ud800"'),
        completion('"x", "temperature": NaN'),
        completion('"x", "temperature": Infinity'),
        completion('"x", "temperature": 1e999'),
        completion('"x", "user": ' + "[" * 300 + "]" * 300),
        b'{"custom_id": "\xff"}\n',
        b'{"custom_id": 1, \n',
    ],
)
def test_a_line_that_no_route_reads_is_named(start_server, tmp_path, raw) -> None:
    server = start_server(files_dir=tmp_path / "files")
    with server.client() as client:
        content = completion('"say(hi)yas"').replace(b'"b"', b'"a"') + raw
        stored = client.files.create(file=("in.jsonl", content), purpose="batch")
        batch = client.batches.create(
            input_file_id=stored.id, endpoint="/v1/completions", completion_window="24h"
        )
        batch = ended(client, batch)
    assert batch.status == "failed"
    (error,) = batch.errors.data
    assert (error.code, error.line) == ("invalid_json_line", 2)
    assert server.engine.requests == []


def test_halves_of_characters_are_replaced_as_online(start_server, tmp_path) -> None:
    server = start_server(files_dir=tmp_path / "files")
    content = b"\xef\xbb\xbf" + encoded([line("a", "\ud800 say(hi)yas"), line("b")])
    with server.client() as client:
        stored = client.files.create(file=("in.jsonl", content), purpose="batch")
        batch = client.batches.create(
            input_file_id=stored.id, endpoint=CHAT, completion_window="24h"
        )
        assert ended(client, batch).request_counts.completed == 2


def test_a_line_larger_than_a_body_is_named(start_server, tmp_path) -> None:
    server = start_server(files_dir=tmp_path / "files", max_body_bytes=4000)
    with server.client() as client:
        batch = ended(client, begin(client, [line("a"), line("b", "x" * 20_000), line("c")]))
    (error,) = batch.errors.data
    assert (error.code, error.line) == ("line_too_large", 2)


# -- room -------------------------------------------------------------------------------------


def test_uploads_at_once_stay_within_the_budget(start_server, tmp_path) -> None:
    """Sixteen files of which three fit, sent together."""
    size = 400_000
    server = start_server(files_dir=tmp_path / "files", file_bytes=3 * size + 20_000)
    barrier = threading.Barrier(16)

    def send(_: int) -> int:
        with server.client() as client:
            barrier.wait()
            try:
                client.files.create(file=("in.jsonl", b"x" * size), purpose="batch")
            except openai.APIStatusError as error:
                assert error.code == "file_budget"
                return error.status_code
            return 200

    with ThreadPoolExecutor(16) as pool:
        statuses = collections.Counter(pool.map(send, range(16)))
    assert statuses == {200: 3, 413: 13}
    stored = [path for path in (tmp_path / "files").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in stored) <= 3 * size + 20_000


def test_results_and_uploads_together_stay_within_the_budget(start_server, tmp_path) -> None:
    """The disk never holds more than the budget, and room that was held is free again."""
    budget = 170_000
    server = start_server(
        files_dir=tmp_path / "files", file_bytes=budget, batch_requests=4, batch_jobs=4
    )
    most, done = 0, threading.Event()

    def used() -> int:
        total = 0
        for path in (tmp_path / "files").rglob("*.*"):
            try:
                total += path.stat().st_size
            except FileNotFoundError:
                continue
        return total

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, used())

    thread = threading.Thread(target=watch)
    thread.start()
    with server.client() as client:
        jobs = []
        for number in range(4):
            lines = [line(f"{number}-{i}", f"say({'z' * 500})yas") for i in range(20)]
            jobs.append(begin(client, lines))
        jobs = [ended(client, job) for job in jobs]
        done.set()
        thread.join()
        for job in jobs:
            rows = [*answers(client, job.output_file_id), *answers(client, job.error_file_id)]
            # without room for the entries of its error file a job is not begun
            is_begun = bool(job.output_file_id or job.error_file_id)
            assert len(rows) == job.request_counts.total * is_begun
            assert is_begun or job.errors.data[0].code == "file_budget"
    assert "failed" in {job.status for job in jobs} <= {"completed", "failed"}
    assert 0 < most <= budget
    store = runner_of(server).store
    assert budget - store.room("") >= used()
    charged = sum(each.most_bytes for each in [*store.files, *store.batches])
    assert store.room("") == budget - charged


def test_a_batch_whose_results_cannot_fit_is_not_begun(start_server, tmp_path) -> None:
    lines = [line(f"r{i}") for i in range(100)]
    server = start_server(files_dir=tmp_path / "files", file_bytes=len(encoded(lines)) + 14_000)
    with server.client() as client:
        batch = ended(client, begin(client, lines))
    assert (batch.status, batch.errors.data[0].code) == ("failed", "file_budget")
    assert batch.error_file_id is None, "there is no room for its entries"
    assert server.engine.requests == []


def test_a_full_disk_fails_the_batch_and_keeps_its_results(
    start_server, tmp_path, monkeypatch
) -> None:
    server = start_server(files_dir=tmp_path / "files", batch_requests=1)
    store, calls = runner_of(server).store, []
    append = store.append_result

    async def full_at_last(record, encoded_line) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        await append(record, encoded_line)

    monkeypatch.setattr(store, "append_result", full_at_last)
    with server.client() as client:
        batch = ended(client, begin(client, [line(f"r{i}") for i in range(6)]))
        assert (batch.status, batch.errors.data[0].code) == ("failed", "disk_error")
        assert len(answers(client, batch.output_file_id)) == 2
        assert len(answers(client, batch.error_file_id)) == 4


def test_many_batches_that_have_ended_are_forgotten(tmp_path) -> None:
    """Records are bounded, oldest first."""

    async def run() -> list[str]:
        store = FileStore(tmp_path / "files", lambda _: 1 << 30, 1e9)
        store.open()
        for number in range(1010):
            value = {"id": f"batch_{number}", "status": "completed", "metadata": None,
                     "created_at": 1, "expires_at": store.now()}  # fmt: skip
            await store.add_batch(StoredBatch("", value))
        await store.close()
        return [record.id for record in store.batches.of("")]

    kept = asyncio.run(run())
    assert kept[0] == "batch_1009" and len(kept) == 1001 and kept[-1] == "batch_9"


def test_files_of_a_key_are_bounded(start_server, tmp_path) -> None:
    server = start_server(files_dir=tmp_path / "files", file_bytes=1 << 30)
    with server.client() as client:
        stored = upload(client, [line("a")])
        store = runner_of(server).store
        record = store.files.get(stored.id, "")
        for number in range(9_999):
            value = {**record.value, "id": f"file-{number}"}
            store.files.put(StoredFile("", value))
        with pytest.raises(openai.APIStatusError) as refused:
            upload(client, [line("a")])
    assert (refused.value.status_code, refused.value.code) == (413, "too_many_files")


@pytest.mark.parametrize("window", ["31d", "99999d", "721h"])
def test_a_window_has_an_end(start_server, tmp_path, window) -> None:
    server = start_server(files_dir=tmp_path / "files")
    with server.client() as client:
        stored = upload(client, [line("a")])
        with pytest.raises(openai.BadRequestError) as refused:
            client.batches.create(input_file_id=stored.id, endpoint=CHAT, completion_window=window)
    assert refused.value.param == "completion_window"


# -- keys -------------------------------------------------------------------------------------


def test_a_batch_ends_with_its_key(start_server, tmp_path) -> None:
    """The key is removed while lines run and others wait; another key's batch goes on."""
    server = start_server(
        files_dir=tmp_path / "files",
        api_keys={"a": "ka", "b": "kb"},
        quotas={"a": TenantQuotas(weight=2)},
        batch_requests=4,
    )
    server.engine.gate_at = 1
    batch = held_job(server, [line(f"r{i}") for i in range(8)], "ka")
    until(lambda: len(server.engine.live) == 4)
    with server.client("kb") as other:
        going_on = begin(other, [line("x")])
        tenants = server.app.state.context.tenants
        tenants.set_keys({"b": "kb"})
        runner = runner_of(server)
        record = runner.store.batches.get(batch.id, "a")
        until(lambda: record.has_ended)
        assert len(server.engine.aborted) == 4
        num_requests = len(server.engine.requests)
        server.engine.gate.set()
        assert ended(other, going_on).status == "completed"
    assert {each.tenant for each in server.engine.requests[num_requests:]} <= {"b"}
    tenants.set_keys({"a": "new", "b": "kb"})
    with server.client("new") as own:
        batch = own.batches.retrieve(batch.id)
        rows = answers(own, batch.error_file_id)
    assert batch.status == "failed"
    assert (batch.errors.data[0].code, len(rows)) == ("key_revoked", 8)
    assert "key" in batch.errors.data[0].message


def test_a_batch_whose_key_is_gone_after_a_restart(start_server, tmp_path) -> None:
    first = start_server(files_dir=tmp_path / "files", api_keys={"a": "ka"})
    batch = held_job(first, [line("x"), line("y")], "ka")
    first.stop()
    first.engine.gate.set()
    second = start_server(files_dir=tmp_path / "files", api_keys={"b": "kb"})
    record = runner_of(second).store.batches.get(batch.id, "a")
    until(lambda: record.has_ended)
    assert record.value["status"] == "failed"
    assert record.value["errors"]["data"][0]["code"] == "key_revoked"
    assert second.engine.requests == []
