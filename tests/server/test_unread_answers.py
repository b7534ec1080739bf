"""Large answers that their clients do not read: they are held once, not once for each client."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import time
import tracemalloc
from typing import Any

import pytest

from chunkllama_server.api.common.response_store import EventRecorder, PackedResponse
from chunkllama_server.transport.http_protocol import LimitedH11Protocol
from chunkllama_server.transport.pieces import PIECE_BYTES, in_pieces
from chunkllama_server.transport.sse import SseResponse, StreamTimes

MANY = {"model": "alias", "messages": [{"role": "user", "content": "say(ab)yas"}], "n": 4,
        "max_tokens": 600, "ignore_eos": True, "logprobs": True, "top_logprobs": 20}  # fmt: skip


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES, PIECE_BYTES + 1, 5 * PIECE_BYTES])
@pytest.mark.parametrize("is_followed", [False, True])
def test_a_body_is_sent_in_pieces(size: int, is_followed: bool) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    start = {"type": "http.response.start", "status": 200, "headers": []}
    message = {"type": "http.response.body", "body": body, "more_body": is_followed}

    async def main() -> None:
        await in_pieces(send)(start)
        await in_pieces(send)(message)

    asyncio.run(main())
    assert sent.pop(0) == start
    assert b"".join(each["body"] for each in sent) == body
    assert max(len(each["body"]) for each in sent) <= PIECE_BYTES
    assert len(sent) == max(-(-size // PIECE_BYTES), 1)
    assert [each["more_body"] for each in sent] == [True] * (len(sent) - 1) + [is_followed]


@pytest.mark.parametrize("path", ["whole", "stored"])
def test_an_answer_that_is_not_read_is_not_copied(server, monkeypatch, path: str) -> None:
    """A connection holds some pieces of the megabyte that waits for its client."""
    protocols: list[LimitedH11Protocol] = []
    made = LimitedH11Protocol.connection_made

    def noting(protocol: LimitedH11Protocol, transport: Any) -> None:
        protocols.append(protocol)
        made(protocol, transport)

    server.engine.tokens_per_delta = 100
    body, request = json.dumps(MANY).encode(), "POST /v1/chat/completions"
    if path == "stored":
        fields = {"input": f"say({'ab' * 600})yas", "top_logprobs": 20,
                  "include": ["message.output_text.logprobs"]}  # fmt: skip
        stored = server.post("/v1/responses", fields).json()["id"]
        body, request = b"", f"GET /v1/responses/{stored}"
    monkeypatch.setattr(LimitedH11Protocol, "connection_made", noting)
    address = server.url.removeprefix("http://").split(":")
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(120)
        sock.connect((address[0], int(address[1])))
        head = f"{request} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        deadline = time.monotonic() + 120
        while not (protocols and protocols[0]._raw_transport.get_write_buffer_size()):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert protocols[0]._raw_transport.get_write_buffer_size() <= 3 * PIECE_BYTES
        answer = http.client.HTTPResponse(sock)
        answer.begin()
        content = answer.read()
    assert len(content) > 10 * PIECE_BYTES and json.loads(content)["id"]


def test_a_large_event_that_is_read_slowly_makes_progress() -> None:
    """What counts for its client is the last piece that was sent."""
    began: list[float] = []

    async def events() -> Any:
        yield b"data: " + b"x" * (4 * PIECE_BYTES) + b"\n\n"

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body" and message["body"]:
            assert len(message["body"]) <= PIECE_BYTES and message["more_body"]
            began.append(response._sending_since or 0.0)
            await asyncio.sleep(0.002)

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def main() -> None:
        nonlocal response
        response = SseResponse(events(), StreamTimes(stall=60.0, first_byte=60.0, comment=60.0))
        await response({"type": "http", "method": "GET", "headers": []}, receive, send)

    response: Any = None
    asyncio.run(main())
    assert len(began) == 5 and began == sorted(set(began))


def packed(events: list[bytes]) -> PackedResponse:
    recorder = EventRecorder()
    recorder.add(events)
    return PackedResponse(b"{}", b"", b"", b"", recorder.packed())


@pytest.mark.parametrize("sizes", [[], [1], [9] * 3000, [3_000_000], [70_000, 1, 200_000, 65_536]])
def test_stored_events_are_unpacked_as_they_were(sizes: list[int]) -> None:
    events = [b"data: " + bytes([97 + i % 26]) * size + b"\n\n" for i, size in enumerate(sizes)]
    assert list(packed(events).unpack_events()) == events


def test_stored_events_are_unpacked_when_they_are_read() -> None:
    """A stream of them holds the next ones, not 16 MB which were packed to a fraction."""
    stored = packed([b"data: " + b"x" * 2000 + b"\n\n"] * 8000)
    assert len(stored.events) < 1 << 20
    tracemalloc.start()
    unpacked = stored.unpack_events()
    num_events = sum(1 for _ in unpacked)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_events == 8000 and peak < 1 << 20
