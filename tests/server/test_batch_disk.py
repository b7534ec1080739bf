"""The folder of files: records that cannot be read, and disks that are full."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import tempfile
from pathlib import Path

import openai
import pytest
from batch_helpers import (
    BUDGET,
    answers,
    encoded_result,
    ended,
    held_job,
    line,
    runner_of,
    until,
    upload,
)

from chunkllama_server.api.batch import runner as runner_module
from chunkllama_server.api.batch.disk import Folder, read_results
from chunkllama_server.api.batch.runner import BatchRunner
from chunkllama_server.api.batch.store import FileStore
from chunkllama_server.config.settings import Settings
from chunkllama_server.transport import forms

# -- what cannot be read ----------------------------------------------------------------------


def opened(folder: Path) -> FileStore:
    store = FileStore(folder, lambda _: BUDGET, 1e9)
    store.open()
    return store


def closed(store: FileStore) -> None:
    asyncio.run(store.close())


def stored_file(folder: Path) -> str:
    """A folder with one file, "abc"."""

    async def store() -> str:
        store = opened(folder)
        value = await store.add_file("", "in.jsonl", iter([b"abc"]), 3)
        await store.close()
        return value["id"]

    return asyncio.run(store())


@pytest.mark.parametrize("cause", ["cut", "later version", "read", "listed"])
def test_the_data_of_a_record_that_cannot_be_read_is_kept(tmp_path, monkeypatch, cause) -> None:
    """The record is cut, of a later version, or not read this time; all are readable again."""
    folder = tmp_path / "files"
    file_id = stored_file(folder)
    (path,) = folder.rglob("*.json")
    record = path.read_bytes()
    results = path.with_name("batch_1.results")
    results.write_bytes(encoded_result(1, "a"))
    results.with_suffix(".json").write_bytes(b"{")

    def broken(path: Path) -> bytes:
        raise OSError(errno.EMFILE, "Too many open files")

    if cause == "cut":
        path.write_bytes(record[:20])
    elif cause == "later version":
        path.write_bytes(json.dumps({**json.loads(record), "serial": "new"}).encode())
    with monkeypatch.context() as patch:
        if cause == "read":
            patch.setattr(Path, "read_bytes", broken)
        elif cause == "listed":
            patch.setattr(Folder, "records", lambda folder: iter([]))
        store = opened(folder)
    assert store.file_path("", file_id) is None
    closed(store)
    path.write_bytes(record)
    store = opened(folder)
    read = store.file_path("", file_id)
    assert read is not None and read.read_bytes() == b"abc"
    assert results.exists()
    closed(store)


def test_a_folder_that_cannot_be_read_once_is_charged_once(tmp_path, monkeypatch) -> None:
    """The first try ends in the middle; the second finds what the first has read."""
    folder = tmp_path / "files"
    stored_file(folder)
    store = FileStore(folder, lambda _: BUDGET, 1e9)

    def broken(folder: Folder, is_used) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "clean", broken)
        with pytest.raises(Exception, match="cannot be stored") as refused:
            store.open()
    assert (refused.value.status_code, refused.value.code) == (503, "files_unavailable")
    store.open()
    assert store.room("") == BUDGET - sum(each.most_bytes for each in store.files) < BUDGET
    closed(store)


@pytest.mark.parametrize("where", [(Folder, "records"), (Path, "is_dir"), (FileStore, "_read")])
@pytest.mark.parametrize(
    "error", [PermissionError(errno.EACCES, "Permission denied"), RuntimeError("a bug")]
)
def test_a_folder_that_cannot_be_read_is_noted_once(
    tmp_path, monkeypatch, caplog, where, error
) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    runner = BatchRunner(
        FileStore(folder, lambda _: BUDGET, 1e9),
        None,
        lambda: True,
        lambda _: True,
        lambda: 1,
        9,
        Settings(),
    )

    def broken(*_) -> None:
        raise error

    async def look() -> None:
        for _ in range(3):
            await runner._look()

    with monkeypatch.context() as patch:
        patch.setattr(*where, broken)
        asyncio.run(look())
    (noted,) = caplog.records
    assert str(error) in noted.getMessage() and "\n" not in noted.getMessage()
    assert noted.exc_info is None
    asyncio.run(look())
    assert runner.store.is_open
    closed(runner.store)


@pytest.mark.parametrize(
    "cut",
    [
        b"5\n",
        b"[]\n",
        b"null\n",
        b"\n",
        b'{"line":1}\n',
        b'{"result":{}}\n',
        b'{"line":"1","result":{}}\n',
        b'{"line":2,"result":{"id":"x"}}\n',
        b'{"line":2,"result":5}\n',
        encoded_result(2, "b")[:-1],
        encoded_result(2, "b")[:-9] + b"\n",
        b"\xff\xfe\n",
        b"\0" * 64 + b"\n",
    ],
)
def test_what_is_no_result_is_a_line_that_was_cut(tmp_path, cut) -> None:
    """It and what follows are removed, so that the lines run again."""
    path = tmp_path / "batch_1.results"
    path.write_bytes(encoded_result(1, "a") + cut + encoded_result(3, "c"))
    assert [entry.number for entry in read_results(path)] == [1]
    assert path.read_bytes() == encoded_result(1, "a")


# -- a full disk ------------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch, request):
    """Files are full from now on; the fixture's parameter is the number of the error."""
    number = request.param

    def begin(suffix: str = "") -> None:
        sync = os.fsync

        def full(descriptor: int) -> None:
            if suffix in os.readlink(f"/proc/self/fd/{descriptor}"):
                raise OSError(number, os.strerror(number))
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", full)

    return begin


