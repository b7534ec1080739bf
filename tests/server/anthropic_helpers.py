"""Requests and events of Anthropic's Messages API, for its tests."""

from __future__ import annotations

import json
from typing import Any

from fake_engine import MODEL
from pydantic import TypeAdapter

PATH = "/v1/messages"
WEATHER = {
    "name": "weather",
    "description": "Tell the weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}


def sdk(server, key: str | None = "none", **options) -> Any:
    import anthropic

    http = anthropic.DefaultHttpxClient(verify=False)  # reading certificates takes long
    return anthropic.Anthropic(
        base_url=server.url, api_key=key, max_retries=0, http_client=http, **options
    )


def say(text: str) -> list[dict]:
    return [{"role": "user", "content": f"say({text})yas"}]


def body_of(messages, **fields) -> dict:
    return {"model": MODEL, "max_tokens": 200, "messages": messages, **fields}


def events_of(server, body: dict) -> list[dict]:
    """Events of a stream, each checked against the published types."""
    from anthropic.types import RawMessageStreamEvent

    types = TypeAdapter(RawMessageStreamEvent)
    response = server.post(PATH, {**body, "stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    events = []
    for block in response.text.strip().split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        types.validate_python(event)
        events.append(event)
    return events


def accumulated(events: list[dict]) -> dict:
    """The message that the events add up to, after checking their order."""
    kinds = [event["type"] for event in events]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    message = events[0]["message"]
    assert message["content"] == [] and message["stop_reason"] is None
    open_index = None
    texts: list[str] = []
    for event in events[1:-2]:
        if event["type"] == "content_block_start":
            assert open_index is None and event["index"] == len(message["content"])
            open_index = event["index"]
            message["content"].append(event["content_block"])
            texts.append("")
            continue
        assert event["index"] == open_index
        block = message["content"][open_index]
        if event["type"] == "content_block_stop":
            open_index = None
            if block["type"] == "tool_use":
                block["input"] = json.loads(texts[-1] or "{}")
            continue
        delta = event["delta"]
        if delta["type"] == "input_json_delta":
            texts[-1] += delta["partial_json"]
        elif delta["type"] == "signature_delta":
            block["signature"] = delta["signature"]
        else:
            name = delta["type"].removesuffix("_delta")
            block[name] += delta[name]
    assert open_index is None
    message |= events[-2]["delta"]
    message["usage"] |= events[-2]["usage"]
    return message


def without_ids(message: dict) -> dict:
    content = [{k: v for k, v in block.items() if k != "id"} for block in message["content"]]
    return {**message, "id": "", "content": content}


def prompt_of(server, text_parts) -> str:
    ids = server.engine.requests[-1].prompt_token_ids
    return text_parts[0].decode(ids, skip_special_tokens=False)
