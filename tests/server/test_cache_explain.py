"""The explanation of a cache match over HTTP: where it is asked for, and where it is given."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest
from fake_engine import MODEL

HEADER = {"x-chunkllama-explain": "1"}
NAME = "x-chunkllama-cache-explanation"
LONG = "tell me about the city of Paris and its river"
OTHER = "tell me about the city of London and its river"


def chat_body(content: str, **fields):
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], **fields}


def test_chat_explains_with_the_prompts_own_text(server) -> None:
    server.post("/v1/chat/completions", chat_body(LONG))
    answer = server.post("/v1/chat/completions", chat_body(OTHER, explain_cache=True))
    usage = answer.json()["usage"]
    (explained,) = usage["prompt_tokens_details"]["cache_explanations"]
    assert explained["reason"] == "diverged"
    assert explained["prompt_tokens"] == usage["prompt_tokens"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert explained["matched_tokens"] == explained["known_tokens"] == cached > 0
    assert explained["tier_tokens"] == 0
    # the tests' tokenizer has one token for each byte
    assert explained["text_before"] == "the city of "
    assert explained["text_after"].startswith("London")
    assert "Paris" not in json.dumps(explained)
    assert explained["message"] == "your earlier prompts continued with another token"
    assert explained["seconds_ago"] is None
    assert answer.headers[NAME] == f"diverged; matched={cached}; known={cached}"


@pytest.mark.parametrize(
    ("path", "body", "details"),
    [
        ("/v1/chat/completions", chat_body(LONG), ("usage", "prompt_tokens_details")),
        ("/v1/completions", {"model": MODEL, "prompt": LONG}, ("usage", "prompt_tokens_details")),
        ("/v1/responses", {"model": MODEL, "input": LONG}, ("usage", "input_tokens_details")),
    ],
)
def test_the_header_and_the_field_ask_alike_and_nothing_is_said_unasked(
    server, path, body, details
) -> None:
    def explanations(answer):
        value = answer.json()
        for name in details:
            value = value[name]
        return value.get("cache_explanations")

    assert explanations(server.post(path, body)) is None
    assert NAME not in server.post(path, body).headers
    asked = [
        server.post(path, body, **HEADER),
        server.post(path, body | {"explain_cache": True}),
    ]
    for answer in asked:
        (explained,) = explanations(answer)
        assert explained["reason"] == "complete"
        assert answer.headers[NAME].startswith("complete; matched=")
    assert explanations(server.post(path, body | {"explain_cache": False})) is None


def test_each_of_several_prompts_is_explained(server) -> None:
    body = {"model": MODEL, "prompt": [LONG, OTHER, "z"], "explain_cache": True}
    answer = server.post("/v1/completions", body)
    explained = answer.json()["usage"]["prompt_tokens_details"]["cache_explanations"]
    assert [each["prompt_tokens"] for each in explained] == [len(LONG), len(OTHER), 1]
    assert answer.headers[NAME].count("matched=") == 3


def test_embeddings_explain_in_the_header(server) -> None:
    body = {"model": MODEL, "input": [LONG, OTHER]}
    assert server.post("/v1/embeddings", body, **HEADER).headers[NAME].count("matched=") == 2
    assert NAME not in server.post("/v1/embeddings", body).headers


@pytest.mark.parametrize("includes_usage", [True, False])
def test_streams_explain_in_the_header_and_in_the_usage_chunk(server, includes_usage) -> None:
    options = {"stream_options": {"include_usage": True}} if includes_usage else {}
    with (
        server.http() as http,
        http.stream(
            "POST", "/v1/chat/completions", json=chat_body(LONG, stream=True, **options),
            headers=HEADER,
        ) as answer,
    ):  # fmt: skip
        assert answer.headers[NAME].startswith("diverged; matched=")
        events = [line[6:] for line in answer.iter_lines() if line.startswith("data: {")]
    chunks = [json.loads(event) for event in events]
    said = [
        chunk["usage"]["prompt_tokens_details"]["cache_explanations"]
        for chunk in chunks
        if chunk.get("usage")
    ]
    assert len(said) == includes_usage


def test_streamed_responses_explain_in_their_last_event(server) -> None:
    body = {"model": MODEL, "input": LONG, "stream": True, "explain_cache": True}
    with server.http() as http, http.stream("POST", "/v1/responses", json=body) as answer:
        events = [json.loads(line[6:]) for line in answer.iter_lines() if line[:6] == "data: "]
    details = events[-1]["response"]["usage"]["input_tokens_details"]
    assert details["cache_explanations"][0]["reason"] in ("diverged", "complete")


def test_a_prompt_is_explained_without_running_it(server) -> None:
    server.post("/v1/chat/completions", chat_body(LONG))
    ran = len(server.engine.requests)
    answer = server.post("/v1/cache/explain", chat_body(LONG)).json()
    assert (answer["reason"], answer["matched_tokens"]) == ("complete", answer["prompt_tokens"] - 1)
    answer = server.post("/v1/cache/explain", chat_body(OTHER)).json()
    assert answer["reason"] == "diverged" and answer["text_after"].startswith("London")
    answer = server.post("/v1/cache/explain", {"prompt": "zz"}).json()
    assert (answer["matched_tokens"], answer["prompt_tokens"]) == (0, 2)
    assert len(server.engine.requests) == ran


def test_token_ids_are_explained_like_their_text(server) -> None:
    ids = server.post("/tokenize", {"prompt": LONG}).json()["tokens"]
    server.post("/v1/completions", {"model": MODEL, "prompt": ids, "max_tokens": 1})
    of_text, of_ids = (
        server.post("/v1/cache/explain", {"prompt": prompt}).json() for prompt in (LONG, ids)
    )
    assert of_ids == of_text
    assert of_ids["matched_tokens"] == len(ids) - 1


def test_the_salt_and_the_key_choose_the_namespace(start_server) -> None:
    server = start_server(api_keys={"alpha": "ka", "beta": "kb"})
    namespace = server.app.state.context.tenants.namespace
    body = {"prompt": "hello", "cache_salt": "s"}
    for key, tenant in (("ka", "alpha"), ("kb", "beta")):
        assert server.post("/v1/cache/explain", body, **{"x-api-key": key}).status_code == 200
        assert server.engine.explained == (namespace(tenant, "s"), tenant)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, 10**9]}, "prompt"),
        ({"prompt": [5] * 5000}, "prompt"),
        ({"prompt": "x" * 5000}, "prompt"),
        ({"prompt": "x", "cache_salt": ""}, "cache_salt"),
        ({"prompt": "x", "model": "none"}, "model"),
    ],
)
def test_unusable_bodies_are_refused(server, body, param) -> None:
    error = server.post("/v1/cache/explain", body)
    assert error.status_code in (400, 404)
    assert error.json()["error"]["param"] == param


def test_questions_without_an_answer_are_bounded(start_server, monkeypatch) -> None:
    keys = {"alpha": "ka", "beta": "kb", "gamma": "kc"}
    server = start_server(api_keys=keys, max_explanations=4)
    answers, explain, gate = [], server.engine.explain, threading.Event()
    come = threading.Semaphore(0)

    async def explain_late(*args):
        come.release()
        while not gate.is_set():
            await asyncio.sleep(0.005)
        return await explain(*args)

    monkeypatch.setattr(server.engine, "explain", explain_late)

    def ask(key):
        answer = server.post("/v1/cache/explain", {"prompt": LONG}, **{"x-api-key": key})
        answers.append(answer.status_code)
        return answer

    waiting = []
    every, own = (f"Prompts{of} that wait to be explained" for of in ("", " of this API key"))
    for key, count, message in (
        ("ka", 2, f"{own}: 2, its share of max_explanations (4); try again later"),
        ("kb", 1, f"{own}: 1, its share of max_explanations (4); try again later"),
        ("kc", 1, f"{every}: 4, as many as max_explanations; try again later"),
    ):
        for _ in range(count):
            waiting.append(threading.Thread(target=ask, args=(key,)))
            waiting[-1].start()
            assert come.acquire(timeout=600)
        refused = ask(key)
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        error = refused.json()["error"]
        assert (error["code"], error["message"]) == ("engine_overloaded", message)
    gate.set()
    for thread in waiting:
        thread.join()
    assert sorted(answers) == [200] * 4 + [429] * 3
    assert ask("ka").status_code == 200
    with server.http() as http:
        usage = http.get("/v1/usage", headers={"x-api-key": "ka"}).json()["data"][0]
    assert usage["rejections"] == {"queue": 1}
