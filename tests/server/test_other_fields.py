"""Each row of the field tables of /v1/responses, /v1/embeddings, /tokenize and /detokenize, and
what /v1/completions has for itself."""

from __future__ import annotations

import json

import pytest
from fake_engine import MODEL, FakeEngine
from fastapi.testclient import TestClient

from chunkllama.text.tokenizer import load_tokenizer
from chunkllama_server.api.app import create_app
from chunkllama_server.api.common.structured_outputs import GrammarChecker
from chunkllama_server.api.common.text_service import TextService
from chunkllama_server.api.schema.base import CacheFields
from chunkllama_server.api.schema.embeddings import EmbeddingRequest
from chunkllama_server.api.schema.responses import ResponseRequest
from chunkllama_server.api.schema.tokenize import DetokenizeRequest, TokenizeRequest
from chunkllama_server.config.settings import Settings
from chunkllama_server.transport.auth import Tenants

# What a response says again.
ECHOED = {
    "instructions": "be brief",
    "max_output_tokens": 16,
    "max_tool_calls": 3,
    "metadata": {"a": "b"},
    "parallel_tool_calls": False,
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "safety_identifier": "x" * 64,
    "service_tier": "flex",
    "store": False,
    "temperature": 0.5,
    "top_logprobs": 2,
    "top_p": 0.25,
    "truncation": "auto",
    "user": "u",
}
# What the engine is asked for.
CACHE = {
    "cache_salt": ("s", lambda request: request.namespace != ""),
    "prompt_cache_options": (
        {"mode": "explicit", "ttl": "5s"},
        lambda request: (request.cache_until, request.pin_seconds) == (0, 5.0),
    ),
    "prompt_cache_retention": ("24h", lambda request: request.pin_seconds == 86_400.0),
    "prompt_cache_key": ("k", lambda request: request.namespace == ""),
}
ENGINE = {
    **CACHE,
    "temperature": (0.5, lambda request: request.sampling.temperature == 0.5),
    "top_p": (0.25, lambda request: request.sampling.top_p == 0.25),
    "max_output_tokens": (16, lambda request: request.sampling.max_tokens == 16),
    "explain_cache": (True, lambda request: request.explain),
    "service_tier": ("flex", lambda request: request.priority == 10),
    "top_logprobs": (2, lambda request: request.sampling.logprobs == 2),
    "top_k": (7, lambda request: request.sampling.top_k == 7),
    "min_p": (0.125, lambda request: request.sampling.min_p == 0.125),
    "frequency_penalty": (1.5, lambda request: request.sampling.frequency_penalty == 1.5),
    "presence_penalty": (1.5, lambda request: request.sampling.presence_penalty == 1.5),
    "repetition_penalty": (1.5, lambda request: request.sampling.repetition_penalty == 1.5),
    "logit_bias": ({"5": 2}, lambda request: request.sampling.logit_bias == {5: 2.0}),
    "seed": (7, lambda request: request.sampling.seed == 7),
    "stop": (["x"], lambda request: request.sampling.stop == ("x",)),
    "stop_token_ids": ([5], lambda request: request.sampling.stop_token_ids == (5,)),
    "include_stop_str_in_output": (
        True,
        lambda request: request.sampling.include_stop_str_in_output,
    ),
    "ignore_eos": (True, lambda request: request.sampling.ignore_eos),
    "min_tokens": (3, lambda request: request.sampling.min_tokens == 3),
    "skip_special_tokens": (False, lambda request: not request.sampling.skip_special_tokens),
    "bad_words": (["no"], lambda request: len(request.sampling.bad_words_token_ids) == 2),
    "allowed_token_ids": ([5, 6], lambda request: request.sampling.allowed_token_ids == (5, 6)),
    "structured_outputs": (
        {"regex": "a"},
        lambda request: request.sampling.grammar.kind == "regex",
    ),
    "truncate_prompt_tokens": (5, lambda request: len(request.prompt_token_ids) == 5),
    "priority": (7, lambda request: request.priority == 7),
}
# test_responses, test_openapi
RESPONSES_ELSEWHERE = {
    "model", "input", "previous_response_id", "stream", "stream_options", "text", "tools",
    "tool_choice", "include", "reasoning", "background", "conversation", "context_management",
    "prompt", "moderation", "chat_template_kwargs", "thinking_token_budget", "parallel",
}  # fmt: skip
CALL = '{"name": "add", "arguments": {}}'


def test_every_response_field_is_tested():
    assert {*ECHOED, *ENGINE, *RESPONSES_ELSEWHERE} == set(ResponseRequest.model_fields)


@pytest.mark.parametrize("field", ECHOED)
def test_a_response_says_what_was_asked(server, field):
    value = ECHOED[field]
    body = server.post("/v1/responses", {"model": MODEL, "input": "x", field: value}).json()
    assert body[field] == value


@pytest.mark.parametrize("field", ENGINE)
def test_response_field_reaches_the_engine(server, field):
    value, holds = ENGINE[field]
    body = {"model": MODEL, "input": "x", field: value}
    assert server.post("/v1/responses", body).status_code == 200
    assert holds(server.engine.requests[-1])


