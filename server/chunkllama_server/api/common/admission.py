"""Bound what waits before it enters the engine, and for how long.

A refusal here costs microseconds; one in the engine waits for a step and weighs what is queued. A
request of n choices counts n times, because it occupies n places of the running batch and a copy of
its token list each.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn, cast

from chunkllama.adapter_messages import AdapterInfo
from chunkllama.cache_messages import CacheAction, KeepSnapshot, LoadPack
from chunkllama.engine.cache_watch import CacheStream
from chunkllama.engine.client import EngineClient
from chunkllama.errors import (
    ENDED_ON_DEMAND,
    DeadlineError,
    OverloadedError,
    RequestFailedError,
)
from chunkllama.logger import request_id_context
from chunkllama.messages import (
    CacheExplanation,
    CommandReply,
    EngineReady,
    EngineRequest,
    EngineStats,
    SetTenants,
    TokenDelta,
)
from chunkllama_server.api.common.idle_prefill import IdlePrefill
from chunkllama_server.transport.internal import queued

_RETRY_AFTER = 2  # before anything has ended
_RETRY_QUESTION = 1
_MAX_RETRY_AFTER = 30
_EXPECTED_TOKENS = 256  # of an answer whose length is not known
_SEQUENCES = ("max_waiting", "sequences are running or waiting")
_TOKENS = ("max_waiting_tokens", "prompt tokens are waiting")
_CHUNKS = ("max_waiting_chunks", "chunks are needed by waiting requests")
_RATE_WINDOW = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueLimits:
    """What may wait, and for how long; None is no limit.

    Attributes:
        tokens: prompt tokens of requests without a token yet, once for each choice.
        chunks: K/V chunks of ``chunk_size`` tokens that these requests will need.
        questions: prompts whose match in the cache is to be explained.
        queue_seconds: until a request's first token.
        request_seconds: until its end.
    """

    tokens: int | None = None
    chunks: int | None = None
    chunk_size: int = 64
    questions: int | None = None
    queue_seconds: float | None = None
    request_seconds: float | None = None


@dataclass(slots=True)
class _Charge:
    """What requests add to the sums: ``sequences`` while they run, the others while they wait."""

    sequences: int = 0
    tokens: int = 0
    chunks: int = 0


@dataclass(slots=True)
class LiveRequest:
    """A request that waits or runs.

    Attributes:
        client_id: its ``x-request-id``, which several requests may have; "" for one of the server.
        began: time of the event loop's clock.
        is_aborted: someone else than its client has ended it.
    """

    request_id: str
    client_id: str
    tenant: str
    num_prompt_tokens: int
    num_choices: int
    began: float
    is_waiting: bool = True
    is_aborted: bool = False


class EndRate:
    """How fast sequences have ended lately."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends: deque[tuple[float, int]] = deque(maxlen=_RATE_WINDOW)

    def add(self, num_sequences: int) -> None:
        self._ends.append((self._clock(), num_sequences))

    def seconds_for(self, num_sequences: int) -> int:
        """Whole seconds until that many have ended, in [1, 30]."""
        if not self._ends:
            return _RETRY_AFTER
        elapsed = self._clock() - self._ends[0][0]
        ended = sum(count for _, count in self._ends)
        return min(max(math.ceil(num_sequences * elapsed / ended), 1), _MAX_RETRY_AFTER)


