"""Refusals: the OpenAI error body, the exact path of the field, and nothing that leaks."""

from __future__ import annotations

import openai
import pydantic
import pytest
from fake_engine import MODEL

from chunkllama.errors import (
    EngineDeadError,
    InvalidRequestError,
    OverloadedError,
    RequestFailedError,
)
from chunkllama_server.api.schema.completions import CompletionRequest
from chunkllama_server.api.schema.embeddings import EmbeddingRequest
from chunkllama_server.api.schema.tokenize import DetokenizeRequest

PATH = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]


def user(content) -> dict:
    return {"messages": [{"role": "user", "content": content}]}


def send_raw(server, raw: bytes, path: str = PATH, **headers: str):
    with server.http() as http:
        return http.post(path, content=raw, headers={"content-type": "application/json", **headers})


def check_error(response, status: int, param: str | None = None) -> dict:
    assert response.status_code == status
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert response.headers["x-request-id"]
    return error


TOOL = {"type": "function", "function": {"name": "f"}}


REFUSED = [
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    (user([{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x"}}]),
     "messages[0].content[0]"),
    (user([{"type": "text", "text": "a"}, {"type": "input_audio"}]), "messages[0].content[1]"),
    (user(5), "messages[0].content"),
    ({"model": 5}, "model"),
    ({"temperature": 2.5}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "warm"}, "temperature"),
    ({"temperature": "nan"}, "temperature"),
    ({"temperature": "1e999"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 1.5}, "min_p"),
    ({"frequency_penalty": 2.1}, "frequency_penalty"),
    ({"presence_penalty": -2.1}, "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"99999": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"logit_bias": {str(i): 1 for i in range(5000)}}, "logit_bias"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": 30}, "logprobs"),
    ({"logprobs": 3, "top_logprobs": 5}, "top_logprobs"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -3}, "max_tokens"),
    ({"max_tokens": 10**9}, "max_tokens"),
    ({"max_tokens": 10**12}, "max_tokens"),
    ({"max_tokens": "twelve"}, "max_tokens"),
    ({"max_tokens": "12.5"}, "max_tokens"),
    ({"stream": "no"}, "stream"),
    ({"stream": 2}, "stream"),
    ({"max_tokens": 12.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": 10**6}, "n"),
    ({"stop": ["a"] * 65}, "stop"),
    ({"stop": ["a"] * 10_000}, "stop"),
    ({"stop": "x" * 257}, "stop"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"stop_token_ids": [99999]}, "stop_token_ids[0]"),
    ({"allowed_token_ids": [0, 99999]}, "allowed_token_ids[1]"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"min_tokens": 5, "max_tokens": 2}, "min_tokens"),
    ({"response_format": {"type": "yaml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a" * 257}}},
        "response_format.json_schema.name",
    ),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
    ({"structured_outputs": {"structural_tag": {}}}, "structured_outputs.structural_tag"),
    (
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        "structured_outputs",
    ),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [TOOL, TOOL]}, "tools[1].function.name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": "maybe"}, "tool_choice"),
    (
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        "tool_choice.function.name",
    ),
    ({"tools": [TOOL], "functions": [{"name": "g"}]}, "functions"),
    ({"function_call": {"name": "f"}}, "function_call"),
    ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice"),
    (
        {"tools": [TOOL], "tool_choice": {"type": "allowed_tools",
                                          "allowed_tools": {"mode": "auto", "tools": [{}]}}},
        "tool_choice.allowed_tools.tools[0]",
    ),
    ({"chat_template_kwargs": {"enable_thinking": []}}, "chat_template_kwargs"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"metadata": {"k" * 65: "v"}}, f"metadata.{'k' * 64}"),
    ({"metadata": {str(i): "v" for i in range(17)}}, "metadata"),
    ({"reasoning_effort": "huge"}, "reasoning_effort"),
    ({"verbosity": "loud"}, "verbosity"),
    ({"service_tier": "gold"}, "service_tier"),
    ({"safety_identifier": "x" * 65}, "safety_identifier"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"moderation": {}}, "moderation"),
    ({"documents": [{}]}, "documents"),
    ({"kv_transfer_params": {"a": 1}}, "kv_transfer_params"),
    ({"vllm_xargs": {"a": 1}}, "vllm_xargs"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"cache_salt": "x" * 1025}, "cache_salt"),
    ({"prompt_cache_options": {"ttl": "forever"}}, "prompt_cache_options.ttl"),
    ({"prompt_cache_options": {"ttl": "\u0663\u0660m"}}, "prompt_cache_options.ttl"),
    ({"prompt_cache_options": {"ttl": "999h"}}, "prompt_cache_options.ttl"),
    ({"prompt_cache_options": {"mode": "never"}}, "prompt_cache_options.mode"),
    ({"prompt_cache_retention": "48h"}, "prompt_cache_retention"),
    ({"chat_template": "{{ 7 * 7 }}"}, "chat_template"),
    ({"chat_template_kwargs": {"__class__": 1}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"bos_token": "x"}}, "chat_template_kwargs"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ({"add_special_tokens": True}, "add_special_tokens"),
    ({"priority": 10**6}, "priority"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=lambda v: str(v)[:60])
