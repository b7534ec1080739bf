"""Hostile connections, with raw sockets: unread responses, floods, large bodies, half-closes."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import os
import socket
import struct
import time
from collections.abc import Iterator

import pytest

from chunkllama.logger import NonBlockingHandler, configure_logging, init_logger
from chunkllama_server.transport.connections import (
    ConnectionTable,
    HttpLimits,
    limit_accept_log,
    peer_of,
)
from chunkllama_server.transport.host_check import is_allowed_host, is_loopback

INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"
LIMITS = HttpLimits(
    header_seconds=600.0,
    write_seconds=0.4,
    half_close_seconds=0.5,
    linger_seconds=2.0,
    max_connections=8,
    max_peer_connections=6,
    reserved_connections=3,
    reserved_seconds=0.4,
)
PROBE = b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


@pytest.fixture(scope="module")
def limited(start_server):
    return start_server(limits=LIMITS, allowed_hosts=("llm.example.org",))


def connect(server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=120)


def read_all(sock: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionError):
        while part := sock.recv(65536):
            data += part
    return data


def exchange(server, request: bytes) -> bytes:
    with connect(server) as sock:
        sock.sendall(request)
        return read_all(sock)


@pytest.fixture
def flood(limited) -> Iterator[list[socket.socket]]:
    """All ordinary slots of this peer, and two reserved ones, held by idle connections."""
    held = [connect(limited) for _ in range(8)]
    time.sleep(0.1)
    yield held
    for sock in held:
        sock.close()
    time.sleep(0.2)


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready", "/health/"])
def test_health_is_answered_beside_a_flood_of_idle_connections(limited, flood, path) -> None:
    answer = exchange(limited, PROBE.replace(b"/health/live", path.encode()))
    assert answer.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /dashboard HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /health/../v1/models HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}",
        b"",
    ],
)
def test_a_reserved_slot_serves_health_alone(limited, flood, request_bytes) -> None:
    answer = exchange(limited, request_bytes)
    assert answer.startswith(b"HTTP/1.1 503") and b"too_many_connections" in answer


def test_a_flood_of_reserved_slots_ends_the_oldest_of_them(limited, flood) -> None:
    more = [connect(limited) for _ in range(20)]
    assert exchange(limited, PROBE).startswith(b"HTTP/1.1 200")
    for sock in more:
        sock.close()


class _Slot:
    """A connection of the table alone."""

    aborted = False

    def abort(self) -> None:
        self.aborted = True

    def check_writes(self, now: float) -> None:
        pass


def test_one_peer_cannot_take_every_slot() -> None:
    async def main() -> None:
        table = ConnectionTable(LIMITS)
        greedy = [_Slot() for _ in range(10)]
        assert [table.admit(slot, "a") for slot in greedy] == [True] * 6 + [False] * 4
        assert [slot.aborted for slot in greedy] == [False] * 6 + [True] + [False] * 3
        others = [_Slot() for _ in range(3)]
        assert [table.admit(slot, "b") for slot in others] == [True, True, False]
        table.leave(greedy[0])
        assert table.promote(others[2])
        assert not table.promote(greedy[9])
        for slot in [*greedy, *others]:
            table.leave(slot)
        assert len(table) == 0

    asyncio.run(main())


@pytest.mark.parametrize(
    ("address", "peer"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:0db8:0001:0002"),
        ("2001:db8:1:2::", "2001:0db8:0001:0002"),
        ("2001:db8:1:3::", "2001:0db8:0001:0003"),
        ("::1", "0000:0000:0000:0000"),
        ("fe80::1%eth0", "fe80::1%eth0"),
        ("", ""),
    ],
)
def test_a_peer_is_an_address_or_a_network(address, peer) -> None:
    assert peer_of(address) == peer


def test_the_addresses_of_a_network_have_one_share() -> None:
    async def main() -> None:
        table = ConnectionTable(LIMITS)
        slots = [_Slot() for _ in range(9)]
        admitted = [table.admit(slot, f"2001:db8::{i:x}") for i, slot in enumerate(slots)]
        assert admitted == [True] * 6 + [False] * 3
        assert table.admit(_Slot(), "2001:db8:0:1::1")

    asyncio.run(main())


def test_S15_unread_responses_end_the_connection(limited) -> None:
    with connect(limited) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(0.5)
        deadline = time.monotonic() + 600
        with pytest.raises((ConnectionError, BrokenPipeError)):
            while time.monotonic() < deadline:
                with contextlib.suppress(TimeoutError):
                    sock.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 20)


def test_a_slow_reader_is_not_cut(limited) -> None:
    with connect(limited) as sock:
        sock.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        data = b""
        while part := sock.recv(2000):
            data += part
            time.sleep(0.01)
    body = data.partition(b"\r\n\r\n")[2]
    assert json.loads(body)["openapi"]


@pytest.mark.parametrize("chunked", [False, True])
def test_413_can_be_read_behind_a_large_body(limited, chunked) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    size = 24 << 20
    with connect(limited) as sock:
        if chunked:
            sock.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
            for _ in range(size >> 16):
                sock.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        else:
            sock.sendall(head + b"Content-Length: %d\r\n\r\n" % size)
            for _ in range(size >> 16):
                sock.sendall(b"x" * 65536)
        assert sock.recv(65536).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    ("size", "count", "expected"),
    [(1, 4200, b"too many small chunks"), (100, 4600, b"too many small chunks"),
     (1, 4000, b"invalid_json"), (1024, 1500, b"invalid_json")],
)  # fmt: skip
def test_bodies_in_small_chunks_are_refused(limited, size, count, expected) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    chunk = b"%x\r\n" % size + b" " * size + b"\r\n"
    with connect(limited) as sock:
        sock.sendall(head + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n")
        # What follows the refusal fits into the socket's buffers, however slow this thread is.
        sock.sendall(chunk * count + b"0\r\n\r\n")
        answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 400") and expected in answer
    assert exchange(limited, PROBE).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("offered", [b"h2c", b"websocket", b"TLS/1.0, h2c"])
def test_an_offer_of_another_protocol_is_ignored(limited, caplog, offered) -> None:
    """Java's client offers HTTP/2 with its first request."""
    limited.engine.reset()
    body = json.dumps({"model": "alias", "prompt": "say(ab)yas", "max_tokens": 5}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAA\r\nUpgrade: " + offered
    request = head + offer + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with connect(limited) as sock:
        for _ in range(2):
            sock.sendall(request)
            answer = http.client.HTTPResponse(sock)
            answer.begin()
            assert answer.status == 200 and json.load(answer)["choices"][0]["text"] == "ab"
    assert caplog.records == []


def completion(version: bytes = b"1.1", prompt: str = "say(ab)yas") -> bytes:
    body = json.dumps({"model": "alias", "prompt": prompt, "max_tokens": 5}).encode()
    head = b"POST /v1/completions HTTP/%b\r\nHost: x\r\nContent-Type: application/json\r\n"
    return head % version + b"Content-Length: %d\r\n\r\n" % len(body) + body


@contextlib.contextmanager
def half_closed(limited, version: bytes = b"1.1") -> Iterator[socket.socket]:
    """A connection whose whole request is sent and half closed; the engine's gate is closed."""
    limited.engine.reset()
    limited.engine.gate.clear()
    with connect(limited) as sock:
        sock.sendall(completion(version))
        sock.shutdown(socket.SHUT_WR)
        yield sock


def test_a_half_closed_request_is_answered(limited) -> None:
    with half_closed(limited) as sock:
        limited.engine.gate.set()
        assert read_all(sock).replace(INTERIM, b"").startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_a_half_closed_request_waits_for_its_answer(limited, version) -> None:
    """As long as that takes: here, the time of four probes."""
    with half_closed(limited, version) as sock:
        time.sleep(4 * LIMITS.half_close_seconds)
        limited.engine.gate.set()
        answer = http.client.HTTPResponse(sock)
        answer.begin()
        assert answer.status == 200 and json.load(answer)["choices"][0]["text"] == "ab"


def test_probes_are_interim_responses_to_http_1_1_alone(limited) -> None:
    with half_closed(limited) as sock:
        for _ in range(2):
            assert sock.recv(len(INTERIM), socket.MSG_WAITALL) == INTERIM
        limited.engine.gate.set()
        assert read_all(sock).replace(INTERIM, b"").startswith(b"HTTP/1.1 200")
    with half_closed(limited, b"1.0") as sock:
        time.sleep(2.5 * LIMITS.half_close_seconds)
        limited.engine.gate.set()
        assert read_all(sock).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_a_request_whose_client_has_left_is_cancelled(limited, version) -> None:
    limited.engine.reset()
    limited.engine.gate_at = 1  # the request runs, and its first delta is no response yet
    limited.engine.gate.clear()
    with connect(limited) as sock:
        sock.sendall(completion(version))
        sock.shutdown(socket.SHUT_WR)
        if version == b"1.0":  # as the kernel answers once it has forgotten the connection
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        while not limited.engine.live:
            time.sleep(0.01)
    deadline = time.monotonic() + 60
    while not limited.engine.aborted and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(limited.engine.aborted) == 1
    limited.engine.gate.set()


def test_a_half_closed_incomplete_request_is_dropped(limited) -> None:
    with connect(limited) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        sock.shutdown(socket.SHUT_WR)
        assert b" 200 " not in read_all(sock)


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        (b"127.0.0.1:8000", True),
        (b"127.0.0.1", True),
        (b"[::1]:8000", True),
        (b"10.1.2.3:80", True),
        (b"localhost", True),
        (b"LOCALHOST:8000", True),
        (b"a.localhost:1", True),
        (b"server", True),
        (b"llm.example.org", True),
        (b"LLM.example.org.:443", True),
        (b"evil.example", False),
        (b"evil.example:8000", False),
        (b"127.0.0.1.evil.example", False),
        (b"localhost.evil.example:8000", False),
        (b"llm.example.org.evil.example", False),
        (b"[evil.example]", False),
    ],
)
def test_a_rebound_name_is_refused(limited, host, allowed) -> None:
    assert is_allowed_host(host, {"llm.example.org"}) is allowed
    answer = exchange(limited, PROBE.replace(b"Host: x", b"Host: " + host))
    assert answer.startswith(b"HTTP/1.1 200" if allowed else b"HTTP/1.1 403")


