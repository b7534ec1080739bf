"""Each row of the field table: what a field does, seen in the engine's request or in the answer."""

from __future__ import annotations

import pytest
from fake_engine import MODEL

from chunkllama_server.api.schema.chat import ChatCompletionRequest
from chunkllama_server.api.schema.completions import CompletionRequest
from chunkllama_server.api.schema.table import all_models

A = 64  # the token id of "a" matters nowhere; any id below 256 is a byte

# field -> (value, attribute of SamplingParams, what it becomes)
SAMPLING = {
    "temperature": (0.5, "temperature", 0.5),
    "top_p": (0.25, "top_p", 0.25),
    "top_k": (7, "top_k", 7),
    "min_p": (0.125, "min_p", 0.125),
    "n": (3, "n", 3),
    "frequency_penalty": (-1.5, "frequency_penalty", -1.5),
    "presence_penalty": (1, "presence_penalty", 1.0),
    "repetition_penalty": (1.25, "repetition_penalty", 1.25),
    "logit_bias": ({"5": -100, "6": 2}, "logit_bias", {5: -100.0, 6: 2.0}),
    "seed": (-(2**63), "seed", -(2**63)),
    "stop": (["x", "y"], "stop", ("x", "y")),
    "stop_token_ids": ([A], "stop_token_ids", (A,)),
    "include_stop_str_in_output": (True, "include_stop_str_in_output", True),
    "ignore_eos": (True, "ignore_eos", True),
    "min_tokens": (2, "min_tokens", 2),
    "skip_special_tokens": (False, "skip_special_tokens", False),
    "allowed_token_ids": ([A, A + 1], "allowed_token_ids", (A, A + 1)),
    "prompt_logprobs": (2, "prompt_logprobs", 2),
    "max_tokens": (5, "max_tokens", 5),
    "max_completion_tokens": (6, "max_tokens", 6),
}
CHAT_ELSEWHERE = {
    # test_chat, test_streaming, test_tools, test_reasoning, test_prompt_cache, test_prediction,
    # test_errors, test_branches, below
    "messages", "model", "stream", "stream_options", "tools", "tool_choice",
    "parallel_tool_calls", "functions", "function_call", "response_format", "structured_outputs",
    "return_token_ids", "cache_salt", "prompt_cache_options", "prompt_cache_retention",
    "prompt_cache_key", "modalities", "store", "metadata", "chat_template",
    "thinking_token_budget", "explain_cache", "parallel", "prediction",
}  # fmt: skip
CHAT_BELOW = {
    "bad_words", "use_beam_search", "length_penalty", "return_tokens_as_token_ids",
    "truncate_prompt_tokens", "priority", "logprobs", "top_logprobs", "reasoning_effort",
    "service_tier", "add_generation_prompt", "continue_final_message", "echo",
    "chat_template_kwargs",
}  # fmt: skip
WITHOUT_EFFECT = {
    "user": "u",
    "request_id": "r",
    "session_id": "s",
    "stream_interval": 4,
    "verbosity": "low",
    "safety_identifier": "x" * 64,
    "add_special_tokens": False,
}
REFUSED = (
    "kv_transfer_params", "vllm_xargs", "audio", "web_search_options", "moderation", "documents",
)  # fmt: skip


def sent(server, **fields):
    """The engine's request for a chat with these fields."""
    response = server.chat("say(ab)yas", **fields)
    assert response.status_code == 200, response.text
    assert "x-chunkllama-ignored-fields" not in response.headers
    return server.engine.requests[-1], response.json()


def test_every_chat_field_is_tested():
    tested = {*SAMPLING, *CHAT_ELSEWHERE, *CHAT_BELOW, *WITHOUT_EFFECT, *REFUSED}
    assert tested == set(ChatCompletionRequest.model_fields)


def test_every_completion_field_is_tested():
    tested = {*SAMPLING, *CHAT_ELSEWHERE, *CHAT_BELOW, *WITHOUT_EFFECT, *REFUSED}
    own = {"prompt", "best_of", "suffix"}  # test_completions; add_special_tokens: test_other_fields
    assert set(CompletionRequest.model_fields) <= tested | own


@pytest.mark.parametrize("field", SAMPLING)
def test_sampling_field_reaches_the_engine(server, field):
    value, attribute, expected = SAMPLING[field]
    request, _ = sent(server, **{field: value})
    assert getattr(request.sampling, attribute) == expected


def test_absent_sampling_fields_take_openai_defaults(server):
    sampling = sent(server)[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.n) == (1.0, 1.0, 0, 1)
    assert sampling.max_tokens is None
    assert sampling.seed is None


def test_model_defaults_apply_where_a_field_is_absent(start_server):
    server = start_server(generation_defaults={"temperature": 0.6, "top_p": 0.9, "top_k": 40})
    sampling = sent(server)[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.6, 0.9, 40)
    sampling = sent(server, temperature=0, top_k=0)[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.0, 0.9, 0)


def test_top_p_0_is_top_1(server):
    sampling = sent(server, top_p=0)[0].sampling
    assert (sampling.top_p, sampling.top_k) == (1.0, 1)


def test_bad_words_are_banned_with_and_without_a_space(server, text_parts):
    tokenizer, _ = text_parts
    banned = sent(server, bad_words=["no"])[0].sampling.bad_words_token_ids
    assert banned == (tuple(tokenizer.encode("no")), tuple(tokenizer.encode(" no")))


