"""Faults of the table in docs/contributing/faults.md, each from outside on a real server.

A test is named by the row that it shows; the table names the tests of the other rows.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file, save_file
from soak_client import Answer, ask
from tiny_model import write_tiny_model

LONG = {"model": "tiny", "prompt": [70, 71, 72], "max_tokens": 600, "ignore_eos": True,
        "temperature": 0, "stream": True, "return_token_ids": True}  # fmt: skip


def port_of(server) -> int:
    return int(server.url.rpartition(":")[2])


def metrics(server, port: int | None = None) -> dict[str, float]:
    url = server.url if port is None else f"http://127.0.0.1:{port}"
    lines = httpx.get(f"{url}/metrics", timeout=120).text.splitlines()
    pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name.removeprefix("chunkllama_"): float(value) for name, _, value in pairs}


def wait_until(condition, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@contextlib.contextmanager
def suspended(server) -> Iterator[None]:
    """The engine does nothing inside the block, so that no request can end."""
    (engine,) = psutil.Process(server.process.pid).children()
    engine.suspend()
    try:
        yield
    finally:
        engine.resume()


def wait_live(server, count: int) -> None:
    wait_until(lambda: metrics(server)["requests_live"] == count)


def idle(server) -> dict[str, float]:
    """The metrics once nothing is live; no chunk may be held then."""
    names = ("requests_live", "requests_running", "requests_waiting")
    wait_until(lambda: not any(metrics(server)[name] for name in names))
    values = metrics(server)
    assert values['kv_chunks{state="private"}'] == values['kv_chunks{state="referenced"}'] == 0
    ended = sum(v for k, v in values.items() if k.startswith("request_finished_total"))
    assert values["request_accepted_total"] == ended
    assert values["invariant_violations"] == 0
    return values


async def stream_all(server, bodies: list[dict]) -> list[Answer]:
    port = port_of(server)
    return await asyncio.gather(*(ask(port, "/v1/completions", body, Answer()) for body in bodies))


def raw_request(body: bytes) -> bytes:
    return (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body) + body
    )


@pytest.fixture(scope="module")
def patient(start):
    """A server that waits for its engine without bound; the last test that uses it drains it."""
    flags = ("--engine-hang-seconds", 3600, "--drain-seconds", 3600)
    return start("--stream-first-byte-seconds", 0.01, *flags)


def test_f01_f02_clients_that_leave_at_any_moment(patient) -> None:
    server = patient
    whole = raw_request(
        b'{"model":"tiny","prompt":"go on","max_tokens":500,"ignore_eos":true,"stream":true}'
    )
    for blocked in (False, True):
        with suspended(server) if blocked else contextlib.nullcontext():
            for cycle in range(40):
                sock = socket.create_connection(("127.0.0.1", port_of(server)))
                if cycle % 2:  # closed with RST instead of FIN
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.sendall(whole[: len(whole) * (cycle % 5 + 1) // 5])
                if cycle % 5 == 4 and cycle > 20:
                    sock.recv(1)  # the headers, perhaps with a token
                if cycle % 10 == 9:
                    sock.shutdown(socket.SHUT_WR)
                sock.close()
        values = idle(server)
    assert values["request_accepted_total"] >= 8, "those that got headers"
    assert values['request_finished_total{reason="abort"}'] >= 4, "whose engine did nothing"


@pytest.fixture(scope="module")
def small_pool(start):
    """A server whose pool holds 960 tokens, fewer than the context of 1,024."""
    return start("--num-chunks", 15, "--engine-hang-seconds", 3600)  # the last --num-chunks counts


def test_f06_a_prompt_larger_than_the_pool(small_pool) -> None:
    for size in (961, 1000):
        body = {**LONG, "prompt": [70] * size, "max_tokens": 1}
        refused = httpx.post(f"{small_pool.url}/v1/completions", json=body, timeout=120)
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert error["code"] == "context_length_exceeded" and "pool holds 960" in error["message"]
    fits = {**LONG, "prompt": [70] * 900, "max_tokens": 4, "stream": False}
    url = f"{small_pool.url}/v1/completions"
    assert httpx.post(url, json=fits, timeout=120).status_code == 200


def test_a_pool_smaller_than_the_context_is_said_at_the_start(small_pool) -> None:
    said = "the K/V pool holds 960 tokens, less than the context of 1024"
    assert said in small_pool.log.read_text()
    (model,) = small_pool.get("/v1/models").json()["data"]
    assert model["max_request_tokens"] == 961  # nothing reads the last token's K/V


def test_f07_parts_of_characters(served) -> None:
    body = b'{"model":"tiny","prompt":"\xff","max_tokens":1}'
    json_type = {"Content-Type": "application/json"}
    url = f"{served.url}/v1/completions"
    assert httpx.post(url, content=body, headers=json_type, timeout=120).status_code == 400
    # of random bytes, many of which begin a character
    fields = {**LONG, "max_tokens": 400, "temperature": 2.0, "seed": 7}
    (streamed,) = asyncio.run(stream_all(served, [fields]))
    whole = httpx.post(url, json={**fields, "stream": False}, timeout=120).json()["choices"][0]
    assert streamed.text[0] == whole["text"] and "\ufffd" in whole["text"]
    assert not whole["text"].replace("\ufffd", "").isascii()


def test_f08_logits_that_are_no_numbers(start, tmp_path) -> None:
    """The embedding of one token is NaN: prompts with it fail, what runs beside them does not."""
    write_tiny_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.embed_tokens.weight"][ord("z")] = np.nan
    save_file(weights, tmp_path / "model.safetensors")
    server = start(
        "--model", tmp_path, "--served-model-name", "tiny", "--engine-hang-seconds", 3600
    )
    good = [{**LONG, "prompt": [70 + i, 71], "max_tokens": 30} for i in range(6)]
    alone = [asyncio.run(stream_all(server, [body]))[0].tokens for body in good]
    bad = {**LONG, "prompt": [*b"broken zone"], "max_tokens": 30}
    with ThreadPoolExecutor(1) as pool:
        with suspended(server):  # so that they run at the same time
            bodies = [*good, bad]
            answers = pool.submit(lambda: asyncio.run(stream_all(server, bodies)))
            wait_live(server, len(bodies))
        *together, failed = answers.result()
    assert (failed.status, (failed.error or {})["code"]) == (500, "model_nan")
    assert [answer.tokens for answer in together] == alone
    assert idle(server)["engine_restarts_total"] == 0


def test_f09_one_request_id_many_times(served) -> None:
    async def send() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=120) as client:
            body = {"model": "tiny", "prompt": "hi", "max_tokens": 8, "temperature": 0}
            headers = {"X-Request-Id": "the-same"}
            url = f"{served.url}/v1/completions"
            return await asyncio.gather(
                *(client.post(url, json=body, headers=headers) for _ in range(100))
            )

    answers = asyncio.run(send())
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.headers["x-request-id"] for answer in answers} == {"the-same"}
    assert len({answer.json()["id"] for answer in answers}) == 100
    assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1
    idle(served)


@pytest.mark.nightly
def test_f13_a_request_that_kills_the_engine(start, tmp_path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'chunkllama.engine.process' in sys.orig_argv:\n"
        "    from chunkllama.engine.core import EngineCore\n"
        "    from chunkllama.engine.journal import StepJournal\n"
        "    add, begin, poison = EngineCore.add, StepJournal.begin_step, set()\n"
        "    def adding(self, request):\n"
        "        if request.prompt_token_ids[:3] == [66, 66, 66]:\n"
        "            poison.add(request.request_id)\n"
        "        add(self, request)\n"
        "    def beginning(self, ids):\n"
        "        begin(self, ids)\n"
        "        if poison & set(ids):\n"
        "            os.kill(os.getpid(), 9)\n"
        "    EngineCore.add, StepJournal.begin_step = adding, beginning\n"
    )
    server = start(PYTHONPATH=str(tmp_path))
    (alone,) = asyncio.run(stream_all(server, [LONG]))
    poison = {**LONG, "prompt": [66, 66, 66]}
    answer, failed = asyncio.run(stream_all(server, [LONG, poison]))
    assert failed.error is not None and failed.error["code"] == "engine_poison_request"
    assert answer.is_done and answer.tokens == alone.tokens
    # two steps with both, one beside the other one that was tried before, one alone
    assert idle(server)["engine_restarts_total"] <= 4


@pytest.mark.parametrize(
    "standby", [False, pytest.param(True, marks=pytest.mark.nightly)], ids=["alone", "standby"]
)
def test_f15_nothing_is_left_when_the_server_is_killed(start_stopping, tmp_path, standby) -> None:
    temporary, cache, snapshots = (tmp_path / name for name in ("tmp", "cache", "snapshots"))
    temporary.mkdir()
    flags = ("--snapshot-dir", snapshots, *(("--standby",) if standby else ()))
    server = start_stopping(*flags, TMPDIR=str(temporary), CHUNKLLAMA_CACHE=str(cache))
    api = psutil.Process(server.process.pid)
    wait_until(lambda: len(api.children()) == 1 + standby)
    family = api.children(recursive=True)
    for process in (api, *family):
        opened = [os.readlink(entry) for entry in Path(f"/proc/{process.pid}/fd").iterdir()]
        assert not [name for name in opened if name.startswith("/dev/shm/")]
        assert "/dev/shm/" not in Path(f"/proc/{process.pid}/maps").read_text()
        assert not [each.laddr for each in process.net_connections("unix") if each.laddr]
    with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=120) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.kill()
        server.process.wait()
        assert not psutil.wait_procs(family, timeout=600)[1]
        with pytest.raises(httpx.TransportError):
            list(lines)
    assert list(temporary.iterdir()) == []
    files = [
        path
        for folder in (cache, snapshots)
        for path in folder.rglob("*")
        if path.is_file() and path.name != "lock"
    ]
    assert not [path for path in files if ".tmp" in path.name or path.stat().st_size == 0]
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port_of(server)))
        again.listen()


@pytest.mark.nightly
def test_f16_a_pool_smaller_than_its_load(small_pool) -> None:
    server = small_pool
    # many short answers, after which the scheduler expects short ones and admits too many
    asyncio.run(stream_all(server, [{**LONG, "prompt": [70], "max_tokens": 2}] * 20))
    bodies = [{**LONG, "prompt": [80 + i, 81, 82], "max_tokens": 260} for i in range(6)]
    with ThreadPoolExecutor(1) as pool:
        with suspended(server):  # so that they run at the same time
            answers = pool.submit(lambda: asyncio.run(stream_all(server, bodies)))
            wait_live(server, len(bodies))
        together = answers.result()
    alone = [asyncio.run(stream_all(server, [body]))[0].tokens for body in bodies]
    assert all(answer.is_done for answer in together)
    assert [answer.tokens for answer in together] == alone
    assert idle(server)["preemptions_total"] > 0


def test_f18_more_than_the_queue_takes(start) -> None:
    server = start("--max-num-seqs", 2, "--max-waiting", 2, "--engine-hang-seconds", 3600)
    bodies = [{**LONG, "max_tokens": 60, "prompt": [65, number]} for number in range(40)]
    statuses: list[int] = []

    async def send(client: httpx.AsyncClient, body: dict) -> httpx.Response:
        answer = await client.post(f"{server.url}/v1/completions", json={**body, "stream": False})
        statuses.append(answer.status_code)
        return answer

    async def flood() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(timeout=600, limits=limits) as client:
            return await asyncio.gather(*(send(client, body) for body in bodies))

    with ThreadPoolExecutor(1) as pool:
        with suspended(server):
            answers = pool.submit(lambda: asyncio.run(flood()))
            wait_until(lambda: len(statuses) == 36)
        refused = [answer for answer in answers.result() if answer.status_code == 429]
    assert Counter(statuses) == {200: 4, 429: 36}
    for answer in refused:
        assert 1 <= int(answer.headers["retry-after"]) <= 30
        assert answer.json()["error"]["code"] == "engine_overloaded"
    idle(server)
    assert server.chat(max_tokens=2).status_code == 200


@pytest.mark.nightly
def test_f19_deadlines(start) -> None:
    server = start("--queue-timeout-seconds", 0.1, "--engine-hang-seconds", 3600)
    with suspended(server):
        late = server.chat(max_tokens=2)
    assert (late.status_code, late.json()["error"]["code"]) == (503, "queue_timeout")
    assert int(late.headers["retry-after"]) >= 1
    assert idle(server)['request_finished_total{reason="timeout"}'] == 1
    server.stop()
    server = start("--request-timeout-seconds", 3, "--engine-hang-seconds", 3600,
                   "--stream-first-byte-seconds", 0.01)  # fmt: skip
    with suspended(server):
        answer = httpx.post(f"{server.url}/v1/completions", json=LONG, timeout=600)
    # an event, unless the server stood still for seconds before it could send its headers
    assert answer.status_code in (200, 504) and '"code":"deadline"' in answer.text
    assert "[DONE]" not in answer.text
    assert idle(server)['request_finished_total{reason="timeout"}'] == 1


def test_f20_two_hundred_streams_are_drained(patient) -> None:
    server = patient
    bodies = [{**LONG, "prompt": [65, i, 67], "max_tokens": 12} for i in range(200)]
    with ThreadPoolExecutor(1) as pool:
        with suspended(server):
            answers = pool.submit(lambda: asyncio.run(stream_all(server, bodies)))
            wait_live(server, len(bodies))
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: server.get("/health/ready").status_code == 503)
            refused = server.chat()
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        drained = answers.result()
    assert all(answer.is_done and len(answer.tokens[0]) == 12 for answer in drained)
    assert server.process.wait(600) == 0
    assert "Traceback" not in server.log.read_text()


def test_f23_f33_no_log_can_be_written_and_no_home_exists(start, tmp_path) -> None:
    server = start(log=Path("/dev/full"), HOME="/nonexistent", TMPDIR=str(tmp_path))
    for _ in range(3):
        assert server.chat(max_tokens=2).status_code == 200
    idle(server)
    assert server.stop() == 0


@pytest.fixture
def few_descriptors(tmp_path: Path) -> str:
    """PYTHONPATH of servers that may open 200 descriptors."""
    (tmp_path / "sitecustomize.py").write_text(
        "import resource, sys\n"
        "if 'serve' in sys.orig_argv:\n"
        "    resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))\n"
    )
    return str(tmp_path)


@pytest.mark.nightly
def test_f30_a_reader_that_stalls(start) -> None:
    server = start("--stream-stall-seconds", 0.5)
    body = b"""{"model": "tiny", "messages": [{"role": "user", "content": "go on"}], "n": 16,
        "max_tokens": 900, "stream": true, "ignore_eos": true, "logprobs": true,
        "top_logprobs": 20}"""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", port_of(server)))
    with sock:
        sock.sendall(raw_request(body).replace(b"/v1/completions", b"/v1/chat/completions"))
        wait_until(lambda: metrics(server)['request_finished_total{reason="abort"}'] == 1)
    idle(server)
    assert server.chat(max_tokens=2).status_code == 200


def test_f31_no_descriptor_is_left_for_clients(start, few_descriptors) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        admin = probe.getsockname()[1]
    server = start("--admin-port", admin, PYTHONPATH=few_descriptors)
    assert "descriptor limit of 200" in server.log.read_text()
    with contextlib.ExitStack() as stack:
        connect = socket.create_connection
        live = stack.enter_context(
            httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=120)
        )
        for _ in range(260):
            stack.enter_context(connect(("127.0.0.1", port_of(server)), 600))
        for _ in range(5):
            url = f"http://127.0.0.1:{admin}"
            assert httpx.get(f"{url}/health/ready", timeout=120).status_code == 200
            assert metrics(server, admin)["requests_live"] >= 0
        assert live.read().endswith(b"data: [DONE]\n\n")
    # Connections that were never accepted are in the queue of the socket, and are closed after it.
    wait_until(lambda: psutil.Process(server.process.pid).num_fds() < 60)
    wait_until(lambda: server.chat(max_tokens=2).status_code == 200)
    assert server.log.read_text().count("cannot accept connections") <= 2


def beside_hogs(server, count: int) -> float:
    """Restarts after ``count`` answers beside four processes that use every processor."""
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4)]
    try:
        for _ in range(count):
            assert server.chat(max_tokens=20).status_code == 200
        return metrics(server)["engine_restarts_total"]
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


def test_f34_busy_neighbours_are_no_hang(served) -> None:
    before = metrics(served)["engine_restarts_total"]
    assert beside_hogs(served, 2) == before


@pytest.mark.nightly
def test_f34_busy_neighbours_for_minutes(served) -> None:
    before = metrics(served)["engine_restarts_total"]
    until = time.monotonic() + 300
    while time.monotonic() < until:
        assert beside_hogs(served, 20) == before


def test_f35_choices_that_end_apart(served) -> None:
    body = {"model": "tiny", "prompt": "go on", "n": 6, "temperature": 1.5, "seed": 5,
            "max_tokens": 120, "stop": ["e"]}  # fmt: skip
    answer = httpx.post(f"{served.url}/v1/completions", json=body, timeout=120)
    choices = answer.json()["choices"]
    assert sorted(choice["index"] for choice in choices) == list(range(6))
    assert len({len(choice["text"]) for choice in choices}) > 1
    assert all(choice["finish_reason"] in ("stop", "length") for choice in choices)
    idle(served)


def test_statistics_have_an_age_while_the_engine_stands(served) -> None:
    server = served
    (engine,) = psutil.Process(server.process.pid).children()
    wait_until(lambda: metrics(server)["engine_stats_age_seconds"] < 0.8)
    capacity = metrics(server)["kv_chunks_capacity"]
    engine.suspend()
    try:
        first, second = metrics(server), metrics(server)
    finally:
        engine.resume()
    assert 0.5 < first["engine_stats_age_seconds"] < second["engine_stats_age_seconds"]
    assert second["kv_chunks_capacity"] == capacity
    wait_until(lambda: metrics(server)["engine_stats_age_seconds"] < 0.5)
