"""Accept the paths and methods that clients commonly send: one canonical path for each endpoint."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fastapi import APIRouter, FastAPI
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SLASHES = re.compile(r"/{2,}")
# What follows is a name, in which slashes count.
_BEFORE_NAME = re.compile(r"/+admin/+cache/+tenants/")
_REPEATED = re.compile(r"^(?:/v1)+(?=/v1/)")
# First parts of paths below /v1, and of paths that are not.
_BELOW_V1 = frozenset(
    ("chat", "completions", "responses", "embeddings", "models", "messages", "files", "batches")
)
_BESIDE_V1 = frozenset(
    (
        *("tokenize", "detokenize", "health", "ping", "metrics", "version", "api"),
        *("server_info", "model_info"),
    )
)
_ALIASES = {"/ping": "/health"}  # as SageMaker, vLLM and SGLang name it
_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
# In a request's scope: its method, where it is served as another one.
ASKED_METHOD = "chunkllama.asked_method"


def canonical_path(path: str, root_path: str, *, keep_root: bool = True) -> str:
    """The path of the endpoint that is meant.

    Repeated and trailing slashes are dropped, and /v1 is added or removed where a client's base URL
    has it once too few or too often. Other names of an endpoint lead to it. A tenant's name at the
    end stays as it is, or a call for ``a/`` would reach ``a``. A ``root_path`` that a
    proxy has not removed stays, unless ``keep_root`` is false.
    """
    rest = path.removeprefix(root_path)
    root = path[: len(path) - len(rest)]
    if rest and not rest.startswith("/"):
        root, rest = "", path
    before = _BEFORE_NAME.match(rest)
    if before is not None:
        rest = _SLASHES.sub("/", before[0]) + rest[before.end() :]
        return root + rest if keep_root else rest
    rest = _SLASHES.sub("/", rest).rstrip("/") or "/"
    rest = _REPEATED.sub("", rest, count=1)
    below = rest.removeprefix("/v1")
    first = below.split("/", 2)[1] if below.startswith("/") else ""
    if first in _BELOW_V1:
        rest = f"/v1{below}"
    elif first in _BESIDE_V1:
        rest = below
    rest = _ALIASES.get(rest, rest)
    return root + rest if keep_root else rest


class PathMiddleware:
    """Routes each request by its ``canonical_path``."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = {**scope, "path": canonical_path(scope["path"], self._root_path)}
        await self._app(scope, receive, send)


def add_routes(app: FastAPI, *routers: APIRouter) -> None:
    """Serve the routes of routers as they are.

    ``include_router`` makes each again for the application, when one is first looked for: a third
    of a second in all, in the first request.
    """
    for router in routers:
        app.router.routes.extend(router.routes)


class MethodMiddleware:
    """Answers HEAD like GET without a body, and OPTIONS with the methods of the path.

    A browser's preflight is answered by the CORS middleware where origins are configured. Without
    them the answer here names no origin, so the browser refuses the call.

    Args:
        routes: of the application, in which a path's methods are looked up.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute]) -> None:
        self._app = app
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = scope["method"] if scope["type"] == "http" else ""
        if method == "HEAD":
            served = {**scope, "method": "GET", ASKED_METHOD: "HEAD"}
            await self._app(served, receive, _without_body(send))
        elif method == "OPTIONS" and (methods := self._methods(scope)):
            if "GET" in methods:
                methods.insert(1, "HEAD")
            allowed = ", ".join([*methods, "OPTIONS"])
            await Response(status_code=204, headers={"allow": allowed})(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _methods(self, scope: Scope) -> list[str]:
        return [
            method
            for method in _METHODS
            if any(
                route.matches({**scope, "method": method})[0] is Match.FULL
                for route in self._routes
            )
        ]


def _without_body(send: Send) -> Send:
    async def send_head(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await send(message)

    return send_head


# What clients send that do not name JSON: nothing, curl's default, and the generic types.
_UNNAMED = frozenset(
    ("", "application/x-www-form-urlencoded", "text/plain", "application/octet-stream", "text/json")
)


def names_json(headers: Headers) -> bool:
    """Whether a body may be read as JSON by its Content-Type.

    A type that a web page can send to another site without asking counts as JSON only where no
    browser sent it: browsers name the page's origin.
    """
    given = headers.get("content-type", "").partition(";")[0].strip().lower()
    if given == "application/json" or (given.startswith("application/") and given[-5:] == "+json"):
        return True
    return given in _UNNAMED and "origin" not in headers and "sec-fetch-site" not in headers