class ChargedEngine:
    """An engine that takes requests until as many sequences as it has places run or wait, or a
    limit of the queue is reached.

    A tenant may take as much of each limit as is still free, or its ``queue_share``
    (``chunkllama.scheduler.intake`` has the same rule for requests). The last request taken may
    exceed a limit: were it refused for its size, small requests would fill what is left and wait
    behind the large ones without end.

    Args:
        max_running, max_waiting: sequences.
        queue_share: of a tenant, in (0, 1]; None is no limit of its own.
        has_own_limit: whether the engine bounds how many requests of a tenant wait, instead of the
            places that are free.

    Attributes:
        num_sequences: running or waiting.
        tokens_waiting, chunks_waiting: of requests without a token yet.
        live: requests that wait or run, by id.
        idle: works while no request runs or waits.
    """

    def __init__(
        self,
        engine: EngineClient,
        max_running: int,
        max_waiting: int,
        limits: QueueLimits | None = None,
        queue_share: Callable[[str], float | None] = lambda _: None,
        has_own_limit: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self._engine = engine
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._limits = limits or QueueLimits()
        self._queue_share = queue_share
        self._has_own_limit = has_own_limit
        self._by_tenant: defaultdict[str, _Charge] = defaultdict(_Charge)
        self._questions: Counter[str] = Counter()  # without an answer, by tenant
        self._rate = EndRate()
        self.live: dict[str, LiveRequest] = {}
        self.num_sequences = 0
        self.tokens_waiting = 0
        self.chunks_waiting = 0
        self.idle: IdlePrefill | None = None
        self._last_request = -math.inf

    @property
    def info(self) -> EngineReady:
        return self._engine.info

    @property
    def is_ready(self) -> bool:
        return self._engine.is_ready

    def has_gap(self, waiting_tokens: int) -> bool:
        """Whether a request would run at once, behind at most so many waiting prompt tokens."""
        return self.num_sequences < self._max_running and self.tokens_waiting < waiting_tokens

    def is_quiet(self, seconds: float) -> bool:
        """Whether nothing but lines of batches has come for so long."""
        return time.monotonic() - self._last_request > seconds

    async def generate(self, request: EngineRequest) -> AsyncIterator[TokenDelta]:
        """As ``EngineClient.generate``.

        Raises:
            OverloadedError: before the engine sees the request.
            DeadlineError: the request has waited or run for too long; it is aborted.
            RequestFailedError: ``end`` has ended it.
        """
        tenant = request.tenant
        self.check_places(tenant)
        charge = self._charge(request)
        self._wait(tenant, charge, 1)
        self._run(tenant, charge, 1)
        if (on_queued := queued.get()) is not None:
            on_queued()
        else:
            self._last_request = time.monotonic()
        live = LiveRequest(
            request.request_id,
            request_id_context.get(),
            tenant,
            len(request.prompt_token_ids),
            charge.sequences,
            asyncio.get_running_loop().time(),
        )
        is_first = self.live.setdefault(request.request_id, live) is live
        try:
            if self.idle is not None:
                await self.idle.interrupt()
            deltas = cast(AsyncGenerator[TokenDelta, None], self._engine.generate(request))
            async with contextlib.aclosing(deltas):
                while (delta := await self._next(deltas, live)) is not None:
                    if live.is_aborted:
                        raise RequestFailedError("The request was ended on demand", ENDED_ON_DEMAND)
                    if live.is_waiting:
                        live.is_waiting = False
                        self._wait(tenant, charge, -1)
                    yield delta
        finally:
            if is_first:
                del self.live[request.request_id]
            if live.is_waiting:
                self._wait(tenant, charge, -1)
            self._run(tenant, charge, -1)
            if self.idle is not None and not self.num_sequences:
                self.idle.resume()
            if not live.is_waiting:
                self._rate.add(charge.sequences)

    async def keep_public(self, request: EngineRequest) -> TokenDelta:
        return await self._engine.keep_public(request)

    async def end(self, request_id: str) -> bool:
        """End a request for its client too, with an error; False if there is none of this id."""
        live = self.live.get(request_id)
        if live is None:
            return False
        live.is_aborted = True
        await self._engine.abort(request_id)
        return True

    def _charge(self, request: EngineRequest) -> _Charge:
        sampling, size = request.sampling, self._limits.chunk_size
        sequences = max(sampling.num_sequences, sampling.beam_width)
        num_prompt = len(request.prompt_token_ids)
        answer = min(_EXPECTED_TOKENS, sampling.max_tokens or _EXPECTED_TOKENS)
        chunks = -(-num_prompt // size) + sequences * -(-answer // size)
        return _Charge(sequences, num_prompt * sequences, chunks)

    def _wait(self, tenant: str, charge: _Charge, sign: int) -> None:
        own = self._by_tenant[tenant]
        self.tokens_waiting += sign * charge.tokens
        self.chunks_waiting += sign * charge.chunks
        own.tokens += sign * charge.tokens
        own.chunks += sign * charge.chunks

    def _run(self, tenant: str, charge: _Charge, sign: int) -> None:
        self.num_sequences += sign * charge.sequences
        own = self._by_tenant[tenant]
        own.sequences += sign * charge.sequences
        if not own.sequences:
            del self._by_tenant[tenant]

    def check_places(self, tenant: str) -> None:
        """Check that the next request of a tenant would be taken, however small it is.

        Raises:
            OverloadedError: it would not.
        """
        limits = self._limits
        own = self._by_tenant.get(tenant, _Charge())
        share = self._queue_share(tenant) if tenant else None
        sequences, tokens = self.num_sequences, self.tokens_waiting
        chunks = self.chunks_waiting
        for present, mine, running, waiting, (setting, what) in (
            (sequences, own.sequences, self._max_running, self._max_waiting, _SEQUENCES),
            (tokens, own.tokens, 0, limits.tokens, _TOKENS),
            (chunks, own.chunks, 0, limits.chunks, _CHUNKS),
        ):
            if waiting is None:
                continue
            most = running + waiting
            if present >= most:
                self._refuse(f"{present} {what}, and the server takes {most} ({setting})")
            why = f"as many as are free of {setting} may wait"
            if share is not None:
                part = max(int(share * waiting), 0 if running else 1)
                why = f"its queue_share of {setting}"
            elif running and self._has_own_limit(tenant):
                continue
            else:
                part = most - present
            if tenant and mine >= running + part:
                self._refuse(
                    f"{mine} {what} for this API key, and it may have {running + part}: {why}"
                )

    def _refuse(self, reason: str) -> NoReturn:
        raise OverloadedError(
            f"{reason}; try again when some have ended", self._rate.seconds_for(self.num_sequences)
        )

    async def _next(
        self, deltas: AsyncGenerator[TokenDelta, None], live: LiveRequest
    ) -> TokenDelta | None:
        """The next delta, None at the end."""
        limits = self._limits
        waits, runs = limits.queue_seconds if live.is_waiting else None, limits.request_seconds
        if waits is None and runs is None:
            return await anext(deltas, None)
        seconds = min(s for s in (waits, runs) if s is not None)
        try:
            async with asyncio.timeout_at(live.began + seconds):
                return await anext(deltas, None)
        except TimeoutError:
            if seconds == waits:
                raise DeadlineError(
                    f"The request waited {waits:g} s without a token; try again later",
                    "queue_timeout",
                ) from None
            raise DeadlineError(f"The request ran for {runs:g} s", "deadline") from None

    async def abort(self, request_id: str, index: int | None = None) -> None:
        await self._engine.abort(request_id, index)

    async def stats(
        self, *, include_tree: bool = False, include_tenants: bool = False
    ) -> EngineStats:
        return await self._engine.stats(include_tree=include_tree, include_tenants=include_tenants)

    def set_tenants(self, tenants: SetTenants) -> None:
        self._engine.set_tenants(tenants)

    async def explain(
        self, prompt_token_ids: list[int], namespace: str = "", tenant: str = "", adapter: str = ""
    ) -> CacheExplanation:
        """As ``EngineClient.explain``; the engine answers one question between two steps.

        Raises:
            OverloadedError: too many of the tenant, or of all, have no answer yet.
        """
        self._check_questions(tenant)
        self._questions[tenant] += 1
        try:
            return await self._engine.explain(prompt_token_ids, namespace, tenant, adapter)
        finally:
            self._questions[tenant] -= 1

    def _check_questions(self, tenant: str) -> None:
        """Let a tenant ask as many questions as are still free, so that one has half at most."""
        most, present, own = self._limits.questions, self._questions.total(), self._questions
        if most is None:
            return
        if present >= most:
            what = f"Prompts that wait to be explained: {present}, as many as max_explanations"
        elif tenant and own[tenant] >= most - present:
            what = (
                f"Prompts of this API key that wait to be explained: {own[tenant]}, its share of "
                f"max_explanations ({most})"
            )
        else:
            return
        raise OverloadedError(f"{what}; try again later", _RETRY_QUESTION)

    @property
    def adapters(self) -> Mapping[str, AdapterInfo]:
        return self._engine.adapters

    async def load_adapter(self, name: str, folder: str) -> AdapterInfo:
        return await self._engine.load_adapter(name, folder)

    async def unload_adapter(self, name: str) -> bool:
        return await self._engine.unload_adapter(name)

    async def cache_command(
        self, action: CacheAction, *, chunk_id: int = -1, tenant: str = ""
    ) -> CommandReply:
        return await self._engine.cache_command(action, chunk_id=chunk_id, tenant=tenant)

    def use_file(self, command: LoadPack | KeepSnapshot) -> None:
        self._engine.use_file(command)

    def watch_cache(self, max_waiting: int, *, with_contents: bool = False) -> CacheStream:
        return self._engine.watch_cache(max_waiting, with_contents=with_contents)

    async def close(self) -> None:
        await self._engine.close()
