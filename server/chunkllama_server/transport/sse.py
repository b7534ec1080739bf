"""Server-sent events with back-pressure, and the end of work whose client has gone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from chunkllama_server.transport.errors import ClientDisconnected, as_api_error

T = TypeVar("T")
_encode = msgspec.json.encode
DONE = b"data: [DONE]\n\n"


def sse(payload: Mapping[str, Any], event: str | None = None) -> bytes:
    """One server-sent event."""
    prefix = f"event: {event}\n".encode() if event else b""
    return prefix + b"data: " + _encode(payload) + b"\n\n"


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await ``work``, or cancel it as soon as the client is gone.

    Raises:
        ClientDisconnected: the connection closed first; ``work`` has been cancelled and awaited.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_until_disconnect(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnected
    finally:
        await _cancel(task)
        await _cancel(gone)


async def gather_or_cancel(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order; when one fails, or the caller is cancelled, the others end too."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            await _cancel(task)


async def _cancel(task: asyncio.Future[Any]) -> None:
    if not task.done():
        task.cancel()
        await asyncio.wait({task})


class SseResponse(Response):
    """Stream events; the status is sent with the first event, so a refusal keeps its own.

    The generator is pulled one event at a time: while the client does not read, nothing is produced
    here, and after ``stall_seconds`` without progress the client is disconnected. The generator is
    always closed, which aborts the engine's work. An error after the first event becomes
    a ``data: {"error": ...}`` event, and no [DONE] follows it.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], stall_seconds: float) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._stall_seconds = stall_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        with contextlib.suppress(ClientDisconnected):
            await unless_disconnected(request, self._stream(send))

    async def _stream(self, send: Send) -> None:
        try:
            event: bytes | None = await anext(self._events)
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            while event is not None:
                async with asyncio.timeout(self._stall_seconds):
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                event = await self._next_event()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            raise ClientDisconnected from None
        finally:
            await self._events.aclose()

    async def _next_event(self) -> bytes | None:
        try:
            return await anext(self._events, None)
        except Exception as error:
            return sse(as_api_error(error).body())
