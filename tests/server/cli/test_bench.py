"""The load test against a real HTTP server over a fake engine."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import sys

import pytest

from chunkllama.errors import ConfigError
from chunkllama.text.tokenizer import load_tokenizer
from chunkllama_server.bench.client import Endpoint, Outcome
from chunkllama_server.bench.monitor import tree_memory
from chunkllama_server.bench.report import Run
from chunkllama_server.bench.workload import (
    Conversation,
    LoadTest,
    PromptMaker,
    Workload,
    make_conversations,
)
from chunkllama_server.bench.workload import read_trace as read_trace_file
from chunkllama_server.commands import run


@pytest.fixture
def bench(server, tiny_model, tmp_path, capsys):
    """Run ``chunkllama bench serve`` with small sizes; returns (exit code, result, printed)."""

    def measure(*flags: object, url: str = ""):
        code = run(
            [
                "bench", "serve", "--url", url or server.url, "--tokenizer", str(tiny_model),
                "--tenants", "2", "--system-tokens", "40", "--user-tokens", "8",
                "--output-tokens", "3", "--conversations", "6", "--concurrency", "3",
                "--output", str(tmp_path), *map(str, flags),
            ]
        )  # fmt: skip
        file = tmp_path / "load-test.json"
        result = json.loads(file.read_text()) if file.is_file() else None
        return code, result, capsys.readouterr()

    return measure


def test_a_run_reports_every_request(bench, server, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bin/chunkllama", "bench", "serve", "--api-key", "canary"])
    code, result, printed = bench("--pid", os.getpid(), "--api-key", "canary")
    assert code == 0, printed
    (one,) = result["runs"]
    summary = one["summary"]
    assert (summary["requests"], summary["failed"]) == (6, 0)
    assert len(one["requests"]) == 6
    assert summary["output_tokens"] == sum(r["output_tokens"] for r in one["requests"])
    assert summary["prompt_tokens"] > 6 * 48
    assert summary["ttft_ms"]["p50"] <= summary["ttft_ms"]["p99"] <= summary["ttft_ms"]["max"]
    assert summary["peak_memory_bytes"] > 1 << 20
    assert one["occupancy"] and {"free", "running"} <= set(one["occupancy"][0])
    assert result["machine"]["processors"] >= 1
    assert result["command"] == "chunkllama bench serve --api-key '***'"
    assert "canary" not in json.dumps(result)
    assert result["versions"]["server"]
    assert "concurrency 3" in printed.out
    prompts = [request.prompt_token_ids for request in server.engine.requests]
    assert len({tuple(ids[:40]) for ids in prompts}) == 2


def test_several_points_and_plots(bench, tmp_path):
    code, result, _ = bench("--rate", "20,40", "--plots", "--warm", "--turns", 2)
    assert code == 0
    assert [each["label"] for each in result["runs"]] == ["rate 20", "rate 40"]
    assert [each["summary"]["requests"] for each in result["runs"]] == [12, 12]
    for name in ("latency", "occupancy", "load"):
        assert (tmp_path / f"load-test-{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_replays_a_trace(bench, tmp_path, server):
    trace = tmp_path / "trace.jsonl"
    lines = [
        {"at": 0.05, "messages": [{"role": "user", "content": "one"}], "max_tokens": 2},
        {"messages": [{"role": "user", "content": "two"}], "tenant": 1, "top_p": 0.5},
    ]
    trace.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    code, result, _ = bench("--trace", trace, "--no-exact-output")
    assert code == 0
    assert result["runs"][0]["label"] == "trace trace.jsonl"
    assert [r["tenant"] for r in result["runs"][0]["requests"]] == [1, 0]
    assert server.engine.requests[0].sampling.top_p == 0.5


@pytest.mark.parametrize(
    "line", ["{", "{}", '{"messages": [], "at": "x"}', "[]", "", '{"messages": 5}']
)
def test_bad_traces_name_the_line(line, tmp_path):
    trace = tmp_path / "trace.jsonl"
    trace.write_text(line)
    with pytest.raises(ConfigError, match="trace"):
        read_trace_file(trace)


def test_failed_requests_are_counted_and_set_the_exit_code(bench):
    code, result, printed = bench("--model", "no-such-model")
    assert code == 1
    assert result["runs"][0]["summary"]["failed"] == 6
    assert "status 404" in result["runs"][0]["summary"]["first_error"]
    assert "first error: status 404" in printed.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--concurrency", "x"], "concurrency, rate: numbers"),
        (["--rate", "0"], "must be above 0"),
        (["--pid", "999999999"], "pid: no process"),
        (["--url", "ftp://x"], "not an http or https URL"),
        (["--url", "http://[::1"], "url: http://[::1"),
        (["--url", "http://127.0.0.1:99999"], "out of range"),
        (["--output", "/proc/nowhere"], "output: cannot write to /proc/nowhere"),
        (["--url", "http://127.0.0.1:9"], "no OpenAI-compatible server"),
        (["--tokenizer", "/nowhere"], "/nowhere"),
        (["--trace", "/nowhere.jsonl"], "trace: cannot read"),
    ],
)
def test_mistakes_are_one_line(bench, flags, message):
    code, _, printed = bench(*flags)
    assert code == 2
    assert message in printed.err


def test_plots_without_matplotlib_say_what_to_install_before_the_run(bench, server, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, result, printed = bench("--plots")
    assert code == 2
    assert "chunkllama[plots]" in printed.err
    assert result is None and not server.engine.requests


def test_prompts_have_exact_lengths_and_follow_the_seed(tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    maker = PromptMaker(tokenizer, seed=3)
    for length in (1, 2, 5, 63, 300):
        assert len(tokenizer.encode(maker.text(length))) == length
    workload = Workload(tenants=3, system_tokens=20, conversations=7, turns=2, rate=5.0)
    made = make_conversations(workload, tokenizer)
    assert made == make_conversations(workload, tokenizer)
    assert [c.tenant for c in made] == [0, 1, 2, 0, 1, 2, 0]
    assert made[0].system == made[3].system != made[1].system
    assert len({user for c in made for user in c.users}) == 14
    assert [c.at for c in made] == sorted(c.at for c in made)


def _stub(parts: list[bytes]):
    """A server that writes given bytes to any request."""

    async def handle(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.001)
        writer.close()

    return handle


async def _outcome(parts: list[bytes]) -> Outcome:
    server = await asyncio.start_server(_stub(parts), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    load = LoadTest(Endpoint(f"http://127.0.0.1:{port}/v1", ("key",)), "m")
    conversation = Conversation(0, 0.0, "", ["hi"], 4)
    await load.run([conversation], concurrency=1, loop="closed")
    server.close()
    return load.outcomes[0]


def test_streams_are_read_however_they_are_cut():
    events = [
        {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"delta": {"content": "é🤖"}}]},
        {"choices": [{"text": "b"}], "usage": None},
        {
            "choices": [],
            "usage": {
                "prompt_tokens": 5,
                "completion_tokens": 2,
                "prompt_tokens_details": {"cached_tokens": 3},
            },
        },
    ]
    body = "".join(f"data: {json.dumps(e, ensure_ascii=False)}\n\n" for e in events).encode()
    body += b"data: [DONE]\n\n"
    rng = random.Random(0)
    for framing in ("chunked", "length", "close"):
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
        if framing == "chunked":
            head += b"Transfer-Encoding: chunked\r\n\r\n"
            cut = [body[i : i + 7] for i in range(0, len(body), 7)]
            stream = head + b"".join(b"%x\r\n%s\r\n" % (len(c), c) for c in cut) + b"0\r\n\r\n"
        else:
            head += b"Content-Length: %d\r\n" % len(body) if framing == "length" else b""
            stream = head + b"\r\n" + body
        cuts = sorted(rng.randrange(len(stream)) for _ in range(5))
        parts = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
        outcome = asyncio.run(_outcome(parts))
        assert outcome.error == ""
        assert outcome.text == "é🤖b"
        assert len(outcome.arrivals) == 2
        counts = (outcome.prompt_tokens, outcome.cached_tokens, outcome.completion_tokens)
        assert counts == (5, 3, 2)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"HTTP/1.1 503 No\r\ncontent-length: 4\r\n\r\nbusy", "status 503: busy"),
        (b"HTTP/1.1 200 OK\r\n\r\ndata: [DONE]\n\n", "no token came"),
        (b'HTTP/1.1 200 OK\r\n\r\ndata: {"error": {"message": "gone"}}\n\n', "gone"),
        (b"HTTP/1.1 200 OK\r\n\r\ndata: {not json\n", "Expecting"),
        (b"", "0 bytes read|expected"),
        (b"garbage", "bytes"),
        (b"garbage\r\n\r\n", "not enough values"),
        (b"HTTP/1.1 200 OK\r\n\r\ndata: [1]\n", "unexpected answer"),
        (b'HTTP/1.1 200 OK\r\n\r\ndata: {"usage": {"x": 1}}\n', "unexpected answer"),
    ],
)
def test_bad_answers_are_errors_of_that_request(answer, error):
    outcome = asyncio.run(_outcome([answer]))
    assert re.search(error, outcome.error)


def test_summaries_are_exact():
    outcomes = [
        Outcome(0, 0, float(i), i + 1.5, [i + 0.1 * (i + 1), i + 1.0], 10, 5, 11) for i in range(10)
    ]
    outcomes.append(Outcome(0, 0, 0.0, error="broken"))
    summary = Run("x", Workload(), outcomes, seconds=10.0).summary()
    assert summary["requests_per_second"] == 1.0
    assert summary["output_tokens_per_second"] == 11.0
    assert summary["cached_share"] == 0.5
    assert summary["failed"] == 1 and summary["first_error"] == "broken"
    assert summary["ttft_ms"]["p50"] == 500.0
    assert summary["ttft_ms"]["p90"] == 900.0
    assert summary["ttft_ms"]["max"] == 1000.0
    assert summary["latency_ms"]["mean"] == 1500.0
    assert summary["tpot_ms"]["p50"] == 40.0


def test_memory_counts_the_process_tree():
    assert tree_memory(os.getpid()) > 10 << 20
    assert tree_memory(999_999_999) == 0
