"""Correct the OpenAPI document that FastAPI derives: error bodies, statuses and streams."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter
from starlette.responses import Response

from chunkllama_server.api.schema.anthropic_response import AnthropicErrorBody, AnthropicEvent
from chunkllama_server.api.schema.chat_response import ChatCompletionChunk
from chunkllama_server.api.schema.completions import Completion
from chunkllama_server.api.schema.errors import ErrorBody
from chunkllama_server.api.schema.ollama import OllamaError
from chunkllama_server.api.schema.response_object import ResponseEvent
from chunkllama_server.api.schema.tgi import TgiError
from chunkllama_server.transport.body import json_response
from chunkllama_server.transport.error_shapes import OVERLOADED

_DESCRIPTIONS = {
    400: "The request is malformed, out of range, or does not fit the context.",
    401: "No API key, or a wrong one.",
    403: "The API key may not use this model or path.",
    404: "Unknown model or path.",
    405: "Wrong method for this path.",
    408: "The request arrived too slowly.",
    409: "It is in use; try again later.",
    413: "The body is over the size limit.",
    415: "The body is compressed.",
    416: "The Range header asks for no part of the file.",
    422: "The request is malformed, out of range, or does not fit the context.",
    424: "The generation failed; other requests continue.",
    429: "The queue is full or a quota is used up; Retry-After says when to try again.",
    500: "The request failed; other requests continue.",
    OVERLOADED: "The queue is full; Retry-After says when to try again.",
    503: "Starting, restarting, draining or busy; Retry-After says when to try again.",
}
Responses = dict[int | str, dict[str, Any]]
_COMPONENTS = "#/components/schemas/{model}"
# FastAPI collects the schemas of answers, not of events.
_EVENTS = (ChatCompletionChunk, Completion, ResponseEvent, AnthropicEvent)


def refusals(*statuses: int) -> Responses:
    """Document error responses."""
    return {
        status: {"model": ErrorBody, "description": _DESCRIPTIONS[status]} for status in statuses
    }


def answers(model: Any, event: Any = None) -> Responses:
    """Document a POST's answers: 200 as JSON (and as events), and every refusal.

    Args:
        model: schema of the JSON answer.
        event: schema of one event's data when the endpoint streams.
    """
    success: dict[str, Any] = {"model": model, "description": "The answer."}
    if event is not None:
        kinds = [{"$ref": _COMPONENTS.format(model=name)} for name in (event.__name__, "ErrorBody")]
        json_data = {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {"anyOf": kinds},
        }
        success["description"] = "The answer; with stream, as server-sent events."
        success["content"] = {
            "text/event-stream": {
                "schema": {
                    "description": "One event.",
                    "type": "object",
                    "properties": {
                        "event": {"type": "string"},
                        "data": {"anyOf": [{"const": "[DONE]"}, json_data]},
                    },
                    "required": ["data"],
                }
            }
        }
    return {200: success, **refusals(400, 401, 403, 404, 405, 408, 413, 415, 429, 500, 503)}


def _with_errors(documented: Responses, model: Any, *more: int) -> Responses:
    """Replace the schema of all errors."""
    errors = [int(status) for status in documented if status != 200] + list(more)
    kinds: Responses = {
        status: {"model": model, "description": _DESCRIPTIONS[status]} for status in errors
    }
    return {**documented, **kinds}


def anthropic_answers(model: Any, event: Any = None) -> Responses:
    """As ``answers``, with errors and events in Anthropic's shape."""
    documented = answers(model, event)
    if event is not None:
        stream = documented[200]["content"]["text/event-stream"]["schema"]
        stream["properties"]["data"] = {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {"$ref": _COMPONENTS.format(model=event.__name__)},
        }
    return _with_errors(documented, AnthropicErrorBody, OVERLOADED)


def ollama_answers(model: Any, *, is_get: bool = False) -> Responses:
    """As ``answers``, with Ollama's errors, and with streams as lines of JSON."""
    if is_get:
        success: Responses = {200: {"model": model, "description": "The answer."}}
        return _with_errors({**success, **refusals(401, 405)}, OllamaError)
    documented = answers(model)
    documented[200]["content"] = {"application/x-ndjson": {}}
    return _with_errors(documented, OllamaError)


def tgi_answers(model: Any, *, streams: bool = False) -> Responses:
    """As ``answers``, with TGI's errors."""
    documented = answers(model)
    if streams:
        documented[200]["content"] = {"text/event-stream": {}}
    return _with_errors(documented, TgiError, 422, 424)


def _event_schemas(events: Sequence[Any]) -> dict[str, Any]:
    """Return the schemas of events, and of what they contain."""
    inputs = [(event.__name__, "serialization", TypeAdapter(event)) for event in events]
    _, schema = TypeAdapter.json_schemas(inputs, ref_template=_COMPONENTS)  # type: ignore[arg-type]
    return dict(schema.get("$defs", {}))


def _require_key(schema: dict[str, Any], keyed: Literal["all", "changes"]) -> None:
    schema["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    if keyed == "all":
        schema["security"] = [{"bearer": []}]
        return
    for path in schema["paths"].values():
        for method, operation in path.items():
            if method != "get":
                operation["security"] = [{"bearer": []}]


def install_openapi(
    app: FastAPI,
    root_path: str,
    *,
    keyed: Literal["all", "changes", "nothing"],
    events: Sequence[Any] = _EVENTS,
) -> None:
    """Serve a document without FastAPI's own 422, and with the key that requests need.

    Building it takes a third of a second, so a thread does.

    Args:
        keyed: the requests that need a key.
        events: types of the streams' events.
    """
    building = threading.Lock()

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
                servers=[{"url": root_path}] if root_path else None,
            )
            for path in schema["paths"].values():
                for operation in path.values():
                    if "HTTPValidationError" in str(operation["responses"].get("422")):
                        del operation["responses"]["422"]  # FastAPI's; TGI's own stays
            schemas = schema["components"]["schemas"]
            schemas.pop("HTTPValidationError", None)
            schemas.pop("ValidationError", None)
            schemas.update(_event_schemas(events))
            if keyed != "nothing":
                _require_key(schema, keyed)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]

    @app.get("/openapi.json", include_in_schema=False)
    def read_document() -> Response:
        with building:
            return json_response(document())
