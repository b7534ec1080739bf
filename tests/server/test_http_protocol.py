"""Limits below ASGI, tried with raw sockets: slow arrivals, headers, connections, smuggling."""

from __future__ import annotations

import asyncio
import contextlib
import json
import select
import socket
import subprocess
import threading
import time
from collections.abc import Callable

import h11
import httpx
import pytest
import uvicorn
from uvicorn.server import ServerState

from chunkllama_server.transport import http_protocol
from chunkllama_server.transport.http_protocol import (
    HttpLimits,
    counting_listener,
    make_protocol,
)

GET = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
HEADERS = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def limited(start_server):
    return start_server(limits=HttpLimits(header_seconds=0.3, body_seconds=0.5, max_connections=12))


def connect(server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=120)


def read_all(sock: socket.socket) -> bytes:
    data = b""
    while part := sock.recv(65536):
        data += part
    return data


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def exchange(server, request: bytes) -> bytes:
    with connect(server) as sock:
        sock.sendall(request)
        return read_all(sock)


def test_silent_connection_is_closed(limited):
    with connect(limited) as sock:
        assert read_all(sock) == b""


@pytest.mark.parametrize(
    "begun", [b"GET / HT", HEADERS, HEADERS + b"Content-Length: 9\r\n\r\n{", b"\r\n"]
)
def test_S14_slow_request_is_408_and_closed(limited, begun):
    answer = exchange(limited, begun)
    if begun.strip():
        assert answer.startswith(b"HTTP/1.1 408")
        body = json.loads(answer.partition(b"\r\n\r\n")[2])
        assert body["error"]["code"] == "request_timeout"


def test_a_trickle_does_not_extend_the_limit(limited):
    with connect(limited) as sock, pytest.raises(OSError):
        for byte in GET[:-2] + b"X: " + b"a" * 3000:  # for 30 seconds
            sock.sendall(bytes([byte]))
            time.sleep(0.01)


@pytest.fixture(scope="module")
def patient(start_server):
    """Each byte of a body gives it another second."""
    return start_server(limits=HttpLimits(body_seconds=0.2, body_rate=1))


def test_a_body_that_progresses_may_take_long(patient):
    body = json.dumps({"model": "alias", "prompt": "say(ab)yas", "max_tokens": 2}).encode()
    head = HEADERS.replace(b"chat/", b"") + b"Connection: close\r\n"
    with connect(patient) as sock:
        sock.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body[:-1])
        time.sleep(0.6)  # three times body_seconds
        sock.sendall(body[-1:])
        assert read_all(sock).startswith(b"HTTP/1.1 200")


def test_a_body_that_trickles_ends_and_its_408_can_be_read(limited):
    """The client is still sending when it is refused: what it sends is dropped, not reset."""
    with connect(limited) as sock:
        sock.sendall(HEADERS + b"Content-Length: 2000000\r\n\r\n")
        while not select.select([sock], [], [], 0.01)[0]:
            sock.sendall(b" ")
        for _ in range(64):
            sock.sendall(b" " * 65536)
        assert read_all(sock).startswith(b"HTTP/1.1 408")


SHAPES = [
    ("/v1/messages", {"type", "error", "request_id"}),
    ("/v1/messages/count_tokens", {"type", "error", "request_id"}),
    ("/api/chat", {"error"}),
    ("/generate", {"error", "error_type"}),
    ("/v1/completions", {"error"}),
]


