"""Files and batches by openai-python: runs, refusals, cancelling, expiry, quotas, restarts."""

from __future__ import annotations

import collections
import json
import random
import stat
import time
from itertools import pairwise
from pathlib import Path

import anyio
import openai
import pytest
from batch_helpers import CHAT, answers, begin, encoded, ended, line, runner_of, upload
from fake_engine import MODEL

from chunkllama.errors import OverloadedError
from chunkllama_server.api.batch.lines import prefix_order
from chunkllama_server.config.tenants import TenantQuotas


@pytest.fixture
def files(start_server, tmp_path):
    """A server with a folder of its own."""
    server = start_server(files_dir=tmp_path / "files")
    return server


@pytest.fixture
def client(files):
    with files.client() as client:
        yield client


def test_a_batch_from_end_to_end(files, client, tmp_path) -> None:
    lines = [line(f"r{i}", f"say(answer {i})yas") for i in range(20)]
    batch = begin(client, lines)
    assert batch.status in ("validating", "in_progress")
    batch = ended(client, batch)
    assert batch.status == "completed"
    assert batch.request_counts.model_dump() == {"total": 20, "completed": 20, "failed": 0}
    assert batch.error_file_id is None and batch.errors is None
    got = answers(client, batch.output_file_id)
    assert [row["custom_id"] for row in got] == [f"r{i}" for i in range(20)]
    for number, row in enumerate(got):
        assert row["error"] is None and row["response"]["status_code"] == 200
        message = row["response"]["body"]["choices"][0]["message"]
        assert message["content"] == f"answer {number}"
    usages = [row["response"]["body"]["usage"] for row in got]
    assert batch.usage.input_tokens == sum(usage["prompt_tokens"] for usage in usages)
    assert batch.usage.output_tokens == sum(usage["completion_tokens"] for usage in usages)
    assert batch.usage.input_tokens_details.cached_tokens == sum(
        usage["prompt_tokens_details"]["cached_tokens"] for usage in usages
    )
    assert {request.priority for request in files.engine.requests} == {1000}
    assert client.batches.list().data[0].id == batch.id
    names = list((tmp_path / "files").rglob("*"))
    modes = {stat.S_IMODE(path.stat().st_mode) for path in names if path.is_file()}
    folders = {stat.S_IMODE(path.stat().st_mode) for path in names if path.is_dir()}
    assert (modes, folders) == ({0o600}, {0o700})
    assert stat.S_IMODE((tmp_path / "files").stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("url", "body", "text"),
    [
        ("/v1/completions", {"prompt": "say(hi)yas"}, lambda b: b["choices"][0]["text"]),
        (
            "/v1/responses",
            {"input": "say(hi)yas", "store": False},
            lambda b: b["output"][0]["content"][0]["text"],
        ),
        (
            "/v1/messages",
            {"max_tokens": 9, "messages": [{"role": "user", "content": "say(hi)yas"}]},
            lambda b: b["content"][0]["text"],
        ),
        (
            "/v1/embeddings",
            {"input": "abc"},
            lambda b: "hi" if b["data"][0]["embedding"][:2] == [0.6, 0.8] else b,
        ),
    ],
)
def test_other_endpoints(client, url, body, text) -> None:
    each = {"custom_id": "a", "method": "POST", "url": url, "body": {"model": MODEL, **body}}
    batch = ended(client, begin(client, [each], url))
    assert batch.status == "completed"
    assert text(answers(client, batch.output_file_id)[0]["response"]["body"]) == "hi"
    assert batch.usage.input_tokens > 0


def test_refused_lines_are_in_the_error_file(client) -> None:
    lines = [line("good"), line("bad", temperature=9), line("stream", stream=True)]
    batch = ended(client, begin(client, lines))
    assert batch.status == "completed"
    assert (batch.request_counts.completed, batch.request_counts.failed) == (2, 1)
    assert {row["custom_id"] for row in answers(client, batch.output_file_id)} == {
        "good", "stream",
    }  # fmt: skip
    (failed,) = answers(client, batch.error_file_id)
    assert failed["custom_id"] == "bad"
    assert failed["response"]["status_code"] == 400
    assert failed["response"]["body"]["error"]["param"] == "temperature"


