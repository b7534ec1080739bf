"""Request bodies read strictly, and responses written fast."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, NoReturn

import msgspec
from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from server.errors import invalid


def _refuse_constant(name: str) -> NoReturn:
    raise invalid(f"{name} is not a JSON number", code="invalid_json")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise invalid(f"{text[:20]} is too large a number", code="invalid_json")
    return value


def parse_json(raw: bytes) -> Any:
    """JSON as RFC 8259 has it: UTF-8, no NaN or Infinity, no lone surrogates; no NUL characters.

    Raises:
        ApiError: 400 with code invalid_json.
    """
    try:
        parsed = json.loads(
            raw.decode(), parse_constant=_refuse_constant, parse_float=_finite_float
        )
        if b"\\u" in raw:
            text = json.dumps(parsed, ensure_ascii=False)
            text.encode()
            if "\\u0000" in text:
                _refuse_nul(parsed)
    except UnicodeError:
        raise invalid("The body is not valid UTF-8 text", code="invalid_json") from None
    except (ValueError, RecursionError):
        raise invalid("The request body is not valid JSON", code="invalid_json") from None
    return parsed


def _refuse_nul(value: Any) -> None:
    stack = [value]
    while stack:
        node = stack.pop()
        if isinstance(node, str) and "\0" in node:
            raise invalid("NUL characters are not accepted", code="invalid_json")
        if isinstance(node, dict):
            stack.extend(node.keys())
            stack.extend(node.values())
        elif isinstance(node, list):
            stack.extend(node)


class StrictRequest(Request):
    """A request whose ``json`` accepts nothing but JSON."""

    async def json(self) -> Any:
        return parse_json(await self.body())


class JsonRoute(APIRoute):
    """A route whose bodies are read by ``parse_json``."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return handle_strictly


def json_response(payload: Mapping[str, Any]) -> Response:
    """A 200 with a JSON body."""
    return Response(msgspec.json.encode(payload), media_type="application/json")
