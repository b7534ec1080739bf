"""SIGHUP: keys, quotas, public prefixes and log level change; a live stream continues."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

PROMPT = "You are a helpful assistant. " * 8
TOKENS = 900


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("settings")


@pytest.fixture(scope="module")
def supervisor(folder: Path) -> Iterator[socket.socket]:
    """systemd's end of the notification socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(folder / "notify"))
        sock.settimeout(600)
        yield sock


@pytest.fixture(scope="module")
def server(start: Callable[..., Any], folder: Path, supervisor: socket.socket) -> Any:
    write(folder)
    server = start(
        "--config", folder / "server.yaml", "--drain-seconds", 0, "--engine-hang-seconds", 3600,
        NOTIFY_SOCKET=str(folder / "notify"), CHUNKLLAMA_TEST_MODE="1",
        CHUNKLLAMA_FAULTS=f"send:stop@file={folder / 'stop'}+20",
    )  # fmt: skip
    assert supervisor.recv(100) == b"READY=1"
    return server


def write(
    folder: Path,
    keys: str = "blue:key-b\n",
    prefixes: str = "[]",
    tenants: str = "",
    **settings: object,
) -> None:
    (folder / "keys").write_text(keys)
    (folder / "prefixes.yaml").write_text(prefixes)
    (folder / "tenants.yaml").write_text(tenants)
    values = {
        "api_key_file": str(folder / "keys"),
        "public_prefixes": str(folder / "prefixes.yaml"),
        "tenants_file": str(folder / "tenants.yaml"),
        "log_level": "info",
        **settings,
    }
    (folder / "server.yaml").write_text(json.dumps(values))


def hang_up(
    server: Any, supervisor: socket.socket, during: Callable[[], object] = lambda: None
) -> str:
    """Reload, with a call when it has begun; what was logged meanwhile."""
    before = len(server.log.read_text())
    server.process.send_signal(signal.SIGHUP)
    reloading, _, monotonic = supervisor.recv(100).decode().partition("\n")
    assert reloading == "RELOADING=1"
    assert 0 < int(monotonic.removeprefix("MONOTONIC_USEC=")) / 1e6 <= time.monotonic()
    during()
    assert supervisor.recv(100) == b"READY=1"
    return server.log.read_text()[before:]


def post(server: Any, key: str, **fields: object) -> httpx.Response:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], **fields}
    headers = {"authorization": f"Bearer {key}"}
    url = f"{server.url}/v1/chat/completions"
    return httpx.post(url, json=body, headers=headers, timeout=600)


class Stream(threading.Thread):
    """Reads a long greedy answer to its end."""

    def __init__(self, server: Any, key: str) -> None:
        super().__init__()
        self.text = ""
        self.lines: list[str] = []
        self.started = threading.Event()
        self._url = f"{server.url}/v1/completions"
        self._headers = {"authorization": f"Bearer {key}"}

    def run(self) -> None:
        body = {
            "model": "tiny", "prompt": "go on", "temperature": 0, "max_tokens": TOKENS,
            "ignore_eos": True, "stream": True,
        }  # fmt: skip
        with httpx.stream(
            "POST", self._url, json=body, headers=self._headers, timeout=600
        ) as response:
            for line in response.iter_lines():
                if line:
                    self.lines.append(line.removeprefix("data: "))
                    self.started.set()
        self.text = "".join(json.loads(line)["choices"][0]["text"] for line in self.lines[:-1])


