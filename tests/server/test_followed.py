"""What a request continues and refers to: bounded by what it could send, before it is decoded."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fake_engine import MODEL

from chunkllama_server.api.common import response_store
from chunkllama_server.api.common.response_store import ResponseStore, StoredResponse
from chunkllama_server.api.common.responses import LocalResponses, Responses
from chunkllama_server.api.schema.chat import ChatMessage

PATH = "/v1/responses"
BODY_BYTES = 100_000


@pytest.fixture(scope="module")
def narrow(start_server):
    """A server of short bodies."""
    return start_server(max_body_bytes=BODY_BYTES)


def ask(server, items: list[dict[str, Any]], **fields: Any):
    body = {"model": MODEL, "input": [*items, {"role": "user", "content": "x"}], **fields}
    return server.post(PATH, body)


def thought(name: str, size: int = 60_000) -> dict[str, Any]:
    """An item that is stored and has no part in the prompt."""
    return {"type": "reasoning", "id": name, "summary": [], "encrypted_content": "a" * size}


def references(*names: str) -> list[dict[str, Any]]:
    return [{"type": "item_reference", "id": name} for name in names]


def test_items_are_referred_to_up_to_the_size_of_a_body(narrow):
    for name in ("rs_a", "rs_b"):
        assert ask(narrow, [thought(name)]).status_code == 200
    for name in ("rs_a", "rs_b"):
        assert ask(narrow, references(name)).status_code == 200
    for names in (("rs_a", "rs_b"), ("rs_a", "rs_a")):
        refused = ask(narrow, references(*names))
        assert refused.status_code == 413
        error = refused.json()["error"]
        assert (error["param"], error["code"]) == ("input", "request_too_large")


def test_small_items_of_large_responses_can_be_referred_to(narrow):
    made = [ask(narrow, [thought(f"rs_{i}", 90_000)]).json() for i in range(3)]
    outputs = [each["output"][0]["id"] for each in made]
    assert ask(narrow, references(*outputs)).status_code == 200


def test_too_much_to_look_through_is_refused_before_it_is_decoded(narrow, monkeypatch):
    names = [f"rs_many{i}" for i in range(40)]
    for name in names:
        small = {**thought(name, 1), "summary": []}
        assert ask(narrow, [small, thought(f"{name}_beside", 90_000)]).status_code == 200
    monkeypatch.setattr(
        response_store, "_unpacked", lambda _: pytest.fail("decoded before it was refused")
    )
    refused = ask(narrow, references(*names))
    assert refused.status_code == 413
    assert refused.json()["error"]["param"] == "input"


def test_a_conversation_is_continued_up_to_the_size_of_a_body(narrow):
    previous: dict[str, Any] = {}
    statuses = []
    for index in range(3):
        tool = {"type": "function", "name": f"f{index}", "unread": "a" * 60_000}
        answer = ask(narrow, [{"type": "additional_tools", "tools": [tool]}], **previous)
        statuses.append(answer.status_code)
        previous = {"previous_response_id": answer.json().get("id")}
    assert statuses == [200, 200, 413]
    assert answer.json()["error"]["param"] == "previous_response_id"


def test_a_response_whose_text_is_larger_than_the_store_is_not_stored():
    store = ResponseStore(9, 4000, 60.0)
    for name, size in (("small", 1000), ("large", 5000)):
        message = ChatMessage(role="user", content="a" * size)
        made: Any = {"id": name, "output": []}
        store.put("t", StoredResponse(made, [message]))
    assert store.get("t", "large") is None
    assert store.get("t", "small") is not None


def test_of_a_response_the_items_that_are_asked_for_are_kept():
    store = ResponseStore(9, 1 << 20, 60.0)
    output = [{"id": f"out{i}", "type": "message"} for i in range(3)]
    made: Any = {"id": "resp", "output": output}
    given = [*({"id": f"in{i}", "type": "reasoning"} for i in range(3)), *references("out9")]
    store.put("t", StoredResponse(made, [], given))
    responses = Responses(LocalResponses(store))
    (holder,) = asyncio.run(responses.holders("t", ["in1", "out2", "none"], 1 << 20)) or []
    packed, ids = holder
    assert ids == ["in1", "out2"]
    assert packed.find_items(ids).keys() == {"in1", "out2"}
    assert packed.find_items(["out9"]) == {}
    assert asyncio.run(responses.holders("t", ["in1"], 10)) is None