@pytest.mark.parametrize(
    ("rows", "code", "number"),
    [
        ([line("a"), "x"], "invalid_json_line", 2),
        ([line("a"), line("a")], "duplicate_custom_id", 2),
        ([{**line("a"), "custom_id": 5}], "invalid_custom_id", 1),
        ([{**line("a"), "method": "GET"}], "invalid_method", 1),
        ([line("a"), line("b", url="/v1/completions")], "mismatched_url", 2),
        ([{**line("a"), "body": []}], "missing_body", 1),
        ([], "empty_file", None),
    ],
)
def test_files_that_cannot_be_run(client, rows, code, number) -> None:
    batch = ended(client, begin(client, rows))
    assert batch.status == "failed"
    assert [(error.code, error.line) for error in batch.errors.data] == [(code, number)]
    assert batch.output_file_id is None


def test_files_of_one_key_are_its_own(start_server, tmp_path) -> None:
    server = start_server(
        files_dir=tmp_path / "files",
        api_keys={"a": "ka", "b": "kb"},
        quotas={"a": TenantQuotas(file_bytes=30_000)},
    )
    with server.client("ka") as own, server.client("kb") as other:
        batch = ended(own, begin(own, [line("x")]))
        assert server.engine.requests[-1].tenant == "a"
        for call in (
            lambda: other.files.retrieve(batch.input_file_id),
            lambda: other.files.content(batch.output_file_id),
            lambda: other.files.delete(batch.input_file_id),
            lambda: other.batches.retrieve(batch.id),
            lambda: other.batches.cancel(batch.id),
        ):
            with pytest.raises(openai.NotFoundError):
                call()
        assert other.files.list().data == other.batches.list().data == []
        with pytest.raises(openai.APIStatusError) as full:
            upload(own, [line("x", "y" * 30_000)])
        assert (full.value.status_code, full.value.code) == (413, "file_budget")
        upload(other, [line("x", "y" * 8000)])
        own.files.delete(batch.input_file_id)
        with pytest.raises(openai.NotFoundError):
            own.files.retrieve(batch.input_file_id)


def test_cancelling_keeps_what_has_run(files, client) -> None:
    """Short answers pass the gate; the others are cancelled in the middle."""
    files.engine.gate_at = 3
    files.engine.gate.clear()
    texts = ["say(a)yas", "say(abcdef)yas"]
    batch = begin(client, [line(f"r{i}", texts[i % 2]) for i in range(6)])
    while client.batches.retrieve(batch.id).request_counts.completed < 3:
        time.sleep(0.01)
    client.batches.cancel(batch.id)
    batch = ended(client, batch)
    files.engine.gate.set()
    assert batch.status == "cancelled"
    assert batch.cancelling_at and batch.cancelled_at
    assert (batch.request_counts.completed, batch.request_counts.failed) == (3, 0)
    assert [row["custom_id"] for row in answers(client, batch.output_file_id)] == [
        "r0",
        "r2",
        "r4",
    ]
    missing = answers(client, batch.error_file_id)
    assert [(row["custom_id"], row["error"]["code"]) for row in missing] == [
        (f"r{i}", "batch_cancelled") for i in (1, 3, 5)
    ]
    assert client.batches.cancel(batch.id).status == "cancelled"


def test_what_has_not_run_in_time_expires(start_server, tmp_path) -> None:
    server = start_server(files_dir=tmp_path / "files")
    with server.client() as client:
        server.engine.gate.clear()
        batch = ended(client, begin(client, [line("a"), line("b")], window="1s"))
        server.engine.gate.set()
        assert batch.status == "expired"
        rows = answers(client, batch.error_file_id)
        assert [(row["custom_id"], row["error"]["code"]) for row in rows] == [
            ("a", "batch_expired"),
            ("b", "batch_expired"),
        ]


def test_a_busy_server_is_asked_again(files, client) -> None:
    files.engine.fail_with = OverloadedError("full", 1)
    batch = begin(client, [line("a")])
    while not files.engine.requests:
        time.sleep(0.01)
    files.engine.fail_with = None
    batch = ended(client, batch)
    assert batch.request_counts.completed == 1


