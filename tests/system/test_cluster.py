"""Replicas on Ray Serve behind `chunkllama serve`: affinity, failover, updates, two front ends.

The first server starts Ray; the others join it. Everything is observed over HTTP, and by what
happens to processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from tiny_model import write_tiny_model

pytestmark = [
    pytest.mark.ray,
    pytest.mark.nightly,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None,
        reason="Ray is not installed: pip install 'chunkllama[ray]'",
    ),
]

HANG_SECONDS = 4
TOKENS = 400
PROMPT = [5, 6, 7, 8] * 20


class Cluster:
    """The first server, others that join it, and the processes of their replicas."""

    def __init__(self, start: Any, folder: Path) -> None:
        self._start = start
        self.model = folder / "model"
        # The engine that begins the next step takes the file, and is killed or stopped.
        self.kill, self.stop = folder / "kill", folder / "stop"
        self.model.mkdir()
        write_tiny_model(self.model, 2048)
        self.env = {
            "RAY_TMPDIR": f"/tmp/cl-{secrets.token_hex(4)}",  # its sockets need a short path
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "CHUNKLLAMA_TEST_MODE": "1",
            "CHUNKLLAMA_FAULTS": f"step:kill@file={self.kill},step:stop@file={self.stop}",
        }
        self.first = self.serve()
        self.url = self.first.url

    def serve(self, *arguments: str) -> Any:
        return self._start(
            *("--cluster", "auto", "--model", str(self.model), "--served-model-name", "tiny"),
            *("--dtype", "float32", "--threads", "1", "--num-chunks", "64", "--log-level", "info"),
            *("--engine-hang-seconds", str(HANG_SECONDS), "--no-idle-prefill", "--no-batches"),
            *arguments,
            env=self.env,
        )

    def _processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.Process(self.first.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def named(self, word: str) -> list[psutil.Process]:
        """Processes of the cluster with a word in their command line."""
        found = []
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if word in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def engines(self) -> set[int]:
        """Ids of the engine processes."""
        return {process.pid for process in self.named("chunkllama.cluster.engine_process")}

    async def stopped(self) -> tuple[int, int]:
        """The ids of an engine process that has stopped itself in a step, and of its host."""
        while True:
            for pid in self.engines():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process = psutil.Process(pid)
                    if process.status() == psutil.STATUS_STOPPED:
                        return pid, process.ppid()
            await asyncio.sleep(0.01)

    def metric(self, name: str) -> float:
        return self.first.metric(name)

    def replica_metric(self, name: str) -> dict[str, float]:
        """A replica's series by its label."""
        found = {}
        for line in httpx.get(self.url + "/metrics", timeout=60).text.splitlines():
            if line.startswith(f"chunkllama_replica_{name}{{"):
                replica = line.partition('replica="')[2].partition('"')[0]
                found[replica] = float(line.rpartition(" ")[2])
        return found

    def wait_replicas(self, count: int = 2) -> None:
        while self.metric('chunkllama_replicas{state="running"}') != count:
            time.sleep(0.1)
        while len(self.engines()) != count:
            time.sleep(0.1)


@pytest.fixture(scope="module")
def cluster(start_server, tmp_path_factory) -> Iterator[Cluster]:
    made = Cluster(start_server, tmp_path_factory.mktemp("cluster"))
    yield made
    below = made._processes()
    made.first.stop(signal.SIGTERM)
    # Without its head node, which the last test ends, Ray gives up after a minute.
    _, alive = psutil.wait_procs(below, timeout=180)
    assert not alive, "processes are left"
    shutil.rmtree(made.env["RAY_TMPDIR"])


@pytest.fixture
def two(cluster: Cluster) -> Cluster:
    """The cluster with two replicas in use."""
    cluster.wait_replicas()
    return cluster


