"""Server-sent events with back-pressure and signs of life; the end of work whose client left."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from chunkllama_server.transport.errors import ApiError, ClientDisconnected, as_api_error
from chunkllama_server.transport.pieces import pieces_of

T = TypeVar("T")
_encode = msgspec.json.encode
DONE = b"data: [DONE]\n\n"
COMMENT = b": waiting\n\n"  # clients skip lines that begin with a colon


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
    task.add_done_callback(_retrieve)
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
    for task in tasks:
        task.add_done_callback(_retrieve)
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            await _cancel(task)


def _retrieve(task: asyncio.Future[Any]) -> None:
    """Keep asyncio from logging a failure that nothing waits for: its caller has been cancelled."""
    if not task.cancelled():
        task.exception()


async def _cancel(task: asyncio.Future[Any]) -> None:
    if not task.done():
        task.cancel()
        await asyncio.wait({task})


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamForm:
    """What a protocol's stream looks like beside its events.

    Attributes:
        media_type: of the response.
        error: makes the last event of a stream that fails after its first.
        waiting, silent: signs of life before and after the first event; None sends none.
    """

    media_type: str
    error: Callable[[ApiError], bytes]
    waiting: bytes | None
    silent: bytes | None


OPENAI_STREAM = StreamForm(
    media_type="text/event-stream",
    error=lambda error: sse(error.body()),
    waiting=COMMENT,
    silent=COMMENT,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamTimes:
    """Times of a stream, in seconds.

    Attributes:
        stall: without the client reading, until it is disconnected.
        first_byte: from the request's arrival until the headers are sent without an event.
        comment: of silence until a comment line is sent.
    """

    stall: float
    first_byte: float
    comment: float


class SseResponse(Response):
    """Stream events; a refusal before the first byte keeps its own status.

    The status is sent with the first event, or after ``times.first_byte`` with a comment line,
    because proxies end a connection on which nothing arrives. From then on an error is an event
    of its own (``data: {"error": ...}`` by default), and no [DONE] follows it. While no event
    comes, a comment line is sent every ``times.comment``.

    The generator is pulled one event at a time: while the client does not read, nothing is produced
    here, and after ``times.stall`` without progress the client is disconnected. The generator is
    always closed, which aborts the engine's work.

    Args:
        events: whole server-sent events.
        times: in seconds.
        arrived_at: the request's arrival, by the event loop's clock; None is now.
        form: the protocol's errors and signs of life.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        times: StreamTimes,
        arrived_at: float | None = None,
        form: StreamForm = OPENAI_STREAM,
    ) -> None:
        super().__init__(
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
            media_type=form.media_type,
        )
        del self.headers["content-length"]
        self._events = events
        self._times = times
        self._form = form
        self._loop = asyncio.get_running_loop()
        arrived_at = self._loop.time() if arrived_at is None else arrived_at
        self._comment_at = arrived_at + times.first_byte
        self._sending_since: float | None = None
        self._lock = asyncio.Lock()
        self._has_begun = False
        self._has_event = False
        self._timer: asyncio.TimerHandle | None = None
        self._comment: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        with contextlib.suppress(ClientDisconnected):
            await unless_disconnected(request, self._stream(send))

    async def _stream(self, send: Send) -> None:
        try:
            async with asyncio.timeout(None) as deadline:
                self._watch(send, deadline)
                while (event := await self._next_event()) is not None:
                    self._has_event = True
                    await self._send(send, event)
                await self._send(send, b"", more_body=False)
        except TimeoutError:
            raise ClientDisconnected from None
        finally:
            if self._timer is not None:
                self._timer.cancel()
            if self._comment is not None:
                await _cancel(self._comment)
            await self._events.aclose()

    async def _next_event(self) -> bytes | None:
        try:
            return await anext(self._events, None)
        except Exception as error:
            if not self._has_begun:
                raise
            return self._form.error(as_api_error(error))

    async def _send(self, send: Send, body: bytes, *, more_body: bool = True) -> None:
        async with self._lock:
            self._sending_since = self._loop.time()
            if not self._has_begun:
                self._has_begun = True
                await send(
                    {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                )
            for piece, is_followed in pieces_of(body):
                more = more_body or is_followed
                self._sending_since = self._loop.time()  # a slow reader of a large event is not cut
                await send({"type": "http.response.body", "body": piece, "more_body": more})
            self._sending_since = None
        self._comment_at = self._loop.time() + self._times.comment

    def _watch(self, send: Send, deadline: asyncio.Timeout) -> None:
        """End a send that does not progress; send a comment line after a silence; come again.

        One timer for the whole stream: a timeout for each event costs several microseconds.
        """
        now, times = self._loop.time(), self._times
        if self._sending_since is not None:
            again = self._sending_since + times.stall
            if again <= now:
                deadline.reschedule(now)
                return
        elif self._comment_at <= now:
            sign = self._form.silent if self._has_event else self._form.waiting
            self._comment = self._loop.create_task(self._send(send, sign or b""))
            again = now + min(times.comment, times.stall)
        else:
            again = min(self._comment_at, now + times.stall)
        self._timer = self._loop.call_at(again, self._watch, send, deadline)
