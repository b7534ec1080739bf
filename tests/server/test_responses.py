"""The Responses API through the openai client: items, events, stored conversations, bounds."""

from __future__ import annotations

import random
import string
import zlib
from typing import Any

import openai
import pydantic
import pytest
from fake_engine import MODEL

from chunkllama.errors import RequestFailedError
from chunkllama_server.api.common import response_store
from chunkllama_server.api.common.response_store import ResponseStore, StoredResponse, item_id_in
from chunkllama_server.api.responses.items import assistant_message
from chunkllama_server.api.schema.chat import ChatMessage

CALL = '{"name": "add", "arguments": {"a": 1}}'
TOOLS = [{"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": False}]


def prompt_of(server, text_parts, index: int = -1) -> str:
    return text_parts[0].decode(server.engine.requests[index].prompt_token_ids)


def test_text(client):
    response = client.responses.create(model=MODEL, input="say(hello)yas")
    assert response.output_text == "hello"
    assert response.status == "completed"
    assert response.usage.input_tokens_details.cached_tokens == 0
    assert response.usage.total_tokens == response.usage.input_tokens + 6


def test_instructions_and_items(server, client, text_parts):
    client.responses.create(
        model=MODEL,
        instructions="be brief",
        input=[
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": [{"type": "output_text", "text": "two"}]},
            {"type": "function_call", "call_id": "c", "name": "add", "arguments": '{"a": 1}'},
            {"type": "function_call_output", "call_id": "c", "output": "42"},
            {"role": "developer", "content": [{"type": "input_text", "text": "three"}]},
        ],
    )
    prompt = prompt_of(server, text_parts)
    parts = ["system\nbe brief", "user\none", 'assistant\ntwoadd{"a": 1}', "tool\n42", "three"]
    assert [part in prompt for part in parts] == [True] * 5


def test_max_output_tokens_is_incomplete(client):
    response = client.responses.create(
        model=MODEL, input=f"say({'x' * 30})yas", max_output_tokens=16
    )
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output_text == "x" * 16


def test_previous_response_goes_on(server, client, text_parts):
    first = client.responses.create(model=MODEL, input="say(blue)yas", instructions="secret")
    second = client.responses.create(model=MODEL, input="and now?", previous_response_id=first.id)
    prompt = prompt_of(server, text_parts)
    assert "user\nsay(blue)yas" in prompt
    assert "assistant\nblue" in prompt
    assert "secret" not in prompt
    assert second.previous_response_id == first.id
    assert second.usage.input_tokens_details.cached_tokens > 0


def test_stored_responses_can_be_read_and_deleted(client):
    response = client.responses.create(model=MODEL, input="say(x)yas")
    assert client.responses.retrieve(response.id).output_text == "x"
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.create(model=MODEL, input="x", previous_response_id=response.id)
    assert caught.value.param == "previous_response_id"


def test_store_false_keeps_nothing(client):
    response = client.responses.create(model=MODEL, input="x", store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def test_events_in_order(client):
    events = list(client.responses.create(model=MODEL, input="say(ab)yas", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == "ab"
    assert events[-1].response.output_text == "ab"
    assert events[-1].response.usage.output_tokens == 3
    assert len({e.item_id for e in events if hasattr(e, "item_id")}) == 1


def test_events_of_text_and_calls(client):
    text = f"Hm. <tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call>"
    events = list(
        client.responses.create(model=MODEL, input=f"say({text})yas", tools=TOOLS, stream=True)
    )
    done = [e for e in events if e.type == "response.function_call_arguments.done"]
    assert [(e.output_index, e.name, e.arguments) for e in done] == [
        (1, "add", '{"a": 1}'),
        (2, "add", '{"a": 1}'),
    ]
    added = [e.item.type for e in events if e.type == "response.output_item.added"]
    assert added == ["message", "function_call", "function_call"]
    final = events[-1].response
    assert [item.type for item in final.output] == added
    assert all(item.status == "completed" for item in final.output)


def test_whole_call(client):
    response = client.responses.create(
        model=MODEL, input=f"say([{CALL}])yas", tools=TOOLS, tool_choice="required"
    )
    assert [(i.type, i.name, i.arguments) for i in response.output] == [
        ("function_call", "add", '{"a": 1}')
    ]


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "function", "name": "add"},
        {
            "type": "allowed_tools",
            "mode": "required",
            "tools": [{"type": "function", "name": "add"}],
        },
    ],
)
def test_tool_choice_objects(server, client, choice):
    client.responses.create(model=MODEL, input="x", tools=TOOLS, tool_choice=choice)
    assert '"const": "add"' in server.engine.requests[0].sampling.grammar.text


