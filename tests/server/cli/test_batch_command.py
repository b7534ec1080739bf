"""``chunkllama batch`` against servers that fail: lines run once, and nothing is given up."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from chunkllama.errors import ChunkLlamaError
from chunkllama_server.commands import batch as batch_command

BATCH = {
    "id": "batch_1",
    "input_file_id": "file-1",
    "status": "completed",
    "errors": None,
    "output_file_id": "file-2",
    "error_file_id": None,
    "request_counts": {"total": 1, "completed": 1, "failed": 0},
    "usage": {
        "input_tokens": 9,
        "input_tokens_details": {"cached_tokens": 3},
        "output_tokens": 2,
    },
}
NOT_FOUND = {"error": {"message": "No batch is stored", "code": "batch_not_found"}}
OTHER = {"error": {"message": "not now", "code": "other"}}
Answer = tuple[int, Any]


class Stub(ThreadingHTTPServer):
    """Answers as told, then as a server that has run the batch; records what it was asked.

    Attributes:
        told: answers by method and path, each given once; None closes the connection.
        cut: beginnings of answers, by method and path, of which more is promised.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.told: dict[str, list[Answer | None]] = {}
        self.cut: dict[str, str] = {}
        self.asked: list[str] = []
        self.batches: list[dict[str, Any]] = []

    def answer(self, name: str) -> Answer | None:
        self.asked.append(name)
        if self.told.get(name):
            return self.told[name].pop(0)
        if name == "POST /v1/files":
            return 200, {"id": "file-1"}
        if name == "POST /v1/batches":
            self.batches.append(BATCH)
            return 200, BATCH
        if name == "GET /v1/batches/batch_1":
            return 200, BATCH
        if name in ("GET /v1/files/file-2/content", "GET /v1/files/file-3/content"):
            return 200, {"custom_id": "a"}
        if name.startswith("DELETE "):
            return 200, {"deleted": True}
        return 200, {"data": self.batches, "has_more": False, "last_id": None}


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def _serve(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        name = f"{self.command} {self.path.partition('?')[0]}"
        answer = self.server.answer(name)
        if answer is None:
            self.close_connection = True
            return
        status, body = answer
        content = json.dumps(body).encode()
        length = len(content)
        if name in self.server.cut:
            content = self.server.cut[name].encode()
            length, self.close_connection = len(content) + 9, True
        self.send_response(status)
        self.send_header("content-length", str(length))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_DELETE = _serve

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    monkeypatch.setattr(batch_command, "_RETRY_SECONDS", 0.0)
    server = Stub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


LINE = json.dumps({"url": "/v1/completions"}) + "\n"


def run(stub: Stub, folder: Path, lines: str = LINE) -> int:
    (folder / "in.jsonl").write_text(lines)
    url = f"http://127.0.0.1:{stub.server_address[1]}"
    return batch_command.batch(folder / "in.jsonl", folder / "out.jsonl", url=url)


def count(stub: Stub, name: str) -> int:
    return stub.asked.count(name)


@pytest.mark.parametrize(
    "answer",
    [(500, OTHER), (503, OTHER), (429, OTHER), (401, OTHER), (403, OTHER), (404, OTHER), None],
)
def test_an_error_does_not_run_the_lines_again(stub, tmp_path, answer) -> None:
    """The command is run again while its batch goes on, and the server answers with an error."""
    (tmp_path / "out.jsonl.batch").write_text("batch_1")
    stub.told["GET /v1/batches/batch_1"] = [answer]
    with pytest.raises(ChunkLlamaError):
        run(stub, tmp_path)
    assert count(stub, "POST /v1/files") == count(stub, "POST /v1/batches") == 0
    assert (tmp_path / "out.jsonl.batch").read_text() == "batch_1"
    assert run(stub, tmp_path) == 0
    assert count(stub, "POST /v1/batches") == 0
    assert not (tmp_path / "out.jsonl.batch").exists()


def test_a_batch_that_is_gone_is_run_again(stub, tmp_path) -> None:
    (tmp_path / "out.jsonl.batch").write_text("batch_0")
    stub.told["GET /v1/batches/batch_0"] = [(404, NOT_FOUND)]
    assert run(stub, tmp_path) == 0
    assert count(stub, "POST /v1/batches") == 1


def test_a_lost_answer_does_not_run_the_lines_again(stub, tmp_path) -> None:
    """The server makes the batch and the connection breaks before its id arrives."""
    stub.told["POST /v1/batches"] = [None]
    with pytest.raises(ChunkLlamaError):
        run(stub, tmp_path)
    stub.batches.append(BATCH)
    assert run(stub, tmp_path) == 0
    assert count(stub, "POST /v1/batches") == 1
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {"custom_id": "a"}


def test_a_batch_that_was_not_made_is_made(stub, tmp_path) -> None:
    stub.told["POST /v1/batches"] = [(429, OTHER)]
    with pytest.raises(ChunkLlamaError, match="not now"):
        run(stub, tmp_path)
    assert run(stub, tmp_path) == 0
    assert len(stub.batches) == 1


def test_a_server_that_restarts_is_asked_again(stub, tmp_path) -> None:
    stub.told["GET /v1/batches/batch_1"] = [(503, OTHER), None, (502, "x"), (429, OTHER)]
    assert run(stub, tmp_path) == 0
    assert count(stub, "GET /v1/batches/batch_1") == 5


def test_a_refusal_while_it_runs_is_reported(stub, tmp_path) -> None:
    stub.told["GET /v1/batches/batch_1"] = [(401, OTHER)]
    with pytest.raises(ChunkLlamaError, match="not now"):
        run(stub, tmp_path)
    assert (tmp_path / "out.jsonl.batch").read_text() == "batch_1"


def test_the_files_of_a_batch_are_removed_when_it_is_done(stub, tmp_path) -> None:
    value = {**BATCH, "error_file_id": "file-3"}
    stub.told["GET /v1/batches/batch_1"] = [(200, value)]
    stub.told["DELETE /v1/files/file-1"] = [(404, OTHER)]  # it has expired meanwhile
    stub.told["DELETE /v1/files/file-2"] = [(503, OTHER)]
    assert run(stub, tmp_path) == 0
    removed = [name for name in stub.asked if name.startswith("DELETE")]
    assert removed == [f"DELETE /v1/files/file-{number}" for number in (1, 2, 3)]
    assert stub.asked.index("GET /v1/files/file-3/content") < stub.asked.index(removed[0])
    assert not (tmp_path / "out.jsonl.batch").exists()


def test_files_stay_while_one_is_not_here(stub, tmp_path) -> None:
    stub.told["GET /v1/files/file-2/content"] = [(503, OTHER)]
    with pytest.raises(ChunkLlamaError, match="not now"):
        run(stub, tmp_path)
    assert not [name for name in stub.asked if name.startswith("DELETE")]
    assert run(stub, tmp_path) == 0
    assert count(stub, "POST /v1/batches") == 1


def test_answers_of_an_earlier_batch_are_removed(stub, tmp_path) -> None:
    """The last batch has neither answers nor errors to write over them."""
    for name in ("out.jsonl", "out.errors.jsonl"):
        (tmp_path / name).write_text("of an earlier batch")
    value = {**BATCH, "status": "failed", "output_file_id": None}
    stub.told["GET /v1/batches/batch_1"] = [(200, value)]
    assert run(stub, tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize("lines", ["\n" + LINE, "  \r\n\n" + LINE, "\ufeff" + LINE])
def test_blank_lines_come_before_the_first(stub, tmp_path, lines) -> None:
    assert run(stub, tmp_path, lines) == 0


@pytest.mark.parametrize(("lines", "said"), [("\n{}\n", "line 2 must"), ("\n", "no line")])
def test_a_file_without_a_url_is_named(stub, tmp_path, lines, said) -> None:
    with pytest.raises(ChunkLlamaError, match=said):
        run(stub, tmp_path, lines)
    assert stub.asked == []


def test_the_progress_and_what_sharing_saved_are_shown(stub, tmp_path, capsys) -> None:
    counts = {"total": 4, "completed": 1, "failed": 1}
    going_on = {**BATCH, "status": "in_progress", "request_counts": counts}
    stub.told["GET /v1/batches/batch_1"] = [(200, going_on)]
    assert run(stub, tmp_path) == 0
    shown = capsys.readouterr().err
    assert "completed" in shown and "1/1" in shown
    assert (
        "completed: 1 of 1 lines answered; 9 prompt tokens, of which 3 (33%) were shared and not "
        "computed; 2 output tokens"
    ) in " ".join(shown.split())


@pytest.mark.parametrize("told", [(200, [1]), (200, "x")])
def test_an_answer_of_another_server_is_reported(stub, tmp_path, told) -> None:
    stub.told["POST /v1/files"] = [told]
    with pytest.raises(ChunkLlamaError, match="is not a ChunkLlama server: its answer is no JSON"):
        run(stub, tmp_path)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"url": "http://127.0.0.1:abc"}, "^url: http://127.0.0.1:abc: "),
        ({"url": "http://[::1"}, "write http://HOST:PORT"),
        ({"url": "127.0.0.1:8000"}, "not an http or https URL"),
        ({"url": "http://127.0.0.1:8000/\u00e4"}, "characters that a URL cannot have"),
        ({"api_key": "a\nb"}, "^api_key: "),
        ({"api_key": "\u043a"}, "^api_key: "),
        ({"answers": "nowhere/out.jsonl"}, "its folder does not exist"),
        ({"answers": "."}, "name a file in it"),
        ({"answers": "in.jsonl"}, "is the file of requests"),
        ({"requests": "nowhere.jsonl"}, "No such file"),
        ({"requests": "."}, "Is a directory"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_sent(stub, tmp_path, fields, said) -> None:
    (tmp_path / "in.jsonl").write_text(LINE)
    given = {"url": f"http://127.0.0.1:{stub.server_address[1]}", **fields}
    paths = [tmp_path / given.pop(name, f"{end}.jsonl")
             for name, end in (("requests", "in"), ("answers", "out"))]  # fmt: skip
    with pytest.raises(ChunkLlamaError, match=said):
        batch_command.batch(*paths, **given)
    assert stub.asked == [] and (tmp_path / "in.jsonl").read_text() == LINE


@pytest.mark.parametrize("sent", ["", '{"custom_id": "a"}'])
def test_answers_that_arrive_in_part_are_not_kept(stub, tmp_path, sent) -> None:
    """The connection breaks in the middle of the file, which stays on the server."""
    stub.cut["GET /v1/files/file-2/content"] = sent
    with pytest.raises(ChunkLlamaError, match="broke while file-2 was received"):
        run(stub, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl.batch"]
    assert not [name for name in stub.asked if name.startswith("DELETE")]
    stub.cut.clear()
    assert run(stub, tmp_path) == 0
    assert count(stub, "POST /v1/batches") == 1


def test_a_full_disk_of_this_machine_is_named(stub, tmp_path, monkeypatch) -> None:
    """It is no failure of the server, and what the server has stays there."""
    stub.told["GET /v1/files/file-2/content"] = [(200, {"custom_id": "a"})]
    opened = Path.open

    def full(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if path.suffix == ".part" and mode == "ab":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(path, mode, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(ChunkLlamaError, match=r"out\.jsonl\.part: No space left"):
            run(stub, tmp_path)
    assert not [name for name in stub.asked if name.startswith("DELETE")]
    assert run(stub, tmp_path) == 0
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {"custom_id": "a"}


REFUSAL = json.dumps({"error": {"message": "The request arrived too slowly", "code": "x"}})
ANSWER = f"HTTP/1.1 408 Request Timeout\r\ncontent-length: {len(REFUSAL)}\r\n\r\n{REFUSAL}"


@pytest.mark.parametrize(
    ("answer", "said"),
    [(ANSWER, ": The request arrived too slowly$"), ("", "broke while the request was sent")],
)
def test_an_upload_that_breaks_is_reported(tmp_path, answer, said) -> None:
    """The server reads a part of the file and ends the connection, with or without an answer."""

    def serve(listener: socket.socket) -> None:
        with listener.accept()[0] as connection:
            connection.recv(1 << 16)
            connection.sendall(answer.encode())

    (tmp_path / "in.jsonl").write_text(LINE + " " * (32 << 20))  # no buffer holds it
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ChunkLlamaError, match=said):
            batch_command.batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl", url=url)
        thread.join()
    assert not (tmp_path / "out.jsonl.batch").exists()
