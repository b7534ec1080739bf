"""Requests to an application without a socket or a thread: what a test of many needs."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any


class InProcess:
    """Posts JSON to an application that runs on an event loop of its own.

    Args:
        app: what a server would serve; it has started.
        loop: runs nothing between the calls.
        headers: of every request.
    """

    def __init__(
        self, app: Any, loop: asyncio.AbstractEventLoop, headers: Mapping[str, str]
    ) -> None:
        self._app = app
        self._loop = loop
        given = {"host": "127.0.0.1", "content-type": "application/json", **headers}
        self._headers = [(name.encode(), value.encode()) for name, value in given.items()]

    def post(self, path: str, body: Any) -> tuple[int, bytes]:
        """Status and body of the answer."""
        return self._loop.run_until_complete(self._post(path, json.dumps(body).encode()))

    async def _post(self, path: str, body: bytes) -> tuple[int, bytes]:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [*self._headers, (b"content-length", str(len(body)).encode())],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
            "state": {},
        }
        status, parts = 0, list[bytes]()
        is_read, never = False, asyncio.Event()

        async def receive() -> dict[str, Any]:
            nonlocal is_read
            if is_read:  # the client stays
                await never.wait()
            is_read = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Mapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                parts.append(message.get("body", b""))

        await self._app(scope, receive, send)
        return status, b"".join(parts)


@contextlib.contextmanager
def in_process(app: Any, headers: Mapping[str, str] | None = None) -> Iterator[InProcess]:
    """The started application while the block runs."""
    loop = asyncio.new_event_loop()
    life = app.router.lifespan_context(app)
    loop.run_until_complete(life.__aenter__())
    try:
        yield InProcess(app, loop, headers or {})
    finally:
        loop.run_until_complete(life.__aexit__(None, None, None))
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