def test_call_conversation_continues(server, client, text_parts):
    first = client.responses.create(
        model=MODEL, input=f"say(<tool_call>{CALL}</tool_call>)yas", tools=TOOLS
    )
    output = {"type": "function_call_output", "call_id": first.output[0].call_id, "output": "2"}
    client.responses.create(model=MODEL, input=[output], tools=TOOLS, previous_response_id=first.id)
    assert 'add{"a": 1}' in prompt_of(server, text_parts)


AROUND = f"One. <tool_call>{CALL}</tool_call>Two. <tool_call>{CALL}</tool_call> Three."


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("logprobs", [False, True])
def test_text_and_calls_stand_in_the_order_they_were_written(server, client, size, logprobs):
    server.engine.tokens_per_delta = size
    body = {"model": MODEL, "input": f"say({AROUND})yas", "tools": TOOLS}
    if logprobs:
        body |= {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
    whole = client.responses.create(**body).output
    streamed = list(client.responses.create(**body, stream=True))[-1].response.output
    for output in (whole, streamed):
        said = [i.content[0].text if i.type == "message" else i.name for i in output]
        assert said == ["One. ", "add", "Two. ", "add", "Three."]
    if logprobs and size == 1:
        for item in whole:
            if item.type == "message":
                tokens = "".join(entry.token for entry in item.content[0].logprobs)
                assert tokens.startswith(item.content[0].text)


def test_incomplete_and_failed_events(server, client):
    events = list(
        client.responses.create(
            model=MODEL, input=f"say({'x' * 30})yas", max_output_tokens=16, stream=True
        )
    )
    assert events[-1].type == "response.incomplete"
    server.engine.fail_after = (2, RequestFailedError("boom", "model_nan"))
    events = list(client.responses.create(model=MODEL, input="say(abcd)yas", stream=True))
    assert events[-1].type == "response.failed"
    error = events[-1].response.error
    assert (error.code, error.message) == ("server_error", "boom")


def test_empty_answer_is_an_empty_message(client):
    response = client.responses.create(model=MODEL, input="say()yas")
    assert response.output[0].content[0].text == ""
    events = list(client.responses.create(model=MODEL, input="say()yas", stream=True))
    assert events[-1].response.output[0].content[0].text == ""


def test_parse_and_text_format(server, client):
    class Answer(pydantic.BaseModel):
        value: int

    response = client.responses.parse(model=MODEL, input='say({"value": 3})yas', text_format=Answer)
    assert response.output_parsed == Answer(value=3)
    assert server.engine.requests[0].sampling.grammar.kind == "json_schema"


def test_logprobs(client):
    response = client.responses.create(
        model=MODEL,
        input="say(ab)yas",
        include=["message.output_text.logprobs"],
        top_logprobs=2,
    )
    logprobs = response.output[0].content[0].logprobs
    assert [entry.token for entry in logprobs][:2] == ["a", "b"]
    assert len(logprobs[0].top_logprobs) == 2


def test_logprobs_of_text_that_might_have_been_a_call(client):
    def ask(**options):
        fields = {"model": MODEL, "input": "say(<tool> hi)yas", "tools": TOOLS, **options}
        return client.responses.create(**fields, include=["message.output_text.logprobs"])

    whole = ask()
    *_, last = ask(stream=True)
    for response in (whole, last.response):
        assert len(response.output[0].content[0].logprobs) == response.usage.output_tokens


def test_top_logprobs_0_asks_for_nothing(client):
    response = client.responses.create(model=MODEL, input="say(ab)yas", top_logprobs=0)
    assert response.output[0].content[0].logprobs == []


@pytest.mark.parametrize("stream", [False, True])
def test_of_two_calls_the_last_is_incomplete(client, stream):
    answer = client.responses.create(
        model=MODEL,
        input=f"say([{CALL}, {CALL}])yas",
        tools=TOOLS,
        tool_choice="required",
        max_output_tokens=len(CALL) + 30,
        stream=stream,
    )
    response = list(answer)[-1].response if stream else answer
    assert [item.status for item in response.output] == ["completed", "incomplete"]


def test_an_answer_may_have_more_calls_than_a_request():
    call = {"type": "function_call", "call_id": "c", "name": "add", "arguments": "{}"}
    message = assistant_message([call] * 200)  # type: ignore[list-item]
    assert len(message.tool_calls or ()) == 200


def test_input_tokens(client):
    counted = client.responses.input_tokens.count(model=MODEL, input="hello")
    response = client.responses.create(model=MODEL, input="hello")
    assert counted.input_tokens == response.usage.input_tokens


def test_tenants_do_not_see_each_other(start_server):
    server = start_server(api_keys={"a": "key-a", "b": "key-b"})
    ours = server.client("key-a").responses.create(model=MODEL, input="x")
    with pytest.raises(openai.NotFoundError):
        server.client("key-b").responses.retrieve(ours.id)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "reasoning"}]}, "input"),
        ({"input": None}, "input"),
        ({"input": [{"content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0]",
        ),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"max_output_tokens": 15}, "max_output_tokens"),
        ({"max_output_tokens": 2040}, "max_output_tokens"),
        ({"input": "x" * 3000}, "input"),
        ({"background": True, "store": False}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"context_management": [{"type": "compaction"}]}, "context_management"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "g"}}, "tool_choice.name"),
        (
            {
                "tools": TOOLS,
                "tool_choice": {"type": "allowed_tools", "tools": [{"name": "g"}]},
            },
            "tool_choice.tools",
        ),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"truncation": "maybe"}, "truncation"),
        ({"temperature": 3}, "temperature"),
        ({"metadata": "a"}, "metadata"),
    ],
    ids=lambda v: str(v)[:50],
)
def test_refusals_name_the_field(server, fields, param):
    response = server.post("/v1/responses", {"model": MODEL, "input": "x", **fields})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def stored(response_id: str, size: int = 10) -> StoredResponse:
    text = "".join(random.Random(0).choices(string.ascii_letters, k=size))  # it hardly compresses
    message = ChatMessage(role="user", content=text)
    return StoredResponse({"id": response_id, "output": []}, [message])  # type: ignore[typeddict-item]