def test_a_live_stream_does_not_notice(server, supervisor, folder):
    write(folder)
    hang_up(server, supervisor)
    undisturbed = Stream(server, "key-b")
    undisturbed.run()
    live = Stream(server, "key-b")
    (folder / "stop").touch()  # the engine stops 20 steps later
    live.start()
    live.started.wait()
    (engine,) = psutil.Process(server.process.pid).children()
    while engine.status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)
    write(folder, keys="red:key-r\n", prefixes=json.dumps([PROMPT]))
    log = hang_up(server, supervisor, engine.resume)
    assert post(server, "key-b", max_tokens=1).status_code == 401, "its key is gone already"
    live.join()
    assert live.lines[-1] == "[DONE]"
    assert live.text == undisturbed.text != ""
    assert "reloaded: 1 keys, removed: blue" in log and "1 public prefixes" in log
    messages = [{"role": "system", "content": PROMPT}, {"role": "user", "content": "hi"}]
    usage = post(server, "key-r", messages=messages, max_tokens=1).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= len(PROMPT)


def test_the_log_level_changes(server, supervisor, folder):
    write(folder, log_level="warning")
    hang_up(server, supervisor)
    before = server.log.read_text()
    assert post(server, "key-b", max_tokens=1).status_code == 200
    assert server.log.read_text() == before
    write(folder)
    assert "log level info" in hang_up(server, supervisor)


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ({"keys": "red:key-r\nred:key-q\n"}, "repeats a name or a key"),
        ({"keys": "# none\n"}, "holds no key"),
        ({"keys": "red:key-r\n", "prefixes": "{"}, "not valid YAML at line 1"),
        ({"keys": "red:key-r\n", "prefixes": "a: b"}, "must be a YAML list of system prompts"),
        ({"keys": "red:key-r\n", "prefixes": json.dumps(["x" * 2000])}, "public_prefixes: entry 1"),
        ({"keys": "red:key-r\n", "log_level": "loud"}, "log_level"),
        ({"keys": "red:key-r\n", "num_chunk": 3}, "did you mean num_chunks"),
        ({"api_key_file": None}, "cannot be turned on or off"),
        (
            {"keys": "red:key-r\n", "tenants": "tenants: {red: {weight: -1}}"},
            "tenant red: weight: ",
        ),
        ({"keys": "red:key-r wait=1\n"}, "tenant red: unknown field wait"),
    ],
)
def test_after_a_bad_file_everything_is_as_before(server, supervisor, folder, bad, told):
    write(folder)
    hang_up(server, supervisor)
    write(folder, **bad)
    (line,) = hang_up(server, supervisor).splitlines()
    assert "nothing reloaded: " in line and told in line
    assert post(server, "key-b", max_tokens=1).status_code == 200
    assert post(server, "key-r", max_tokens=1).status_code == 401


def test_quotas_change(server, supervisor, folder):
    """Those of the API process and those of the engine process."""
    write(folder, tenants="tenants: {blue: {requests_per_minute: 1000, pin_chunks: 0}}")
    hang_up(server, supervisor)
    pinned = {"prompt_cache_options": {"ttl": "5m"}, "max_tokens": 1}
    answer = post(server, "key-b", **pinned)
    assert answer.headers["x-ratelimit-limit-requests"] == "1000"
    assert answer.headers["x-chunkllama-cache-pin"] == "over-budget"
    write(folder, keys="blue:key-b tokens_per_minute=500\n")
    hang_up(server, supervisor)
    answer = post(server, "key-b", **pinned)
    assert "x-ratelimit-limit-requests" not in answer.headers
    assert answer.headers["x-ratelimit-limit-tokens"] == "500"
    assert answer.headers["x-chunkllama-cache-pin"] == "granted"


def test_other_settings_wait_for_the_next_start(server, supervisor, folder):
    write(folder, max_num_seqs=3, num_chunks=64)
    assert "used from the next start on: max_num_seqs\n" in hang_up(server, supervisor)


def test_the_engine_outlives_a_closed_terminal(server, supervisor, folder):
    """The hangup of a terminal goes to every process in the foreground."""
    write(folder)
    (engine,) = psutil.Process(server.process.pid).children()
    engine.send_signal(signal.SIGHUP)
    hang_up(server, supervisor)
    assert post(server, "key-b", max_tokens=1).status_code == 200
    assert engine.is_running()
