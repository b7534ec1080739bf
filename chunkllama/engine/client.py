"""Access to an engine: the same calls whether it runs in this process or in another.

Imports no torch.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import sys
from abc import abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Protocol

import msgspec

from chunkllama.cache_messages import CacheAction, CacheEvents, KeepSnapshot, LoadPack
from chunkllama.engine.cache_watch import CacheStream, CacheWatchers
from chunkllama.engine.commands import AdapterClient, CommandClient
from chunkllama.engine.replay import ReplayState, Stream, num_entries
from chunkllama.errors import (
    EngineDeadError,
    InvalidRequestError,
    OverloadedError,
    RequestFailedError,
)
from chunkllama.messages import (
    AbortRequest,
    CacheExplanation,
    ChoiceDelta,
    CommandReply,
    EngineErrorInfo,
    EngineReady,
    EngineRequest,
    EngineStats,
    FromEngine,
    SetTenants,
    StatsRequest,
    ToEngine,
    TokenDelta,
)
from chunkllama.tuning_messages import TuningProgress


class EngineClient(AdapterClient, Protocol):
    """Asynchronous access to an engine."""

    @property
    def info(self) -> EngineReady:
        """What the engine reported of its model when it became ready."""
        ...

    @property
    def is_ready(self) -> bool:
        """Requests are accepted: the model has been loaded, and the engine runs or is restarted."""
        ...

    def generate(self, request: EngineRequest) -> AsyncIterator[TokenDelta]:
        """Stream the request's tokens; closing the iterator early aborts it.

        Raises (at the first ``anext``): InvalidRequestError, OverloadedError,
        RequestFailedError, EngineDeadError.
        """
        ...

    async def keep_public(self, request: EngineRequest) -> TokenDelta:
        """Compute a pinned prompt that all tenants share, also in engines that are started later.

        Returns:
            The first delta.

        Raises:
            InvalidRequestError, RequestFailedError, EngineDeadError.
        """
        ...

    async def abort(self, request_id: str, index: int | None = None) -> None:
        """Stop a request, or one choice of it; its chunks are released within a step.

        The choices of a beam search exist only at its end: aborting one aborts all.
        """
        ...

    async def stats(
        self, *, include_tree: bool = False, include_tenants: bool = False
    ) -> EngineStats:
        """A fresh snapshot from the engine loop, on request with the tree and each tenant."""
        ...

    def set_tenants(self, tenants: SetTenants) -> None:
        """Replace the limits of all tenants, also in engines that are started later."""
        ...

    async def explain(
        self, prompt_token_ids: list[int], namespace: str = "", tenant: str = "", adapter: str = ""
    ) -> CacheExplanation:
        """Why the match of a prompt would end now, from the tenant's own record.

        Raises:
            InvalidRequestError: the adapter is not loaded.
            EngineDeadError: the engine has ended or is being restarted.
        """
        ...

    async def cache_command(
        self, action: CacheAction, *, chunk_id: int = -1, tenant: str = ""
    ) -> CommandReply:
        """Run an operator's command; see ``chunkllama/cache/admin.py``."""
        ...

    def use_file(self, command: LoadPack | KeepSnapshot) -> None:
        """Load a file in the background, also in engines that are started later."""
        ...

    def watch_cache(self, max_waiting: int, *, with_contents: bool = False) -> CacheStream:
        """Everything stored in the cache, then its changes; see ``CacheWatchers.watch``.

        Raises:
            EngineDeadError: the engine was closed.
        """
        ...

    async def close(self) -> None:
        """End the engine; live requests end with EngineDeadError."""
        ...


def seed_source(seed: int | None) -> Callable[[int], int]:
    """``draw(bits)`` for requests that bring no seed; reproducible if ``seed`` is set."""
    return secrets.randbits if seed is None else random.Random(seed).getrandbits


def with_seed(request: EngineRequest, draw: Callable[[int], int]) -> EngineRequest:
    """Draw the seed here if none came: a replay then continues with the same random numbers."""
    if request.sampling.seed is not None:
        return request
    sampling = msgspec.structs.replace(request.sampling, seed=draw(63))
    return msgspec.structs.replace(request, sampling=sampling)


def as_exception(error: EngineErrorInfo) -> Exception:
    """The typed exception a caller of ``generate`` sees."""
    if error.kind == "invalid":
        return InvalidRequestError(error.message, error.param, error.code)
    if error.kind == "overloaded":
        return OverloadedError(error.message, error.retry_after)
    return RequestFailedError(error.message, error.code or "engine_error")


