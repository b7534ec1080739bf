"""Embeddings, tokenize, detokenize and render."""

from __future__ import annotations

import base64
import math
import struct

import openai
import pytest
from fake_engine import MODEL


def test_embeddings_are_normalised_and_base64_agrees(server, client):
    answer = client.embeddings.create(model=MODEL, input=["a", "bc"])
    assert [e.index for e in answer.data] == [0, 1]
    assert answer.data[0].embedding == pytest.approx([0.6, 0.8] + [0.0] * 6)
    assert answer.usage.prompt_tokens == 3
    raw = server.post(
        "/v1/embeddings", {"model": MODEL, "input": "a", "encoding_format": "base64"}
    ).json()["data"][0]["embedding"]
    assert struct.unpack("<8f", base64.b64decode(raw)) == pytest.approx(answer.data[0].embedding)
    assert {r.wants_hidden_states for r in server.engine.requests} == {"mean"}


def test_embeddings_of_ids_and_dimensions(client, text_parts):
    ids = text_parts[0].encode("abc")
    answer = client.embeddings.create(model=MODEL, input=[ids, ids], dimensions=1)
    assert [e.embedding for e in answer.data] == [[1.0], [1.0]]
    one = client.embeddings.create(model=MODEL, input=ids)
    assert math.hypot(*one.data[0].embedding) == pytest.approx(1.0)
    assert one.usage.total_tokens == 3


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": [[1], []]}, "input[1]"),
        ({"input": [99999]}, "input"),
        ({"input": ["x"] * 2049}, "input"),
        ({"input": "x" * 3000}, "input"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": 9}, "dimensions"),
        ({"encoding_format": "hex"}, "encoding_format"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_embedding_refusals(server, fields, param):
    response = server.post("/v1/embeddings", {"model": MODEL, "input": "a", **fields})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_embedding_of_unknown_model(client):
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="nope", input="a")


def test_tokenize_prompt_and_detokenize(server, text_parts):
    ids = text_parts[0].encode("héllo")
    body = server.post(
        "/tokenize", {"model": MODEL, "prompt": "héllo", "return_token_strs": True}
    ).json()
    assert (body["tokens"], body["count"], body["max_model_len"]) == (ids, 6, 2048)
    assert body["token_strs"][0] == "h"
    text = server.post("/detokenize", {"model": MODEL, "tokens": ids}).json()
    assert text == {"prompt": "héllo"}


def test_tokenize_messages_equals_what_chat_sends(server):
    messages = [{"role": "user", "content": "<|im_end|> hi"}]
    body = {"model": MODEL, "messages": messages}
    tokens = server.post("/tokenize", body).json()["tokens"]
    server.post("/v1/chat/completions", body)
    assert server.engine.requests[0].prompt_token_ids == tokens


def test_render(server):
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    rendered = server.post("/v1/chat/completions/render", body).json()
    assert rendered["prompt"] == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert rendered["count"] == len(rendered["prompt_token_ids"])
    assert not server.engine.requests


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages[0].content"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [1, 99999]}, "tokens[1]"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
    ],
)
def test_tokenize_refusals(server, path, body, param):
    response = server.post(path, body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_long_texts_are_tokenized_off_the_loop(server):
    response = server.post("/tokenize", {"prompt": "word " * 20_000})
    assert response.json()["count"] == 100_000


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream": True, "use_beam_search": True}, "use_beam_search"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"metadata": {"k" * 65: "v"}}, "metadata." + "k" * 64),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"tools": "x"}}, "chat_template_kwargs"),
    ],
)
def test_render_refuses_what_a_completion_refuses(server, fields, param):
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **fields}
    refusals = [
        server.post(f"/v1/chat/completions{path}", body).json()["error"] for path in ("", "/render")
    ]
    assert refusals[0] == refusals[1]
    assert refusals[1]["param"] == param
    assert not server.engine.requests


def test_a_rendered_a_counted_and_a_generated_prompt_are_the_same(server):
    """One preparation: tools, continued messages and template options reach each endpoint."""
    tool = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "so"}]
    chat = {
        "model": MODEL,
        "messages": messages,
        "tools": [{"type": "function", "function": tool}],
        "continue_final_message": True,
    }
    rendered = server.post("/v1/chat/completions/render", chat).json()
    counted = server.post("/tokenize", chat).json()
    assert server.post("/v1/chat/completions", chat).status_code == 200
    generated = server.engine.requests[-1].prompt_token_ids
    assert rendered["prompt_token_ids"] == counted["tokens"] == generated
    assert '"f"' in rendered["prompt"] and rendered["prompt"].endswith("so")
    body = {
        "model": MODEL,
        "input": messages[:1],
        "tools": [{"type": "function", **tool}],
    }
    counted = server.post("/v1/responses/input_tokens", body).json()["input_tokens"]
    assert server.post("/v1/responses", body).status_code == 200
    assert counted == len(server.engine.requests[-1].prompt_token_ids)