def test_store_is_bounded_by_count_bytes_and_age():
    now = [0.0]
    store = ResponseStore(2, 2000, 60.0, lambda: now[0])
    store.put("t", stored("a"))
    store.put("t", stored("b"))
    assert store.get("t", "a") is not None
    store.put("t", stored("c"))
    assert store.get("t", "b") is None, "the least recently used goes first"
    store.put("t", stored("big", 1200))
    assert len(store) == 1
    assert store.num_bytes <= 2000
    store.put("t", stored("too big", 2500))
    assert store.get("t", "too big") is None
    now[0] = 61.0
    assert store.get("t", "big") is None
    assert (len(store), store.num_bytes) == (0, 0)


def test_items_that_came_without_ids_cost_no_index():
    """Each id names the response: an entry in a dictionary for each took more than the items."""
    store, made = ResponseStore(9, 1 << 20, 60.0), "resp_" + "0a" * 16
    items = [
        {"id": item_id_in(made, "msg", i), "type": "message", "content": [{"text": "a"}]}
        for i in range(1200)
    ]
    given = {"id": "msg_of_the_client", "type": "message"}
    response: Any = {"id": made, "output": [{"id": "msg_" + "f" * 32, "type": "message"}]}
    store.put("t", StoredResponse(response, [], [*items, given]))
    assert store.num_bytes < 12_000
    for item in (items[0], items[1199], given, response["output"][0]):
        assert store.with_item("t", item["id"]) == made
        assert store.with_item("other", item["id"]) is None
    assert store.with_item("t", item_id_in("resp_" + "0b" * 16, "msg", 0)) is None
    (packed,) = [store.get("t", made)]
    assert packed is not None and packed.load_input_items() == [*items, given]
    assert packed.text_bytes > 80_000, "what is decoded is known before"