def test_beam_search(server):
    sampling = sent(server, use_beam_search=True, n=2, length_penalty=0.5)[0].sampling
    assert (sampling.beam_width, sampling.length_penalty, sampling.temperature) == (2, 0.5, 0.0)


def test_truncate_prompt_tokens(server):
    whole = sent(server)[0].prompt_token_ids
    assert sent(server, truncate_prompt_tokens=30)[0].prompt_token_ids == whole[-30:]


def test_logprobs_with_bytes(server):
    choice = sent(server, logprobs=True, top_logprobs=2)[1]["choices"][0]
    first = choice["logprobs"]["content"][0]
    assert (first["token"], first["logprob"], first["bytes"]) == ("a", -0.25, [97])
    assert [entry["token"] for entry in first["top_logprobs"]] == ["a", "b"]
    assert choice["logprobs"]["refusal"] is None


def test_logprob_bytes_of_a_split_character(server):
    body = server.chat("say(é)yas", logprobs=True).json()
    content = body["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in content[:2]] == [[0xC3], [0xA9]]
    assert b"".join(bytes(entry["bytes"]) for entry in content[:2]).decode() == "é"
    assert all(entry["top_logprobs"] == [] for entry in content)


def test_logprobs_of_a_stream_are_complete(client):
    messages = [{"role": "user", "content": "say(aéb)yas"}]
    stream = client.chat.completions.create(
        model=MODEL, messages=messages, logprobs=True, stream=True
    )
    entries = [
        entry
        for chunk in stream
        for entry in (chunk.choices[0].logprobs and chunk.choices[0].logprobs.content) or []
    ]
    assert b"".join(bytes(entry.bytes) for entry in entries[:-1]).decode() == "aéb"


def test_tokens_as_token_ids(server):
    body = sent(server, logprobs=True, return_tokens_as_token_ids=True, return_token_ids=True)[1]
    choice = body["choices"][0]
    tokens = [entry["token"] for entry in choice["logprobs"]["content"]]
    assert tokens == [f"token_id:{token}" for token in choice["token_ids"]]


def test_prompt_logprobs_in_the_answer(server):
    request, body = sent(server, prompt_logprobs=1)
    assert len(body["prompt_logprobs"]) == len(request.prompt_token_ids)
    assert body["prompt_logprobs"][0] is None


@pytest.mark.parametrize(
    ("fields", "priority"),
    [
        ({}, 0),
        ({"priority": 7}, 7),
        ({"service_tier": "flex"}, 10),
        ({"service_tier": "priority"}, -10),
        ({"service_tier": "fast", "priority": 3}, -7),
        ({"service_tier": "auto"}, 0),
    ],
)
def test_priority_and_service_tier(server, fields, priority):
    request, body = sent(server, **fields)
    assert request.priority == priority
    used = {"auto": "default", None: None}.get(
        fields.get("service_tier"), fields.get("service_tier")
    )
    assert body["service_tier"] == used


def test_metadata_is_echoed(server):
    assert sent(server, metadata={"k": "v"})[1]["metadata"] == {"k": "v"}


def test_add_generation_prompt(server, text_parts):
    request, _ = sent(server, add_generation_prompt=False)
    prompt = text_parts[0].decode(request.prompt_token_ids, skip_special_tokens=False)
    assert prompt.endswith("<|im_end|>\n")


def test_continue_final_message_and_echo(server, text_parts):
    messages = [
        {"role": "user", "content": "say(done)yas"},
        {"role": "assistant", "content": "It is"},
    ]
    body = {"model": MODEL, "messages": messages, "continue_final_message": True, "echo": True}
    answer = server.post("/v1/chat/completions", body).json()
    prompt = text_parts[0].decode(server.engine.requests[-1].prompt_token_ids)
    assert prompt.endswith("assistant\nIt is")
    assert answer["choices"][0]["message"]["content"] == "It isdone"
    stream = server.post("/v1/chat/completions", {**body, "stream": True}).text
    assert stream.index('"It is"') < stream.index('"d"')


def test_template_variables(server):
    """The test template reads neither; both are taken without a complaint."""
    sent(server, reasoning_effort="low", chat_template_kwargs={"enable_thinking": False})


def test_trusted_chat_template(start_server):
    server = start_server(trust_request_chat_template=True)
    server.chat("x", chat_template="{{ messages[0].content }} say(mine)yas")
    assert server.engine.reply(server.engine.requests[0]) == server.engine.tokenizer.encode("mine")
    refused = server.chat("x", chat_template="{{ ''.__class__ }}{% for")
    assert refused.status_code == 400


@pytest.mark.parametrize("field", WITHOUT_EFFECT)
def test_fields_without_effect(server, field):
    plain, _ = sent(server)
    request, _ = sent(server, **{field: WITHOUT_EFFECT[field]})
    assert request.sampling == plain.sampling
    assert request.prompt_token_ids == plain.prompt_token_ids


@pytest.mark.parametrize("field", REFUSED)
def test_known_fields_that_are_refused(server, field):
    error = server.chat(**{field: {"a": 1}}).json()["error"]
    assert (error["param"], error["code"]) == (field, "unsupported")


def test_every_field_says_what_becomes_of_it():
    for model in all_models():
        for name, field in model.model_fields.items():
            words = (field.description or "").replace(":", " ").replace(".", " ").split()
            verdict = words[0] if words else None
            assert verdict in ("Honoured", "Validated", "Ignored", "Refused"), (model, name)