@pytest.mark.parametrize(("path", "members"), SHAPES)
@pytest.mark.parametrize(
    "rest",
    [
        b"X: a\r\n" * 101 + b"\r\n",
        b"Transfer-Encoding: chunked\r\n\r\nno size\r\n",
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
    ids=["101 headers", "bad chunk", "length and chunk"],
)
def test_refusals_have_the_shape_of_their_path(limited, path, members, rest):
    request = b"POST %b HTTP/1.1\r\nHost: x\r\n" % path.encode()
    head, _, body = exchange(limited, request + rest).partition(b"\r\n\r\n")
    assert b"\r\nx-request-id: req_" in head
    assert set(json.loads(body)) == members
    if "type" in members:
        request_id = json.loads(body)["request_id"].encode()
        assert b"\r\nrequest-id: %b" % request_id in head


def test_a_slow_body_is_refused_in_the_shape_of_its_path(limited):
    head = b"POST /v1/messages HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"
    answer = exchange(limited, head + b"{")
    assert answer.startswith(b"HTTP/1.1 408")
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert error == {"type": "invalid_request_error", "message": "The request arrived too slowly"}


def test_slow_answers_are_not_timed_out(limited):
    limited.engine.reset()
    limited.engine.delay = 0.25
    response = limited.chat("say(abcd)yas")
    limited.engine.reset()
    assert response.json()["choices"][0]["message"]["content"] == "abcd"


def test_idle_keep_alive_outlives_the_header_limit(limited):
    with limited.http() as http:
        assert http.get("/health/live").status_code == 200
        time.sleep(0.5)
        assert http.get("/health/live").status_code == 200
        assert len(http._transport._pool.connections) == 1


def test_second_request_on_a_connection_has_its_own_limit(limited):
    with connect(limited) as sock:
        sock.sendall(GET)
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")
        sock.sendall(b"GET /hea")
        assert b"HTTP/1.1 408" in read_all(sock)


def test_connections_beyond_the_cap_get_503(start_server):
    server = start_server(limits=HttpLimits(header_seconds=600.0, max_connections=12))
    held = [connect(server) for _ in range(12)]
    with connect(server) as sock:  # accepted after the others
        answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 503")
    assert b"too_many_connections" in answer
    for sock in held:
        sock.close()
    probe = GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    wait_until(lambda: b"200 OK" in exchange(server, probe))


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: a\r\n" * 50_000 + b"\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        HEADERS + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEADERS + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
        HEADERS + b"Content-Length: -5\r\n\r\n{}",
        HEADERS + b"Content-Length: x\r\n\r\n{}",
        b"NONSENSE\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
    ],
    ids=["long header", "50k headers", "no host", "two hosts", "cl+te", "two lengths",
         "negative length", "bad length", "nonsense", "tls hello"],
)  # fmt: skip
def test_malformed_requests_are_refused_and_closed(limited, request_bytes):
    answer = exchange(limited, request_bytes)
    assert answer.split()[1] in (b"400", b"408", b"413", b"431")


@pytest.mark.parametrize(
    "begun",
    [
        b"P\x00ST / HTTP/1.1\r\n",
        HEADERS + b"Bad Header: x\r\n\r\n",
        HEADERS + b"Content-Length: -1\r\n\r\n",
        HEADERS + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
        HEADERS + b"Transfer-Encoding: chunked\r\n\r\nno size\r\n",
        HEADERS + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
    ids=["method", "header", "length", "two lengths", "chunk", "length and chunk"],
)
def test_a_refusal_can_be_read_behind_what_follows_the_error(limited, begun):
    """Bytes that the server has not read when it closes make the kernel discard its answer."""
    answer = exchange(limited, begun + b"x" * (4 << 20))
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431"))


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"NONSENSE\r\n\r\n", 400),
        (HEADERS + b"Transfer-Encoding: chunked\r\n\r\nno size\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X: a\r\n" * 101 + b"\r\n", 431),
    ],
    ids=["nonsense", "bad chunk", "101 headers"],
)
def test_what_cannot_be_read_gets_an_error_body(limited, request_bytes, status):
    head, _, body = exchange(limited, request_bytes).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d" % status)
    assert b"\r\nx-request-id: req_" in head
    assert b"retry-after" not in head, "the same request would fail again"
    error = json.loads(body)["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", None)