def test_item_references_decode_each_response_once(server, monkeypatch):
    made = [server.post("/v1/responses", {"input": f"say({name})yas"}).json() for name in "ab"]
    decoded: list[bytes] = []
    decode = response_store._decode_output
    monkeypatch.setattr(
        response_store, "_decode_output", lambda text: (decoded.append(text), decode(text))[1]
    )
    monkeypatch.setattr(
        response_store.PackedResponse, "load", lambda _: pytest.fail("decoded whole")
    )
    references = [
        {"type": "item_reference", "id": response["output"][0]["id"]} for response in made * 50
    ]
    body = {"input": [*references, {"role": "user", "content": "x"}]}
    assert server.post("/v1/responses/input_tokens", body).status_code == 200
    assert len(decoded) == 2


def test_only_events_that_are_streamed_again_are_unpacked(server, monkeypatch):
    made = server.post("/v1/responses", {"input": "say(a)yas"}).json()
    unpacked: list[int] = []
    unpack = response_store.PackedResponse.unpack_events
    monkeypatch.setattr(
        response_store.PackedResponse,
        "unpack_events",
        lambda entry: (unpacked.append(1), unpack(entry))[1],
    )
    path = f"/v1/responses/{made['id']}"
    with server.http() as http:
        assert http.get(path).json() == made
        assert http.get(f"{path}/input_items").status_code == 200
        followed = {"input": "x", "previous_response_id": made["id"]}
        assert server.post("/v1/responses", followed).status_code == 200
        assert not unpacked
        assert "response.completed" in http.get(f"{path}?stream=true").text
        assert len(unpacked) == 1
        assert http.get("/v1/responses/resp_none?stream=true").status_code == 404


@pytest.mark.parametrize("stream", [False, True])
def test_events_are_recorded_only_to_be_stored(server, monkeypatch, stream):
    recorded: list[bytes] = []
    add = response_store.EventRecorder.add
    monkeypatch.setattr(
        response_store.EventRecorder,
        "add",
        lambda recorder, events: (recorded.extend(events), add(recorder, events))[1],
    )
    body = {"input": "say(a)yas", "stream": stream}
    assert server.post("/v1/responses", {**body, "store": False}).status_code == 200
    assert not recorded
    answer = server.post("/v1/responses", body)
    assert recorded
    assert not stream or b"".join(recorded).decode() in answer.text


def test_a_recorder_packs_events_as_they_come():
    events = [f"data: {{{index}}}\n\n".encode() * 20 for index in range(500)]
    recorder = response_store.EventRecorder()
    for event in events:
        recorder.add([event])
    assert zlib.decompress(recorder.packed()) == b"".join(events)
    recorder.add([b"data: {}\n\n"])
    assert zlib.decompress(recorder.packed()) == b"".join(events) + b"data: {}\n\n"
    assert len(recorder.packed()) < sum(map(len, events)) // 20
