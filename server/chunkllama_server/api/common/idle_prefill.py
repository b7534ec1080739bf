"""Prefill what the next prompts will begin with, while no request runs.

A template that drops the thoughts of earlier turns writes the last answer at other positions than
the model has generated it at, so the next prompt would compute the whole answer again.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import Any, cast

from chunkllama.engine.client import EngineClient
from chunkllama.errors import ChunkLlamaError, EngineDeadError
from chunkllama.logger import init_logger
from chunkllama.messages import EngineRequest
from chunkllama.sampling_params import SamplingParams
from chunkllama_server.api.common.prompt_cache import common_prefix
from chunkllama_server.transport.errors import ApiError

logger = init_logger(__name__)

LOWEST_PRIORITY = 1000
_MAX_JOBS = 64
# A request that arrives meanwhile waits for one slice at most.
_SLICE_TOKENS = 256
# Fewer tokens cost the next prompt less than a step.
_LEAST_TOKENS = 16


@dataclass(frozen=True, slots=True)
class PrefillJob:
    """A prefix to compute for one tenant.

    Attributes:
        token_ids: makes the prefix, when it is needed.
        known: token ids whose K/V are cached.
        adapter: under which the prefix is computed.
    """

    namespace: str
    tenant: str
    token_ids: Callable[[], Coroutine[Any, Any, list[int]]]
    known: list[int]
    adapter: str = ""
    context: Context = field(default_factory=copy_context)


class IdlePrefill:
    """Runs jobs one after another while the engine has nothing else to do.

    The engine charges a job's tokens to its tenant. Of more than 64 waiting jobs the oldest is
    dropped.

    Args:
        engine: runs the jobs' requests; no limit of the queue counts them.
        is_idle: whether no other request runs or waits.
    """

    def __init__(self, engine: EngineClient, is_idle: Callable[[], bool]) -> None:
        self._engine = engine
        self._is_idle = is_idle
        self._jobs: deque[PrefillJob] = deque(maxlen=_MAX_JOBS)
        self._task: asyncio.Task[None] | None = None
        self._resumed = asyncio.Event()
        self._request_id = ""

    def offer(self, job: PrefillJob) -> None:
        """Add a job; it starts when the engine is idle."""
        self._jobs.append(job)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run(), context=Context())

    def is_activated(self, adapter: str) -> bool:
        """Whether an adapter is active only from its invocation tokens on."""
        info = self._engine.adapters.get(adapter)
        return info is not None and info.is_activated

    async def interrupt(self) -> None:
        """Stop computing, because a request has arrived; the job continues later."""
        if self._request_id:
            await self._engine.abort(self._request_id)

    def resume(self) -> None:
        """Note that no request runs any more."""
        self._resumed.set()

    async def close(self) -> None:
        """Drop all jobs."""
        self._jobs.clear()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        while self._jobs:
            await self._until_idle()
            if not self._jobs:
                return
            job = self._jobs.popleft()
            try:
                await self._prefill(job)
            except EngineDeadError:
                self._jobs.clear()
            except (ChunkLlamaError, ApiError) as error:
                logger.debug("a prefix was not prefilled: %s", error)

    async def _until_idle(self) -> None:
        while not self._is_idle():
            self._resumed.clear()
            await self._resumed.wait()

    async def _prefill(self, job: PrefillJob) -> None:
        loop = asyncio.get_running_loop()
        ids = await loop.create_task(job.token_ids(), context=job.context)
        end = common_prefix(ids, job.known)
        if len(ids) - end < _LEAST_TOKENS:
            return
        while end < len(ids):
            await self._until_idle()
            if await self._compute(job, ids[: end + _SLICE_TOKENS]):
                end += _SLICE_TOKENS

    async def _compute(self, job: PrefillJob, ids: list[int]) -> bool:
        """Compute a prefix; False if it was interrupted."""
        request = EngineRequest(
            request_id=f"idle-{uuid.uuid4().hex}",
            prompt_token_ids=ids,
            sampling=SamplingParams(max_tokens=0),
            namespace=job.namespace,
            tenant=job.tenant,
            priority=LOWEST_PRIORITY,
            adapter=job.adapter,
        )
        deltas = cast(AsyncGenerator[Any, None], self._engine.generate(request))
        reason = None
        self._request_id = request.request_id
        try:
            async with contextlib.aclosing(deltas):
                async for delta in deltas:
                    for choice in delta.choices:
                        reason = choice.finish_reason or reason
        finally:
            self._request_id = ""
        return reason != "abort"
