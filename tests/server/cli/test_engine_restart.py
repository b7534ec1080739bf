"""The engine process of a real server is killed, or its server is: seen from outside."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

LIVE = "chunkllama_requests_live "
WORD = {"type": "json_schema", "json_schema": {"name": "word", "schema": {
    "type": "string", "pattern": "^[a-z]{300}$"}}}  # fmt: skip
KINDS = {
    "greedy": {"max_tokens": 700, "ignore_eos": True},
    "logprobs": {"max_tokens": 500, "ignore_eos": True, "logprobs": True, "top_logprobs": 2},
    "choices": {"max_tokens": 400, "ignore_eos": True, "n": 2},
    "penalty": {"max_tokens": 500, "ignore_eos": True, "repetition_penalty": 1.3},
    "grammar": {"max_tokens": 500, "response_format": WORD},
}


class Reader(threading.Thread):
    """Reads one stream to its end; ``count`` choices' deltas have arrived so far."""

    def __init__(self, url: str, fields: dict[str, object]) -> None:
        super().__init__(daemon=True)
        self._url = f"{url}/v1/chat/completions"
        self._body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "go on"}],
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **fields,
        }
        self.count = 0
        self.text: dict[int, str] = {}
        self.reasons: dict[int, str] = {}
        self.logprobs: list[tuple[str, float]] = []
        self.usage: dict[str, object] = {}
        self.last = ""
        self.start()

    def run(self) -> None:
        with httpx.stream("POST", self._url, json=self._body, timeout=600) as response:
            for line in response.iter_lines():
                if not line.startswith("data: "):
                    continue
                self.last = line
                if line == "data: [DONE]":
                    return
                event = json.loads(line.removeprefix("data: "))
                self.usage = event.get("usage") or self.usage
                for choice in event.get("choices", []):
                    self._add(choice)

    def _add(self, choice: dict) -> None:
        index = choice["index"]
        assert index not in self.reasons
        self.text[index] = self.text.get(index, "") + (choice["delta"].get("content") or "")
        for entry in (choice.get("logprobs") or {}).get("content") or []:
            self.logprobs.append((entry["token"], entry["logprob"]))
        if choice.get("finish_reason"):
            self.reasons[index] = choice["finish_reason"]
        self.count += 1


def read_all(url: str) -> dict[str, Reader]:
    return {name: Reader(url, fields) for name, fields in KINDS.items()}


def engines_of(server) -> list[psutil.Process]:
    """The engine processes that run now: none between two."""
    found = []
    for child in psutil.Process(server.process.pid).children():
        with contextlib.suppress(psutil.Error):
            if child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
    return found


def engine_of(server) -> psutil.Process:
    (engine,) = engines_of(server)
    return engine


def wait_until(condition, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def wait_for_another_engine(server, before: psutil.Process) -> None:
    wait_until(lambda: any(engine.pid != before.pid for engine in engines_of(server)))
    wait_until(lambda: server.get("/health/ready").status_code == 200)


def num_live(server) -> float:
    lines = server.get("/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(LIVE))


@pytest.fixture
def gate(tmp_path) -> Iterator[Path]:
    """A file; while it exists, engine processes that are started do not begin to load."""
    path = tmp_path / "gate"
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys, time\n"
        "if 'chunkllama.engine.process' in sys.orig_argv:\n"
        f"    while os.path.exists({str(path)!r}):\n"
        "        time.sleep(0.01)\n"
    )
    yield path
    path.unlink(missing_ok=True)


@pytest.mark.nightly
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_streams_continue_in_another_engine_process(start, how, gate) -> None:
    stop = gate.with_name("stop")  # the engine stops 40 steps after this file was created
    server = start(
        "--engine-hang-seconds", 2 if how == signal.SIGSTOP else 3600,
        PYTHONPATH=str(gate.parent), CHUNKLLAMA_TEST_MODE="1",
        CHUNKLLAMA_FAULTS=f"send:stop@file={stop}+40",
    )  # fmt: skip
    undisturbed = {}
    for name, fields in KINDS.items():  # one by one, and cold caches do not change greedy ids
        undisturbed[name] = Reader(server.url, fields)
        undisturbed[name].join()
    before = engine_of(server)
    gate.touch()
    stop.touch()
    readers = read_all(server.url)
    wait_until(lambda: num_live(server) == len(KINDS))
    if how == signal.SIGKILL:
        wait_until(lambda: before.status() == psutil.STATUS_STOPPED)
        before.send_signal(how)
    wait_until(lambda: server.get("/health/ready").status_code == 503)
    assert server.get("/health/live").status_code == 200
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(server.chat, "hello", max_tokens=3, temperature=0)
        wait_until(lambda: num_live(server) == len(KINDS) + 1)
        gate.unlink()
        assert late.result().status_code == 200, "a request waits for the restart"
    for name, reader in readers.items():
        reader.join()
        assert reader.last == "data: [DONE]", (name, reader.last)
        assert reader.text == undisturbed[name].text, name
        assert reader.reasons == undisturbed[name].reasons, name
        for key in ("prompt_tokens", "completion_tokens"):
            assert reader.usage[key] == undisturbed[name].usage[key], name
    pairs = zip(readers["logprobs"].logprobs, undisturbed["logprobs"].logprobs, strict=True)
    for (token, logprob), (expected, value) in pairs:
        assert token == expected and abs(logprob - value) < 1e-3
    wait_until(lambda: server.get("/health/ready").status_code == 200)
    assert engine_of(server).pid != before.pid
    assert not before.is_running()
    assert server.stop() == 0
    assert "Traceback" not in server.log.read_text()


def test_an_engine_that_keeps_ending_ends_the_server_for_its_supervisor(start, tmp_path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'serve' in sys.orig_argv:\n"
        "    from chunkllama.engine import supervisor\n"
        "    supervisor._MAX_BARREN, supervisor._MAX_BACK_OFF = 1, 0.01\n"
    )
    server = start(PYTHONPATH=str(tmp_path))
    first = engine_of(server)
    first.kill()
    wait_for_another_engine(server, first)
    engine_of(server).kill()
    assert server.process.wait(600) == 70
    log = server.log.read_text()
    assert "Traceback" not in log and "exit code 70" in log
