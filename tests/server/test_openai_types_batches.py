"""openai-python's own types accept batches, their files, and what is in these."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from batch_helpers import encoded
from fake_engine import MODEL
from openai import types
from openai.pagination import SyncCursorPage
from openai.types import responses as response_types
from openai.types import shared
from openai_checks import check


@pytest.fixture(scope="module")
def answering(start_server):
    return start_server()


LINES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "say(hi)yas"}]},
    "/v1/completions": {"prompt": "say(hi)yas"},
    "/v1/responses": {"input": "say(hi)yas"},
    "/v1/embeddings": {"input": "a"},
}
WHOLE = {
    "/v1/chat/completions": types.chat.ChatCompletion,
    "/v1/completions": types.Completion,
    "/v1/responses": response_types.Response,
    "/v1/embeddings": types.CreateEmbeddingResponse,
}


def upload(http, lines: list[Any], **fields: str) -> dict[str, Any]:
    form = {"purpose": "batch", **fields}
    return http.post("/v1/files", data=form, files={"file": ("in.jsonl", encoded(lines))}).json()


def run_batch(http, lines: list[Any], endpoint: str, **fields: Any) -> dict[str, Any]:
    """A job when it has ended; each state on the way fits the type."""
    body = {"input_file_id": upload(http, lines)["id"], "endpoint": endpoint, **fields}
    made = http.post("/v1/batches", json={"completion_window": "24h", **body}).json()
    deadline = time.monotonic() + 60
    while check(types.Batch, made).status not in ("completed", "failed", "cancelled"):
        assert time.monotonic() < deadline, made
        made = http.get(f"/v1/batches/{made['id']}").json()
    return made


@pytest.mark.parametrize("endpoint", LINES)
def test_batches_and_their_files(answering, endpoint):
    good = {"method": "POST", "url": endpoint, "body": {"model": MODEL, **LINES[endpoint]}}
    bad = {**good, "body": {"model": "absent"}}
    lines = [{**good, "custom_id": "a"}, {**bad, "custom_id": "b"}]
    expiry = {"anchor": "created_at", "seconds": 3600}
    with answering.http() as http:
        options = {"metadata": {"a": "b"}, "output_expires_after": expiry}
        batch = run_batch(http, lines, endpoint, **options)
        assert batch["request_counts"] == {"total": 2, "completed": 1, "failed": 1}
        (answered,) = map(
            json.loads, http.get(content_of(batch["output_file_id"])).text.splitlines()
        )
        check(WHOLE[endpoint], answered["response"]["body"])
        (refused,) = map(json.loads, http.get(content_of(batch["error_file_id"])).text.splitlines())
        check(shared.ErrorObject, refused["response"]["body"]["error"])
        listed = http.get("/v1/batches").json()
        assert check(SyncCursorPage[types.Batch], listed).data
        files = http.get("/v1/files").json()
        purposes = {each.purpose for each in check(SyncCursorPage[types.FileObject], files).data}
        assert purposes == {"batch", "batch_output"}
        output = batch["output_file_id"]
        assert check(types.FileObject, http.get(f"/v1/files/{output}").json()).expires_at
        check(types.FileDeleted, http.delete(f"/v1/files/{output}").json())


def content_of(file_id: str) -> str:
    return f"/v1/files/{file_id}/content"


def test_a_batch_that_fails_and_one_that_is_cancelled(answering):
    with answering.http() as http:
        failed = run_batch(http, ["no line"], "/v1/completions")
        assert check(types.Batch, failed).errors.data[0].line == 1
        line = {"method": "POST", "url": "/v1/completions", "custom_id": "a"}
        answering.engine.gate.clear()
        try:
            made = upload(http, [{**line, "body": {"model": MODEL, "prompt": "a"}}])
            check(types.FileObject, made)
            body = {"input_file_id": made["id"], "endpoint": line["url"]}
            batch = http.post("/v1/batches", json={"completion_window": "1h", **body}).json()
            cancelled = http.post(f"/v1/batches/{batch['id']}/cancel").json()
            assert check(types.Batch, cancelled).status in ("cancelling", "cancelled")
        finally:
            answering.engine.gate.set()
