"""Batches on a real engine: what sharing saves, a killed server, and the command."""

from __future__ import annotations

import collections
import contextlib
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from fake_engine import MODEL
from tiny_model import write_tiny_model
from tiny_server import TinyServer, serve

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("batches")
    write_tiny_model(folder)
    return folder


def sdk(server: TinyServer) -> openai.OpenAI:
    http = openai.DefaultHttpxClient(verify=False)
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", http_client=http)


def requests(count: int, num_prefixes: int, max_tokens: int) -> list[dict]:
    """Requests over shared system prompts, in shuffled order."""
    rows = [
        {
            "custom_id": f"r{i}",
            "method": "POST",
            "url": CHAT,
            "body": {
                "model": MODEL,
                "messages": [
                    {"role": "system", "content": chr(97 + i % num_prefixes) * 120},
                    {"role": "user", "content": f"question {i}"},
                ],
                "max_tokens": max_tokens,
                "ignore_eos": True,
                "temperature": 0,
            },
        }
        for i in range(count)
    ]
    random.Random(3).shuffle(rows)
    return rows


def least_prefill(rows: list[dict]) -> int:
    """Tokens to compute if each prefix is computed once, and each question by itself.

    A character is a token, and so is each control token: ^system, its line, $ and a new line.
    """
    prefixes, questions = set(), 0
    for row in rows:
        system, user = (message["content"] for message in row["body"]["messages"])
        prefixes.add(f"^system\n{system}$\n")
        questions += len(f"^user\n{user}$\n^assistant\n")
    return sum(map(len, prefixes)) + questions


def encoded(rows: list[dict]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def begin(client: openai.OpenAI, rows: list[dict]):
    stored = client.files.create(file=("in.jsonl", encoded(rows)), purpose="batch")
    return client.batches.create(input_file_id=stored.id, endpoint=CHAT, completion_window="24h")


def ended(client: openai.OpenAI, batch_id: str):
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        batch = client.batches.retrieve(batch_id)
        if batch.status in ("completed", "failed", "expired", "cancelled"):
            return batch
        time.sleep(0.05)
    raise AssertionError(batch)


def check_once(client: openai.OpenAI, batch, rows: list[dict]) -> None:
    assert batch.status == "completed" and batch.error_file_id is None
    text = client.files.content(batch.output_file_id).text
    answers = [json.loads(line) for line in text.splitlines()]
    counts = collections.Counter(answer["custom_id"] for answer in answers)
    assert counts == {row["custom_id"]: 1 for row in rows}
    assert {answer["response"]["status_code"] for answer in answers} == {200}


def computed_tokens(server: TinyServer) -> int:
    """Prompt tokens that the engine has computed since its start."""
    text = httpx.get(f"{server.url}/metrics").text
    (line,) = re.findall(r"^chunkllama_prefill_tokens_computed_total (\S+)$", text, re.MULTILINE)
    return int(float(line))


def check_sharing(server: TinyServer, before: int, batch, rows: list[dict]) -> None:
    """The engine's count, which the usage of the lines agrees with."""
    computed = computed_tokens(server) - before
    usage = batch.usage
    assert computed == usage.input_tokens - usage.input_tokens_details.cached_tokens
    assert 0 < computed <= 1.2 * least_prefill(rows)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[TinyServer]:
    with serve(folder) as server:
        yield server


def test_the_command_and_what_sharing_saves(server: TinyServer, tmp_path: Path) -> None:
    """More prompts than the pool holds: their order decides what is computed again."""
    rows, before = requests(64, 16, 2), computed_tokens(server)
    (tmp_path / "in.jsonl").write_bytes(encoded(rows))
    command = [sys.executable, "-m", "chunkllama_server.cli", "batch", "in.jsonl", "out.jsonl"]
    done = subprocess.run(
        [*command, "--url", server.url], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [answer["custom_id"] for answer in answers] == [row["custom_id"] for row in rows]
    assert "completed: 64 of 64 lines answered" in " ".join(done.stderr.split())
    assert not (tmp_path / "out.jsonl.batch").exists()
    with sdk(server) as client:
        check_sharing(server, before, client.batches.list().data[0], rows)


@pytest.mark.nightly
def test_500_requests_over_16_prefixes(server: TinyServer) -> None:
    rows, before = requests(500, 16, 8), computed_tokens(server)
    with sdk(server) as client:
        batch = ended(client, begin(client, rows).id)
        check_once(client, batch, rows)
        check_sharing(server, before, batch, rows)


@pytest.mark.nightly
def test_a_killed_server_answers_every_line_once(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    copy.mkdir()
    write_tiny_model(copy)
    rows = requests(24, 4, 8)
    for number, row in enumerate(rows):  # they end one after the other
        row["body"]["max_tokens"] = 4 + 3 * number
    first = serve(copy)
    server = first.__enter__()
    with sdk(server) as client:
        batch_id = begin(client, rows).id
        while client.batches.retrieve(batch_id).request_counts.completed < 3:
            assert server.process.poll() is None
            time.sleep(0.01)
    server.process.kill()
    with contextlib.suppress(AssertionError):  # it did not end by itself
        first.__exit__(None, None, None)
    with serve(copy) as again, sdk(again) as client:
        batch = ended(client, batch_id)
        check_once(client, batch, rows)
        assert batch.request_counts.completed == len(rows)