def test_400_names_the_exact_field(server, fields, param):
    response = server.post(PATH, {"model": MODEL, "messages": HELLO, **fields})
    assert check_error(response, 400, param)["type"] == "invalid_request_error"
    assert not server.engine.requests


@pytest.mark.parametrize("value", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999"])
@pytest.mark.parametrize("field", ["temperature", "unknown_field"])
def test_numbers_that_are_no_json(server, value, field):
    raw = b'{"model":"org/tiny","messages":[{"role":"user","content":"x"}],"%s":%s}'
    error = check_error(send_raw(server, raw % (field.encode(), value)), 400)
    assert error["code"] == "invalid_json"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"null",
        b"{'a': 1}",
        b'{"model": "org/tiny", "messages": ' + b"[" * 100_000,
        b'{"n": ' + b"9" * 5000 + b"}",
        b'{"model": "\xff\xfe"}',
        b"\xef\xbb\xbf{}",
    ],
)
def test_malformed_bodies_are_400(server, raw):
    response = send_raw(server, raw)
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_bodies_of_too_many_objects_are_refused(server):
    parts = [{"type": "text", "text": "a"}] * 60
    messages = [{"role": "user", "content": parts}] * 1000
    response = server.post(PATH, {"model": MODEL, "messages": messages})
    assert check_error(response, 400)["code"] == "invalid_json"


def test_braces_in_a_text_are_no_objects(server):
    error = check_error(server.chat("{" * 20_000), 400, "messages")
    assert error["code"] == "context_length_exceeded"


def test_objects_of_too_many_members_are_refused(server):
    response = server.chat(metadata={str(i): 1 for i in range(10_000)})
    assert check_error(response, 400)["code"] == "invalid_json"


@pytest.mark.parametrize("depth", [101, 300, 600, 800])
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_bodies_nested_too_deeply_are_refused(server, depth, choice):
    schema: dict = {}
    for _ in range(depth):
        schema = {"items": schema}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    error = check_error(server.chat(tools=[tool], tool_choice=choice), 400)
    assert error["code"] == "invalid_json"


@pytest.mark.parametrize("wrong", [["a"] * 50_000, [["a"] * 50] * 1000, [1.5] * 50_000])
def test_of_many_wrong_values_few_are_told_of(wrong):
    """Each complaint costs microseconds of the event loop."""
    for model, field in (
        (CompletionRequest, "prompt"),
        (EmbeddingRequest, "input"),
        (DetokenizeRequest, "tokens"),
        (CompletionRequest, "allowed_token_ids"),
    ):
        with pytest.raises(pydantic.ValidationError) as caught:
            model.model_validate({"model": MODEL, field: wrong})
        assert caught.value.error_count() < 3000