FULL = pytest.mark.parametrize("full_disk", [errno.ENOSPC, errno.EDQUOT], indirect=True)


def check_full(refused: openai.APIStatusError, caplog) -> None:
    assert (refused.status_code, refused.code) == (503, "storage_full")
    assert int(refused.response.headers["retry-after"]) > 0
    (noted,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert noted.exc_info is None and "\n" not in noted.getMessage()


@FULL
@pytest.mark.parametrize("suffix", [".data.new", ".json.new"])
def test_a_full_disk_refuses_an_upload(start_server, tmp_path, caplog, full_disk, suffix) -> None:
    """At the content or at the record; neither is left, and no room is lost."""
    server = start_server(files_dir=tmp_path / "files")
    with server.client() as client:
        upload(client, [line("a")])
        kept, room = sorted(tmp_path.rglob("*.*")), runner_of(server).store.room("")
        full_disk(suffix)
        with pytest.raises(openai.APIStatusError) as refused:
            upload(client, [line("b")])
    check_full(refused.value, caplog)
    assert sorted(tmp_path.rglob("*.*")) == kept
    assert runner_of(server).store.room("") == room


@FULL
def test_a_full_disk_refuses_a_batch(start_server, tmp_path, caplog, full_disk) -> None:
    server = start_server(files_dir=tmp_path / "files")
    with server.client() as client:
        stored = upload(client, [line("a")])
        room = runner_of(server).store.room("")
        full_disk()
        with pytest.raises(openai.APIStatusError) as refused:
            client.batches.create(
                input_file_id=stored.id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
            )
        assert client.batches.list().data == []
    check_full(refused.value, caplog)
    assert runner_of(server).store.room("") == room


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_of_temporary_files_refuses_an_upload(
    start_server, tmp_path, monkeypatch, caplog, number
) -> None:
    """An upload of more than a MiB lies in a temporary file while it is received."""

    class FullFile(tempfile.SpooledTemporaryFile):
        def rollover(self) -> None:
            raise OSError(number, os.strerror(number))

    server = start_server(files_dir=tmp_path / "files")
    monkeypatch.setattr(forms, "SpooledTemporaryFile", FullFile)
    with server.client() as client, pytest.raises(openai.APIStatusError) as refused:
        client.files.create(file=("in.jsonl", b"x" * (3 << 20)), purpose="batch")
    check_full(refused.value, caplog)


def test_a_disk_that_is_full_when_the_folder_is_made(tmp_path, monkeypatch, caplog) -> None:
    def full(*_, **__) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = FileStore(tmp_path / "files", lambda _: BUDGET, 1e9)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", full)
        for _ in range(3):
            with pytest.raises(Exception, match="full") as refused:
                store.open()
    assert (refused.value.status_code, refused.value.code) == (503, "storage_full")
    assert len(caplog.records) == 1


def test_a_cancel_that_cannot_be_stored_ends_the_batch(start_server, tmp_path, monkeypatch) -> None:
    """Its lines end although the disk is full, and the client may ask again."""
    monkeypatch.setattr(runner_module, "_DISK_SECONDS", 0.02)
    server = start_server(files_dir=tmp_path / "files", batch_requests=2)
    server.engine.gate_at = 1
    batch = held_job(server, [line(f"r{i}") for i in range(4)])
    until(lambda: len(server.engine.live) == 2)
    store = runner_of(server).store
    write = store.write_batch

    def full(record) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "write_batch", full)
    with server.client() as client:
        with pytest.raises(openai.InternalServerError) as refused:
            client.batches.cancel(batch.id)
        assert (refused.value.status_code, refused.value.code) == (503, "storage_full")
        until(lambda: len(server.engine.aborted) == 2)
        monkeypatch.setattr(store, "write_batch", write)
        client.batches.cancel(batch.id)
        server.engine.gate.set()
        batch = ended(client, batch)
        assert batch.status == "cancelled"
        assert len(answers(client, batch.error_file_id)) == 4
    assert len(server.engine.requests) == 2
