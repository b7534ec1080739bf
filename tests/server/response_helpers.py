"""Events of a streamed response."""

from __future__ import annotations

import json

from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

PATH = "/v1/responses"
EVENT = TypeAdapter(ResponseStreamEvent)


def events_of(text: str) -> list[dict]:
    events = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: {")]
    for event in events:
        EVENT.validate_python(event)
    return events
