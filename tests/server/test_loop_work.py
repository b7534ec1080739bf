"""What the event loop does for one request is bounded: counted, not timed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute

from chunkllama_server.api import app as application
from chunkllama_server.api import embeddings, openapi, tokenize
from chunkllama_server.api.anthropic import routes as anthropic
from chunkllama_server.api.batch import routes as batch
from chunkllama_server.api.chat import routes as chat
from chunkllama_server.api.completions import routes as completions
from chunkllama_server.api.ollama import routes as ollama
from chunkllama_server.api.responses import routes as responses
from chunkllama_server.api.tgi import routes as tgi
from chunkllama_server.transport.body import parse_json
from chunkllama_server.transport.errors import ApiError

FAMILIES = (
    *(application.cache, embeddings, tokenize, anthropic, batch, chat, completions, ollama),
    *(responses, tgi),
)
MOST_ERRORS = 64  # of one list; pydantic makes an object for each


def bodies() -> Iterator[tuple[str, Any]]:
    """Path and core schema of each endpoint's body."""
    for family in FAMILIES:
        for route in family.router.routes:
            if isinstance(route, APIRoute) and route.body_field is not None:
                model: Any = route.body_field.field_info.annotation
                if hasattr(model, "__pydantic_core_schema__"):
                    yield route.path, model.__pydantic_core_schema__


def lists_in(schema: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The list schemas in a core schema whose items can be wrong."""
    if isinstance(schema, dict):
        if schema.get("type") == "list" and schema["items_schema"]["type"] != "any":
            yield path, schema
        for key, value in schema.items():
            if key not in ("serialization", "metadata"):
                yield from lists_in(value, f"{path}.{key}")
    elif isinstance(schema, list | tuple):
        for item in schema:
            yield from lists_in(item, path)


def test_a_list_of_wrong_items_is_few_errors() -> None:
    found = [pair for path, schema in bodies() for pair in lists_in(schema, path)]
    assert len(found) > 30
    for path, schema in found:
        assert schema.get("fail_fast") or schema.get("max_length", 10**9) <= MOST_ERRORS, path


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/chat/completions", {"modalities": ["x"] * 200_000}, "modalities[0]"),
        ("/v1/chat/completions", {"messages": [{}] * 4000}, "messages[0].role"),
        ("/v1/completions", {"prompt": [[]] * 1000}, "prompt[0]"),
        ("/v1/responses", {"input": [{"role": "user", "content": 5}] * 4000}, "input[0].content"),
        ("/v1/embeddings", {"input": [1.5] * 2000}, "input[0]"),
    ],
)
def test_the_first_wrong_item_is_named(server, path, fields, param) -> None:
    hello = [{"role": "user", "content": "hi"}]
    body = {"model": "alias", **({"messages": hello} if "chat" in path else {}), **fields}
    response = server.post(path, body)
    assert response.status_code == 400 and response.json()["error"]["param"] == param


def test_the_openapi_document_is_built_once_and_in_a_thread(start_server, monkeypatch) -> None:
    loops: list[object] = []
    build = openapi.get_openapi

    def noting(**options: Any) -> dict[str, Any]:
        loops.append(asyncio._get_running_loop())
        return build(**options)

    monkeypatch.setattr(openapi, "get_openapi", noting)
    server = start_server()
    documents = [httpx.get(f"{server.url}/openapi.json").json() for _ in range(2)]
    assert documents[0] == documents[1] and documents[0]["openapi"]
    assert loops == [None]


@pytest.mark.parametrize("wrap", ["%s", "[%s]", '{"a":[1,"x",{"b":%s}]}', '["a",null,[],-%s]'])
def test_numbers_beyond_a_double_are_found_at_any_level(wrap) -> None:
    for number in ("1e999", "1" * 400 + ".0"):
        with pytest.raises(ApiError, match="no double holds") as caught:
            parse_json((wrap % number).encode())
        assert (caught.value.status_code, caught.value.code) == (400, "invalid_json")
    text = wrap % "1e308"
    assert parse_json(text.encode()) == json.loads(text)
    text = wrap % ("9" * 400)  # an integer has no bound of its own
    assert parse_json(text.encode()) == json.loads(text)
