"""A server whose model is split over two processes: one ends, hangs, or loses its parent."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from model_families import random_model
from tiny_model import write_tokenizer

pytestmark = pytest.mark.nightly

HANG_SECONDS = 4
RANK, ENGINE = "chunkllama.engine.rank_process", "chunkllama.engine.process"
PROMPTS = [[5, 6, 7, 8] * 20, [5, 6, 7, 8] * 18 + [9] * 30, [11, 12] * 50]
TOKENS = 300


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    random_model("Llama", {"vocab_size": 259}).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture
def server(start_server, model) -> Iterator:
    started = start_server(
        *("--model", str(model), "--served-model-name", "tiny", "--tp", "2"),
        *("--dtype", "float32", "--num-chunks", "64", "--log-level", "info"),
        *("--engine-hang-seconds", str(HANG_SECONDS), "--no-idle-prefill", "--no-batches"),
    )
    yield started
    started.stop(signal.SIGTERM)


def named(server, module: str) -> list[psutil.Process]:
    """Processes of the server that run a module."""
    found = []
    for process in server.descendants():
        try:
            if module in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def has_ended(process: psutil.Process) -> bool:
    """Whether nothing runs any more; a container may lack a process that reaps it."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(condition: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Reader(threading.Thread):
    """Reads the stream of a prompt's greedy answer."""

    def __init__(self, url: str, prompt: list[int]) -> None:
        super().__init__(daemon=True)
        self._url, self._prompt = url, prompt
        self.events: list[str] = []
        self.start()

    def run(self) -> None:
        body = {"model": "tiny", "prompt": self._prompt, "temperature": 0, "stream": True}
        body |= {"max_tokens": TOKENS, "ignore_eos": True, "return_token_ids": True}
        url = f"{self._url}/v1/completions"
        with httpx.stream("POST", url, json=body, timeout=600) as response:
            self.events.extend(x[6:] for x in response.iter_lines() if x.startswith("data: "))

    def text(self) -> str:
        self.join()
        assert self.events[-1] == "[DONE]"
        events = [json.loads(event) for event in self.events[:-1]]
        return "".join(choice["text"] for event in events for choice in event["choices"])


def read_all(server) -> list[Reader]:
    return [Reader(server.url, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_streams_continue_when_a_rank_ends_or_hangs(server, how) -> None:
    undisturbed = [reader.text() for reader in read_all(server)]
    (rank,), (engine,) = named(server, RANK), named(server, ENGINE)
    streams = read_all(server)
    wait_until(lambda: all(len(stream.events) > 20 for stream in streams))
    os.kill(rank.pid, how)
    assert [stream.text() for stream in streams] == undisturbed
    assert server.metric("chunkllama_engine_restarts_total") == 1
    wait_until(lambda: has_ended(rank) and has_ended(engine))
    assert len(named(server, RANK)) == len(named(server, ENGINE)) == 1


def test_an_idle_rank_that_ends_is_replaced_before_a_request_comes(server) -> None:
    (rank,) = named(server, RANK)
    rank.kill()
    wait_until(lambda: [each for each in named(server, RANK) if each != rank] != [])
    wait_until(lambda: httpx.get(server.url + "/health/ready").status_code == 200)
    assert Reader(server.url, PROMPTS[0]).text()


@pytest.mark.parametrize("ended", ["server by SIGTERM", "server", "engine"])
def test_no_rank_is_left_when_its_parents_end(server, ended) -> None:
    (rank,), (engine,) = named(server, RANK), named(server, ENGINE)
    if ended == "engine":
        engine.kill()
    else:
        server.stop(signal.SIGTERM if "SIGTERM" in ended else signal.SIGKILL)
    wait_until(lambda: has_ended(rank) and has_ended(engine))
    if ended == "engine":
        wait_until(lambda: len(named(server, RANK)) == 1)
