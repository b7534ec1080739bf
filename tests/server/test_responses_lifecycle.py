"""Responses after they were asked for: retrieved, followed, cancelled, listed, compacted."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from fake_engine import MODEL
from openai.types.responses import (
    CompactedResponse,
    Response,
    ResponseItem,
)
from pydantic import TypeAdapter
from response_helpers import PATH, events_of

from chunkllama.errors import OverloadedError, RequestFailedError
from chunkllama_server.api.common.response_store import ResponseStore
from chunkllama_server.api.common.responses import LocalResponses
from chunkllama_server.api.responses import routes

CALL = '{"name": "add", "arguments": {"a": 1}}'
TOOLS = [{"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": False}]


def wait_until(check) -> None:
    """Background work has no connection to wait on."""
    deadline = time.monotonic() + 600
    while not check():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


@pytest.mark.parametrize(
    "fields",
    [
        {"input": "say(hello)yas"},
        {"input": f"say(Hm. <tool_call>{CALL}</tool_call>)yas", "tools": TOOLS},
        {"input": f"say({'x' * 30})yas", "max_output_tokens": 16},
        {"input": "say(ab)yas", "include": ["message.output_text.logprobs"], "top_logprobs": 1},
    ],
    ids=lambda fields: str(fields)[:40],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_stored_response_is_streamed_again(server, fields, stream):
    body = {"model": MODEL, "stream": stream, **fields}
    answer = server.post(PATH, body)
    first = events_of(answer.text) if stream else None
    response = first[-1]["response"] if stream else answer.json()
    with server.http() as http:
        again = http.get(f"{PATH}/{response['id']}?stream=true")
        assert again.headers["content-type"].startswith("text/event-stream")
        events = events_of(again.text)
        assert events == (first or events)
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        assert events[-1]["response"] == response
        assert http.get(f"{PATH}/{response['id']}").json() == response
        for after in (0, 3, len(events) - 2, len(events) - 1, 10**6):
            rest = http.get(f"{PATH}/{response['id']}?stream=true&starting_after={after}")
            assert events_of(rest.text) == events[after + 1 :]
        refused = http.get(f"{PATH}/{response['id']}?starting_after=1").json()["error"]
        assert refused["param"] == "starting_after"
        assert http.get(f"{PATH}/{response['id']}?stream=true&starting_after=-1").status_code == 400


def test_through_the_openai_client(client):
    made = client.responses.create(model=MODEL, input="say(ab)yas")
    events = list(client.responses.retrieve(made.id, stream=True))
    assert events[-1].response.output_text == "ab"
    assert list(client.responses.retrieve(made.id, stream=True, starting_after=2)) == events[3:]


ITEMS = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": [{"type": "output_text", "text": "two"}]},
    {"type": "reasoning", "id": "rs_1", "summary": []},
    {"type": "function_call", "call_id": "c", "name": "add", "arguments": '{"a": 1}'},
    {"type": "function_call_output", "call_id": "c", "output": "42"},
    {"type": "custom_tool_call", "call_id": "d", "name": "run", "input": "ls"},
    {"type": "custom_tool_call_output", "call_id": "d", "output": "x"},
    {"role": "developer", "content": [{"type": "input_text", "text": "three"}]},
]


def test_input_items(client):
    made = client.responses.create(model=MODEL, input=ITEMS)
    page = client.responses.input_items.list(made.id, order="asc")
    assert [item.type for item in page.data] == [item.get("type", "message") for item in ITEMS]
    for item in page.data:
        TypeAdapter(ResponseItem).validate_python(
            item.model_dump(exclude_unset=True, by_alias=True)
        )
    assert page.data[0].content[0].text == "one"
    assert page.data[2].id == "rs_1"
    ids = [item.id for item in page.data]
    assert len(set(ids)) == len(ITEMS)
    newest = client.responses.input_items.list(made.id, limit=3)
    assert [item.id for item in newest.data] == ids[::-1][:3]
    assert newest.has_more
    assert [item.id for item in newest] == ids[::-1], "the client pages to the end"


def test_input_items_of_a_text(server):
    made = server.post(PATH, {"input": "hi"}).json()
    with server.http() as http:
        page = http.get(f"{PATH}/{made['id']}/input_items").json()
        assert (page["object"], page["has_more"]) == ("list", False)
        (item,) = page["data"]
        assert item["content"] == [{"type": "input_text", "text": "hi"}]
        assert page["first_id"] == page["last_id"] == item["id"]
        assert http.get(f"{PATH}/resp_none/input_items").status_code == 404
        for query in ("limit=0", "limit=101", "order=up", "after=nothing"):
            bad = http.get(f"{PATH}/{made['id']}/input_items?{query}")
            assert bad.json()["error"]["param"] == query.partition("=")[0]


@pytest.fixture
def slow(server):
    """The server, with tokens that take a while, so that a request is seen while it runs."""
    server.engine.delay = 0.05
    yield server
    server.engine.delay = 0.0


def test_a_background_response_runs_without_a_connection(slow):
    made = slow.post(PATH, {"model": MODEL, "input": "say(abcd)yas", "background": True}).json()
    TypeAdapter(Response).validate_python(made)
    assert (made["status"], made["background"], made["output"]) == ("queued", True, [])
    with slow.http() as http:
        url = f"{PATH}/{made['id']}"
        wait_until(lambda: http.get(url).json()["status"] == "in_progress")
        followed = {"model": MODEL, "input": "x", "previous_response_id": made["id"]}
        assert slow.post(PATH, followed).json()["error"]["code"] == "response_running"
        events = events_of(http.get(f"{url}?stream=true").text)
        types = [event["type"] for event in events]
        assert types[:3] == ["response.created", "response.queued", "response.in_progress"]
        assert types[-1] == "response.completed"
        finished = http.get(url).json()
        assert (finished["status"], finished["id"]) == ("completed", made["id"])
        assert finished["output"][0]["content"][0]["text"] == "abcd"
        assert events_of(http.get(f"{url}?stream=true&starting_after=4").text) == events[5:]
        assert slow.post(PATH, followed).status_code == 200
        again = http.post(f"{url}/cancel").json()
        assert again == finished


def test_a_background_stream_goes_on_when_its_client_leaves(slow):
    body = {"model": MODEL, "input": "say(abcd)yas", "background": True, "stream": True}
    with slow.http() as http, http.stream("POST", PATH, json=body) as stream:
        lines = stream.iter_lines()
        first = next(json.loads(line[6:]) for line in lines if line.startswith("data: "))
    url = f"{PATH}/{first['response']['id']}"
    with slow.http() as http:
        wait_until(lambda: http.get(url).json()["status"] == "completed")
        events = events_of(http.get(f"{url}?stream=true").text)
        assert events[0] == first
        assert events[-1]["response"]["output"][0]["content"][0]["text"] == "abcd"


def test_cancel_ends_the_engines_work(slow):
    body = {"model": MODEL, "input": f"say({'x' * 200})yas", "background": True}
    made = slow.post(PATH, body).json()
    with slow.http() as http:
        url = f"{PATH}/{made['id']}"
        wait_until(lambda: http.get(url).json()["output"])
        cancelled = http.post(f"{url}/cancel").json()
        TypeAdapter(Response).validate_python(cancelled)
        assert cancelled["status"] == "cancelled"
        assert cancelled["output"][0]["status"] == "incomplete"
        wait_until(lambda: slow.engine.aborted)
        assert http.get(url).json() == cancelled
        events = events_of(http.get(f"{url}?stream=true").text)
        assert events[-1]["response"]["status"] == "cancelled"
        assert http.post(f"{url}/cancel").json() == cancelled


class SlowStore(LocalResponses):
    """Stores a response when its gate is opened."""

    def __init__(self) -> None:
        super().__init__(ResponseStore(9, 1 << 20, 60.0))
        self.gate = threading.Event()
        self.waiting = 0

    async def put(self, tenant, stored, max_items) -> None:
        self.waiting += 1
        while not self.gate.is_set():
            await asyncio.sleep(0.002)
        await super().put(tenant, stored, max_items)


def test_a_response_that_has_ended_is_not_cancelled_while_it_is_stored(start_server):
    store = SlowStore()
    server = start_server(responses=store)
    made = server.post(PATH, {"model": MODEL, "input": "say(ab)yas", "background": True}).json()
    wait_until(lambda: store.waiting)
    task = server.app.state.context.background.get("", made["id"]).task
    url = f"{PATH}/{made['id']}"
    with ThreadPoolExecutor() as pool, server.http() as http:
        followed = pool.submit(lambda: server.http().get(f"{url}?stream=true").text)
        cancels = [pool.submit(server.post, f"{url}/cancel", {}) for _ in range(2)]
        wait_until(lambda: task.cancelling() == 2)
        store.gate.set()
        answers = [cancel.result().json() for cancel in cancels]
        stored = http.get(url).json()
        events = [
            events_of(text) for text in (followed.result(), http.get(f"{url}?stream=true").text)
        ]
    assert [answer["status"] for answer in (*answers, stored)] == ["completed"] * 3
    for each in events:
        assert [event["sequence_number"] for event in each] == list(range(len(each)))
        assert [event["type"] for event in each if "output" in event.get("response", {})][-1] == (
            "response.completed"
        )
    assert events[0] == events[1] and store.waiting == 1


def test_what_cannot_be_cancelled(server):
    made = server.post(PATH, {"input": "hi"}).json()
    with server.http() as http:
        error = http.post(f"{PATH}/{made['id']}/cancel", json={})
        assert (error.status_code, error.json()["error"]["code"]) == (
            400,
            "not_a_background_response",
        )
        missing = http.post(f"{PATH}/resp_none/cancel")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "response_not_found")


def test_deleting_ends_a_running_response(slow):
    made = slow.post(PATH, {"input": f"say({'x' * 200})yas", "background": True}).json()
    with slow.http() as http:
        assert http.delete(f"{PATH}/{made['id']}").json()["deleted"] is True
        assert http.get(f"{PATH}/{made['id']}").status_code == 404
    wait_until(lambda: not slow.engine.live)


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (OverloadedError("queue full", 7), "rate_limit_exceeded"),
        (RequestFailedError("boom", "model_nan"), "server_error"),
    ],
)
def test_a_background_response_that_fails_is_stored(server, failure, code):
    server.engine.fail_with = failure
    made = server.post(PATH, {"input": "hi", "background": True}).json()
    with server.http() as http:
        wait_until(lambda: http.get(f"{PATH}/{made['id']}").json()["status"] == "failed")
        failed = http.get(f"{PATH}/{made['id']}").json()
    TypeAdapter(Response).validate_python(failed)
    assert failed["error"]["code"] == code


def test_background_responses_are_bounded(start_server):
    server = start_server(background_responses=1)
    server.engine.delay = 0.05
    body = {"input": f"say({'x' * 100})yas", "background": True}
    first = server.post(PATH, body).json()
    refused = server.post(PATH, body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "background_limit")
    with server.http() as http:
        http.post(f"{PATH}/{first['id']}/cancel")
    assert server.post(PATH, body).status_code == 200


def test_background_responses_that_come_at_once_are_bounded(start_server, monkeypatch):
    """Both find a place when they come; the first to be prepared takes it."""
    server = start_server(background_responses=1)
    server.engine.delay = 0.05
    prepare, both = routes.prepare, threading.Barrier(2, timeout=600)

    async def prepare_together(*args):
        await asyncio.to_thread(both.wait)
        return await prepare(*args)

    monkeypatch.setattr(routes, "prepare", prepare_together)
    body = {"input": f"say({'x' * 100})yas", "background": True}
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _: server.post(PATH, body), range(2)))
    assert sorted(answer.status_code for answer in answers) == [200, 429]
    assert len(server.app.state.context.background) == 1


def test_a_key_has_half_of_the_background_places(start_server):
    server = start_server(background_responses=3, api_keys={"a": "ka", "b": "kb"})
    server.engine.delay = 0.05
    body = {"input": f"say({'x' * 100})yas", "background": True}
    codes = [server.post(PATH, body, **{"x-api-key": key}).status_code for key in ("ka",) * 3]
    assert codes == [200, 200, 429]
    assert server.post(PATH, body, **{"x-api-key": "kb"}).status_code == 200
    assert server.post(PATH, body, **{"x-api-key": "kb"}).status_code == 429


def test_a_single_key_has_all_background_places(start_server):
    server = start_server(background_responses=2, api_keys={"a": "ka"})
    server.engine.delay = 0.05
    body = {"input": f"say({'x' * 100})yas", "background": True}
    codes = [server.post(PATH, body, **{"x-api-key": "ka"}).status_code for _ in range(3)]
    assert codes == [200, 200, 429]


def test_tenants_do_not_see_each_others_background(start_server):
    server = start_server(api_keys={"a": "ka", "b": "kb"})
    server.engine.delay = 0.05
    body = {"input": f"say({'x' * 100})yas", "background": True}
    made = server.post(PATH, body, **{"x-api-key": "ka"}).json()
    with server.http(headers={"x-api-key": "kb"}) as http:
        url = f"{PATH}/{made['id']}"
        for answer in (
            http.get(url), http.get(f"{url}?stream=true"), http.post(f"{url}/cancel"),
            http.delete(url), http.get(f"{url}/input_items"),
        ):  # fmt: skip
            assert answer.status_code == 404
    with server.http(headers={"x-api-key": "ka"}) as http:
        assert http.post(f"{url}/cancel").json()["status"] == "cancelled"


def test_compact(server, client, text_parts):
    made = client.responses.create(model=MODEL, input="My name is Ada.")
    compacted = server.post(
        f"{PATH}/compact",
        {"previous_response_id": made.id, "input": "say(We met.)yas", "instructions": "be brief"},
    ).json()
    CompactedResponse.model_validate(compacted)
    (item,) = compacted["output"]
    assert item["type"] == "compaction"
    assert compacted["usage"]["output_tokens"] > 0
    followed = client.responses.create(
        model=MODEL, input=[item, {"role": "user", "content": "Who am I?"}]
    )
    assert followed.status == "completed"
    prompt = text_parts[0].decode(server.engine.requests[-1].prompt_token_ids)
    for text in ("We met.", "My name is Ada.", "Who am I?"):
        assert text in prompt
    broken = {"input": [{**item, "encrypted_content": "x"}, {"role": "user", "content": "hi"}]}
    response = server.post(PATH, broken)
    assert response.status_code == 200
    assert response.headers["x-chunkllama-repaired-history"] == "input[0]"


def test_the_first_chunk_of_a_streamed_call_has_no_content(server, client):
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": f"say(<tool_call>{CALL}</tool_call>)yas"}],
        tools=[tool],
        stream=True,
    )
    chunks = [chunk.choices[0].delta for chunk in stream]
    assert chunks[0].role == "assistant"
    assert [chunk.content for chunk in chunks] == [None] * len(chunks)
    assert any(chunk.tool_calls for chunk in chunks)


def test_a_stored_response_takes_its_events_into_account(start_server):
    server = start_server(response_store_bytes=20_000)
    made = server.post(PATH, {"input": "say(x)yas"}).json()
    store = server.app.state.context.responses._backend._store
    assert store.num_bytes > len(json.dumps(made))
    with pytest.raises(openai.NotFoundError):
        for _ in range(30):
            server.post(PATH, {"input": "say(x)yas"})
        server.client().responses.retrieve(made["id"])
