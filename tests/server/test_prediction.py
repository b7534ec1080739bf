"""``prediction`` of a chat completion: it reaches the engine, and usage says what came of it."""

from __future__ import annotations

import json

import pytest

PREDICTION = {"type": "content", "content": "abx"}
PARTS = [{"type": "text", "text": "ab"}, {"type": "text", "text": "x<|eos|>"}]


@pytest.fixture(scope="module")
def guessing_server(start_server):
    return start_server(speculation="auto")


@pytest.mark.parametrize("content", ["abx<|eos|>", PARTS], ids=["text", "parts"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_prediction_is_counted_in_usage(guessing_server, content, stream):
    """The reply has "ab" in common with it; its control tokens are plain text."""
    server = guessing_server
    body = {"prediction": {"type": "content", "content": content}}
    if stream:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        lines = server.chat("say(abc)yas", **body, **options).text.splitlines()
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        usage = chunks[-1]["usage"]
    else:
        usage = server.chat("say(abc)yas", **body).json()["usage"]
    predicted = server.engine.requests[-1].prediction_token_ids
    assert len(predicted) == len("abx<|eos|>")
    details = usage["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] == 2
    assert details["rejected_prediction_tokens"] == len(predicted) - 2
    assert usage["completion_tokens"] == 4, "what was rejected is no output"


def test_without_a_prediction_or_speculation_there_is_none(server, guessing_server):
    for at, body in ((guessing_server, {}), (server, {"prediction": PREDICTION})):
        details = at.chat("say(abc)yas", **body).json()["usage"]["completion_tokens_details"]
        assert details["accepted_prediction_tokens"] == details["rejected_prediction_tokens"] == 0
        assert at.engine.requests[-1].prediction_token_ids == []


@pytest.mark.parametrize(
    ("prediction", "param"),
    [
        ({"type": "image", "content": "x"}, "prediction.type"),
        ({"content": "x"}, "prediction.type"),
        ({"type": "content"}, "prediction.content"),
        ({"type": "content", "content": 5}, "prediction.content"),
    ],
    ids=["type", "no type", "no content", "a number"],
)
def test_a_malformed_prediction_names_its_field(server, prediction, param):
    response = server.chat(prediction=prediction)
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith(param)
