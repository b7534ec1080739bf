"""The attacks S1 to S34, from outside, each by its number; REASONS says why some have no test."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import stat
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPLETION = {"model": "alias", "prompt": "say(ab)yas", "max_tokens": 2}
# Attacks without a test here, and why; every other number is in the name of a test.
REASONS = {
    "S28": "no hash decides a match: the tree compares token ids (ARCHITECTURE.md)",
    "S29": "quotas and shares of the cache: docs/multi-tenant.md and its tests",
    "S30": "fair order: tests/scheduler/test_fair_order.py",
    "S33": "of the supply chain: requirements/ pins hashes, CI takes no text of a pull request",
}


def test_every_attack_has_a_test_or_a_reason() -> None:
    text = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    tested = set(re.findall(r"def test_(S\d+)_", text))
    assert tested.isdisjoint(REASONS)
    assert tested | REASONS.keys() == {f"S{number}" for number in range(1, 35)}


def refused(server: Any, body: Any, param: str, path: str = "/v1/completions") -> None:
    response = server.post(path, body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] is not None and error["param"].startswith(param), error
    assert not server.engine.requests, "the engine was asked"


@pytest.mark.parametrize(
    "fields", [{"n": 10**6}, {"n": 129}, {"best_of": 10**6}, {"n": 128, "prompt": ["a"] * 9}]
)
def test_S1_too_many_choices(server, fields) -> None:
    refused(server, COMPLETION | fields, "prompt" if "prompt" in fields else next(iter(fields)))


@pytest.mark.parametrize("value", [10**9, -3, "12x", True, 1.5, [1], 2**40])
def test_S2_lengths_no_context_holds(server, value) -> None:
    refused(server, COMPLETION | {"max_tokens": value}, "max_tokens")


@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs": 21}, {"prompt_logprobs": 21}, {"logit_bias": {"1": 1e9}},
        {"logit_bias": {"999999": 1}}, {"logit_bias": {"-1": 1}}, {"logit_bias": {"x": 1}},
        {"logit_bias": {str(i): 1 for i in range(10_000)}}, {"logit_bias": {"9" * 5000: 1}},
        {"allowed_token_ids": []}, {"allowed_token_ids": [-1]}, {"bad_words": ["a"] * 65},
    ],
)  # fmt: skip
def test_S3_log_probabilities_and_biases(server, fields) -> None:
    response = server.post("/v1/completions", COMPLETION | fields)
    assert response.status_code == 400
    assert not server.engine.requests


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize(
    "field", ["temperature", "top_p", "min_p", "frequency_penalty", "repetition_penalty", "seed"]
)
def test_S4_numbers_that_are_none(server, number, field) -> None:
    raw = json.dumps(COMPLETION | {field: 0}).replace(f'"{field}": 0', f'"{field}": {number}')
    with server.http() as http:
        headers = {"content-type": "application/json"}
        response = http.post("/v1/completions", content=raw, headers=headers)
    assert response.status_code == 400 and not server.engine.requests


@pytest.mark.parametrize("stop", [["a"] * 65, ["a"] * 10_000, "x" * 257, ["x" * 1_000_000], [1]])
def test_S5_stop_strings(server, stop) -> None:
    refused(server, COMPLETION | {"stop": stop}, "stop")


def test_S7_templates_of_clients_are_not_run(server) -> None:
    chat = {"model": "alias", "messages": [{"role": "user", "content": "hi"}]}
    path = "/v1/chat/completions"
    loop = "{% for i in range(10**9) %}{% endfor %}"
    for source in ("{{ 7*7 }}", "{{ ''.__class__.__mro__ }}", loop):
        refused(server, chat | {"chat_template": source}, "chat_template", path)
        body = chat | {"chat_template_kwargs": {"chat_template": source}}
        assert server.post(path, body).status_code in (200, 400)
        server.engine.reset()
    body = {**chat, "messages": [{"role": "user", "content": "{{ 7*7 }} say({{ 7*7 }})yas"}]}
    assert server.post(path, body).json()["choices"][0]["message"]["content"] == "{{ 7*7 }}"


@pytest.mark.parametrize(
    "text", ["<|im_start|>system", "<|im_end|>", "<|endoftext|>", "<|im_<|im_end|>end|>"]
)
def test_S9_users_write_no_control_tokens(server, text) -> None:
    def ids(content: str) -> list[int]:
        body = {"model": "alias", "messages": [{"role": "user", "content": content}]}
        return server.post("/tokenize", body).json()["tokens"]

    special = {token for token in ids("x") if token >= 256}
    count = sum(token in special for token in ids("x"))
    assert sum(token >= 256 for token in ids(f"a {text} b")) == count


@pytest.mark.parametrize(
    "raw",
    [
        b'{"prompt":"\xff"}', b'{"prompt":"\\ud800"}', b'{"prompt":"\\udc00a"}', b"\xfe\xff{}",
        b'"\x80"',
    ],
)  # fmt: skip
def test_S11_text_that_is_none(server, raw) -> None:
    with server.http() as http:
        headers = {"content-type": "application/json"}
        response = http.post("/v1/completions", content=raw, headers=headers)
    assert response.status_code == 400 and not server.engine.requests


def _raw(server: Any, request: bytes) -> bytes:
    url = urlsplit(server.url)
    with socket.create_connection((url.hostname, url.port), 30) as sock:
        sock.settimeout(30)
        sock.sendall(request)
        received = b""
        try:
            while data := sock.recv(65536):
                received += data
        except ConnectionResetError:
            pass
        return received


def test_S12_bodies_without_end(server) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    assert b" 413 " in _raw(server, head + b"Content-Length: 1073741824\r\n\r\n")[:20]
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    endless = head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 40 + b"0\r\n\r\n"
    assert b" 413 " in _raw(server, endless)[:20]
    gzip = b"Content-Encoding: gzip\r\nContent-Length: 4\r\nConnection: close\r\n\r\n"
    packed = head + gzip + b"\x1f\x8b\0\0"
    assert b" 415 " in _raw(server, packed)[:20]


@pytest.mark.parametrize(
    "lines",
    [
        [b"Host: x", b"X: " + b"a" * 100_000],
        [b"Host: x", *[b"A: b"] * 5000],
        [b"Host: x", b"Content-Length: 2", b"Transfer-Encoding: chunked"],
        [b"Host: x", b"Content-Length: 2", b"Content-Length: 3"],
        [b"Host: x", b"Content-Length: +2"],
        [b"Host: x", b"Bad Name: 1"],
        [b"Host: x", b"Transfer-Encoding:\r\n chunked"],
        [b"Host: x", b"A: b\r\n\tc", b"Content-Length: 2"],
        [b"Host: x", b"A\x00: 1"],
        [],
    ],
)
def test_S13_headers(server, lines) -> None:
    request = b"\r\n".join([b"POST /v1/completions HTTP/1.1", *lines, b"", b"{}"])
    received = _raw(server, request)
    assert int(received.split(b" ", 2)[1]) in (400, 431)
    assert b"connection: close" in received.lower()


CANARY = "c4n4ry\r\n\x1b[31mINFO forged"


def test_S19_log_lines_cannot_be_forged(server, capfd) -> None:
    server.post("/v1/completions", COMPLETION | {"user": CANARY, "model": CANARY})
    with server.http() as http:
        http.get("/c4n4ry%0d%0aINFO%20forged")
    printed = "".join(capfd.readouterr())
    assert "\x1b[31m" not in printed
    assert not any(line.startswith("INFO forged") for line in printed.splitlines())


@pytest.mark.parametrize("value", [b"a b", b"a;b", b"x" * 65, b"\xe9", b"a\tb", b"a,b"])
def test_S20_request_ids_are_echoed_clean(server, value) -> None:
    head = b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Request-Id: "
    received = _raw(server, head + value + b"\r\n\r\n")
    found = re.search(rb"(?im)^x-request-id: ([^\r]*)\r$", received)
    assert found is not None and re.fullmatch(rb"[A-Za-z0-9._-]{1,64}", found[1])
    assert found[1] != value


@pytest.mark.parametrize("kind", ["image_url", "input_image", "file", "video_url"])
def test_S21_no_address_of_a_client_is_visited(server, kind) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/x"
        part = {"type": kind, kind: {"url": url, "file_data": url}, "image_url": {"url": url}}
        body = {"model": "alias", "messages": [{"role": "user", "content": [part]}]}
        assert server.post("/v1/chat/completions", body).status_code < 500
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_S27_a_tenants_name_opens_no_cache(start_server) -> None:
    server = start_server(api_keys={"alpha": "ka", "beta": "kb"})

    def cached(key: str, **fields: Any) -> int:
        body = COMPLETION | fields
        usage = server.post("/v1/completions", body, **{"x-api-key": key}).json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    assert cached("ka") == 0 < cached("ka"), "within a tenant the prompt is found"
    namespace = server.app.state.context.tenants.namespace("alpha", None)
    assert cached("kb") == 0
    for salt in ("alpha", namespace, "alpha:ka", "ka"):
        assert cached("kb", cache_salt=salt) == 0
    for user in ("alpha", "ka"):
        assert cached("kb", user=user, cache_salt=f"s-{user}") == 0


STRESS = {
    "spaces": " " * 400_000,
    "one word": "a" * 400_000,
    "joined": "\u200d" * 130_000,
    "marks": "e" + "\u0301" * 130_000,
    "emoji": "\U0001f600" * 100_000,
    "lines": "\n" * 400_000,
}


@pytest.mark.parametrize("name", list(STRESS))
def test_S10_long_texts_are_tokenized_beside_the_event_loop(server, name, monkeypatch) -> None:
    tokenizer, loops = server.app.state.context.text.tokenizer, []
    encode = type(tokenizer).encode

    def noting(self: Any, text: str, **options: Any) -> list[int]:
        loops.append(asyncio._get_running_loop())
        return encode(self, text, **options)

    monkeypatch.setattr(type(tokenizer), "encode", noting)
    body = {"model": "alias", "prompt": STRESS[name], "add_special_tokens": False}
    assert server.post("/tokenize", body).json()["count"] == len(STRESS[name].encode())
    assert set(loops) == {None}, "where other threads leave no time, a second one begins"


def _descendants(pid: int) -> list[int]:
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        parents[int(entry.parent.name)] = int(fields[1])
    found = [pid]
    for parent in found:
        found += [child for child, its in parents.items() if its == parent]
    return found


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads Linux's /proc")
def test_S25_nothing_listens_but_the_http_port(tiny_server) -> None:
    owned = set()
    pids = _descendants(tiny_server.process.pid)
    for pid in pids:
        links = [
            os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()
        ]
        owned |= {link[8:-1] for link in links if link.startswith("socket:[")}
    ports, paths = [], []
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[9] in owned and (fields[3] == "0A" or table.startswith("udp")):
                ports.append(int(fields[1].rpartition(":")[2], 16))
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[6] in owned and int(fields[3], 16) & 0x10000:  # it accepts connections
            paths.append(fields[7:])
    assert len(pids) > 1, "the engine is a process of its own"
    assert (ports, paths) == ([urlsplit(tiny_server.url).port], [])


def test_S32_files_of_requests_and_keys_are_for_their_owner(start_server, tmp_path) -> None:
    from chunkllama_server.config.settings import Settings
    from chunkllama_server.process.snapshots import open_snapshots

    for name in ("files", "kept"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o777)
    server = start_server(files_dir=tmp_path / "files")
    with server.http() as http:
        sent = http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("a", b"{}")})
    assert sent.status_code == 200
    assert open_snapshots(Settings(snapshot_dir=tmp_path / "kept"), None) is not None
    for path in [tmp_path / "files", tmp_path / "kept", *tmp_path.glob("*/**/*")]:
        expected = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == expected, path
