"""Bodies of errors in the shape of the protocol whose path was asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec
from starlette.responses import Response

from chunkllama_server.api.schema.anthropic_response import AnthropicErrorBody
from chunkllama_server.api.schema.ollama import OllamaError
from chunkllama_server.api.schema.tgi import TgiError
from chunkllama_server.transport.errors import ApiError

OVERLOADED = 529  # Anthropic's own status of a full queue
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    OVERLOADED: "overloaded_error",
}


# TGI's own names of failures, and those of statuses that it answers without a body.
_TGI_TYPES = {
    400: "validation",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    413: "validation",
    415: "validation",
    429: "overloaded",
    431: "validation",
    503: "overloaded",
    504: "timeout",
}


@dataclass(frozen=True, slots=True)
class Shape:
    """A protocol's own form of errors.

    Attributes:
        response: makes the response of an error of the request with this id.
        id_header: names the request's id in every response, beside x-request-id.
    """

    response: Callable[[ApiError, str], Response]
    id_header: str | None = None


def _with_param(error: ApiError) -> str:
    """The message with the path of the field, for shapes without a place for it."""
    if error.param and error.param not in error.message:
        return f"{error.param}: {error.message}"
    return error.message


def anthropic_status(error: ApiError) -> int:
    """The status of an error: a full queue has a status of its own, apart from used-up rates."""
    return OVERLOADED if error.code == "engine_overloaded" else error.status_code


def anthropic_body(error: ApiError, request_id: str | None = None) -> AnthropicErrorBody:
    """The error as Anthropic's API writes it; its message begins with the field's path."""
    status = anthropic_status(error)
    fallback = "api_error" if status >= 500 else "invalid_request_error"
    kind = _ANTHROPIC_TYPES.get(status, fallback)
    return {
        "type": "error",
        "error": {"type": kind, "message": _with_param(error)},
        "request_id": request_id,
    }


def _anthropic(error: ApiError, request_id: str) -> Response:
    body = msgspec.json.encode(anthropic_body(error, request_id))
    status = anthropic_status(error)
    return Response(body, status, error.headers, media_type="application/json")


def _ollama(error: ApiError, request_id: str) -> Response:
    body: OllamaError = {"error": _with_param(error)}
    return Response(
        msgspec.json.encode(body),
        error.status_code,
        error.headers,
        media_type="application/json",
    )


def tgi_body(error: ApiError) -> TgiError:
    """The error as TGI writes it."""
    kind = _TGI_TYPES.get(error.status_code, "generation")
    return {"error": _with_param(error), "error_type": kind}


def _tgi(error: ApiError, request_id: str) -> Response:
    status = {400: 422, 500: 424}.get(error.status_code, error.status_code)
    body = msgspec.json.encode(tgi_body(error))
    return Response(body, status, error.headers, media_type="application/json")


_MODELS = "/v1/models"
# Paths whose errors, and those of the paths below them, have a shape of their own.
_SHAPES: dict[str, Shape] = {
    "/v1/messages": Shape(_anthropic, "request-id"),
    "/api": Shape(_ollama),
    "/generate": Shape(_tgi),
    "/generate_stream": Shape(_tgi),
    "/embed": Shape(_tgi),
    "/info": Shape(_tgi),
}


def error_shape(path: str, headers: Mapping[bytes, bytes]) -> Shape | None:
    """The shape of a request's errors; None is OpenAI's.

    Args:
        path: canonical, without its root.
        headers: by names in lower case; Anthropic's clients say on paths of both APIs whose they
            are.
    """
    if path == "/":
        return _SHAPES["/generate"]
    if b"anthropic-version" in headers and (path == _MODELS or path.startswith(f"{_MODELS}/")):
        return _SHAPES["/v1/messages"]
    for prefix, shape in _SHAPES.items():
        if path == prefix or path.startswith(f"{prefix}/"):
            return shape
    return None
