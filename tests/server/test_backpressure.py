"""What waits is bounded in requests, tokens, chunks and time; refusals are quick and say when to
come again."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from fake_engine import MODEL

from chunkllama_server.api.common.admission import EndRate


@contextmanager
def gated(server) -> Iterator[None]:
    """The engine holds back every delta inside the block."""
    server.engine.reset()
    server.engine.gate.clear()
    try:
        yield
    finally:
        server.engine.gate.set()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def waiting_of(server) -> tuple[int, int, int]:
    engine = server.app.state.context.engine
    return engine.num_sequences, engine.tokens_waiting, engine.chunks_waiting


@pytest.mark.parametrize(
    ("limit", "fields", "what"),
    [
        ({"max_waiting_tokens": 150}, {"n": 3}, "180 prompt tokens are waiting, and the"),
        ({"max_waiting_tokens": 60}, {}, "60 prompt tokens are waiting"),
        ({"max_waiting_chunks": 5}, {"n": 5, "max_tokens": 9}, "6 chunks are needed"),
        (
            {"max_num_seqs": 1, "max_waiting": 0},
            {},
            "1 sequences are running or waiting, and the server takes 1 (max_waiting)",
        ),
    ],
)
def test_a_full_queue_is_429_with_the_time_to_wait(start_server, limit, fields, what) -> None:
    server = start_server(**limit)
    body = {"model": MODEL, "prompt": "x" * 48 + "say(ab)yas..", "max_tokens": 2, **fields}
    answers = []
    with gated(server):
        first = threading.Thread(
            target=lambda: answers.append(server.post("/v1/completions", body))
        )
        first.start()
        wait_until(lambda: waiting_of(server)[0] > 0)
        for stream in (False, True):
            refused = server.post("/v1/completions", {**body, "stream": stream})
            assert refused.status_code == 429, refused.text
            assert 1 <= int(refused.headers["retry-after"]) <= 30
            error = refused.json()["error"]
            assert error["code"] == "engine_overloaded" and what in error["message"]
        assert len(server.engine.requests) == 1, "the engine saw none of the refused"
    first.join()
    assert answers[0].status_code == 200
    assert waiting_of(server) == (0, 0, 0)
    assert server.post("/v1/completions", body).status_code == 200


def test_a_request_that_has_a_token_does_not_wait(start_server) -> None:
    server = start_server(max_waiting_tokens=1)
    with gated(server):
        server.engine.gate_at = 1
        body = {"model": MODEL, "prompt": "say(abc)yas", "max_tokens": 3}
        threads = [
            threading.Thread(target=server.post, args=("/v1/completions", body)) for _ in range(2)
        ]
        for number, thread in enumerate(threads, 1):
            thread.start()
            wait_until(lambda number=number: waiting_of(server) == (number, 0, 0))
    for thread in threads:
        thread.join()
    assert waiting_of(server) == (0, 0, 0)


def test_a_request_that_waits_too_long_is_503(start_server) -> None:
    server = start_server(queue_timeout_seconds=0.05)
    with gated(server):
        for stream in (False, True):
            body = {"model": MODEL, "prompt": "hi", "stream": stream}
            late = server.post("/v1/completions", body)
            assert late.status_code == 503
            assert late.json()["error"]["code"] == "queue_timeout"
            assert int(late.headers["retry-after"]) >= 1
    assert waiting_of(server) == (0, 0, 0)
    with server.http() as http:
        text = http.get("/metrics").text
    assert 'chunkllama_request_finished_total{reason="timeout"} 2.0' in text
    assert server.post("/v1/completions", {"model": MODEL, "prompt": "hi"}).status_code == 200


def test_a_request_that_runs_too_long_ends_with_its_code(start_server) -> None:
    server = start_server(request_timeout_seconds=0.2, queue_timeout_seconds=60)
    with gated(server):
        server.engine.gate_at = 2
        body = {"model": MODEL, "prompt": "say(abcd)yas"}
        whole = server.post("/v1/completions", body)
        assert (whole.status_code, whole.json()["error"]["code"]) == (504, "deadline")
        assert whole.headers["x-should-retry"] == "false"
        streamed = server.post("/v1/completions", {**body, "stream": True})
        assert streamed.status_code == 200
        events = [line[6:] for line in streamed.text.splitlines() if line.startswith("data: ")]
        assert json.loads(events[-1])["error"]["code"] == "deadline"
        assert json.loads(events[0])["choices"][0]["text"] == "a"
        assert len(server.engine.aborted) == 2 and not server.engine.live


def test_the_time_to_wait_follows_from_the_rate_of_ends() -> None:
    now = [0.0]
    rate = EndRate(lambda: now[0])
    assert rate.seconds_for(100) == 2, "nothing has ended"
    for _ in range(10):
        now[0] += 1.0
        rate.add(2)
    assert rate.seconds_for(4) == 2
    assert rate.seconds_for(1000) == 30
    assert rate.seconds_for(0) == 1
