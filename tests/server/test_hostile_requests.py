"""Malformed requests by the hundred: no 5xx, and a probe client is answered all the while."""

from __future__ import annotations

import json
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from malformed_requests import malformed_requests


def answer(address: tuple[str, int], request: bytes) -> bytes:
    """The beginning of the answer; b"" when the connection ended without one."""
    with socket.create_connection(address, 60) as sock:
        sock.settimeout(60)
        received = b""
        try:
            sock.sendall(request)
            sock.shutdown(socket.SHUT_WR)
            while len(received) < 65536 and (data := sock.recv(65536)):
                received += data
        except OSError:
            pass
        return received


@pytest.mark.parametrize(
    ("seed", "count"),
    [(1, 250), (2, 250), *(pytest.param(s, 2500, marks=pytest.mark.nightly) for s in range(3, 7))],
)
def test_S34_malformed_requests_are_refused_and_others_served(start_server, seed, count) -> None:
    server = start_server()
    url = urlsplit(server.url)
    assert url.hostname is not None and url.port is not None
    address = url.hostname, url.port
    statuses: dict[int, int] = {}
    leaks = (b"Traceback", b"site-packages", b".py", b"0x7f", b"/root/", b"/home/")
    with server.http() as probe:
        for number, request in enumerate(malformed_requests(seed, count)):
            received = answer(address, request)
            if received:
                status = int(received.split(b" ", 2)[1])
                statuses[status] = statuses.get(status, 0) + 1
                assert status < 500, (number, request[:300], received[:300])
                assert status < 400 or not any(leak in received for leak in leaks), received[:600]
            if number % 25 == 0:
                live = probe.get("/health/live")
                assert live.status_code == 200, number
    body = {"model": "alias", "prompt": "say(ab)yas", "max_tokens": 2}
    assert server.post("/v1/completions", body).status_code == 200
    assert sum(statuses.values()) > 0.8 * count
    assert sum(n for status, n in statuses.items() if status >= 400) > 0.5 * count
    deadline = time.monotonic() + 30
    while server.engine.live and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not server.engine.live, "nothing keeps running for a client that is gone"


def test_the_loop_reads_no_body_that_is_too_much_work(start_server, monkeypatch) -> None:
    """Counted, not timed: what reaches the parser is bounded by the limits in the settings."""
    from chunkllama_server.config.limits import DEFAULT_LIMITS
    from chunkllama_server.transport import body as module

    parsed: list[str] = []
    loads = json.loads

    def counting(text: str, **options: Any) -> Any:
        if "parse_constant" in options:  # the server's, not the client's
            parsed.append(text)
        return loads(text, **options)

    monkeypatch.setattr(module.json, "loads", counting)
    server = start_server()
    headers = {"content-type": "application/json"}
    with httpx.Client(base_url=server.url, timeout=60, headers=headers) as client:
        for item, count in ((b"[1],", 400_000), (b"{},", 500_000), (b"1,", 900_000)):
            raw = b'{"model":"alias","prompt":[' + item * count + item[:-1] + b"]}"
            response = client.post("/v1/completions", content=raw)
            assert response.status_code == 400
            assert response.json()["error"]["code"] == "invalid_json"
        raw = b"[" * 40_000 + b'"' + b'\\"' * 900_000
        assert client.post("/v1/completions", content=raw).status_code == 400
    for text in parsed:
        assert text.count("[") + text.count("{") <= DEFAULT_LIMITS.max_json_containers
        assert text.count(",") < DEFAULT_LIMITS.max_json_values