def test_escaped_backslash_before_u0000_is_text(server):
    raw = b'{"model":"org/tiny","messages":[{"role":"user","content":"a\\\\u0000b"}]}'
    assert send_raw(server, raw).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_a_browser_must_name_json(server, kind):
    """A page may send these types to another site without asking, and browsers name the page."""
    for origin in ({"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}):
        headers = {**origin, **({} if kind is None else {"content-type": kind})}
        with server.http() as http:
            response = http.post(PATH, content=b"{}", headers=headers)
        assert "Content-Type" in check_error(response, 400)["message"]


def test_body_over_the_limit_is_413(server):
    raw = b'{"model": "' + b"x" * (2 * 2**20) + b'"}'
    assert check_error(send_raw(server, raw), 413)["code"] == "request_too_large"

    def chunks():
        for _ in range(40):
            yield b"x" * 65536

    with server.http() as http:
        response = http.post(PATH, content=chunks(), headers={"content-type": "application/json"})
    check_error(response, 413)


def test_compressed_body_is_415(server):
    check_error(send_raw(server, b"\x1f\x8b", **{"content-encoding": "gzip"}), 415)


def test_unknown_path_and_method(server):
    with server.http() as http:
        assert check_error(http.get("/v2/x"), 404)["type"] == "not_found_error"
        check_error(http.get(PATH), 405)
        check_error(http.delete("/v1/models"), 405)


def test_unknown_model(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-9", messages=HELLO)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_context_length_names_both_numbers(server):
    error = check_error(server.chat("x" * 3000), 400, "messages")
    assert error["code"] == "context_length_exceeded"
    assert "2048" in error["message"]
    error = check_error(server.chat("x", max_tokens=2040), 400, "max_tokens")
    assert "2048" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (InvalidRequestError("too long", "messages", "c"), 400, "c"),
        (OverloadedError("queue full", 7), 429, "engine_overloaded"),
        (RequestFailedError("poison", "engine_poison_request"), 500, "engine_poison_request"),
        (RequestFailedError("none", "no_allowed_token"), 400, "no_allowed_token"),
        (RequestFailedError("none", "grammar_too_complex"), 400, "grammar_too_complex"),
        (EngineDeadError("dead"), 503, "engine_unavailable"),
        (ValueError("/secret/path 0x7f00"), 500, "internal"),
    ],
)
def test_engine_errors(server, error, status, code, stream):
    server.engine.fail_with = error
    response = server.chat(stream=stream)
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert response.headers["x-request-id"]
    assert "secret" not in response.text
    if status in (429, 503):
        assert 1 <= int(response.headers["retry-after"]) <= 30


def test_unknown_fields_are_named_and_counted(server):
    def count() -> float:
        with server.http() as http:
            lines = http.get("/metrics").text.splitlines()
        return next(
            float(line.split()[1])
            for line in lines
            if line.startswith("chunkllama_ignored_fields_total ")
        )

    before = count()
    message = {"role": "user", "content": "x", "mood": 1}
    response = server.post(PATH, {"model": MODEL, "messages": [message], "x\r\ny": 1, "": 2})
    assert response.status_code == 200
    assert response.headers["x-chunkllama-ignored-fields"] == "x__y, _, messages[0].mood"
    assert count() == before + 3


def test_strict_mode_refuses_unknown_fields(start_server):
    strict = start_server(strict=True)
    message = {"role": "user", "content": "x", "mood": 1}
    response = strict.post(PATH, {"model": MODEL, "messages": [message]})
    assert check_error(response, 400, "messages[0].mood")["code"] == "unknown_field"
    answer = {"role": "assistant", "content": "x", "annotations": None}
    assert strict.post(PATH, {"model": MODEL, "messages": [answer]}).status_code == 200
    ttl = {"prompt_cache_options": {"ttl": "5m"}}
    check_error(strict.chat(**ttl), 400, "prompt_cache_options.ttl")
    assert strict.chat(prompt_cache_options={"ttl": "30m"}).status_code == 200


@pytest.mark.parametrize("given", ["a b", "x" * 65, "é".encode().decode("latin-1"), ""])
def test_unclean_request_ids_are_replaced(server, given):
    with server.http() as http:
        headers = {b"x-request-id": given.encode("latin-1")}
        response = http.get("/health/live", headers=headers)
    assert response.headers["x-request-id"].startswith("req_")


def test_null_equals_absent(server):
    names = ("temperature", "top_p", "n", "stop", "tools", "logit_bias", "max_tokens", "seed")
    response = server.chat("say(x)yas", **dict.fromkeys(names))
    assert response.status_code == 200
    assert "x-chunkllama-ignored-fields" not in response.headers
