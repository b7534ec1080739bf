"""Uploaded files: what is refused before a body is read, and what is bounded while it arrives."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import tempfile
import time
from collections.abc import Iterator

import pytest
from batch_helpers import runner_of, until
from python_multipart.multipart import MultipartParser

from chunkllama_server.config.tenants import TenantQuotas
from chunkllama_server.transport import forms

FORM = "multipart/form-data; boundary=b"
PURPOSE = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
FILE = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
END = b"\r\n--b--\r\n"


@pytest.fixture(scope="module")
def files(start_server, tmp_path_factory):
    return start_server(
        files_dir=tmp_path_factory.mktemp("uploads") / "files",
        api_keys={"a": "ka", "b": "kb"},
        quotas={name: TenantQuotas(file_bytes=1 << 20) for name in ("a", "b")},
        max_uploads=2,
    )


def begun(server, content_type: str = FORM, length: int | None = 1000, key: str = "ka",
          body: bytes = b"", **headers: str) -> socket.socket:  # fmt: skip
    """Begin an upload, of which only ``body`` is sent."""
    sock = socket.create_connection(server.url.removeprefix("http://").split(":"), timeout=60)
    lines = {"Host": "x", "Authorization": f"Bearer {key}", "Content-Type": content_type, **headers}
    lines |= {"Transfer-Encoding": "chunked"} if length is None else {"Content-Length": str(length)}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    sock.sendall(f"POST /v1/files HTTP/1.1\r\n{head}\r\n".encode() + body)
    return sock


def refusal(sock: socket.socket) -> tuple[int, str | None]:
    """Status and code of the answer, which ends the connection."""
    data = b""
    with sock:
        while part := sock.recv(65536):
            data += part
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def post(server, *parts: bytes) -> tuple[int, str]:
    with server.http() as http:
        answer = http.post(
            "/v1/files",
            content=b"\r\n".join(part.removesuffix(b"\r\n") for part in parts) + END,
            headers={"content-type": FORM, "authorization": "Bearer ka"},
        )
    return answer.status_code, answer.text


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"content_type": "application/x-www-form-urlencoded", "Origin": "http://evil"},
         (415, "unsupported_media_type")),
        ({"content_type": "application/x-www-form-urlencoded"}, (415, "unsupported_media_type")),
        ({"content_type": "application/json"}, (415, "unsupported_media_type")),
        ({"content_type": "multipart/form-data"}, (400, "invalid_form")),
        ({"Origin": "http://evil"}, (403, "origin")),
        ({"length": 2 << 20}, (413, "file_budget")),
    ],
)  # fmt: skip
def test_an_upload_is_refused_before_its_body_arrives(files, fields, expected) -> None:
    """No byte of the body is sent, so an answer proves that none is waited for."""
    assert refusal(begun(files, **fields)) == expected


def test_a_body_of_unknown_length_takes_of_the_budget_as_it_grows(files) -> None:
    store = runner_of(files).store
    free = store.room("a")
    block = b"x" * (1 << 18)
    body = b"%x\r\n%b\r\n" % (len(FILE), FILE)
    body += (b"%x\r\n" % len(block) + block + b"\r\n") * 8
    assert refusal(begun(files, length=None, body=body)) == (413, "file_budget")
    until(lambda: store.room("a") == free)


def test_uploads_of_a_key_at_once_are_counted(files) -> None:
    with contextlib.ExitStack() as held:
        for _ in range(2):
            held.enter_context(begun(files, body=FILE))
        store = runner_of(files).store
        until(lambda: store.num_arriving["a"] == 2)
        assert store.room("a") == (1 << 20) - 2 * 1000
        assert refusal(begun(files)) == (429, "too_many_uploads")
        assert refusal(begun(files, key="kb", Origin="http://evil")) == (403, "origin")
        assert store.room("b") == 1 << 20
    until(lambda: store.num_arriving["a"] == 0)
    assert store.room("a") == 1 << 20


def test_the_parts_of_a_form_are_counted(files, monkeypatch) -> None:
    made = []

    class Counted(tempfile.SpooledTemporaryFile):
        def __init__(self, *args, **kwargs) -> None:
            made.append(1)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(forms, "SpooledTemporaryFile", Counted)
    status, text = post(files, *[FILE + b"x" * 1000] * 199)
    assert (status, len(made)) == (400, 1) and "more than one file" in text
    status, text = post(files, *[PURPOSE] * 4)
    assert status == 400 and "more than 3 fields" in text
    status, text = post(files, PURPOSE[:-2] + b"x" * 5000)
    assert status == 400 and "4096 bytes" in text
    status, text = post(files, PURPOSE)
    assert status == 400 and '"param":"file"' in text
    status, text = post(files, PURPOSE, FILE.replace(b'; filename="a"', b"") + b"{}")
    assert status == 400 and "needs a filename" in text


@pytest.mark.parametrize(
    "body", [b"", b"--b", b"--b\r\n\r\nx" + END, FILE + b"x", FILE + b"x\r\n--b\r\n", b"nonsense"]
)
def test_a_malformed_form_is_refused(files, body) -> None:
    sock = begun(files, length=len(body), body=body)
    assert refusal(sock) == (400, "invalid_form")


def test_a_form_is_parsed_beside_the_event_loop(files, monkeypatch) -> None:
    """The parser may take half a microsecond for each byte of some bodies."""
    loops: list[object] = []
    write = MultipartParser.write

    def noting(parser: MultipartParser, data: bytes) -> int:
        loops.append(asyncio._get_running_loop())
        return write(parser, data)

    monkeypatch.setattr(MultipartParser, "write", noting)
    status, text = post(files, PURPOSE, FILE + b"\r" * 300_000)
    assert status == 200 and json.loads(text)["bytes"] == 300_000
    assert loops and set(loops) == {None}


def test_records_are_written_and_removed_beside_the_event_loop(files, monkeypatch) -> None:
    import os
    from pathlib import Path

    loops: list[object] = []

    def noting(owner, name) -> None:
        work = getattr(owner, name)

        def noted(*args, **kwargs):
            loops.append(asyncio._get_running_loop())
            return work(*args, **kwargs)

        monkeypatch.setattr(owner, name, noted)

    noting(os, "fsync")
    noting(Path, "unlink")
    with files.client("ka") as client:
        stored = client.files.create(file=("a", b"{}"), purpose="batch")
        client.batches.create(
            input_file_id=stored.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        client.files.delete(stored.id)
    folder = runner_of(files).store.folder
    until(lambda: not list(folder.rglob(f"{stored.id}.*")))
    assert len(loops) >= 5 and set(loops) == {None}


@pytest.fixture
def jumping(monkeypatch) -> Iterator[list[float]]:
    """What is added to the system's clock."""
    added = [0.0]
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + added[0])
    yield added


def test_a_clock_that_is_set_expires_nothing(tmp_path, jumping) -> None:
    from chunkllama_server.api.batch.store import FileStore

    store = FileStore(tmp_path, lambda _: 1 << 20, 1e9)
    before = store.now()
    jumping[0] = 86_400.0
    assert store.now() - before < 3600
    assert FileStore(tmp_path, lambda _: 1 << 20, 1e9).now() - before >= 86_400