def test_results_beyond_the_budget_end_the_batch(start_server, tmp_path) -> None:
    lines = [line(f"r{i}", f"say({'z' * 500})yas") for i in range(40)]
    room = len(encoded(lines)) + 40_000
    server = start_server(files_dir=tmp_path / "files", file_bytes=room, batch_requests=2)
    with server.client() as client:
        batch = ended(client, begin(client, lines))
        assert batch.status == "failed"
        assert batch.errors.data[0].code == "file_budget"
        counts = batch.request_counts
        assert 0 < counts.completed < 40
        assert len(answers(client, batch.output_file_id)) == counts.completed


def test_a_folder_is_used_by_one_server(files, client, start_server, tmp_path) -> None:
    upload(client, [line("a")])
    second = start_server(files_dir=tmp_path / "files")
    with second.client() as other, pytest.raises(openai.APIStatusError) as refused:
        other.files.list()
    assert (refused.value.status_code, refused.value.code) == (503, "files_unavailable")


def test_servers_of_a_machine_share_no_folder(start_server, tmp_path, monkeypatch) -> None:
    """Without a setting, a second server on another port stores files, too."""
    monkeypatch.setenv("CHUNKLLAMA_CACHE", str(tmp_path))
    for port in (8000, 8001):
        with start_server(files_dir=None, port=port).client() as client:
            stored = upload(client, [line("a")])
            assert [each.id for each in client.files.list()] == [stored.id]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files-8000", "files-8001"]


def test_the_folder_of_an_earlier_version_is_taken_over(start_server, tmp_path, monkeypatch):
    monkeypatch.setenv("CHUNKLLAMA_CACHE", str(tmp_path))
    earlier = tmp_path / "files"
    first = start_server(files_dir=earlier, port=8000)
    with first.client() as client:
        stored = upload(client, [line("a")])
        with start_server(files_dir=None, port=8001).client() as other:
            assert not list(other.files.list())
        assert [each.id for each in client.files.list()] == [stored.id]
    first.stop()
    for options in ({"files_dir": tmp_path / "own"}, {"batches": False}, {"port": 0}):
        start_server(**{"files_dir": None, "port": 8000, **options})
        assert earlier.is_dir()
    for port, ids in ((8000, [stored.id]), (8002, [])):
        with start_server(files_dir=None, port=port).client() as client:
            assert [each.id for each in client.files.list()] == ids
    assert not earlier.exists()


def test_files_can_be_turned_off(start_server) -> None:
    server = start_server(batches=False)
    with server.client() as client, pytest.raises(openai.NotFoundError) as refused:
        client.files.list()
    assert refused.value.code == "files_disabled"


def test_a_file_and_a_purpose(files, client) -> None:
    stored = upload(client, [line("a")])
    assert (stored.filename, stored.purpose, stored.bytes) == (
        "in.jsonl", "batch", len(encoded([line("a")])),
    )  # fmt: skip
    assert client.files.content(stored.id).content == encoded([line("a")])
    assert [each.id for each in client.files.list()] == [stored.id]
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.create(file=("in.jsonl", b"x"), purpose="vision")
    assert caught.value.param == "purpose"
    with pytest.raises(openai.NotFoundError):
        client.batches.create(input_file_id="file-x", endpoint=CHAT, completion_window="24h")


def test_the_head_of_a_content_reads_no_file(files, client, monkeypatch) -> None:
    """One that asks for no byte of 200 MB must not cost what reading them does."""
    stored = upload(client, [line("a")])
    opened, open_file = [], anyio.open_file

    async def noting(path, *args, **kwargs):
        opened.append(path)
        return await open_file(path, *args, **kwargs)

    monkeypatch.setattr(anyio, "open_file", noting)
    with files.http() as http:
        head = http.head(f"/v1/files/{stored.id}/content")
        assert (head.status_code, head.content, opened) == (200, b"", [])
        assert int(head.headers["content-length"]) == stored.bytes
        assert http.get(f"/v1/files/{stored.id}/content").content == encoded([line("a")])
    assert len(opened) == 1


