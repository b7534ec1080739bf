"""Each quota of a tenants file, seen by a client of a real server."""

from __future__ import annotations

import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

TENANTS = """
tenants:
  plain: {}
  concurrent: {max_concurrent_requests: 1}
  queued: {max_concurrent_requests: 1, max_queued_requests: 1}
  places: {max_concurrent_requests: 1, queue_share: 0.05}
  requests: {requests_per_minute: 2}
  tokens: {tokens_per_minute: 40}
  unpinned: {pin_chunks: 0}
  pinned: {pin_chunks: 2}
  small: {chunk_share: 0.1}
  forgetful: {stored_responses: 1}
  modest: {highest_priority: 5}
  narrow: {allowed_models: [alias]}
"""
NAMES = [line.split(":")[0].strip() for line in TENANTS.splitlines() if "{" in line]


@pytest.fixture(scope="module")
def served(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tenants")
    (folder / "keys.txt").write_text("".join(f"{name}:key-{name}\n" for name in NAMES))
    (folder / "tenants.yaml").write_text(TENANTS)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = start(
        *("--api-key-file", folder / "keys.txt", "--tenants-file", folder / "tenants.yaml"),
        *(
            "--engine-hang-seconds",
            600,
            "--admin-port",
            port,
            "--max-waiting",
            40,
            "--max-num-seqs",
            8,
        ),
        *("--served-model-name", "tiny", "--served-model-name", "alias"),
    )
    server.admin = f"http://127.0.0.1:{port}"
    return server


def send(served, tenant: str, prompt: object = "hello", path: str = "completions", **fields):
    body = {"model": served.model, "max_tokens": 1, "ignore_eos": True, **fields}
    body["input" if path == "responses" else "prompt"] = prompt
    if path == "responses":
        del body["max_tokens"], body["ignore_eos"]
    headers = {"authorization": f"Bearer key-{tenant}"}
    return httpx.post(f"{served.url}/v1/{path}", json=body, headers=headers, timeout=120)


def send_at_once(served, tenant: str, count: int, **fields) -> list[httpx.Response]:
    with ThreadPoolExecutor(count) as pool:
        with served.paused_engine():
            answers = [pool.submit(send, served, tenant, f"{i}", **fields) for i in range(count)]
            while live_requests(served) < count:
                time.sleep(0.02)
        return [answer.result() for answer in answers]


def live_requests(served) -> int:
    """Requests that the API process has accepted."""
    text = httpx.get(f"{served.admin}/metrics", timeout=60).text
    (line,) = re.findall(r"^chunkllama_requests_live (\S+)$", text, re.MULTILINE)
    return int(float(line))


def state(served, tenant: str) -> dict:
    rows = httpx.get(f"{served.admin}/dashboard/tenants", timeout=60).json()["data"]
    (row,) = [row for row in rows if row["tenant"] == tenant]
    return row


def check_error(answer: httpx.Response, status: int, code: str, param: str | None = None) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param)


def test_concurrent_requests(served) -> None:
    running = []
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(send_at_once, served, "concurrent", 4, max_tokens=200)
        while not answers.done():
            running.append(state(served, "concurrent")["requests_running"])
    assert {answer.status_code for answer in answers.result()} == {200}
    assert max(running) <= 1


@pytest.mark.parametrize(("tenant", "accepted"), [("queued", 2), ("places", 3)])
def test_queued_requests_and_places(served, tenant: str, accepted: int) -> None:
    answers = send_at_once(served, tenant, 6, max_tokens=20)
    refused = [answer for answer in answers if answer.status_code != 200]
    assert len(refused) == 6 - accepted
    for answer in refused:
        check_error(answer, 429, "engine_overloaded")
        assert int(answer.headers["retry-after"]) >= 1
    assert state(served, tenant)["usage"]["rejections"] == {"queue": len(refused)}


def test_requests_a_minute(served) -> None:
    answers = [send(served, "requests") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    check_error(answers[-1], 429, "rate_limit_exceeded")
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 30
    assert [answer.headers["x-ratelimit-limit-requests"] for answer in answers] == ["2"] * 3


def test_tokens_a_minute(served) -> None:
    answers = [send(served, "tokens", "x" * 30) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 429]
    assert answers[1].json()["error"]["type"] == "tokens"
    assert 1 <= int(answers[1].headers["retry-after"]) <= 60
    assert "x-ratelimit-remaining-tokens" in answers[1].headers


def test_pin_budget(served) -> None:
    def pin(tenant: str, letter: str) -> str:
        ttl = {"prompt_cache_options": {"ttl": "5m"}}
        return send(served, tenant, letter * 100, **ttl).headers["x-chunkllama-cache-pin"]

    assert pin("unpinned", "a") == "over-budget"
    assert [pin("pinned", letter) for letter in "ab"] == ["granted", "over-budget"]


def test_chunk_share(served) -> None:
    """The share is 6 chunks; what is beyond them goes before any chunk of another tenant."""
    for letter in "abcde":
        send(served, "small", letter * 190)
    number = 0
    while not state(served, "small")["evictions"]["chunks"]:
        number += 1
        send(served, "plain", f"{number} " * 60)
    assert state(served, "plain")["evictions"]["chunks"] == 0
    assert state(served, "small")["chunks"]["cached"] > 6


def test_stored_responses(served) -> None:
    kept = {}
    for tenant in ("plain", "forgetful"):
        answers = [
            send(served, tenant, "hi", "responses", max_output_tokens=16, store=True)
            for _ in range(2)
        ]
        headers = {"authorization": f"Bearer key-{tenant}"}
        kept[tenant] = [
            httpx.get(f"{served.url}/v1/responses/{answer.json()['id']}", headers=headers)
            for answer in answers
        ]
    assert [answer.status_code for answer in kept["plain"]] == [200, 200]
    assert [answer.status_code for answer in kept["forgetful"]] == [404, 200]


def test_highest_priority(served) -> None:
    assert send(served, "modest", priority=5).status_code == 200
    refused = send(served, "modest", priority=4)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "priority"


def test_allowed_models(served) -> None:
    check_error(send(served, "narrow"), 403, "model_not_found", "model")
    assert send(served, "narrow", model="alias").status_code == 200
    headers = {"authorization": "Bearer key-narrow"}
    listed = httpx.get(f"{served.url}/v1/models", headers=headers).json()["data"]
    assert [model["id"] for model in listed] == ["alias"]