def test_parallel_tool_calls_of_a_response(server):
    tools = [{"type": "function", "name": "add"}]
    text = f"say(<tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call>)yas"
    for parallel, count in ((True, 2), (False, 1)):
        body = {"model": MODEL, "input": text, "tools": tools, "parallel_tool_calls": parallel}
        assert len(server.post("/v1/responses", body).json()["output"]) == count


def test_reasoning_and_moderation_of_a_response(server):
    body = {"model": MODEL, "input": "x"}
    answer = server.post("/v1/responses", {**body, "reasoning": {"effort": "low"}}).json()
    assert answer["reasoning"]["effort"] == "low"
    error = server.post("/v1/responses", {**body, "moderation": {}}).json()["error"]
    assert (error["param"], error["code"]) == ("moderation", "unsupported")


def test_every_embedding_field_is_tested():
    # test_other_endpoints, test_dialect
    elsewhere = {"model", "input", "encoding_format", "dimensions", "truncate_prompt_tokens"}
    below = {"add_special_tokens", "user"}
    tested = {*CACHE, *elsewhere, *below}
    assert tested == set(EmbeddingRequest.model_fields)
    assert set(CACHE) == set(CacheFields.model_fields)


@pytest.mark.parametrize("field", CACHE)
def test_cache_field_of_embeddings_reaches_the_engine(server, field):
    value, holds = CACHE[field]
    body = {"model": MODEL, "input": "x", "user": "u", field: value}
    assert server.post("/v1/embeddings", body).status_code == 200
    assert holds(server.engine.requests[-1])


def test_every_tokenize_field_is_tested():
    elsewhere = {"model", "prompt", "messages", "return_token_strs"}  # test_other_endpoints
    below = {
        "add_special_tokens", "add_generation_prompt", "continue_final_message", "tools",
        "chat_template_kwargs",
    }  # fmt: skip
    assert elsewhere | below == set(TokenizeRequest.model_fields)
    assert {"model", "tokens", "skip_special_tokens"} == set(DetokenizeRequest.model_fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"add_generation_prompt": False},
        {"continue_final_message": True},
        {"tools": [{"type": "function", "function": {"name": "add"}}]},
        {"chat_template_kwargs": {"enable_thinking": True}},
    ],
)
def test_tokenize_options_are_those_of_chat(server, fields):
    body = {"model": MODEL, "messages": [{"role": "assistant", "content": "It"}]}
    tokens = server.post("/tokenize", {**body, **fields}).json()["tokens"]
    server.post("/v1/chat/completions", {**body, **fields})
    assert server.engine.requests[0].prompt_token_ids == tokens
    if "chat_template_kwargs" not in fields:
        assert tokens != server.post("/tokenize", body).json()["tokens"]


def test_tokenize_takes_no_variable_that_the_server_sets(server):
    body = {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"tools": "x"}}
    assert server.post("/tokenize", body).json()["error"]["param"] == "chat_template_kwargs"


@pytest.mark.parametrize(("skip", "text"), [(None, "<|im_end|>a"), (True, "a")])
def test_detokenize_skips_special_tokens_on_request(server, text_parts, skip, text):
    ids = [text_parts[0].token_id("<|im_end|>"), *text_parts[0].encode("a")]
    body = {"tokens": ids, "skip_special_tokens": skip}
    assert server.post("/detokenize", body).json() == {"prompt": text}


@pytest.fixture
def with_bos(tokenizer_writer, tmp_path):
    """An application whose tokenizer puts BOS before a text, and its engine."""
    tokenizer_writer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "add_bos_token": True}))
    tokenizer = load_tokenizer(tmp_path)
    engine = FakeEngine(tokenizer)
    app = create_app(
        engine,
        TextService(tokenizer, None),
        Settings(served_model_name=(MODEL,)),
        Tenants(),
        GrammarChecker(lambda: lambda spec: None),
    )
    with TestClient(app) as client:
        yield client, engine, tokenizer


@pytest.mark.parametrize(
    ("path", "field"), [("/v1/completions", "prompt"), ("/v1/embeddings", "input")]
)
@pytest.mark.parametrize("added", [None, True, False])
def test_add_special_tokens(with_bos, path, field, added):
    client, engine, tokenizer = with_bos
    body = {"model": MODEL, field: "ab", "add_special_tokens": added}
    assert client.post(path, json=body).status_code == 200
    expected = [] if added is False else [tokenizer.bos_token_id]
    assert engine.requests[0].prompt_token_ids == [*expected, *tokenizer.encode("ab")]


@pytest.mark.parametrize("added", [None, True, False])
def test_add_special_tokens_of_tokenize(with_bos, added):
    client, _, tokenizer = with_bos
    body = {"prompt": "ab", "add_special_tokens": added}
    expected = [] if added is False else [tokenizer.bos_token_id]
    assert client.post("/tokenize", json=body).json()["tokens"] == [
        *expected,
        *tokenizer.encode("ab"),
    ]
