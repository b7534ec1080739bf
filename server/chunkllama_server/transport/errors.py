"""Every refusal and failure as an error body, OpenAI's unless the protocol has another: one
exception type, one mapping, one set of handlers."""

from __future__ import annotations

import errno
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.responses import Response

from chunkllama.errors import (
    ENDED_ON_DEMAND,
    DeadlineError,
    EngineDeadError,
    InvalidRequestError,
    OverloadedError,
    RequestFailedError,
)
from chunkllama.logger import init_logger
from chunkllama_server.api.schema.errors import ErrorBody
from chunkllama_server.config.limits import LimitsConfig

logger = init_logger(__name__)

ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    410: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    416: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
}
CLIENT_CLOSED_REQUEST = 499
# In a request's scope: paths of translated fields here, and as the client wrote them.
SPELLED = "chunkllama.spelled"
# In a request's scope: makes the response of an error, where its protocol has a shape of its own.
SHAPED = "chunkllama.shaped"
MAX_RETRY_AFTER = 30
# Code and message of what starlette refuses by itself.
_OF_STARLETTE = {
    404: ("not_found", "This server has no such path; /docs lists those that it has"),
    405: ("method_not_allowed", "The path has other methods; the header Allow names them"),
    413: ("request_too_large", "The request body is too large"),
}
_INPUT = "Input should be "  # how pydantic begins
_OBJECT = f"{_INPUT}an object"
_OBJECT_TYPES = frozenset(("dict_type", "model_type", "model_attributes_type"))


class ClientDisconnected(Exception):
    """The client closed its connection before the answer."""


class ApiError(HTTPException):
    """A refusal with everything its error body and headers need.

    Args:
        status: HTTP status.
        message: one line for the client; never a path, an address or a traceback.
        param: exact path of the offending field, e.g. ``messages[0].content[1]``.
        code: machine-readable code.
        retry_after: seconds for the Retry-After header, or None.
        kind: the error body's type; None is that of the status.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        kind: str | None = None,
    ) -> None:
        headers = {}
        if retry_after is not None:
            headers["Retry-After"] = str(min(max(retry_after, 1), MAX_RETRY_AFTER))
        super().__init__(status, message, headers)
        self.message = message
        self.param = param
        self.code = code
        self.kind = kind or ERROR_TYPES.get(status, "server_error")

    def body(self) -> ErrorBody:
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self, scope: MutableMapping[str, Any]) -> Response:
        """Make the response, in the shape of the protocol that the request's path belongs to."""
        shape = scope.get(SHAPED)
        if shape is not None:
            made: Response = shape(self)
            return made
        return Response(
            msgspec.json.encode(self.body()),
            self.status_code,
            headers=self.headers,
            media_type="application/json",
        )


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return a 400: the request is invalid and a retry cannot succeed."""
    return ApiError(400, message, param, code)


def unavailable(message: str, code: str) -> ApiError:
    """A 503 with the time after which it is worth trying again."""
    return ApiError(503, message, code=code, retry_after=2)


def storage_full(error: OSError) -> ApiError | None:
    """Return the 503 of a disk or a quota that is full; None for another error."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    return unavailable("The disk of this server is full; try again later", "storage_full")


def exceeded(limits: LimitsConfig, key: str, param: str | None = None, **values: Any) -> ApiError:
    """Return the refusal of a request that is beyond a limit, as the table of limits states it.

    Args:
        key: the setting.
        values: what its message names beside the limit.
    """
    extra = type(limits).model_fields[key].json_schema_extra
    assert isinstance(extra, dict)
    status, _, code = str(extra["answer"]).partition(" ")
    message = str(extra["text"]).format(limit=getattr(limits, key), param=param, **values)
    retry_after = 2 if status == "503" else None
    return ApiError(int(status), message, param, code or None, retry_after)


def not_found_model(name: str) -> ApiError:
    return ApiError(
        404,
        f"The model {name[:200]!r} does not exist; GET /v1/models lists those that do",
        param="model",
        code="model_not_found",
    )


def refused_model(name: str) -> ApiError:
    """A 403 with OpenAI's code for a model that the API key may not use."""
    return ApiError(
        403,
        f"This API key does not have access to model {name[:200]!r}",
        param="model",
        code="model_not_found",
    )


