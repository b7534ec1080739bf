"""A request that the queue has no place for is refused before anything of its body is read."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from fake_engine import MODEL
from fastapi.routing import APIRoute

from chunkllama_server.transport.full_queue import QUEUED_PATHS

JOB_CHANGES = ("/{job_id}/cancel", "/{job_id}/pause", "/{job_id}/resume")
# POST routes that run no model, or that ask it something between two steps.
OTHER_PATHS = {
    *("/tokenize", "/detokenize", "/v1/chat/completions/render", "/v1/completions/render"),
    *("/v1/messages/count_tokens", "/v1/responses/input_tokens", "/api/show"),
    *("/v1/responses/{response_id}/cancel", "/v1/cache/explain", "/v1/cache/packs"),
    *("/v1/responses/compact", "/v1/rerank", "/v2/rerank", "/rerank", "/v1/score", "/score"),
    *(f"/v1/fine_tuning/jobs{rest}" for rest in ("", *JOB_CHANGES)),
    *("/v1/files", "/v1/batches", "/v1/batches/{batch_id}/cancel"),
    *("/v1/uploads", "/v1/uploads/{upload_id}/parts", "/v1/uploads/{upload_id}/complete"),
    *("/v1/uploads/{upload_id}/cancel", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"),
}


@pytest.fixture
def full(start_server, request: pytest.FixtureRequest) -> Iterator[object]:
    """A server whose only place is taken; a parameter is its root path."""
    server = start_server(max_num_seqs=1, max_waiting=0, root_path=getattr(request, "param", ""))
    server.engine.reset()
    server.engine.gate.clear()
    body = {"model": MODEL, "prompt": "say(ab)yas", "max_tokens": 2}
    first = threading.Thread(target=server.post, args=("/v1/completions", body))
    first.start()
    engine = server.app.state.context.engine
    while not engine.num_sequences:
        time.sleep(0.002)
    yield server
    server.engine.gate.set()
    first.join()


@pytest.mark.parametrize("path", sorted(QUEUED_PATHS))
def test_a_body_is_not_read_where_no_place_is_left(full, path: str) -> None:
    refused = httpx.post(f"{full.url}{path}", content=b'{"never": [read', timeout=600)
    assert refused.status_code in (429, 529), refused.text
    assert "sequences are running or waiting" in refused.text
    assert int(refused.headers["retry-after"]) >= 1


@pytest.mark.parametrize("full", ["/llm"], indirect=True)
@pytest.mark.parametrize("root", ["", "/llm"])
def test_a_path_may_begin_with_the_root_path(full, root: str) -> None:
    """A proxy removes it, or leaves it."""
    for path in ("/v1/chat/completions", "/chat/completions/", "/api/chat", "/"):
        refused = httpx.post(f"{full.url}{root}{path}", content=b'{"never": [read', timeout=600)
        assert refused.status_code == 429, (path, refused.text)


def test_what_needs_no_place_is_answered(full) -> None:
    answer = full.post("/tokenize", {"model": MODEL, "prompt": "a"})
    assert answer.status_code == 200, answer.text


def test_it_is_known_of_every_route_whether_it_needs_a_place(full) -> None:
    posts = {
        route.path
        for route in full.app.routes
        if isinstance(route, APIRoute) and "POST" in (route.methods or ())
    }
    assert posts >= QUEUED_PATHS
    assert not posts - QUEUED_PATHS - OTHER_PATHS
