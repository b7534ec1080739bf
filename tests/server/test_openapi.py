"""The OpenAPI document is true: our error bodies, no 422, and answers that fit their schemas."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from fake_engine import MODEL
from openai.types import Completion, CreateEmbeddingResponse, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from chunkllama_server.api.schema import (
    chat_response,
    completions,
    embeddings,
    models,
    response_object,
    tokenize,
)

HELLO = [{"role": "user", "content": "say(hi)yas"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = [{"role": "user", "content": 'say(<tool_call>{"name": "f"}</tool_call>)yas'}]
CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
FLAT_TOOL = {"type": "function", "name": "f"}
ANSWERS = [
    (CHAT, {"messages": HELLO}, chat_response.ChatCompletion, ChatCompletion),
    (CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 2, "n": 2, "stop": "i",
            "return_token_ids": True, "prompt_logprobs": 1, "metadata": {"a": "b"}},
     chat_response.ChatCompletion, ChatCompletion),
    (CHAT, {"messages": CALL, "tools": [TOOL]}, chat_response.ChatCompletion, ChatCompletion),
    (CHAT, {"messages": CALL, "functions": [TOOL["function"]]}, chat_response.ChatCompletion,
     ChatCompletion),
    (TEXT, {"prompt": "say(hi)yas", "logprobs": 2, "stop": ["i"], "return_token_ids": True,
            "prompt_logprobs": 1}, completions.Completion, Completion),
    # OpenAI's types do not know the null of a prompt's first token, which OpenAI sends.
    (TEXT, {"prompt": "hi", "logprobs": 2, "echo": True}, completions.Completion, None),
    (TEXT, {"prompt": ["a", "b"], "n": 2}, completions.Completion, Completion),
    (RESPONSES, {"input": "say(hi)yas"}, response_object.Response, Response),
    (RESPONSES, {"input": CALL, "tools": [FLAT_TOOL], "instructions": "x", "user": "u",
                 "include": ["message.output_text.logprobs"], "top_logprobs": 1,
                 "text": {"format": {"type": "text"}}, "reasoning": {"effort": "low"},
                 "tool_choice": {"type": "function", "name": "f"}},
     response_object.Response, Response),
    (f"{RESPONSES}/input_tokens", {"input": "x"}, response_object.InputTokens, None),
    ("/v1/embeddings", {"input": ["a"]}, embeddings.EmbeddingList, CreateEmbeddingResponse),
    ("/v1/embeddings", {"input": "a", "encoding_format": "base64"}, embeddings.EmbeddingList, None),
    ("/tokenize", {"prompt": "a"}, tokenize.TokenizeResponse, None),
    ("/detokenize", {"tokens": [1]}, tokenize.DetokenizeResponse, None),
    (f"{CHAT}/render", {"messages": HELLO}, tokenize.RenderedPrompt, None),
]  # fmt: skip
STREAMS = [
    (CHAT, {"messages": HELLO, "stream_options": {"include_usage": True}, "logprobs": True,
            "return_token_ids": True, "stop": "i", "n": 2},
     chat_response.ChatCompletionChunk, ChatCompletionChunk),
    (CHAT, {"messages": CALL, "tools": [TOOL]}, chat_response.ChatCompletionChunk,
     ChatCompletionChunk),
    (CHAT, {"messages": CALL, "functions": [TOOL["function"]]}, chat_response.ChatCompletionChunk,
     ChatCompletionChunk),
    # Nor the finish_reason null of a streamed completion.
    (TEXT, {"prompt": ["say(hi)yas", "b"], "logprobs": 1, "return_token_ids": True,
            "stream_options": {"include_usage": True}}, completions.Completion, None),
    (RESPONSES, {"input": CALL, "tools": [FLAT_TOOL]}, response_object.ResponseEvent,
     ResponseStreamEvent),
    (RESPONSES, {"input": "say(hi)yas", "include": ["message.output_text.logprobs"]},
     response_object.ResponseEvent, ResponseStreamEvent),
]  # fmt: skip


def validate(payload, ours, theirs) -> None:
    """Against our schema with nothing unknown, and against OpenAI's published types."""
    TypeAdapter(ours).validate_python(payload, strict=True)
    assert set(payload) <= set(ours.__annotations__)
    if theirs is not None:
        TypeAdapter(theirs).validate_python(payload)


@pytest.mark.parametrize(("path", "body", "ours", "theirs"), ANSWERS)
def test_answers_fit_both_schemas(server, path, body, ours, theirs):
    response = server.post(path, {"model": MODEL, **body})
    assert response.status_code == 200, response.text
    validate(response.json(), ours, theirs)


@pytest.mark.parametrize(("path", "body", "ours", "theirs"), STREAMS)
def test_events_fit_both_schemas(server, path, body, ours, theirs):
    response = server.post(path, {"model": MODEL, "stream": True, **body})
    lines = [line for line in response.text.split("\n") if line.startswith("data: {")]
    assert len(lines) > 3
    for line in lines:
        validate(json.loads(line[6:]), ours, theirs)


def test_model_fits(server):
    with server.http() as http:
        validate(http.get(f"/v1/models/{MODEL}").json(), models.Model, Model)


# Errors of other protocols, by the beginning of their paths.
SHAPES = {
    "/v1/messages": "AnthropicErrorBody",
    "/api/": "OllamaError",
    "/embed": "TgiError",
    "/generate": "TgiError",
    "/info": "TgiError",
}


def test_document_knows_our_errors_and_no_422(server):
    document = server.app.openapi()
    for path, operations in document["paths"].items():
        found = (name for prefix, name in SHAPES.items() if path.startswith(prefix))
        shape = next(found, "TgiError" if path == "/" else "ErrorBody")
        error = {"$ref": f"#/components/schemas/{shape}"}
        for method, operation in operations.items():
            assert ("422" in operation["responses"]) == (shape == "TgiError"), path
            for status, response in operation["responses"].items():
                if status >= "4":
                    assert response["content"]["application/json"]["schema"] == error
            if method == "post":
                assert {"400", "404", "413", "429", "503"} <= set(operation["responses"])
    assert not {"HTTPValidationError", "ValidationError"} & set(document["components"]["schemas"])


def test_every_request_field_is_described(server):
    schemas = server.app.openapi()["components"]["schemas"]
    names = ("ChatCompletionRequest", "CompletionRequest", "ResponseRequest", "MessagesRequest")
    for name in names:
        for field, schema in schemas[name]["properties"].items():
            assert schema.get("description"), (name, field)


def test_document_asks_for_a_key_when_the_server_does(start_server):
    document = start_server(api_keys={"a": "k"}).app.openapi()
    assert document["security"] == [{"bearer": []}]


def test_application_imports_no_torch():
    modules = "chunkllama_server.api.app, chunkllama_server.transport.http_protocol"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_strict_validation_would_notice():
    """The helper is not blind: a missing member and a wrong type are both found."""
    body = {"object": "list", "data": []}
    validate(body, models.ModelList, None)
    for bad in ({"object": "list"}, {"object": "list", "data": {}}):
        with pytest.raises(ValueError, match="validation error"):
            validate(bad, models.ModelList, None)