def as_api_error(error: Exception) -> ApiError:
    """The error body for anything a request can raise; unknown exceptions are logged and say
    nothing."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidRequestError):
        return ApiError(400, error.message, error.param, error.code)
    if isinstance(error, OverloadedError):
        return ApiError(
            429, error.message, code="engine_overloaded", retry_after=error.retry_after or 1
        )
    if isinstance(error, RequestFailedError) and error.code == "no_allowed_token":
        return ApiError(
            400,
            "No token is left: logit_bias, allowed_token_ids, bad_words and the structured output "
            "exclude each other",
            code=error.code,
        )
    if isinstance(error, RequestFailedError) and error.code == "grammar_too_complex":
        return ApiError(
            400,
            "The grammar of structured_outputs, response_format or tools became too complex to be "
            "followed; lower its repeat counts, or have less that may be left out",
            code=error.code,
        )
    if isinstance(error, RequestFailedError):
        status = 410 if error.code == ENDED_ON_DEMAND else 500
        api_error = ApiError(status, error.message, code=error.code)
        api_error.headers = {"x-should-retry": "false"}
        return api_error
    if isinstance(error, DeadlineError) and error.code == "queue_timeout":
        return unavailable(error.message, error.code)
    if isinstance(error, DeadlineError):
        api_error = ApiError(504, error.message, code=error.code)
        api_error.headers = {"x-should-retry": "false"}  # it would take as long again
        return api_error
    if isinstance(error, EngineDeadError):
        return unavailable("The engine is not available; try again", "engine_unavailable")
    full = storage_full(error) if isinstance(error, OSError) else None
    if full is not None:
        logger.error("request failed: %s", error)
        return full
    logger.error("request failed", exc_info=error)
    return ApiError(500, "Internal server error; quote the x-request-id header", code="internal")


def field_path(location: Sequence[str | int], body: Any, error_type: str) -> tuple[str, int]:
    """Turn pydantic's location into the path a client would write, and its depth in the body.

    Pydantic's locations also name union members (``content.str``); a part that is not found in the
    body is such a name, except the last part of a missing or superfluous field.
    """
    path, depth, current = "", 0, body
    for position, part in enumerate(location):
        is_last = position == len(location) - 1
        if isinstance(part, int) and isinstance(current, list) and part < len(current):
            current = current[part]
            path += f"[{part}]"
        elif (
            isinstance(part, str)
            and isinstance(current, dict)
            and (part in current or (is_last and error_type == "missing"))
        ):
            current = current.get(part)
            path += f".{part}" if path else part
        else:
            continue
        depth += 1
    return path, depth


def from_validation_error(error: RequestValidationError) -> ApiError:
    """FastAPI's 422 as OpenAI's 400: the most specific of pydantic's complaints, with its exact
    path."""
    best: tuple[tuple[bool, int], str, list[str]] | None = None
    for entry in error.errors():
        location = list(entry["loc"])
        source = location.pop(0) if location else "body"
        if source == "body" and not location and isinstance(error.body, bytes):
            return invalid("Send a JSON object with Content-Type: application/json")
        if source == "body" and not isinstance(error.body, FormData):
            path, depth = field_path(location, error.body, entry["type"])
        else:
            path, depth = ".".join(map(str, location)), len(location)
        # Of a union's members only the right one complains of more than the type.
        rank = (not entry["type"].endswith("_type"), depth)
        message = _OBJECT if entry["type"] in _OBJECT_TYPES else str(entry["msg"])
        others = best[2] if best is not None and best[1] == path else []
        if best is None or rank > best[0]:
            best = (rank, path, [message, *others])
        elif others:
            others.append(message)
    assert best is not None, "a validation error without entries"
    _, path, messages = best
    message = _alternatives(messages)
    if "Expected UploadFile" in message:
        message = "must be a file; its part of the form needs a filename"
    if not path:
        return invalid("The request body must be a JSON object")
    return invalid(f"{path}: {message}", param=path)


def _alternatives(messages: list[str]) -> str:
    """What a value may be by all members of a union, the most specific first."""
    first, *others = dict.fromkeys(messages)
    if first.startswith(_INPUT):
        first = " or ".join([first, *(m[len(_INPUT) :] for m in others if m.startswith(_INPUT))])
    return first


def spelled_path(spelled: Mapping[str, str], path: str) -> str:
    """A field's path as the client wrote it, where it was translated."""
    for ours in sorted(spelled, key=len, reverse=True):
        if path == ours or path.startswith((f"{ours}.", f"{ours}[")):
            return spelled[ours] + path[len(ours) :]
    return path


def as_spelled(error: ApiError, request: Request) -> ApiError:
    """The error with the name of its field that the client sent, where it was translated."""
    ours = error.param
    if ours:
        error.param = spelled_path(request.scope.get(SPELLED, {}), ours)
        if error.message.startswith(ours):
            error.message = error.param + error.message[len(ours) :]
    return error


def from_http_exception(error: HTTPException) -> ApiError:
    """Starlette's own refusals (unknown path, wrong method, body over the limit)."""
    if isinstance(error, ApiError):
        return error
    code, message = _OF_STARLETTE.get(error.status_code, (None, str(error.detail)))
    api_error = ApiError(error.status_code, message, code=code)
    api_error.headers = error.headers
    return api_error


def install_error_handlers(app: FastAPI) -> None:
    """Every exception that is foreseen becomes an OpenAI error body; RequestInfoMiddleware answers
    the others."""

    async def on_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return as_spelled(from_validation_error(error), request).response(request.scope)

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return as_spelled(from_http_exception(error), request).response(request.scope)

    async def on_any(request: Request, error: Exception) -> Response:
        return as_spelled(as_api_error(error), request).response(request.scope)

    async def on_disconnect(_: Request, __: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    app.add_exception_handler(ClientDisconnected, on_disconnect)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)
    for known in (
        InvalidRequestError,
        OverloadedError,
        RequestFailedError,
        DeadlineError,
        EngineDeadError,
    ):
        app.add_exception_handler(known, on_any)