def test_too_many_small_headers_close_the_connection(limited):
    headers = b"".join(b"X%d: a\r\n" % i for i in range(101))
    answer = exchange(limited, b"GET /health/live HTTP/1.1\r\nHost: x\r\n" + headers + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 431")


def test_stalled_reader_is_given_up(start_server):
    server = start_server(stream_stall_seconds=0.3)
    body = json.dumps(
        {
            "model": "alias",
            "messages": [{"role": "user", "content": f"say({'x' * 200})yas"}],
            "stream": True,
            "ignore_eos": True,
            "n": 128,
            "logprobs": True,
            "top_logprobs": 20,
        }
    ).encode()
    server.engine.tokens_per_delta = 16
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    host, port = server.url.removeprefix("http://").split(":")
    sock.connect((host, int(port)))
    with sock:
        sock.sendall(HEADERS + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        wait_until(lambda: server.engine.aborted)
    assert len(server.engine.aborted) == 1


class SilentTransport(asyncio.Transport):
    """A connection whose peer sends no more."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
        self.written, self.has_closed = b"", False

    def write(self, data: bytes) -> None:
        self.written += data

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def is_closing(self) -> bool:
        return self.has_closed

    def close(self) -> None:
        self.has_closed = True


def test_a_server_that_ends_waits_for_no_rest_of_a_request():
    async def refuse_then_end() -> SilentTransport:
        config = uvicorn.Config(lambda: None)
        config.load()
        protocol = http_protocol.make_protocol(HttpLimits())(config, ServerState(), {})
        transport = SilentTransport()
        protocol.connection_made(transport)
        protocol.data_received(b"NONSENSE\r\n\r\n")
        assert protocol.is_lingering and not transport.has_closed
        protocol.shutdown()
        protocol.connection_lost(None)
        return transport

    transport = asyncio.run(refuse_then_end())
    assert transport.has_closed and transport.written.startswith(b"HTTP/1.1 400")


def answers(connection: h11.Connection, version: bytes) -> list[bytes | None]:
    """What a connection writes for a stream, and for an answer of known length after it."""
    written = []
    for number, (headers, parts) in enumerate(
        (
            ([], [b"data: a\n\n", b"", b"x" * 300, b"[DONE]"]),
            ([(b"content-length", b"3")], [b"abc"]),
            ([], [b"data: b\n\n"]),
        )
    ):
        if number and version == b"1.0":
            break
        connection.receive_data(b"GET / HTTP/%b\r\nHost: x\r\n\r\n" % version)
        assert type(connection.next_event()) is h11.Request
        assert type(connection.next_event()) is h11.EndOfMessage
        written.append(connection.send(h11.Response(status_code=200, headers=headers)))
        written += [connection.send(h11.Data(data=part)) for part in parts]
        written.append(connection.send(h11.EndOfMessage()))
        if version == b"1.1":
            connection.start_next_cycle()
    return written


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_a_stream_is_written_as_h11_writes_it(version):
    ours = http_protocol._StreamingConnection(HttpLimits(max_body_chunks=100))
    assert answers(ours, version) == answers(h11.Connection(h11.SERVER), version)


SMALL_HEADERS = b"a:\r\n" * 64_000


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n" + SMALL_HEADERS + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a: " + b"b" * 40_000 + b"\r\n\r\n",
        GET.replace(b"GET", b"POST").replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n")
        + b"0\r\n" + SMALL_HEADERS + b"\r\n",
    ],
    ids=["headers", "bytes", "trailers"],
)  # fmt: skip
def test_a_block_of_headers_is_counted_before_it_is_parsed(monkeypatch, sent):
    """All of it comes in one read, so that it is complete when h11 first sees it."""
    parsed = []
    parse = h11._readers._decode_header_lines

    def noting(lines):
        lines = list(lines)
        parsed.append(len(lines))
        return parse(lines)

    monkeypatch.setattr(h11._readers, "_decode_header_lines", noting)
    connection = http_protocol._StreamingConnection(HttpLimits())
    connection.receive_data(sent)
    with pytest.raises(h11.RemoteProtocolError):
        while connection.next_event() is not h11.NEED_DATA:
            pass
    assert connection.has_large_headers and sum(parsed) <= 2


def test_as_many_headers_as_may_be_are_read():
    """With a request behind them, whose headers are not theirs."""
    connection = http_protocol._StreamingConnection(HttpLimits(max_headers=12))
    head = b"GET / HTTP/1.1\r\nHost: x\r\n"
    connection.receive_data(head + b"a: b\r\n" * 11 + b"\r\n" + GET * 20)
    assert len(connection.next_event().headers) == 12
    refused = http_protocol._StreamingConnection(HttpLimits(max_headers=12))
    refused.receive_data(head + b"a: b\r\n" * 12 + b"\r\n")
    with pytest.raises(h11.RemoteProtocolError):
        refused.next_event()


async def answer_at_once(scope, receive, send) -> None:
    """An application."""
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})


def test_connections_in_their_tls_handshake_are_counted(tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-keyout", str(key), "-out", str(certificate), "-days", "1"]
    subprocess.run([*command, "-subj", "/CN=127.0.0.1"], check=True, capture_output=True)
    limits = HttpLimits(max_connections=4, max_peer_connections=3, reserved_connections=1,
                        header_seconds=2.0, write_seconds=0.4)  # fmt: skip
    config = uvicorn.Config(answer_at_once, http=make_protocol(limits), ws="none", loop="asyncio",
                            lifespan="off", log_level="warning", ssl_certfile=str(certificate),
                            ssl_keyfile=str(key))  # fmt: skip
    table = config.http.table
    main = socket.create_server(("127.0.0.1", 0))
    port = main.getsockname()[1]
    server = uvicorn.Server(config)
    listener = counting_listener(main, config)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    silent = [socket.create_connection(("127.0.0.1", port), timeout=600) for _ in range(9)]
    wait_until(lambda: (len(table._ordinary), len(table._reserved)) == (3, 1))
    for sock in silent:  # asyncio alone would wait for a minute
        with sock, contextlib.suppress(ConnectionError):
            assert sock.recv(100) == b""
    wait_until(lambda: len(table) == 0)
    with httpx.Client(verify=False) as http:
        assert http.get(f"https://127.0.0.1:{port}/").text == "ok"
        assert len(table) == 1 and not table.handshakes, "its slot is the connection's now"
    wait_until(lambda: len(table) == 0)
    server.should_exit = True
    thread.join()
