"""The engine process of a real server is killed, or its server is: seen from outside."""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import httpx
import psutil
import pytest

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
        with httpx.stream("POST", self._url, json=self._body, timeout=120) as response:
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


def engine_of(server) -> psutil.Process:
    (child,) = psutil.Process(server.process.pid).children()
    return child


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_streams_continue_in_another_engine_process(start, how) -> None:
    server = start("--engine-hang-seconds", 2)
    undisturbed = {}
    for name, fields in KINDS.items():  # one by one, and cold caches do not change greedy ids
        undisturbed[name] = Reader(server.url, fields)
        undisturbed[name].join(120)
    readers = read_all(server.url)
    wait_until(lambda: all(reader.count > 5 for reader in readers.values()))
    before = engine_of(server)
    assert all(reader.is_alive() for reader in readers.values())
    before.send_signal(how)
    wait_until(lambda: server.get("/health/ready").status_code == 503)
    assert server.get("/health/live").status_code == 200
    late = server.chat("hello", max_tokens=3, temperature=0)
    assert late.status_code == 200, "a request waits for the restart"
    for name, reader in readers.items():
        reader.join(120)
        assert reader.last == "data: [DONE]", (name, reader.last)
        assert reader.text == undisturbed[name].text, name
        assert reader.reasons == undisturbed[name].reasons, name
        for key in ("prompt_tokens", "completion_tokens"):
            assert reader.usage[key] == undisturbed[name].usage[key], name
    pairs = zip(readers["logprobs"].logprobs, undisturbed["logprobs"].logprobs, strict=True)
    for (token, logprob), (expected, value) in pairs:
        assert token == expected and abs(logprob - value) < 1e-3
    assert server.get("/health/ready").status_code == 200
    assert engine_of(server).pid != before.pid
    assert not before.is_running()
    assert server.stop() == 0
    assert "Traceback" not in server.log.read_text()


def test_the_engine_ends_with_its_server(start) -> None:
    server = start()
    shared_memory = set(os.listdir("/dev/shm"))
    engine = engine_of(server)
    server.process.kill()
    server.process.wait(10)
    assert not psutil.wait_procs([engine], timeout=5)[1]
    assert set(os.listdir("/dev/shm")) <= shared_memory


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
    wait_until(lambda: server.get("/health/ready").status_code == 503)
    wait_until(lambda: server.get("/health/ready").status_code == 200)
    engine_of(server).kill()
    assert server.process.wait(60) == 70
    log = server.log.read_text()
    assert "Traceback" not in log and "exit code 70" in log