@pytest.mark.parametrize(
    ("asked", "status"),
    [("bytes=0-1", 206), ("bytes=-2", 206), ("bytes=5-2", 400), ("bytes=x", 400),
     ("lines=0-1", 400), ("bytes=99999-", 416), (f"bytes={'0-0,' * 200}1-2", 200)],
)  # fmt: skip
def test_parts_of_a_content(files, client, asked: str, status: int) -> None:
    """A part that cannot be sent is refused as everything else is."""
    stored = upload(client, [line("a")])
    with files.http() as http:
        answer = http.get(f"/v1/files/{stored.id}/content", headers={"range": asked})
    assert answer.status_code == status
    if status == 206:
        assert len(answer.content) == 2
    if status >= 400:
        assert answer.json()["error"]["code"] == "invalid_range"
        said = "is malformed" if status == 400 else "asks for no part of the file"
        assert answer.json()["error"]["message"] == f"The Range header {said}"
        size = f"bytes */{stored.bytes}" if status == 416 else None
        assert answer.headers.get("content-range") == size


def test_content_that_is_gone_is_not_found(files, client) -> None:
    """Deleted between the look at the record and at the file."""
    stored = upload(client, [line("a")])
    runner_of(files).store.file_path("", stored.id).unlink()
    with pytest.raises(openai.NotFoundError) as refused:
        client.files.content(stored.id)
    assert refused.value.code == "file_not_found"


def test_a_large_file_has_a_limit_of_its_own(start_server, tmp_path) -> None:
    server = start_server(files_dir=tmp_path / "files", max_body_bytes=2000, max_file_bytes=50_000)
    with server.client() as client:
        upload(client, [line("a", "x" * 20_000)])
        with pytest.raises(openai.APIStatusError) as refused:
            upload(client, [line("a", "x" * 60_000)])
    assert refused.value.status_code == 413


def test_lines_are_ordered_by_their_prefixes() -> None:
    """Prompts with a common beginning are neighbours, however they were shuffled."""
    prefixes = [f"system prompt {i} " * 60 for i in range(16)]
    bodies = [
        {"messages": [{"role": "system", "content": prefixes[i % 16]},
                      {"role": "user", "content": f"question {i}"}]}
        for i in range(200)
    ]  # fmt: skip
    random.Random(1).shuffle(bodies)
    bodies.sort(key=prefix_order)
    names = [body["messages"][0]["content"] for body in bodies]
    runs = 1 + sum(a != b for a, b in pairwise(names))
    assert runs == 16


def test_each_line_once_after_a_cut(start_server, tmp_path) -> None:
    """A process that ended in the middle of a line continues with the lines that have no result."""
    folder = tmp_path / "files"
    first = start_server(files_dir=folder, batch_requests=1)
    first.engine.gate.clear()
    first.engine.gate_at = 0
    with first.client() as client:
        batch = begin(client, [line(f"r{i}") for i in range(6)])
        while not first.engine.requests:
            time.sleep(0.01)
    runner = first.app.state.context.batches
    record = runner.store.batches.get(batch.id, "")
    first.stop()
    first.engine.gate.set()
    results = runner.store.results_path(record)
    done = {"id": "x", "custom_id": "r2", "error": None,
            "response": {"status_code": 200, "request_id": "q", "body": {"old": True}}}  # fmt: skip
    whole = json.dumps({"line": 3, "result": done}).encode() + b"\n"
    results.write_bytes(whole + whole + b'{"line": 4, "resu')
    second = start_server(files_dir=folder)
    with second.client() as client:
        batch = ended(client, client.batches.retrieve(batch.id))
        got = answers(client, batch.output_file_id)
    assert batch.status == "completed"
    assert collections.Counter(row["custom_id"] for row in got) == {f"r{i}": 1 for i in range(6)}
    assert got[2]["response"]["body"] == {"old": True}
    assert len(second.engine.requests) == 5
    while Path(results).exists():  # removed behind the status
        time.sleep(0.01)


def test_a_batch_of_a_protocol_that_is_turned_off_is_refused(start_server, tmp_path) -> None:
    server = start_server(files_dir=tmp_path / "files", protocols="ollama")
    with server.client() as client:
        stored = upload(client, [line("a", url="/v1/messages")])
        with pytest.raises(openai.BadRequestError) as refused:
            client.batches.create(
                input_file_id=stored.id, endpoint="/v1/messages", completion_window="24h"
            )
    assert (refused.value.param, refused.value.code) == ("endpoint", "unsupported")
