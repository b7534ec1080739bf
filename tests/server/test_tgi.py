"""Text Generation Inference's API by huggingface_hub's client, and what is refused by name."""

from __future__ import annotations

import json

import pytest
from fake_engine import MODEL
from huggingface_hub import InferenceClient

from chunkllama.adapter_messages import AdapterInfo
from chunkllama.errors import OverloadedError, RequestFailedError


def sdk(server) -> InferenceClient:
    return InferenceClient(model=server.url)


def events(response) -> list[dict]:
    blocks = response.text.strip().split("\n\n")
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def generate(server, prompt: str = "say(hi)yas", path: str = "/generate", **parameters):
    return server.post(path, {"inputs": prompt, "parameters": parameters})


def test_generate_by_the_client(server) -> None:
    assert sdk(server).text_generation("say(hi there)yas") == "hi there"
    detailed = sdk(server).text_generation("say(abc)yas", details=True, max_new_tokens=2)
    assert detailed.generated_text == "ab"
    assert (detailed.details.finish_reason, detailed.details.generated_tokens) == ("length", 2)
    assert [token.text for token in detailed.details.tokens] == ["a", "b"]


def test_a_stream_by_the_client(server) -> None:
    client = sdk(server)  # its streams end with it
    assert "".join(client.text_generation("say(hi there)yas", stream=True)) == "hi there"
    parts = list(client.text_generation("say(abc)yas", stream=True, details=True))
    assert parts[-1].generated_text == "abc"
    assert parts[-1].details.finish_reason == "eos_token"
    assert parts[-1].details.input_length == len("say(abc)yas")


@pytest.mark.parametrize("tokens_per_delta", [1, 3])
def test_texts_of_tokens_add_up(server, tokens_per_delta) -> None:
    server.engine.tokens_per_delta = tokens_per_delta
    got = events(generate(server, "say(né ok END x)yas", "/generate_stream", stop=["END"]))
    text = got[-1]["generated_text"]
    assert text == "".join(event["token"]["text"] for event in got) == "né ok END"
    assert [event["index"] for event in got] == list(range(1, len(got) + 1))
    assert got[-1]["details"]["finish_reason"] == "stop_sequence"
    assert generate(server, "say(né ok END x)yas", stop=["END"]).json()["generated_text"] == text


@pytest.mark.parametrize(
    ("parameters", "reads", "value"),
    [
        ({}, "temperature", 0.0),
        ({"do_sample": True}, "temperature", 1.0),
        ({"temperature": 0.5}, "temperature", 0.5),
        ({"temperature": 1.0}, "temperature", 0.0),
        ({"temperature": 1.0, "do_sample": True}, "temperature", 1.0),
        ({"temperature": 1.0, "top_p": 0.5}, "temperature", 1.0),
        ({"top_k": 7}, "top_k", 7),
        ({"top_p": 0.25}, "top_p", 0.25),
        ({"seed": 7}, "seed", 7),
        ({}, "max_tokens", 100),
        ({"max_new_tokens": 5}, "max_tokens", 5),
        ({"min_new_tokens": 2}, "min_tokens", 2),
        ({"repetition_penalty": 1.5}, "repetition_penalty", 1.5),
        ({"frequency_penalty": 1.5}, "frequency_penalty", 1.5),
    ],
)
def test_parameters(server, parameters, reads, value) -> None:
    assert generate(server, **parameters).status_code == 200
    assert getattr(server.engine.requests[-1].sampling, reads) == value


@pytest.mark.parametrize("name", ["early_stopping", "length_penalty", "diversity_penalty"])
def test_parameters_of_beam_search_are_ignored_and_named(server, name) -> None:
    """Clients send Transformers' generation_config as it is."""
    answer = generate(server, **{name: True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-chunkllama-ignored-fields"] == f"parameters.{name}"


@pytest.mark.parametrize(
    ("grammar", "kind"),
    [
        ({"type": "json", "value": {"type": "object", "title": "t"}}, "json_schema"),
        ({"type": "json_schema", "value": {"schema": {"type": "object"}}}, "json_schema"),
        ({"type": "regex", "value": "a+"}, "regex"),
        ({"type": "json_object"}, "json_object"),
    ],
)
def test_grammars(server, grammar, kind) -> None:
    assert generate(server, grammar=grammar).status_code == 200
    assert server.engine.requests[-1].sampling.grammar.kind == kind


def test_the_prompt_is_returned_and_cut(server) -> None:
    whole = generate(server, return_full_text=True).json()
    assert whole["generated_text"] == "say(hi)yashi"
    assert generate(server, "xxsay(hi)yas", truncate=10).status_code == 200
    assert len(server.engine.requests[-1].prompt_token_ids) == 10


def test_tokens_of_the_prompt(server) -> None:
    details = generate(server, details=True, decoder_input_details=True).json()["details"]
    assert [entry["text"] for entry in details["prefill"]] == list("say(hi)yas")
    assert details["prefill"][0]["logprob"] is None


def test_embeddings_by_the_client(server) -> None:
    client = InferenceClient(model=f"{server.url}/embed")
    assert client.feature_extraction("abc").tolist() == [
        pytest.approx([0.6, 0.8, *[0.0] * 6], rel=1e-6)
    ]
    assert client.feature_extraction(["a", "b"]).shape == (2, 8)
    assert client.feature_extraction("abc", normalize=False)[0, :2].tolist() == [3.0, 4.0]
    assert client.feature_extraction("abc", dimensions=2).shape == (1, 2)
    assert client.feature_extraction("x" * 5000, truncate=True).shape == (1, 8)


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ({}, "inputs"),
        ({"inputs": []}, "inputs"),
        ({"inputs": ["a", ""]}, "inputs[1]"),
        ({"inputs": "x" * 5000}, "inputs"),
        ({"inputs": "a", "prompt_name": "query"}, "prompt_name"),
        ({"inputs": "a", "truncation_direction": "Left"}, "truncation_direction"),
        ({"inputs": "a", "dimensions": 9}, "dimensions"),
    ],
)
def test_texts_that_cannot_be_embedded(server, body, name) -> None:
    response = server.post("/embed", body)
    assert (response.status_code, response.json()["error_type"]) == (422, "validation")
    assert name in response.json()["error"]


