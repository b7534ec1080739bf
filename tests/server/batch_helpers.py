"""Files of lines, and batches of them, by openai-python."""

from __future__ import annotations

import json
import time
from typing import Any

import msgspec
import openai
from fake_engine import MODEL

from chunkllama_server.api.batch.disk import encode_result

CHAT = "/v1/chat/completions"
BUDGET = 1 << 30  # the default of file_bytes


def line(custom_id: str, content: str = "say(hi)yas", url: str = CHAT, **body: Any) -> dict:
    given = {"model": MODEL, "messages": [{"role": "user", "content": content}], **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": given}


def encoded(lines: list[Any]) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in lines)


def upload(client: openai.OpenAI, lines: list[Any]):
    return client.files.create(file=("in.jsonl", encoded(lines)), purpose="batch")


def begin(client: openai.OpenAI, lines: list[Any], endpoint: Any = CHAT, window: Any = "24h"):
    stored = upload(client, lines)
    return client.batches.create(
        input_file_id=stored.id, endpoint=endpoint, completion_window=window
    )


def ended(client: openai.OpenAI, batch):
    deadline = time.monotonic() + 60
    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        assert time.monotonic() < deadline, batch
        time.sleep(0.02)
        batch = client.batches.retrieve(batch.id)
    return batch


def answers(client: openai.OpenAI, file_id: str | None) -> list[dict]:
    if file_id is None:
        return []
    return [json.loads(row) for row in client.files.content(file_id).text.splitlines()]


def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def write_record(store, record) -> None:
    """Store what a job has become in the folder of a server that has ended."""
    store._disk.place(record.tenant, record.id, "json").write_bytes(msgspec.json.encode(record))


def runner_of(server):
    return server.app.state.context.batches


def held_job(server, lines: list[dict], key: str = "none"):
    """A batch whose lines wait in the engine."""
    server.engine.gate.clear()
    with server.client(key) as client:
        batch = begin(client, lines)
    until(lambda: server.engine.requests)
    return batch


def encoded_result(number: int, custom_id: str) -> bytes:
    """A line of the gathered results of a job."""
    body = {"usage": {"prompt_tokens": 5, "completion_tokens": 2}}
    answer = {"status_code": 200, "request_id": "q", "body": body}
    return encode_result(
        number, {"id": "x", "custom_id": custom_id, "error": None, "response": answer}
    )
