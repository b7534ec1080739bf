"""Routers of other projects before two servers: models listed, affinity kept, health followed.

Needs the extra ``routers``. The routers run as they are installed; only times are set.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import httpx
import openai
import pytest

pytestmark = [pytest.mark.nightly, pytest.mark.routers]

KEY = "key-of-the-tenant"
COMMANDS = {
    "sglang-router": ("sglang_router.launch_router",),
    "smg": ("smg", "launch"),
}
PREFIX_CHARACTERS = 300  # as many tokens of the tiny model, four whole chunks


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@dataclass
class Setup:
    """Two servers and a router."""

    servers: list
    url: str
    log: Path

    def workers(self) -> list[dict]:
        headers = {"authorization": f"Bearer {KEY}"}
        return httpx.get(f"{self.url}/workers", headers=headers, timeout=60).json()["workers"]

    def wait_for(self, healthy: int) -> None:
        """Wait until the router takes that many servers for healthy."""
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            try:
                if sum(bool(worker["is_healthy"]) for worker in self.workers()) == healthy:
                    return
            except (httpx.TransportError, ValueError, KeyError):
                pass
            time.sleep(0.2)
        raise AssertionError(self.log.read_text()[-8000:])


@pytest.fixture(scope="module", params=[f"{name}, {keys}" for name in COMMANDS
                                        for keys in ("open", "keys")])  # fmt: skip
def routed(request, start: Callable, tmp_path_factory) -> Iterator[Setup]:
    name, _, keys = request.param.partition(", ")
    module, *words = COMMANDS[name]
    if find_spec(module.partition(".")[0]) is None:
        pytest.skip(f"{name} is not installed: pip install chunkllama[routers]")
    folder = tmp_path_factory.mktemp("routers")
    flags = ["--api-key", f"tenant:{KEY}"] if keys == "keys" else []
    servers = [start(*flags, "--files-dir", folder / f"files-{i}") for i in range(2)]
    port, metrics = free_ports(2)
    command = [sys.executable, "-m", module, *words, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--prometheus-port", str(metrics), "--policy", "cache_aware", "--worker-urls"]
    command += [server.url for server in servers]
    command += ["--health-check-interval-secs", "1", "--health-failure-threshold", "1"]
    command += ["--api-key", KEY] if keys == "keys" else []
    log = folder / "router.log"
    with log.open("w") as file:
        router = subprocess.Popen(command, stdout=file, stderr=file, env=dict(os.environ))
    made = Setup(servers, f"http://127.0.0.1:{port}", log)
    try:
        made.wait_for(2)
        yield made
    finally:
        router.kill()
        router.wait(60)
        for server in servers:
            if server.process.poll() is None:
                server.stop()


@pytest.fixture
def client(routed: Setup) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{routed.url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


def test_the_model_is_listed_by_its_name(client) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_prompts_of_one_prefix_stay_on_one_server(client, routed: Setup) -> None:
    cold = 0
    for user in range(4):
        for prefix in range(8):
            system = chr(ord("a") + prefix) * PREFIX_CHARACTERS
            answer = client.completions.create(model="tiny", prompt=f"{system}{user}", max_tokens=1)
            assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
            cold += (answer.usage.prompt_tokens_details.cached_tokens or 0) < PREFIX_CHARACTERS
    assert cold == 8


def test_a_stream_is_passed_on_whole(client) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=5, stream=True
        )
    )
    assert chunks[-1].choices[0].finish_reason in ("length", "stop")


def test_a_stopped_server_gets_no_more_requests(client, routed: Setup) -> None:
    """The last test of a router: one server is left."""
    routed.servers[0].stop()
    routed.wait_for(1)
    for user in range(10):
        answer = client.completions.create(model="tiny", prompt=f"after {user}", max_tokens=1)
        assert answer.choices[0].finish_reason == "length"