def test_a_chat_by_the_client_without_a_model(server, start_server) -> None:
    """It sends the name "dummy"; TGI's own examples send "tgi"."""
    for client, name in (
        (InferenceClient(base_url=server.url), None),
        (InferenceClient(model=server.url), None),
        (InferenceClient(base_url=server.url), "tgi"),
    ):
        asked = [{"role": "user", "content": "say(hi)yas"}]
        answer = client.chat_completion(asked, model=name)
        assert (answer.choices[0].message.content, answer.model) == ("hi", MODEL)
    body = {"model": "dummy", "messages": asked}
    response = server.post("/v1/chat/completions", body)
    assert response.headers["x-chunkllama-ignored-fields"] == "model"
    own = AdapterInfo(name="dummy", folder="x", rank=8, num_bytes=1, is_activated=False, digest="0")
    server.engine.adapters["dummy"] = own
    named = server.post("/v1/chat/completions", body)
    assert named.json()["model"] == "dummy"
    assert "x-chunkllama-ignored-fields" not in named.headers
    for other in (server.post("/v1/chat/completions", {**body, "model": "any"}),
                  start_server(protocols="none").post("/v1/chat/completions", body)):  # fmt: skip
        assert other.json()["error"]["code"] == "model_not_found"


def test_refusals_that_are_not_of_the_model(start_server) -> None:
    guarded = start_server(api_keys={"a": "ka"})
    refused = generate(guarded)
    assert (refused.status_code, refused.json()["error_type"]) == (401, "unauthorized")
    missing = guarded.post("/generate/nothing", {}, authorization="Bearer ka")
    assert (missing.status_code, missing.json()["error_type"]) == (404, "not_found")


def test_info(server) -> None:
    with server.http() as http:
        info = http.get("/info").json()
    assert (info["model_id"], info["max_total_tokens"]) == (MODEL, 2048)
    assert info["model_dtype"] == server.engine.info.dtype


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ({}, "inputs"),
        ({"inputs": ""}, "inputs"),
        ({"inputs": "x", "parameters": {"max_new_tokens": 0}}, "parameters.max_new_tokens"),
        ({"inputs": "x", "parameters": {"max_new_tokens": 5000}}, "parameters.max_new_tokens"),
        ({"inputs": "x", "parameters": {"temperature": 0}}, "parameters.temperature"),
        ({"inputs": "x", "parameters": {"min_new_tokens": -1}}, "parameters.min_new_tokens"),
        ({"inputs": "x", "parameters": {"min_new_tokens": 5000}}, "parameters.min_new_tokens"),
        ({"inputs": "x", "parameters": {"max_length": 50}}, "max_new_tokens"),
        ({"inputs": "x", "parameters": {"min_length": 5}}, "min_new_tokens"),
        ({"inputs": "x", "parameters": {"adapter_id": "a"}}, "parameters.adapter_id"),
        ({"inputs": "x", "parameters": {"best_of": 2}}, "parameters.best_of"),
        (
            {"inputs": "x", "parameters": {"grammar": {"type": "regex", "value": "REFUSE"}}},
            "parameters.grammar.value: ",
        ),
        ({"inputs": "x" * 3000}, "inputs"),
    ],
)
@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
def test_invalid_requests_name_the_field(server, path, body, name) -> None:
    response = server.post(path, body)
    assert response.status_code == 422, response.text
    assert set(response.json()) == {"error", "error_type"}
    assert response.json()["error_type"] == "validation"
    assert name in response.json()["error"]


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (OverloadedError("full", 7), 429, "overloaded"),
        (RequestFailedError("boom", "model_nan"), 424, "generation"),
    ],
)
def test_failures(server, error, status, kind) -> None:
    server.engine.fail_with = error
    response = generate(server)
    assert (response.status_code, response.json()["error_type"]) == (status, kind)


def test_a_failure_in_a_stream_is_an_event(server) -> None:
    server.engine.fail_after = (2, RequestFailedError("boom", "model_nan"))
    got = events(generate(server, "say(abcdef)yas", "/generate_stream"))
    assert got[-1]["error_type"] == "generation"


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank", "/score", "/v1/score"])
def test_rerank_and_score_are_refused_by_name(server, path) -> None:
    response = server.post(path, {"query": "a", "documents": ["b"]})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "unsupported"
    assert "cross-encoder" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("protocols", "missing"),
    [
        ("anthropic,tgi", "/api/chat"),
        ("anthropic,ollama", "/generate"),
        ("ollama,tgi", "/v1/messages"),
    ],
)
def test_each_protocol_can_be_turned_off(start_server, protocols, missing) -> None:
    server = start_server(protocols=protocols)
    statuses = {
        path: server.post(path, {}).status_code
        for path in ("/api/chat", "/generate", "/v1/messages")
    }
    assert [path for path, status in statuses.items() if status == 404] == [missing]
