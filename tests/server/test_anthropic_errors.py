"""Errors below /v1/messages: Anthropic's body, its client's exceptions, the path of the field."""

from __future__ import annotations

import anthropic
import pytest
from anthropic_helpers import PATH, WEATHER, body_of, say, sdk
from fake_engine import MODEL

from chunkllama.errors import EngineDeadError, OverloadedError, RequestFailedError
from chunkllama_server.config.tenants import TenantQuotas

HELLO = [{"role": "user", "content": "hi"}]
IMAGE = {
    "type": "image",
    "source": {"type": "base64", "media_type": "image/png", "data": "aGk="},
}
PDF = {
    "type": "document",
    "source": {"type": "base64", "media_type": "application/pdf", "data": "aGk="},
}


def check_error(response, status: int, kind: str) -> str:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"type", "error", "request_id"}
    assert body["type"] == "error"
    assert set(body["error"]) == {"type", "message"}
    assert body["error"]["type"] == kind
    assert body["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]
    return body["error"]["message"]


def user(*blocks) -> list[dict]:
    return [{"role": "user", "content": list(blocks)}]


MARK = {"type": "ephemeral"}
MARKED = {"type": "text", "text": "a", "cache_control": MARK}
LONG_MARKED = {"type": "text", "text": "a", "cache_control": {**MARK, "ttl": "1h"}}
UNENFORCEABLE = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
SEARCH = {"type": "web_search_20250305", "name": "x"}
INVALID = [
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": HELLO, "max_tokens": None}, "max_tokens"),
    ({"messages": HELLO, "max_tokens": -1}, "max_tokens"),
    ({"messages": HELLO, "max_tokens": "five"}, "max_tokens"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": user(IMAGE)}, "messages[0].content[0]"),
    ({"messages": user({"type": "text", "text": "a"}, PDF)}, "messages[0].content[1]"),
    ({"messages": HELLO, "system": [IMAGE]}, "system[0]"),
    ({"messages": user({"type": "tool_result"})}, "messages[0].content[0].tool_use_id"),
    ({"messages": HELLO, "temperature": 3}, "temperature"),
    ({"messages": HELLO, "top_k": -1}, "top_k"),
    ({"messages": HELLO, "stop_sequences": ["a"] * 65}, "stop_sequences"),
    ({"messages": HELLO, "stop_sequences": ["a" * 256] * 5}, "stop_sequences"),
    ({"messages": HELLO, "tools": [WEATHER] * 1025}, "tools"),
    ({"messages": HELLO, "tools": [{"input_schema": {}}]}, "tools[0].name"),
    ({"messages": HELLO, "tools": [{"type": "custom", "input_schema": {}}]}, "tools[0].name"),
    ({"messages": HELLO, "tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name"),
    ({"messages": HELLO, "tools": [WEATHER, WEATHER]}, "tools[1].name: 'weather'"),
    ({"messages": HELLO, "tools": [{"type": "function", "function": {}}]}, "tools[0].type"),
    (
        {"messages": HELLO, "tools": [SEARCH], "tool_choice": {"type": "tool", "name": "x"}},
        "tool_choice: All tools of the request",
    ),
    ({"messages": HELLO, "tool_choice": "auto"}, "tool_choice: Input should be an object"),
    ({"messages": HELLO, "tool_choice": {"type": "any"}}, "tool_choice"),
    ({"messages": HELLO, "tools": [WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
    (
        {"messages": HELLO, "tools": [WEATHER], "tool_choice": {"type": "tool", "name": "b"}},
        "tool_choice.name",
    ),
    (
        {
            "messages": HELLO,
            "tools": [{**WEATHER, "strict": True, "input_schema": UNENFORCEABLE}],
            "tool_choice": {"type": "any"},
        },
        "tools[0].input_schema",
    ),
    ({"messages": HELLO, "thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
    ({"messages": HELLO, "thinking": {"type": "on"}}, "thinking.type"),
    (
        {"messages": HELLO, "thinking": {"type": "enabled", "budget_tokens": 9}},
        "thinking.budget_tokens",
    ),
    ({"messages": user({"type": "sound", "x": 1})}, "messages[0].content[0]"),
    (
        {"messages": user({"type": "tool_use", "id": "a", "name": "b", "input": {}})},
        "messages[0].content[0]",
    ),
    ({"messages": HELLO, "mcp_servers": [{"url": "x"}]}, "mcp_servers"),
    ({"messages": HELLO, "container": "c"}, "container"),
    ({"messages": user(*[MARKED] * 5)}, "messages[0].content[4].cache_control"),
    (
        {"messages": user({"type": "tool_result", "tool_use_id": "t", "content": [MARKED] * 5})},
        "messages[0].content[0].content[4].cache_control",
    ),
    ({"messages": [*user(IMAGE), {"role": "assistant", "content": "a"}]}, "messages[0].content[0]"),
    ({"messages": user(MARKED, LONG_MARKED)}, "messages[0].content[1].cache_control.ttl"),
    (
        {"messages": user({**MARKED, "cache_control": {**MARK, "ttl": "2h"}})},
        "messages[0].content[0].cache_control.ttl",
    ),
    ({"messages": [*HELLO, {"role": "assistant", "content": "a "}]}, "messages[1].content"),
    ({"messages": user({"type": "text", "text": "x" * 3000})}, "messages"),
]


@pytest.mark.parametrize(("fields", "path"), INVALID)
def test_invalid_requests_name_the_field(server, fields, path) -> None:
    response = server.post(PATH, {"model": MODEL, "max_tokens": 9, **fields})
    message = check_error(response, 400, "invalid_request_error")
    assert message.startswith(f"{path}: ") or path in message
    assert not server.engine.requests


def test_an_answer_of_the_past_may_be_empty(server) -> None:
    """Clients send back the content that they got, which is [] where the answer was."""
    messages = [*HELLO, {"role": "assistant", "content": []}, *say("x")]
    assert server.post(PATH, body_of(messages)).json()["content"][0]["text"] == "x"


def test_a_budget_between_tools_may_be_larger_than_an_answer(server) -> None:
    thinking = {"type": "enabled", "budget_tokens": 2000}
    body = {"model": MODEL, "max_tokens": 9, "messages": HELLO, "thinking": thinking}
    beta = {"anthropic-beta": "a-1, interleaved-thinking-2025-05-14"}
    assert server.post(PATH, body, **beta).status_code == 200
    count = {"model": MODEL, "messages": HELLO, "thinking": thinking}
    assert server.post(f"{PATH}/count_tokens", count).status_code == 200


def test_the_client_reads_the_error(server) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        sdk(server).messages.create(model=MODEL, max_tokens=9, messages=user(IMAGE))
    assert "messages[0].content[0]" in str(caught.value)
    with pytest.raises(anthropic.NotFoundError) as missing:
        sdk(server).messages.create(model="claude", max_tokens=9, messages=HELLO)
    assert missing.value.type == "not_found_error"


def test_media_of_the_past_are_named_in_the_prompt(server, text_parts) -> None:
    messages = [*user(IMAGE), {"role": "assistant", "content": "a cat"}, *say("x")]
    response = server.post(PATH, body_of(messages))
    assert response.status_code == 200
    assert response.headers["x-chunkllama-repaired-history"] == "messages[0].content[0]"
    ids = server.engine.requests[-1].prompt_token_ids
    assert "[image]" in text_parts[0].decode(ids, skip_special_tokens=False)


def test_media_in_results_of_tools_are_named_in_the_prompt(server, text_parts) -> None:
    """A result is data, also in the turn to be answered: the client cannot send another."""
    result = {"type": "tool_result", "tool_use_id": "t", "content": [MARKED, IMAGE, PDF]}
    response = server.post(PATH, body_of(user(result)))
    assert response.status_code == 200, response.text
    assert response.headers["x-chunkllama-repaired-history"] == (
        "messages[0].content[0].content[1], messages[0].content[0].content[2]"
    )
    ids = server.engine.requests[-1].prompt_token_ids
    shown = text_parts[0].decode(ids, skip_special_tokens=False)
    assert "tool\na\n[image]\n[document]<|im_end|>" in shown


def test_keys(start_server) -> None:
    guarded = start_server(api_keys={"a": "ka"})
    message = check_error(guarded.post(PATH, body_of(HELLO)), 401, "authentication_error")
    assert "API key" in message
    with pytest.raises(anthropic.AuthenticationError):
        sdk(guarded, "wrong").messages.create(model=MODEL, max_tokens=9, messages=HELLO)
    assert sdk(guarded, "ka").messages.create(model=MODEL, max_tokens=9, messages=HELLO).content
    bearer = sdk(guarded, None, auth_token="ka")
    assert bearer.messages.create(model=MODEL, max_tokens=9, messages=HELLO).content


def test_too_large_a_body(start_server) -> None:
    small = start_server(max_body_bytes=2000)
    messages = user({"type": "text", "text": "x" * 3000})
    check_error(small.post(PATH, body_of(messages)), 413, "request_too_large")


def test_a_used_up_rate_says_when_to_come_again(start_server) -> None:
    limited = start_server(api_keys={"a": "ka"}, quotas={"a": TenantQuotas(requests_per_minute=1)})
    headers = {"x-api-key": "ka"}
    assert limited.post(PATH, body_of(HELLO), **headers).status_code == 200
    refused = limited.post(PATH, body_of(HELLO), **headers)
    check_error(refused, 429, "rate_limit_error")
    assert int(refused.headers["retry-after"]) >= 1


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (OverloadedError("full", 7), 529, "overloaded_error"),
        (EngineDeadError("gone"), 503, "overloaded_error"),
        (RequestFailedError("boom", "model_nan"), 500, "api_error"),
    ],
)
def test_failures_of_the_engine(server, error, status, kind) -> None:
    server.engine.fail_with = error
    for stream in (False, True):
        response = server.post(PATH, body_of(HELLO, stream=stream))
        check_error(response, status, kind)
        if status in (529, 503):
            assert int(response.headers["retry-after"]) >= 1


def test_a_failure_in_a_stream_is_an_event(server) -> None:
    server.engine.fail_after = (2, RequestFailedError("boom", "model_nan"))
    text = server.post(PATH, body_of(say("abcdef"), stream=True)).text
    assert text.startswith("event: message_start\n")
    assert '"type":"api_error"' in text.rpartition("event: error\ndata: ")[2]
    assert "message_stop" not in text
    stream = sdk(server).messages.stream(model=MODEL, max_tokens=9, messages=say("abcdef"))
    with pytest.raises(anthropic.APIStatusError), stream as got:
        got.until_done()


def test_paths_and_methods(server) -> None:
    with server.http() as http:
        check_error(http.get(PATH), 405, "invalid_request_error")
        message = check_error(http.post(f"{PATH}/nothing", json={}), 404, "not_found_error")
        assert message.startswith("This server has no such path")
        check_error(http.post(PATH, content=b"{"), 400, "invalid_request_error")
        for path in ("/messages", "//v1/messages/", "/v1/v1/messages"):
            assert http.post(path, json=body_of(HELLO)).status_code == 200
        assert "type" not in http.post("/v1/nothing", json={}).json()


def test_errors_of_models_are_in_the_clients_shape(server, start_server) -> None:
    version = {"anthropic-version": "2023-06-01"}
    with server.http() as http:
        missing = http.get("/v1/models/nothing", headers=version)
        check_error(missing, 404, "not_found_error")
        check_error(http.post("/v1/models", headers=version), 405, "invalid_request_error")
        assert "code" in http.get("/v1/models/nothing").json()["error"]
    with start_server(api_keys={"a": "ka"}).http() as http:
        check_error(http.get("/v1/models", headers=version), 401, "authentication_error")
    with pytest.raises(anthropic.NotFoundError) as caught:
        sdk(server).models.retrieve("nothing")
    assert caught.value.type == "not_found_error"


def test_the_protocol_can_be_turned_off(start_server) -> None:
    plain = start_server(protocols="none")
    check_error(plain.post(PATH, body_of(HELLO)), 404, "not_found_error")
    assert plain.chat().status_code == 200
