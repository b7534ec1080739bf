"""What the event loop does for one request is bounded: counted, not timed."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
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
from chunkllama_server.api.common import context as context_module
from chunkllama_server.api.completions import routes as completions
from chunkllama_server.api.ollama import routes as ollama
from chunkllama_server.api.responses import routes as responses
from chunkllama_server.api.responses.event_stream import EventStream
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
    documents = [httpx.get(f"{server.url}/openapi.json", timeout=120).json() for _ in range(2)]
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


MOST_CALLS = 40_000  # of Python functions in one callback of the event loop, about 15 ms
USER = {"role": "user", "content": "a"}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
CALLS = [{"role": "assistant", "tool_calls": [CALL] * 50}, {"role": "tool", "content": "x"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "a"}] * 500}]
PROPERTIES = {f"p{i}": {"type": "string"} for i in range(60)}
PARAMETERS = {"type": "object", "properties": PROPERTIES}
TOOLS = [{"type": "function", "function": {"name": f"f{i}", "parameters": PARAMETERS}}
         for i in range(100)]  # fmt: skip
UNKNOWN = {f"unknown_{i}": 1 for i in range(5000)}
FLAT_CALLS = [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
              {"type": "function_call_output", "call_id": "a", "output": "x"}]  # fmt: skip
USES = [{"role": "assistant",
         "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]},
        {"role": "user",
         "content": [{"type": "tool_result", "tool_use_id": "t", "content": "x"}]}]  # fmt: skip
CHAT = "/v1/chat/completions"
LONG_BODIES = {
    "messages": (CHAT, {"messages": [USER] * 4000}),
    "calls": (CHAT, {"messages": [USER, *CALLS * 40]}),
    "parts": (CHAT, {"messages": PARTS * 20}),
    "tools": (CHAT, {"messages": [USER], "tools": TOOLS, "tool_choice": "required"}),
    "unknown fields": (CHAT, {"messages": [USER], **UNKNOWN}),
    "unknown members": (CHAT, {"messages": [{**USER, "x": 1, "y": 2}] * 4000}),
    "render": (f"{CHAT}/render", {"messages": [USER] * 4000}),
    "explain": ("/v1/cache/explain", {"messages": [USER] * 4000}),
    "tokenize": ("/tokenize", {"messages": [USER] * 4000}),
    "input items": ("/v1/responses", {"input": [USER] * 4000}),
    "input calls": ("/v1/responses", {"input": [USER, *FLAT_CALLS * 2000]}),
    "input tokens": ("/v1/responses/input_tokens", {"input": [USER] * 4000}),
    "compact": ("/v1/responses/compact", {"input": [USER] * 4000}),
    "anthropic": ("/v1/messages", {"messages": [USER] * 4000, "max_tokens": 2}),
    "anthropic uses": ("/v1/messages", {"messages": [USER, *USES * 1500], "max_tokens": 2}),
    "ollama": ("/api/chat", {"messages": [USER] * 4000, "stream": False}),
    "prompts": ("/v1/completions", {"prompt": ["a"] * 1000, "max_tokens": 1}),
    "inputs": ("/v1/embeddings", {"input": ["a"] * 800}),
}


class CallbackCounter:
    """Counts the Python functions that each callback of other threads' event loops calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._worst = self._num_running = 0
        self._changed = threading.Condition()
        run = asyncio.events.Handle._run
        main = threading.get_ident()

        def counted(handle: asyncio.events.Handle) -> None:
            if threading.get_ident() == main:
                run(handle)
                return
            count = 0

            def note(_frame: Any, event: str, _argument: Any) -> None:
                nonlocal count
                count += event == "call"

            with self._changed:
                self._num_running += 1
            sys.setprofile(note)
            try:
                run(handle)
            finally:
                sys.setprofile(None)
                with self._changed:
                    self._worst = max(self._worst, count)
                    self._num_running -= 1
                    self._changed.notify_all()

        monkeypatch.setattr(asyncio.events.Handle, "_run", counted)

    def worst(self) -> int:
        """The count of the busiest callback, once those that run have ended: an answer can arrive
        before the callback that sent it ends."""
        with self._changed:
            assert self._changed.wait_for(lambda: not self._num_running, timeout=120)
            return self._worst


def most_calls(server: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Functions that the busiest callback calls while a server answers one of the bodies."""
    path, fields = LONG_BODIES[name]
    body = {"model": "alias", **fields}
    server.post(path, {**body, "model": "warm"})  # routes are built when one is first looked for
    server.chat()
    counter = CallbackCounter(monkeypatch)
    response = server.post(path, body)
    assert response.status_code in (200, 400), response.text[:300]
    return counter.worst()


@pytest.fixture(scope="module")
def patient_server(start_server):
    """A server that reads a body however long other processes keep it from doing so."""
    return start_server(text_seconds=3600)


@pytest.mark.parametrize("name", list(LONG_BODIES))
def test_a_long_body_is_read_beside_the_event_loop(patient_server, name, monkeypatch) -> None:
    assert 20 < most_calls(patient_server, name, monkeypatch) < MOST_CALLS


def test_on_the_event_loop_a_long_body_is_more_work(start_server, monkeypatch) -> None:
    """So the test above can fail."""
    server = start_server(text_offload_chars=1 << 30)
    assert most_calls(server, "messages", monkeypatch) > MOST_CALLS


def test_a_short_body_is_read_where_it_arrives(server, monkeypatch) -> None:
    from chunkllama_server.api.common.fair_pool import FairPool

    moved = []
    monkeypatch.setattr(FairPool, "run", lambda *_: moved.append(1))
    assert server.chat().status_code == 200 and not moved


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"input": "say(hello)yas", "top_logprobs": 3,
                           "include": ["message.output_text.logprobs"]}),
        ("/tokenize", {"prompt": "a b c", "return_token_strs": True}),
        ("/v1/completions", {"prompt": [5, 6, 7], "echo": True, "max_tokens": 2}),
        ("/api/embed", {"input": ["a", "b"]}),
    ],
)  # fmt: skip
def test_a_long_answer_is_written_beside_the_event_loop(
    start_server, monkeypatch, path, body
) -> None:
    """Here every answer counts as long."""
    server = start_server(text_offload_chars=0)
    loops: list[object] = []

    def noting(owner: Any, name: str) -> None:
        work = getattr(owner, name)

        def noted(*arguments: Any, **options: Any) -> Any:
            loops.append(asyncio._get_running_loop())
            return work(*arguments, **options)

        monkeypatch.setattr(owner, name, noted)

    noting(EventStream, "take")
    noting(EventStream, "close")
    noting(context_module, "json_response")
    noting(completions, "_echo_text")
    response = server.post(path, {"model": "alias", **body})
    assert response.status_code == 200, response.text
    assert loops and set(loops) == {None}


def test_what_a_response_repeats_of_its_request_is_known(server) -> None:
    """Junk would be in each of its events."""
    junk = {"junk": "x" * 100_000}
    body = {"model": "alias", "input": "say(hi)yas", "text": {"verbosity": "low", **junk},
            "reasoning": {"effort": "low", "generate_summary": junk, **junk}}  # fmt: skip
    response = server.post("/v1/responses", body)
    assert response.status_code == 200 and len(response.content) < 5000
    echoed = response.json()
    assert echoed["reasoning"] == {"effort": "low", "summary": None}
    assert echoed["text"]["verbosity"] == "low"
