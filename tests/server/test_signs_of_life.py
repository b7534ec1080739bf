"""A stream that waits sends its headers and comment lines; errors keep status or code."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import openai
import pytest
from fake_engine import MODEL

from chunkllama.errors import EngineDeadError, OverloadedError, RequestFailedError

MESSAGES = [{"role": "user", "content": "say(abcd)yas"}]
ENDPOINTS = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "say(abcd)yas"},
    "/v1/responses": {"input": "say(abcd)yas"},
}
COMMENT = ": waiting"
ERRORS = [
    (OverloadedError("full", 7), 429, "engine_overloaded"),
    (RequestFailedError("boom", "model_nan"), 500, "model_nan"),
    (EngineDeadError("gone"), 503, "engine_unavailable"),
]


@pytest.fixture(scope="module")
def impatient(start_server):
    return start_server(stream_first_byte_seconds=0.02, stream_comment_seconds=0.02)


@pytest.fixture
def waiting(impatient):
    """The server, its engine as new and holding back every delta."""
    impatient.engine.reset()
    impatient.engine.gate.clear()
    yield impatient
    impatient.engine.gate.set()


@pytest.fixture(params=sorted(ENDPOINTS))
def endpoint(request) -> str:
    return request.param


def post(http: httpx.Client, path: str):
    body = {"model": MODEL, "stream": True, **ENDPOINTS[path]}
    return http.stream("POST", path, json=body)


def comments(lines: Iterator[str], count: int) -> None:
    """Read ``count`` comment lines; nothing else may come before them."""
    while count:
        line = next(lines)
        assert line in (COMMENT, "")
        count -= line == COMMENT


def text_of(path: str, lines: Iterator[str]) -> str:
    parts = []
    for line in lines:
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line[6:])
        if path == "/v1/responses":
            parts.append(event["delta"] if event["type"].endswith("text.delta") else "")
        else:
            choice = event["choices"][0]
            parts.append(choice.get("text") or choice.get("delta", {}).get("content") or "")
    return "".join(parts)


def test_headers_and_comments_come_before_the_first_token(waiting, endpoint) -> None:
    with waiting.http() as http, post(http, endpoint) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = response.iter_lines()
        comments(lines, 3)
        waiting.engine.gate.set()
        assert text_of(endpoint, lines).endswith("abcd")


def test_comments_fill_a_pause_between_tokens(waiting, endpoint) -> None:
    waiting.engine.gate_at = 2
    with waiting.http() as http, post(http, endpoint) as response:
        seen = []
        for line in (lines := response.iter_lines()):
            seen.append(line)
            if line == COMMENT:
                break
        comments(lines, 2)
        waiting.engine.gate.set()
        assert text_of(endpoint, iter([*seen, *lines])).endswith("abcd")


@pytest.mark.parametrize(("error", "status", "code"), ERRORS)
def test_an_error_behind_the_headers_is_an_event_of_the_same_code(
    waiting, endpoint, error, status, code
) -> None:
    waiting.engine.fail_with = error
    with waiting.http() as http, post(http, endpoint) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        comments(lines, 1)
        waiting.engine.gate.set()
        data = [line[6:] for line in lines if line.startswith("data: ")]
    assert [json.loads(event)["error"]["code"] for event in data] == [code]
    assert not waiting.engine.live


@pytest.mark.parametrize(("error", "status", "code"), ERRORS)
def test_an_error_before_the_headers_is_a_status(server, endpoint, error, status, code) -> None:
    server.engine.fail_with = error
    response = server.post(endpoint, {"model": MODEL, "stream": True, **ENDPOINTS[endpoint]})
    assert response.status_code == status
    assert response.json()["error"]["code"] == code


def test_openai_clients_skip_comments(waiting) -> None:
    with waiting.client() as client:
        waiting.engine.gate_at = 1
        with client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True) as stream:
            chunks = iter(stream)
            said = [next(chunks), next(chunks)]
            waiting.engine.gate.set()
            said += chunks
        assert "".join(c.choices[0].delta.content or "" for c in said) == "abcd"
        waiting.engine.fail_with = OverloadedError("the queue is full", 3)
        waiting.engine.gate.clear()
        waiting.engine.gate_at = 0
        late = client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        waiting.engine.gate.set()
        with pytest.raises(openai.APIError, match="queue is full"):
            list(late)


def test_a_client_that_leaves_while_it_waits_aborts(waiting, endpoint) -> None:
    waiting.engine.gate_at = 1
    with waiting.http() as http, post(http, endpoint) as response:
        for line in response.iter_lines():
            if line == COMMENT:
                break
        assert len(waiting.engine.live) == 1
    request = waiting.engine.requests[0]
    waiting.engine.gate.set()
    while waiting.engine.live:
        pass
    assert waiting.engine.aborted == [(request.request_id, None)]
