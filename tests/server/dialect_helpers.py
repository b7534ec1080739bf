"""Requests of each endpoint, and what a body in another server's dialect asks of the engine."""

from __future__ import annotations

from typing import Any

from fake_engine import MODEL

from chunkllama_server.api.dialect.meanings import Endpoint
from chunkllama_server.api.dialect.route import MODELS
from chunkllama_server.api.dialect.translate import Translation, translate

PATHS: dict[Endpoint, str] = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "responses": "/v1/responses",
    "embeddings": "/v1/embeddings",
    "tokenize": "/tokenize",
}
BODIES: dict[Endpoint, dict[str, Any]] = {
    "chat": {"messages": [{"role": "user", "content": "hi"}]},
    "completions": {"prompt": "hi"},
    "responses": {"input": "hi"},
    "embeddings": {"input": "hi"},
    "tokenize": {"prompt": "hi"},
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
GBNF = 'root ::= "yes" | "no"\n'
JSON, REGEX = (
    {"structured_outputs": {"json": SCHEMA}},
    {"structured_outputs": {"regex": "[0-9]{3}"}},
)
THINKS = {"chat_template_kwargs": {"enable_thinking": False, "thinking": False}}
FUNCTION = {"name": "f", "parameters": SCHEMA}


def run(server: Any, endpoint: Endpoint, fields: dict[str, Any]) -> Any:
    """What the engine is asked for, or the answer where it is not asked."""
    body = {"model": MODEL, **BODIES[endpoint], **fields}
    if fields.keys() & {"inputs", "content"}:
        body.pop("prompt", None)
        body.pop("input", None)
    response = server.post(PATHS[endpoint], body)
    assert response.status_code == 200, response.text
    assert "x-chunkllama-ignored-fields" not in response.headers
    if endpoint == "tokenize":
        return response.json()
    request = server.engine.requests[-1]
    return request.prompt_token_ids, request.sampling, request.namespace


def read(endpoint: Endpoint, fields: dict[str, Any]) -> Translation:
    return translate(fields, endpoint, MODELS[endpoint].wire_names())