async def stream(
    url: str, prompt: list[int] = PROMPT, tokens: int = TOKENS, **fields: object
) -> AsyncIterator[str]:
    """The text pieces of a streamed completion; an error event raises."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "stream": True}
    body |= {"temperature": 0.0, "ignore_eos": True, "seed": 3, **fields}
    ended = False
    async with (
        httpx.AsyncClient(timeout=120) as client,
        client.stream("POST", f"{url}/v1/completions", json=body) as response,
    ):
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                ended = True
                continue
            event = json.loads(line[6:])
            assert "error" not in event, event
            yield event["choices"][0]["text"]
    assert ended


async def complete(url: str, prompt: list[int] = PROMPT, **fields: object) -> str:
    return "".join([text async for text in stream(url, prompt, **fields)])


def random_prompt(rng: Any, length: int) -> list[int]:
    return rng.integers(0, 256, length).tolist()


def test_each_prefix_has_one_replica_and_the_load_is_balanced(two: Cluster, rng) -> None:
    prefixes = [random_prompt(rng, 128) for _ in range(8)]

    async def scenario() -> None:
        for _ in range(4):
            prompts = [prefix + random_prompt(rng, 8) for prefix in prefixes for _ in range(2)]
            await asyncio.gather(*(complete(two.url, prompt, tokens=4) for prompt in prompts))

    before = two.replica_metric("prompt_tokens_total")
    computed = sum(two.replica_metric("prefill_tokens_computed_total").values())
    asyncio.run(scenario())
    parts: list[float] = []
    while sum(parts) != 64:  # snapshots of idle replicas come each second
        after = two.replica_metric("prompt_tokens_total")
        parts = sorted((after[name] - before[name]) / 136 for name in after)
    assert parts[1] <= 40, parts
    # each prefix was computed once: two replicas would have computed it twice
    computed = sum(two.replica_metric("prefill_tokens_computed_total").values()) - computed
    assert computed <= 8 * 128 + 64 * 8 + 64 * 4, computed


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_an_engine_that_is_killed_does_not_show_in_the_stream(
    two: Cluster, temperature: float, rng
) -> None:
    prompt = random_prompt(rng, 100)
    failovers = two.metric('chunkllama_failovers_total{reason="death"}')

    async def scenario() -> None:
        alone = await complete(two.url, prompt, temperature=temperature)
        pieces = []
        async for piece in stream(two.url, prompt, temperature=temperature):
            pieces.append(piece)
            if len(pieces) == 10:
                two.kill.touch()
        assert "".join(pieces) == alone

    asyncio.run(scenario())
    assert not two.kill.exists()
    assert two.metric('chunkllama_failovers_total{reason="death"}') == failovers + 1


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_a_replica_that_is_killed_or_stopped_does_not_show_in_the_stream(
    two: Cluster, how: str, rng
) -> None:
    prompt = random_prompt(rng, 100)
    restarts = two.metric("chunkllama_engine_restarts_total")
    gone: list[int] = []

    async def end_replica() -> None:
        engine, host = await two.stopped()
        os.kill(host, signal.Signals[how])
        gone.extend((engine, host))

    async def scenario() -> None:
        alone = await complete(two.url, prompt)
        pieces, ending = [], None
        async for piece in stream(two.url, prompt):
            pieces.append(piece)
            if len(pieces) == 10:
                two.stop.touch()
                ending = asyncio.create_task(end_replica())
        assert ending is not None
        await ending
        assert "".join(pieces) == alone

    asyncio.run(scenario())
    assert two.metric("chunkllama_engine_restarts_total") == restarts + 1
    while any(psutil.pid_exists(pid) for pid in gone):  # the hang limit of the replica, too
        time.sleep(0.1)


def test_a_request_that_ends_engines_is_failed_after_two_failovers(two: Cluster, rng) -> None:
    prompt = random_prompt(rng, 100)
    before = two.metric("chunkllama_engine_restarts_total")

    async def scenario() -> None:
        poison = asyncio.create_task(complete(two.url, prompt))
        while not poison.done():  # only an engine that computes takes the file
            two.kill.touch()
            await asyncio.sleep(0.01)
        two.kill.unlink(missing_ok=True)
        with pytest.raises(AssertionError, match="engine_poison_request"):
            await poison

    asyncio.run(scenario())
    assert two.metric("chunkllama_engine_restarts_total") == before + 3


def test_two_front_ends_choose_the_same_replica(two: Cluster, rng) -> None:
    prompts = [random_prompt(rng, 140) for _ in range(8)]
    second = two.serve()
    while second.metric('chunkllama_replicas{state="running"}') != 2:
        time.sleep(0.1)
    cached = []
    for url in (two.url, second.url):
        for prompt in prompts:
            body = {"model": "tiny", "prompt": prompt, "max_tokens": 2}
            usage = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["usage"]
            cached.append(usage["prompt_tokens_details"]["cached_tokens"])
    assert max(cached[:8]) < 64 and min(cached[8:]) >= 128, cached
    assert second.stop(signal.SIGTERM) == 0
    assert len(two.engines()) == 2, "replicas outlive a front end that joined"


def test_a_tenant_has_one_namespace_at_all_front_ends(two: Cluster, tmp_path, rng) -> None:
    secret = tmp_path / "namespace.key"
    secret.touch(mode=0o600)
    secret.write_text(secrets.token_hex(32))
    keys = ("--api-key", "a:key-a", "--api-key", "b:key-b", "--namespace-secret-file", str(secret))
    fronts = [two.serve(*keys) for _ in range(2)]
    prompt = random_prompt(rng, 140)
    cached = {}
    for tenant in "ab":
        for number, front in enumerate(fronts):
            while front.metric('chunkllama_replicas{state="running"}') != 2:
                time.sleep(0.1)
            body = {"model": "tiny", "prompt": prompt, "max_tokens": 2}
            headers = {"Authorization": f"Bearer key-{tenant}"}
            answer = httpx.post(
                f"{front.url}/v1/completions", json=body, headers=headers, timeout=60
            )
            details = answer.json()["usage"]["prompt_tokens_details"]
            cached[tenant, number] = details["cached_tokens"]
    for front in fronts:
        front.stop(signal.SIGTERM)
    assert cached == {("a", 0): 0, ("a", 1): 139, ("b", 0): 0, ("b", 1): 139}


async def load_until(url: str, done: asyncio.Event, rng: Any, least: int) -> list[int]:
    """Requests one after the other until ``done``, and at least so many; their status codes."""
    codes: list[int] = []
    async with httpx.AsyncClient(timeout=120) as client:
        while not done.is_set() or len(codes) < least:
            body = {"model": "tiny", "prompt": random_prompt(rng, 80), "max_tokens": 20}
            answer = await client.post(f"{url}/v1/completions", json=body)
            codes.append(answer.status_code)
    return codes


def test_an_update_and_fewer_replicas_fail_no_request(two: Cluster, rng) -> None:
    async def scenario() -> None:
        done = asyncio.Event()
        load = [asyncio.create_task(load_until(two.url, done, rng, 125)) for _ in range(4)]
        engines = two.engines()
        updating = await asyncio.to_thread(two.serve, "--explain-chunks", "1000")
        while len(two.engines()) < 2 or engines & two.engines():
            await asyncio.sleep(0.2)
        await asyncio.to_thread(updating.stop, signal.SIGTERM)
        shrinking = await asyncio.to_thread(
            two.serve, "--explain-chunks", "1000", "--replicas", "1"
        )
        while len(two.engines()) != 1:
            await asyncio.sleep(0.2)
        await asyncio.to_thread(shrinking.stop, signal.SIGTERM)
        served = await complete(two.url)
        done.set()
        codes = [code for each in load for code in await each]
        assert served and len(codes) >= 500 and set(codes) == {200}

    asyncio.run(scenario())
    growing = two.serve("--explain-chunks", "1000")
    two.wait_replicas()
    growing.stop(signal.SIGTERM)


def test_streams_and_new_requests_go_on_without_the_head_node(two: Cluster) -> None:
    """The last test: the cluster cannot replace anything any more."""
    (head,) = two.named("gcs_server")

    async def scenario() -> None:
        alone = await complete(two.url)
        pieces = []
        async for piece in stream(two.url):
            pieces.append(piece)
            if len(pieces) == 20:
                head.kill()
        assert "".join(pieces) == alone
        for _ in range(5):
            assert await complete(two.url) == alone
            await asyncio.sleep(1)

    asyncio.run(scenario())
    assert two.metric('chunkllama_replicas{state="running"}') >= 1
