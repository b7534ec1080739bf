"""Test what a new user does first: curl, the openai client, a second wave, Ctrl-C."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess

import httpx
import openai
import psutil
import pytest

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def model_name(server) -> str:
    return client(server).models.list().data[0].id


def test_curl_answers_paris(demo) -> None:
    body = json.dumps({"model": model_name(demo), "messages": QUESTION, "temperature": 0})
    done = subprocess.run(
        [
            "curl",
            "-sS",
            demo.url + "/v1/chat/completions",
            "-H",
            "Content-Type: application/json",
            "-d",
            body,
        ],
        capture_output=True,
        check=True,
    )
    answer = json.loads(done.stdout)
    assert "Paris" in answer["choices"][0]["message"]["content"]
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_openai_client_streams_the_same_answer(demo) -> None:
    chat = client(demo).chat.completions
    name = model_name(demo)
    whole = chat.create(model=name, messages=QUESTION, temperature=0, max_tokens=40)
    stream = chat.create(model=name, messages=QUESTION, temperature=0, max_tokens=40, stream=True)
    parts = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(parts) == whole.choices[0].message.content
    assert "Paris" in "".join(parts)
    assert len(parts) > 5, "a stream arrives in pieces"


def test_completions_by_text_and_by_ids_agree(demo) -> None:
    completions = client(demo).completions
    name = model_name(demo)
    prompt = "The capital of France is"
    by_text = completions.create(
        model=name,
        prompt=prompt,
        max_tokens=8,
        temperature=0,
        extra_body={"return_token_ids": True},
    )
    ids = by_text.choices[0].model_extra["prompt_token_ids"]
    by_ids = completions.create(
        model=name,
        prompt=ids,
        max_tokens=8,
        temperature=0,
        extra_body={"return_token_ids": True},
    )
    assert "Paris" in by_text.choices[0].text
    assert by_ids.choices[0].text == by_text.choices[0].text
    assert by_ids.choices[0].model_extra["token_ids"] == by_text.choices[0].model_extra["token_ids"]
    assert by_ids.usage.completion_tokens == len(by_ids.choices[0].model_extra["token_ids"]) == 8


def test_a_shared_system_prompt_is_computed_once(demo) -> None:
    """16 cold requests over one 1,024-token prefix prefill it once; a second wave finds it."""
    name = model_name(demo)
    shared = [(7 * i) % 4000 + 300 for i in range(1024)]

    async def wave(salt: int) -> list[openai.types.Completion]:
        async with openai.AsyncOpenAI(
            base_url=demo.url + "/v1", api_key="none", max_retries=0, timeout=120
        ) as api:
            return await asyncio.gather(
                *(
                    api.completions.create(
                        model=name,
                        prompt=[*shared, 5000 + 100 * salt + i, 6000, 7000],
                        max_tokens=2,
                        temperature=0,
                        extra_body={"ignore_eos": True},
                    )
                    for i in range(16)
                )
            )

    before = demo.metric("chunkllama_prefill_tokens_computed_total")
    first = asyncio.run(wave(1))
    computed = demo.metric("chunkllama_prefill_tokens_computed_total") - before
    assert computed == 1024 + 16 * 3
    second = asyncio.run(wave(2))
    assert all(answer.usage.prompt_tokens == 1027 for answer in first + second)
    assert all(a.usage.prompt_tokens_details.cached_tokens >= 1024 for a in second)


def test_a_client_that_leaves_frees_its_chunks(demo) -> None:
    with httpx.stream(
        "POST",
        demo.url + "/v1/completions",
        json={
            "model": model_name(demo),
            "prompt": [9, 8, 7],
            "max_tokens": 2000,
            "stream": True,
            "ignore_eos": True,
        },
        timeout=600,
    ) as response:
        next(response.iter_lines())
    while demo.metric("chunkllama_requests_running") or demo.metric("chunkllama_requests_waiting"):
        pass
    assert demo.metric('chunkllama_kv_chunks{state="private"}') == 0
    assert demo.metric('chunkllama_kv_chunks{state="referenced"}') == 0


def test_what_the_model_cannot_hold_is_refused_at_once(demo) -> None:
    answer = httpx.post(
        demo.url + "/v1/completions",
        json={"model": model_name(demo), "prompt": "hello", "max_tokens": 10**6},
        timeout=600,
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_ctrl_c_leaves_nothing_behind(start_server, tmp_path) -> None:
    server = start_server("--num-chunks", "64", env={"TMPDIR": str(tmp_path)})
    family = [psutil.Process(server.process.pid), *server.descendants()]
    assert len(family) >= 2, "the engine is a process of its own"
    assert server.stop(signal.SIGINT) == 0
    _, alive = psutil.wait_procs(family, timeout=600)
    assert not alive
    assert list(tmp_path.iterdir()) == []
    assert "Traceback" not in server.log.read_text()


@pytest.mark.nightly
def test_a_dead_engine_is_a_pause(start_server) -> None:
    server = start_server("--num-chunks", "64")
    body = {"prompt": [9, 8, 7], "max_tokens": 300, "ignore_eos": True, "stream": True}
    with httpx.stream(
        "POST",
        server.url + "/v1/completions",
        json={"model": model_name(server), "stream_options": {"include_usage": True}, **body},
        timeout=600,
    ) as response:
        lines = response.iter_lines()
        next(lines)
        for child in server.descendants():
            child.kill()
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["usage"]["completion_tokens"] == 300
    assert server.process.poll() is None
    assert server.stop() == 0
    assert "Traceback" not in server.log.read_text()
