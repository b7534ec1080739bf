"""Server-sent events: order, usage, split characters and stop strings, errors, and lost clients."""

from __future__ import annotations

import json
import socket
import time
from http.client import HTTPConnection
from urllib.parse import urlsplit

import openai
import pytest
from fake_engine import MODEL

from chunkllama.errors import RequestFailedError


def events(response) -> list:
    """The data of every event; [DONE] as a string."""
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = response.text.split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") and "\n" not in part for part in parts)
    return [d if (d := part[6:]) == "[DONE]" else json.loads(d) for part in parts]


def texts(chunks: list) -> list[str]:
    return [
        chunk["choices"][0]["delta"]["content"]
        for chunk in chunks
        if chunk != "[DONE]" and chunk["choices"] and chunk["choices"][0]["delta"].get("content")
    ]


def test_order_of_a_stream(server):
    chunks = events(server.chat("say(abc)yas", stream=True))
    assert chunks[-1] == "[DONE]"
    assert len({chunk["id"] for chunk in chunks[:-1]}) == 1
    assert len({chunk["created"] for chunk in chunks[:-1]}) == 1
    roles = [c["choices"][0]["delta"].get("role") for c in chunks[:-1]]
    assert roles == ["assistant"] + [None] * (len(roles) - 1)
    reasons = [c["choices"][0]["finish_reason"] for c in chunks[:-1]]
    assert reasons == [None] * (len(reasons) - 1) + ["stop"]
    assert texts(chunks) == ["a", "b", "c"]
    assert all("usage" not in chunk for chunk in chunks[:-1])


def test_include_usage(server):
    whole = server.chat("say(abc)yas").json()["usage"]
    options = {"include_usage": True}
    chunks = events(server.chat("say(abc)yas", stream=True, stream_options=options))
    assert all(chunk["usage"] is None for chunk in chunks[:-2])
    assert chunks[-2]["choices"] == []
    assert chunks[-2]["usage"]["completion_tokens"] == whole["completion_tokens"]
    assert chunks[-2]["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_continuous_usage(server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(server.chat("say(abc)yas", stream=True, stream_options=options))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks[:-1]]
    assert counts == sorted(counts)
    assert counts[-1] == 4


@pytest.mark.parametrize("text", ["🌍", "a👩‍👩‍👧‍👦b", "नमस्ते", "日本語🇮🇳"])
def test_no_part_of_a_character_surfaces(server, text):
    chunks = events(server.chat(f"say({text})yas", stream=True))
    assert "".join(texts(chunks)) == text
    assert not any("�" in piece for piece in texts(chunks))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_no_part_of_a_stop_string_surfaces(server, size):
    server.engine.tokens_per_delta = size
    chunks = events(server.chat("say(ab STxx STOP more)yas", stream=True, stop=["STOP"]))
    assert "".join(texts(chunks)) == "ab STxx "
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"


def test_text_held_for_a_stop_string_comes_at_the_end(server):
    chunks = events(server.chat("say(ends with STO)yas", stream=True, stop=["STOP"]))
    assert "".join(texts(chunks)) == "ends with STO"


def test_streams_of_n_choices(client):
    stream = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "say(xy)yas"}], n=3, stream=True
    )
    said = {0: "", 1: "", 2: ""}
    for chunk in stream:
        assert len(chunk.choices) == 1
        said[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert said == {0: "xy", 1: "xy", 2: "xy"}


def test_error_before_the_first_token_keeps_its_status(server):
    server.engine.fail_with = RequestFailedError("boom", "model_nan")
    response = server.chat(stream=True)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "model_nan"
    assert response.headers["x-should-retry"] == "false"


def test_error_in_a_stream_is_an_event_without_done(server, client):
    server.engine.fail_after = (2, RequestFailedError("boom", "model_nan"))
    chunks = events(server.chat("say(abcd)yas", stream=True))
    assert chunks[-1]["error"]["code"] == "model_nan"
    assert "[DONE]" not in chunks
    stream = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "say(abcd)yas"}], stream=True
    )
    with pytest.raises(openai.APIError, match="boom"):
        list(stream)


def wait_for(condition, seconds: float = 600.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return False


def test_closing_a_stream_aborts(server, client):
    server.engine.delay = 0.01
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "hi"}],
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    assert len(server.engine.live) == 1
    stream.close()
    assert wait_for(lambda: not server.engine.live)
    assert server.engine.aborted == [(server.engine.requests[0].request_id, None)]


@pytest.mark.parametrize("stream", [True, False])
def test_client_gone_before_the_first_token_aborts(server, stream, caplog):
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "hi"}],
        "stream": stream,
        "ignore_eos": True,
    }
    server.engine.delay = 3600.0
    client = HTTPConnection(urlsplit(server.url).netloc)
    headers = {"Content-Type": "application/json"}
    client.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    assert wait_for(lambda: server.engine.live)
    client.close()
    assert wait_for(lambda: not server.engine.live)
    assert len(server.engine.aborted) == 1
    assert not caplog.records, "a client that leaves is nothing to report"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_the_events_of_a_step_are_sent_together(server, path):
    """Each by itself costs the server's thread about as much as it costs to make it."""
    chat = {"messages": [{"role": "user", "content": "say(abcdefgh)yas"}]}
    prompt = chat if "chat" in path else {"prompt": "say(abcdefgh)yas"}
    content = json.dumps({"model": MODEL, "n": 16, "stream": True, **prompt}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    url = urlsplit(server.url)
    received = b""
    with socket.create_connection((url.hostname, url.port), 60) as sock:
        sock.sendall(head.encode() + content)
        while data := sock.recv(65536):
            received += data
    chunks, rest = [], received.partition(b"\r\n\r\n")[2]
    while size := int(rest.partition(b"\r\n")[0], 16):
        begin = rest.index(b"\r\n") + 2
        chunks.append(rest[begin : begin + size])
        rest = rest[begin + size + 2 :]
    assert chunks[-1] == b"data: [DONE]\n\n"
    num_events = b"".join(chunks).count(b"data: ")
    assert num_events >= 8 * 16 and len(chunks) <= 16 + 8 + 3, "roles, steps, the end"
