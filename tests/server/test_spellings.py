"""Values as clients of other servers, forms and shells send them: what is read of each."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from dialect_helpers import BODIES, PATHS, run
from fake_engine import MODEL
from hypothesis import given
from hypothesis import strategies as st

from chunkllama_server.api.schema.spellings import as_flag, as_number

ALL = ("chat", "completions", "responses")
# Endpoints, fields as some client sends them, and own fields that mean the same.
SPELLED: list[tuple[tuple[str, ...], dict[str, Any], dict[str, Any]]] = [
    (ALL, {"temperature": "0.7"}, {"temperature": 0.7}),
    (ALL, {"temperature": "0"}, {"temperature": 0}),
    (ALL, {"temperature": " 1e0 "}, {"temperature": 1}),
    (ALL, {"top_p": ".5", "top_k": "7", "min_p": "0.2"}, {"top_p": 0.5, "top_k": 7, "min_p": 0.2}),
    (ALL, {"seed": "9007199254740993"}, {"seed": 9007199254740993}),
    (ALL, {"max_tokens": "20"}, {"max_tokens": 20}),
    (ALL, {"max_tokens": "20.0"}, {"max_tokens": 20}),
    (ALL, {"max_tokens": "-1"}, {"max_tokens": -1}),
    (ALL, {"n_predict": "20"}, {"max_tokens": 20}),
    (ALL, {"ignore_eos": "True", "max_tokens": 20}, {"ignore_eos": True, "max_tokens": 20}),
    (ALL, {"ignore_eos": 1, "max_tokens": 20}, {"ignore_eos": True, "max_tokens": 20}),
    (ALL, {"stream": "false"}, {}),
    (ALL, {"stream": 0}, {}),
    (ALL, {"stream": None}, {}),
    (ALL, {"do_sample": "false"}, {"temperature": 0}),
    (ALL, {"random_seed": "-1"}, {}),
    (ALL, {"mirostat": "0", "typical_p": "1.0", "watermark": "false"}, {}),
    (ALL, {"max_time": "0", "num_beams": "1", "min_length": "0", "raw": "false"}, {}),
    (ALL, {"safe_prompt": "false", "enable_search": "false", "max_length": False}, {}),
    (ALL, {"suppress_tokens": ["5", 6.0]}, {"logit_bias": {"5": -100, "6": -100}}),
    (ALL, {"banned_tokens": "5"}, {"logit_bias": {"5": -100}}),
    (ALL, {"logit_bias": {"5": "-100"}}, {"logit_bias": {"5": -100}}),
    (ALL, {"logit_bias": [[5, "1"]]}, {"logit_bias": {"5": 1}}),
    (ALL, {"truncate_prompt_tokens": -1}, {}),
    (("chat", "completions"), {"stream_options": {"include_usage": True}}, {}),
    (("responses",), {"stream_options": {"include_obfuscation": False}}, {}),
    (("chat", "completions"), {"n": "2"}, {"n": 2}),
    (("completions",), {"best_of": "1"}, {"best_of": 1}),
    (("chat",), {"best_of": "1"}, {}),
    (("chat",), {"logprobs": 5}, {"logprobs": True, "top_logprobs": 5}),
    (("chat",), {"logprobs": "5"}, {"logprobs": True, "top_logprobs": 5}),
    (("chat",), {"logprobs": 1, "top_logprobs": 5}, {"logprobs": True, "top_logprobs": 5}),
    *((("chat",), {"logprobs": off}, {}) for off in (0, 0.0, "0", "0.0", "false")),
    *((("chat",), {"logprobs": on}, {"logprobs": True}) for on in (1, 1.0, "1", "true")),
    (("completions",), {"logprobs": True}, {"logprobs": 1}),
    (("completions",), {"logprobs": False}, {}),
    (("chat", "completions"), {"prompt_logprobs": True}, {"prompt_logprobs": 1}),
    (("chat", "completions"), {"prompt_logprobs": False}, {}),
    (("chat",), {"reasoning_effort": "auto"}, {}),
    (("chat",), {"reasoning_effort": "default"}, {}),
    (("chat",), {"reasoning_effort": "High"}, {"reasoning_effort": "high"}),
    (("chat",), {"reasoning_effort": "off"}, {"reasoning_effort": "none"}),
    (("chat",), {"thinking": "disabled"}, {"thinking": False}),
    (("responses",), {"reasoning": {"effort": "auto"}}, {}),
    (("responses",), {"reasoning_effort": "default"}, {}),
    (("responses",), {"reasoning": {"enabled": "false"}}, {"enable_thinking": False}),
    (("chat", "responses"), {"enable_thinking": "false"}, {"enable_thinking": False}),
    (
        ("chat", "responses"),
        {"chat_template_kwargs": {"enable_thinking": "false"}},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ),
    (("chat", "responses"), {"service_tier": "on_demand"}, {"service_tier": "default"}),
    (("chat", "responses"), {"metadata": {"id": 5, "tags": ["a"], "none": None}}, {}),
    (("chat", "responses"), {"parallel_tool_calls": "true"}, {}),
]  # fmt: skip
CASES = [(e, spelled, plain) for names, spelled, plain in SPELLED for e in names]


@pytest.mark.parametrize(("endpoint", "spelled", "plain"), CASES, ids=str)
def test_a_spelling_is_read(server, endpoint, spelled, plain):
    if "max_tokens" in plain and endpoint == "responses":
        plain = {**plain, "max_output_tokens": plain["max_tokens"]}
        del plain["max_tokens"]
    assert run(server, endpoint, spelled) == run(server, endpoint, plain)


@pytest.mark.parametrize("endpoint", ALL)
@pytest.mark.parametrize("flag", ["true", "True", 1])
def test_a_stream_by_another_word(server, endpoint, flag):
    response = server.post(PATHS[endpoint], {"model": MODEL, **BODIES[endpoint], "stream": flag})
    assert response.headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize("options", [{}, {"include_usage": False}, {"include_usage": "false"}])
def test_usage_is_streamed_only_where_it_is_asked_for(server, options):
    text = server.chat(stream=True, stream_options=options).text
    assert '"usage"' not in text


def test_metadata_comes_back_as_texts(server):
    metadata = {"user": 5, "path": ["a", "b"], "name": "n"}
    shown = {"user": "5", "path": '["a", "b"]', "name": "n"}
    assert server.chat(metadata=metadata).json()["metadata"] == shown
    body = {"model": MODEL, "input": "hi", "metadata": metadata}
    assert server.post("/v1/responses", body).json()["metadata"] == shown


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/messages", {"messages": BODIES["chat"]["messages"], "max_tokens": "5"}),
        ("/api/chat", {"messages": BODIES["chat"]["messages"], "stream": "false",
                       "options": {"temperature": "0", "num_predict": "5"}}),
        ("/generate", {"inputs": "hi", "parameters": {"max_new_tokens": "5"}}),
        ("/v1/embeddings", {"input": "hi", "dimensions": "4"}),
        ("/tokenize", {"prompt": "hi", "add_special_tokens": "false"}),
    ],
)  # fmt: skip
def test_other_protocols_read_them_too(server, path, fields):
    response = server.post(path, {"model": MODEL, **fields})
    assert response.status_code == 200, response.text


def test_a_health_check_by_another_name(start_server):
    server = start_server(api_keys={"a": "k"})
    with server.http() as http:
        assert http.get("/ping").json() == {"status": "ok"}
        assert http.get("/v1/ping", headers={"x-api-key": "k"}).json() == {"status": "ok"}
        server.engine.is_ready = False
        assert http.get("/ping").status_code == http.get("/health").status_code == 503


@given(st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False))
def test_the_text_of_a_number_is_the_number(number):
    text = json.dumps(number)
    assert as_number(text) == number
    assert as_number(f" {text}\n") == number


@given(
    st.text() | st.sampled_from(["nan", "inf", "-Infinity", "1_0", "0x1", "１", "1e", "--1", "."])
)
def test_what_is_no_number_stays(text):
    read = as_number(text)
    if isinstance(read, str):
        assert read == text
    else:
        assert math.isclose(read, float(text)) and text.isascii() and "_" not in text


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"presence_penalty": "0", "repeat_last_n": 64}, 200),
        ({"repetition_penalty": "1.0", "frequency_penalty": "", "repeat_last_n": "64"}, 200),
        ({"repeat_penalty": "1", "frequency_penalty": "0.0", "rep_pen_range": 64}, 200),
        ({"presence_penalty": "0.5", "repeat_last_n": 64}, 400),
        ({"repeat_penalty": "1.1", "repeat_last_n": "64"}, 400),
        ({"temperature": "1", "temperature_last": "true"}, 200),
        ({"temperature": "0.0", "temperature_last": True}, 200),
        ({"temperature": "0.7", "temperature_last": True}, 400),
    ],
)
@pytest.mark.parametrize("endpoint", ALL)
def test_whether_a_field_binds_is_read_from_quoted_numbers(server, endpoint, fields, status):
    body = {"model": MODEL, **BODIES[endpoint], **fields}
    answer = server.post(PATHS[endpoint], body)
    assert answer.status_code == status, answer.text


@pytest.mark.parametrize(
    "value", ["", "yes", "0", "tru", 2, -1, 1.0, None, [], {}, "ｔｒｕｅ"], ids=str
)
def test_what_is_no_flag_stays(value):
    assert as_flag(value) is value
