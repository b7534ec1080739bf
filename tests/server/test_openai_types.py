"""openai-python's own types accept every answer and every event of every endpoint, strictly: no
member is missing or of another type, and what is added is listed in openai_checks.py."""

from __future__ import annotations

from typing import Any

import pytest
from fake_engine import MODEL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai import types
from openai.types import responses as response_types
from openai.types import shared
from openai.types.responses import response_item_list
from openai_checks import check, events

CALL = '{"name": "f", "arguments": {"city": "Oslo"}}'
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}]
RESPONSE_TOOLS = [
    {"type": "function", "name": "f", "parameters": PARAMETERS, "strict": False},
    {"type": "custom", "name": "run", "description": "runs"},
    {"type": "namespace", "name": "mcp", "tools": [{"type": "function", "name": "g"}]},
]
TEXTS = [
    "",
    "Paris",
    'é🤖 \\ "',
    "<think>hm</think>so",
    CALL,
    f"<tool_call>{CALL}</tool_call>",
    f"One. <tool_call>{CALL}</tool_call>Two.",
    '<tool_call>{"name": "run", "arguments": {"input": "ls"}}</tool_call>',
    '<tool_call>{"name": "mcp__g", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "f", "arg',
    "<tool_call>",
]


def maybe(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


SAMPLING = {
    "seed": st.integers(0, 5),
    "temperature": st.sampled_from([0, 0.5, 2]),
    "stop": st.sampled_from(["a", ["is", "Oslo"]]),
    "prompt_cache_key": st.just("k"),
    "explain_cache": st.booleans(),
}
CHAT = maybe(
    **SAMPLING,
    n=st.integers(1, 3),
    logprobs=st.just(True),
    max_tokens=st.integers(1, 90),
    tools=st.just(TOOLS),
    tool_choice=st.sampled_from(["auto", "none"]),
    parallel_tool_calls=st.booleans(),
    prediction=st.just({"type": "content", "content": "Paris in spring"}),
    reasoning_effort=st.sampled_from(["none", "low"]),
    service_tier=st.sampled_from(["auto", "default", "flex", "priority"]),
    metadata=st.just({"a": "b"}),
    return_token_ids=st.booleans(),
    user=st.just("u"),
)
COMPLETION = maybe(
    **SAMPLING,
    n=st.integers(1, 3),
    logprobs=st.integers(0, 3),
    max_tokens=st.integers(1, 90),
    echo=st.booleans(),
    return_token_ids=st.booleans(),
)
RESPONSE = maybe(
    **SAMPLING,
    include=st.just(["message.output_text.logprobs"]),
    top_logprobs=st.integers(0, 3),
    max_output_tokens=st.integers(16, 90),
    tools=st.just(RESPONSE_TOOLS),
    tool_choice=st.sampled_from(
        ["auto", "none", "required", {"type": "function", "name": "f"},
         {"type": "custom", "name": "run"}]
    ),
    parallel_tool_calls=st.booleans(),
    instructions=st.just("be brief"),
    reasoning=st.just({"effort": "low", "summary": "auto"}),
    text=st.sampled_from([{"verbosity": "low"}, {"format": {"type": "json_object"}}]),
    service_tier=st.sampled_from(["auto", "flex", "priority"]),
    truncation=st.sampled_from(["auto", "disabled"]),
    max_tool_calls=st.just(3),
    metadata=st.just({"a": "b"}),
    safety_identifier=st.just("s"),
    user=st.just("u"),
    background=st.booleans(),
)  # fmt: skip
SAID = st.sampled_from(TEXTS)
_QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
_SOME = settings(max_examples=8, deadline=None, suppress_health_check=_QUIET)
_MANY = settings(max_examples=400, deadline=None, suppress_health_check=_QUIET)


@pytest.fixture(scope="module", params=["plain", "thinking"])
def answering(request, start_server):
    tags = ("<think>", "</think>") if request.param == "thinking" else ("none",)
    return start_server(reasoning_tags=tags, speculation="auto")


def asked(body: dict[str, Any]) -> dict[str, Any]:
    """Fields that need others are left out where these are missing."""
    if "tools" not in body:
        body = {k: v for k, v in body.items() if k not in ("tool_choice", "parallel_tool_calls")}
    return {"model": MODEL, **body}


def check_chat(answering, text, fields, usage, size):
    answering.engine.tokens_per_delta = size
    body = asked({"messages": [{"role": "user", "content": f"say({text})yas"}], **fields})
    answer = answering.post("/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text
    check(types.chat.ChatCompletion, answer.json())
    body |= {"stream": True} | ({"stream_options": {"include_usage": True}} if usage else {})
    for event in events(answering.post("/v1/chat/completions", body).text):
        check(types.chat.ChatCompletionChunk, event)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["auto", {"name": "f"}])
def test_chat_with_functions(answering, stream, choice):
    functions = [tool["function"] for tool in TOOLS]
    body = {"functions": functions, "function_call": choice, "stream": stream}
    answer = answering.chat(f"say(<tool_call>{CALL}</tool_call>)yas", **body)
    if stream:
        for event in events(answer.text):
            check(types.chat.ChatCompletionChunk, event)
    else:
        made = check(types.chat.ChatCompletion, answer.json())
        assert made.choices[0].message.function_call.name == "f"


def check_completions(answering, text, fields, usage, several):
    prompt = f"say({text})yas"
    body = {"model": MODEL, "prompt": [prompt, prompt] if several else prompt, **fields}
    answer = answering.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    whole = answer.json()
    for logprobs in filter(None, (choice["logprobs"] for choice in whole["choices"])):
        # Nothing stands before an echoed prompt's first token, so it has none, as in OpenAI's API.
        for name, neutral in (("token_logprobs", 0.0), ("top_logprobs", {})):
            if fields.get("echo") and logprobs[name] and logprobs[name][0] is None:
                logprobs[name][0] = neutral
    check(types.Completion, whole)
    if not (fields.get("echo") and "logprobs" in fields):
        body |= {"stream": True} | ({"stream_options": {"include_usage": True}} if usage else {})
        for event in events(answering.post("/v1/completions", body).text):
            check_text_chunk(event)


def check_text_chunk(event: dict[str, Any]) -> None:
    for choice in event["choices"]:
        # The type is that of whole answers; OpenAI's chunks have null before the last.
        choice["finish_reason"] = choice["finish_reason"] or "stop"
    check(types.Completion, event)


def check_responses(answering, text, fields, size):
    answering.engine.tokens_per_delta = size
    body = asked({"input": f"say({text})yas", **fields})
    answer = answering.post("/v1/responses", body)
    assert answer.status_code == 200, answer.text
    response = check(response_types.Response, answer.json())
    streamed = events(answering.post("/v1/responses", {**body, "stream": True}).text)
    for event in streamed:
        check(response_types.ResponseStreamEvent, event)
    with answering.http() as http:
        last = streamed[-1]["response"]["id"]
        check(response_types.Response, http.get(f"/v1/responses/{last}").json())
        again = http.get(f"/v1/responses/{last}?stream=true")
        assert events(again.text) == streamed
        items = http.get(f"/v1/responses/{response.id}/input_items").json()
        check(response_item_list.ResponseItemList, items)
        cancelled = http.post(f"/v1/responses/{response.id}/cancel")
        if fields.get("background"):
            check(response_types.Response, cancelled.json())
        else:
            assert cancelled.status_code == 400
    counted = answering.post("/v1/responses/input_tokens", body).json()
    check(response_types.InputTokenCountResponse, counted)


ASKED_CHAT = given(SAID, CHAT, st.booleans(), st.integers(1, 9))
ASKED_TEXT = given(SAID, COMPLETION, st.booleans(), st.booleans())
ASKED_RESPONSE = given(SAID, RESPONSE, st.integers(1, 9))
test_chat = _SOME(ASKED_CHAT(check_chat))
test_completions = _SOME(ASKED_TEXT(check_completions))
test_responses = _SOME(ASKED_RESPONSE(check_responses))
test_many_chats = pytest.mark.nightly(_MANY(ASKED_CHAT(check_chat)))
test_many_completions = pytest.mark.nightly(_MANY(ASKED_TEXT(check_completions)))
test_many_responses = pytest.mark.nightly(_MANY(ASKED_RESPONSE(check_responses)))


def test_failed_and_compacted_responses(answering):
    from chunkllama.errors import RequestFailedError

    body = {"model": MODEL, "input": "say(abcd)yas"}
    compacted = answering.post("/v1/responses/compact", body).json()
    check(response_types.CompactedResponse, compacted)
    after = {"model": MODEL, "input": [*compacted["output"], {"role": "user", "content": "x"}]}
    assert answering.post("/v1/responses", after).status_code == 200
    answering.engine.tokens_per_delta = 1
    answering.engine.fail_after = (2, RequestFailedError("boom", "model_nan"))
    try:
        failed = events(answering.post("/v1/responses", {**body, "stream": True}).text)
    finally:
        answering.engine.fail_after = None
    assert failed[-1]["type"] == "response.failed"
    for event in failed:
        check(response_types.ResponseStreamEvent, event)


@given(
    given_input=st.sampled_from(["a", ["a", "b"], [65, 66], [[65], [66, 67]]]),
    fields=maybe(
        encoding_format=st.sampled_from(["float", "base64"]),
        dimensions=st.integers(1, 8),
        user=st.just("u"),
    ),
)
@_SOME
def test_embeddings(answering, given_input, fields):
    answer = answering.post("/v1/embeddings", {"model": MODEL, "input": given_input, **fields})
    assert answer.status_code == 200, answer.text
    data = answer.json()
    if fields.get("encoding_format") == "base64":
        # The client decodes these before it makes its types.
        for entry in data["data"]:
            assert isinstance(entry["embedding"], str)
            entry["embedding"] = [0.0]
    check(types.CreateEmbeddingResponse, data)


def test_models(answering):
    with answering.http() as http:
        listed = http.get("/v1/models").json()
        assert listed["object"] == "list"
        for model in listed["data"]:
            check(types.Model, model)
            check(types.Model, http.get(f"/v1/models/{model['id']}").json())


BRANCHES = {"branches": ["say(red)yas", "say(green)yas"]}
JOINS = st.fixed_dictionaries(
    {"join_tokens": st.integers(1, 9)}, optional={"join": st.sampled_from(["json", "last"])}
)
BRANCHED = {
    "/v1/chat/completions": (
        {"messages": [{"role": "user", "content": "colours"}], "max_tokens": 20},
        types.chat.ChatCompletion,
        types.chat.ChatCompletionChunk,
    ),
    "/v1/completions": ({"prompt": "colours", "max_tokens": 20}, types.Completion, None),
    "/v1/responses": (
        {"input": "colours", "max_output_tokens": 20},
        response_types.Response,
        response_types.ResponseStreamEvent,
    ),
}


@pytest.mark.parametrize("path", BRANCHED)
@_SOME
@given(JOINS)
def test_branches(answering, path, joins):
    body, whole, event = BRANCHED[path]
    body = {"model": MODEL, **body, "parallel": {**BRANCHES, **joins}}
    check(whole, answering.post(path, body).json())
    for part in events(answering.post(path, {**body, "stream": True}).text):
        if event is None:
            check_text_chunk(part)
        else:
            check(event, part)


def test_a_background_response_from_its_start_to_its_end(answering):
    engine = answering.engine
    engine.gate.clear()
    body = {"model": MODEL, "input": "say(abcd)yas", "background": True}
    try:
        queued = check(response_types.Response, answering.post("/v1/responses", body).json())
        assert queued.status in ("queued", "in_progress")
        with answering.http() as http:
            path = f"/v1/responses/{queued.id}"
            check(response_types.Response, http.get(path).json())
            cancelled = check(response_types.Response, http.post(f"{path}/cancel").json())
            assert cancelled.status == "cancelled"
            replayed = events(http.get(f"{path}?stream=true&starting_after=0").text)
            for event in replayed:
                check(response_types.ResponseStreamEvent, event)
            assert replayed[-1]["type"] == "response.incomplete"
            assert http.delete(path).status_code == 200
    finally:
        engine.gate.set()


REFUSED = {
    "/v1/chat/completions": {"messages": []},
    "/v1/completions": {"prompt": 1},
    "/v1/responses": {"input": 1},
    "/v1/responses/input_tokens": {"input": 1},
    "/v1/responses/compact": {"input": 1},
    "/v1/embeddings": {"input": []},
    "/v1/batches": {"endpoint": "/v1/other"},
}
MISSING = ["models", "responses", "files", "batches"]


def test_refusals(answering):
    with answering.http() as http:
        refused = [http.post(path, json={"model": MODEL, **REFUSED[path]}) for path in REFUSED]
        assert {answer.status_code for answer in refused} == {400}
        missing = [http.get(f"/v1/{kind}/absent") for kind in MISSING]
        assert {answer.status_code for answer in missing} == {404}
    for answer in refused + missing:
        check(shared.ErrorObject, answer.json()["error"])


def test_a_stream_that_fails_has_an_error(answering):
    from chunkllama.errors import RequestFailedError

    answering.engine.fail_after = (2, RequestFailedError("boom", "model_nan"))
    answering.engine.tokens_per_delta = 1
    asked = {"model": MODEL, "stream": True}
    text = {**asked, "prompt": "say(abcd)yas"}
    chat = {**asked, "messages": [{"role": "user", "content": text["prompt"]}]}
    try:
        for path, body in (("/v1/chat/completions", chat), ("/v1/completions", text)):
            answer = answering.post(path, body)
            assert events(answer.text), answer.text
            check(shared.ErrorObject, events(answer.text)[-1]["error"])
    finally:
        answering.engine.fail_after = None


# Of other APIs, or the project's own; fine-tuning is checked in test_fine_tuning.py.
OTHER_PATHS = ("/v1/fine_tuning", "/v1/messages", "/v1/cache", "/v1/load", "/v1/unload",
               "/v1/usage", "/v1/rerank", "/v1/score")  # fmt: skip
CHECKED = {
    *BRANCHED, "/v1/embeddings", "/v1/models", "/v1/models/{model}", "/v1/files",
    "/v1/files/{file_id}", "/v1/files/{file_id}/content", "/v1/batches", "/v1/batches/{batch_id}",
    "/v1/batches/{batch_id}/cancel", "/v1/responses/input_tokens", "/v1/responses/compact",
    "/v1/responses/{response_id}", "/v1/responses/{response_id}/input_items",
    "/v1/responses/{response_id}/cancel",
}  # fmt: skip


def test_no_endpoint_is_left_out(answering):
    paths = {path for path in answering.app.openapi()["paths"] if path.startswith("/v1/")}
    ours = {path for path in paths if path.startswith(OTHER_PATHS) or path.endswith("/render")}
    assert paths - ours == CHECKED