@pytest.mark.parametrize(
    ("address", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True),
     ("0.0.0.0", False), ("::", False), ("192.168.1.1", False), ("host.example", False)],
)  # fmt: skip
def test_loopback_addresses(address, expected) -> None:
    assert is_loopback(address) is expected


@pytest.fixture
def root_logger() -> Iterator[None]:
    """Logging as it was, afterwards."""
    root, own = logging.getLogger(), logging.getLogger("chunkllama")
    before = root.handlers, root.level, own.level
    yield
    logging.captureWarnings(False)
    root.handlers = before[0]
    root.setLevel(before[1])
    own.setLevel(before[2])


def test_a_log_that_is_not_read_drops_lines_and_counts_them(root_logger) -> None:
    reader, writer = os.pipe()
    before = NonBlockingHandler.num_dropped
    with os.fdopen(writer, "w") as stream:
        configure_logging("info", stream=stream)
        logger = init_logger("test")
        for number in range(3000):
            logger.info("line %d %s", number, "x" * 100)
        dropped = NonBlockingHandler.num_dropped - before
        text = os.read(reader, 1 << 20)
        logger.info("the reader is back")
        rest = os.read(reader, 1 << 20)
        logger.info("y" * 10_000)
        long_line = os.read(reader, 1 << 20)
    os.close(reader)
    assert 0 < dropped < 3000
    assert text.count(b"\n") == 3000 - dropped
    assert rest.startswith(b"%d log lines dropped" % dropped) and b"reader is back" in rest
    assert long_line.count(b"y") == 10_000


def test_failing_accepts_are_one_line_a_minute(caplog) -> None:
    loop = asyncio.new_event_loop()
    limit_accept_log(loop)
    for _ in range(1000):
        loop.call_exception_handler(
            {
                "message": "socket.accept() out of system resource",
                "exception": OSError(24, "Too many open files"),
            }
        )
    loop.call_exception_handler({"message": "something else"})
    loop.close()
    lines = [record.getMessage() for record in caplog.records]
    assert sum("Too many open files" in line for line in lines) == 1
    assert any("something else" in line for line in lines)