class MessageClient(CommandClient):
    """An EngineClient over a stream of messages: each delta goes to the request that waits.

    Attributes:
        cache_watchers: readers of the cache's events; ``slow_readers`` counts those dropped.
        draw_seed: makes the seed of a request without one.
        on_stats: called with each snapshot that the step loop sends unasked.
        max_backlog: tokens and log-probability entries that may wait for one caller of
            ``generate``; beyond, its request fails.
    """

    def __init__(self) -> None:
        super().__init__()
        self._streams: dict[str, Stream] = {}
        self._stats_waiters: deque[asyncio.Future[EngineStats]] = deque()
        self._info: EngineReady | None = None
        self._tenants: SetTenants | None = None
        self.slow_readers = 0
        self.cache_watchers = CacheWatchers(self._send, self._drop_slow_reader)
        self.draw_seed = seed_source(None)
        self.on_stats: Callable[[EngineStats], None] = lambda _: None
        self.max_backlog = sys.maxsize

    @abstractmethod
    def _send(self, message: ToEngine) -> None: ...

    def _submit(self, stream: Stream) -> None:
        """Hand a new request to the engine."""
        self._send(stream.state.request)

    def _deliver(self, stream: Stream, delta: TokenDelta) -> None:
        """Hand a delta to the caller of ``generate``."""
        if stream.overflowed:
            return
        is_behind = stream.backlog > 0  # one delta may be larger: beams arrive as a whole
        stream.backlog += num_entries(delta)
        if is_behind and stream.backlog > self.max_backlog:
            delta = self._overflow(stream)
        stream.inbox.put_nowait(delta)

    def _overflow(self, stream: Stream) -> TokenDelta:
        """Drop what waits for a caller that is too slow; returns the failure it gets instead."""
        request_id = stream.state.request.request_id
        self._send(AbortRequest(request_id=request_id))
        stream.overflowed = True
        while not stream.inbox.empty():
            stream.inbox.get_nowait()
        info = EngineErrorInfo(
            kind="failed",
            message=f"the client reads too slowly: {stream.backlog} tokens wait for it",
            code="slow_reader",
        )
        failed = TokenDelta(request_id=request_id, choices=[], error=info)
        stream.state.record(failed)
        return failed

    def _forget(self, stream: Stream) -> None:
        """The caller of ``generate`` has left."""
        del self._streams[stream.state.request.request_id]

    @property
    def info(self) -> EngineReady:
        assert self._info is not None, "the engine has not become ready"
        return self._info

    @property
    def is_ready(self) -> bool:
        return self._info is not None and self._dead is None

    async def generate(self, request: EngineRequest) -> AsyncIterator[TokenDelta]:
        if self._dead is not None:
            raise self._dead
        if request.request_id in self._streams:
            raise InvalidRequestError(f"request id {request.request_id!r} is in use", "request_id")
        sampling = request.sampling
        is_beam_search = sampling.beam_width > 1
        unfinished = set(range(sampling.n if is_beam_search else sampling.num_sequences))
        inbox: asyncio.Queue[TokenDelta | EngineDeadError] = asyncio.Queue()
        state = ReplayState(with_seed(request, self.draw_seed))
        stream = Stream(state, inbox, unfinished, is_beam_search)
        self._streams[request.request_id] = stream
        try:
            self._submit(stream)
            while unfinished:
                delta = await inbox.get()
                if isinstance(delta, EngineDeadError):
                    unfinished.clear()
                    raise delta
                if delta.error is not None:
                    unfinished.clear()
                    raise as_exception(delta.error)
                stream.backlog -= num_entries(delta)
                # a choice aborted here may still have had tokens in transit
                delta.choices = [c for c in delta.choices if c.index in unfinished]
                unfinished -= {c.index for c in delta.choices if c.finish_reason is not None}
                yield delta
        finally:
            if unfinished and self._dead is None:
                self._send(AbortRequest(request_id=request.request_id))
            self._forget(stream)

    async def keep_public(self, request: EngineRequest) -> TokenDelta:
        first, *_ = [delta async for delta in self.generate(request)]
        return first

    async def abort(self, request_id: str, index: int | None = None) -> None:
        stream = self._streams.get(request_id)
        if stream is None or self._dead is not None:
            return
        if stream.is_beam_search:
            index = None
        self._send(AbortRequest(request_id=request_id, index=index))
        indices = sorted(stream.unfinished) if index is None else [index]
        ended = [ChoiceDelta(index=i, token_ids=[], finish_reason="abort") for i in indices]
        self._deliver(stream, TokenDelta(request_id=request_id, choices=ended))

    def set_tenants(self, tenants: SetTenants) -> None:
        self._tenants = tenants
        if self._dead is None:
            self._send(tenants)

    async def stats(
        self, *, include_tree: bool = False, include_tenants: bool = False
    ) -> EngineStats:
        if self._dead is not None:
            raise self._dead
        waiter: asyncio.Future[EngineStats] = asyncio.get_running_loop().create_future()
        self._stats_waiters.append(waiter)
        self._send(StatsRequest(include_tree=include_tree, include_tenants=include_tenants))
        return await waiter

    def _drop_slow_reader(self) -> None:
        self.slow_readers += 1

    def watch_cache(self, max_waiting: int, *, with_contents: bool = False) -> CacheStream:
        if self._dead is not None:
            raise self._dead
        return self.cache_watchers.watch(max_waiting, with_contents=with_contents)

    def _dispatch(self, messages: list[FromEngine]) -> None:
        for message in messages:
            match message:
                case TokenDelta():
                    stream = self._streams.get(message.request_id)
                    if stream is not None:
                        self._deliver(stream, message)
                case EngineStats(is_pushed=True):
                    self.on_stats(message)
                case EngineStats():
                    waiter = self._stats_waiters.popleft()
                    if not waiter.done():
                        waiter.set_result(message)
                case CommandReply():
                    self._take_reply(message)
                case TuningProgress():
                    self._take_progress(message)
                case CacheEvents():
                    self.cache_watchers.deliver(message)
                case EngineReady():
                    self._info = message

    def _fail_all(self, error: EngineDeadError) -> None:
        self._dead = error
        for stream in self._streams.values():
            stream.inbox.put_nowait(error)
        self.cache_watchers.close(error)
        self._fail_stats(error)

    def _fail_stats(self, error: EngineDeadError) -> None:
        """Fail the callers that wait for statistics or for the reply to a command."""
        self._fail_replies(error)
        for waiter in self._stats_waiters:
            if not waiter.done():
                waiter.set_exception(error)
        self._stats_waiters.clear()
