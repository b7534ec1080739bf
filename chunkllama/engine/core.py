"""One step after another: schedule -> execute -> commit. One thread, no I/O of its own."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TYPE_CHECKING

import msgspec

from chunkllama.adapter_messages import LoadAdapter, UnloadAdapter
from chunkllama.cache.adapter_tags import AdapterUse
from chunkllama.cache.node import Node
from chunkllama.cache_messages import (
    CacheCommand,
    CacheDigest,
    CacheEvents,
    KeepSnapshot,
    LoadPack,
    WatchCache,
    WriteSnapshot,
)
from chunkllama.engine.adapter_cache import AdapterCache
from chunkllama.engine.executor import Executor
from chunkllama.engine.faults import Faults
from chunkllama.engine.journal import StepJournal
from chunkllama.errors import InvalidRequestError
from chunkllama.logger import init_logger
from chunkllama.messages import (
    BATCH_SIZE_BOUNDS,
    STEP_SECONDS_BOUNDS,
    STEP_TOKENS_BOUNDS,
    CommandReply,
    EngineErrorInfo,
    EngineReady,
    EngineRequest,
    EngineStats,
    ExplainPrompt,
    FromEngine,
    Histogram,
    TokenDelta,
)
from chunkllama.scheduler.output import SchedulerOutput
from chunkllama.scheduler.scheduler import Scheduler
from chunkllama.tenant_limits import TenantTable
from chunkllama.tuning_messages import StartTuning, StopTuning, TuningProgress

if TYPE_CHECKING:
    from chunkllama.engine.pack_loader import PackLoader
    from chunkllama.engine.snapshot import SnapshotKeeper
    from chunkllama.engine.tier_files import TierFiles
    from chunkllama.engine.tuner import Tuner

logger = init_logger(__name__)

_PREPARATION_POLL = 0.02  # seconds between looks at the inbox while all requests are prepared
_LOADING_POLL = 0.01  # the same while nothing runs and packs are loaded
_PUSH_SECONDS = 0.5  # between two snapshots that a busy loop sends unasked


MakeDigest = Callable[[Iterable[Node], int, int], list[list[int]]]


class EngineCore:
    """A scheduler and an executor, stepped together.

    ``LLM`` uses it directly, clients through ``loop.py``.

    Args:
        scheduler: owns requests and the cache; pure Python.
        executor: computes steps.
        info: what clients learn of the model.
        packs, snapshots: read and write chunks between steps; None where there is no model.
        tier: the files of the cache's tier; None without one.
        clock: monotonic seconds.
        adapters: that are loaded; None: the executor takes none.

    Attributes:
        journal: where the steps of a process of its own are noted; None elsewhere.
        faults: failures that a test plants; None in service.
        make_digest: computes keys from the tree's nodes, the chunk size and the most keys wanted.
        on_step: gets each step and its duration in seconds.
        idle_work: done once, when nothing else is to do; None where there is none.
        tuner: trains adapters between steps; None where there is no model.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        info: EngineReady,
        packs: PackLoader | None = None,
        snapshots: SnapshotKeeper | None = None,
        clock: Callable[[], float] = time.monotonic,
        adapters: AdapterCache | None = None,
        tier: TierFiles | None = None,
    ) -> None:
        self.info = info
        self.packs = packs
        self.snapshots = snapshots
        self.journal: StepJournal | None = None
        self.faults: Faults | None = None
        self.make_digest: MakeDigest | None = None
        self.on_step: Callable[[SchedulerOutput, float], None] = lambda output, seconds: None
        self.idle_work: Callable[[], None] | None = None
        self.tuner: Tuner | None = None
        self._scheduler = scheduler
        self._executor = executor
        self._clock = clock
        self._adapters = adapters
        self._tier = tier
        if adapters is not None:
            scheduler.use_adapters(adapters.may_start, adapters.end)
        self._preparations: dict[Future[None], str] = {}
        self._steps = self._checked_at_step = self._violations = 0
        self._step_seconds = Histogram.over(STEP_SECONDS_BOUNDS)
        self._batch_size = Histogram.over(BATCH_SIZE_BOUNDS)
        self._step_tokens = Histogram.over(STEP_TOKENS_BOUNDS)
        self._request_of_slot: dict[int, str] = {}
        self._pushed_at = self._next_digest = self._next_check = -math.inf

    def add(self, request: EngineRequest) -> None:
        """Queue a request.

        Raises:
            InvalidRequestError: it can never be served (too long for the context or the pool, a
                token the model does not have, an adapter that is not loaded).
            OverloadedError: the waiting queue is full.
        """
        ids = request.prompt_token_ids
        if ids and not 0 <= min(ids) <= max(ids) < self.info.vocab_size:
            raise InvalidRequestError(
                f"prompt token ids must be in [0, {self.info.vocab_size - 1}], got {min(ids)} to "
                f"{max(ids)}",
                "prompt",
            )
        request = self._with_known_prediction(request)
        use = self._adapter_use(request.adapter, ids)
        self._scheduler.add(request, use)
        if use is not None and self._adapters is not None:
            self._adapters.add(request)
        preparation = self._executor.prepare(request.sampling)
        if preparation is not None:
            self._scheduler.hold(request.request_id)
            self._preparations[preparation] = request.request_id

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Drop a request, or one choice (of a beam search all). Unknown ids are ignored: it may
        just have finished.
        """
        self._scheduler.abort(request_id, index)
        if index is None:
            for future in [f for f, waits in self._preparations.items() if waits == request_id]:
                future.cancel()
                del self._preparations[future]

    def _with_known_prediction(self, request: EngineRequest) -> EngineRequest:
        """Cut the prediction at the first token that the model does not have."""
        for at, token in enumerate(request.prediction_token_ids):
            if not 0 <= token < self.info.vocab_size:
                known = request.prediction_token_ids[:at]
                return msgspec.structs.replace(request, prediction_token_ids=known)
        return request

    def _adapter_use(self, name: str, prompt_token_ids: list[int]) -> AdapterUse | None:
        if not name:
            return None
        if self._adapters is None:
            raise InvalidRequestError("this engine takes no adapters", "model")
        return self._adapters.use_of(name, prompt_token_ids)

    def load_adapter(self, command: LoadAdapter) -> CommandReply | None:
        """Begin to load an adapter; the reply comes with ``adapter_replies``, or here if it is
        refused at once."""
        assert self._adapters is not None, "an engine without adapters"
        return self._adapters.load(command)

    def unload_adapter(self, command: UnloadAdapter) -> CommandReply:
        """Forget an adapter and what is cached under it, unless requests use it."""
        reply = CommandReply(command_id=command.command_id)
        assert self._adapters is not None, "an engine without adapters"
        try:
            number = self._adapters.unload(command.name)
        except InvalidRequestError as error:
            reply.error = error.message
            return reply
        reply.found = number is not None
        if number is not None:
            self._scheduler.remove_adapter(number, reply)
        return reply

    def adapter_replies(self) -> list[CommandReply]:
        """Replies to ``load_adapter`` since the last call."""
        return [] if self._adapters is None else self._adapters.take_replies()

    def set_tenants(self, limits: TenantTable) -> None:
        """Apply other limits of tenants; accepted requests stay."""
        self._scheduler.set_tenants(limits)

    def has_work(self) -> bool:
        is_loading = self._adapters is not None and self._adapters.is_loading
        return is_loading or self._scheduler.has_unfinished()

    def step(self) -> list[TokenDelta]:
        """Run one step; [] when nothing could be scheduled."""
        failed = self._release_prepared()
        if failed:
            return failed
        if self._tier is not None:
            self._tier.turn()
        output = self._scheduler.schedule()
        if output is None:
            reads = [] if self._adapters is None else self._adapters.futures()
            chunks = [] if self._tier is None else self._tier.futures()
            waited_for = [*self._preparations, *reads, *chunks, Future[None]()]  # or for messages
            wait(waited_for, _PREPARATION_POLL, return_when=FIRST_COMPLETED)
            return []
        started = self._clock()
        if self.journal is not None:
            self.journal.begin_step(self._requests_of(output))
        if self.faults is not None:
            self.faults.reach("step")
        sampled = self._executor.execute(output)
        if self.faults is not None:
            self.faults.reach("commit")
        deltas = self._scheduler.commit(output, sampled)
        if self.journal is not None:
            self.journal.end_step()
        self._steps += 1
        elapsed = self._clock() - started
        self._step_seconds.observe(elapsed)
        self.on_step(output, elapsed)
        self._batch_size.observe(len(output.slices))
        self._step_tokens.observe(output.num_tokens)
        if self.faults is not None:
            self.faults.reach("send")
        return deltas

    def _release_prepared(self) -> list[TokenDelta]:
        """Let held requests start whose wait is over; returns the ends of those that cannot."""
        for done in [future for future in self._preparations if future.done()]:
            self._scheduler.release(self._preparations.pop(done))
        if self._adapters is None:
            return []
        ready, failed = self._adapters.poll()
        for request_id in ready:
            self._scheduler.release(request_id)
        for request_id in failed:
            self.abort(request_id)
        return [
            TokenDelta(
                request_id=request_id,
                choices=[],
                error=EngineErrorInfo(kind="failed", message=reason, code="adapter_unreadable"),
            )
            for request_id, reason in failed.items()
        ]

    def _requests_of(self, output: SchedulerOutput) -> list[str]:
        """Ids of the requests with a slice in this step, or a row to sample."""
        for new in output.new_sequences:
            self._request_of_slot[new.slot] = new.request_id
        slots = [*(piece.slot for piece in output.slices), *output.awaited]
        return list(dict.fromkeys(self._request_of_slot[slot] for slot in slots))

    def check_idle(self) -> None:
        """Audit pool and tree once per idle spell, in at most a hundredth of the time; violations
        are counted and logged."""
        if self._checked_at_step == self._steps or self._clock() < self._next_check:
            return
        self._checked_at_step = self._steps
        started = self._clock()
        try:
            self._scheduler.check_invariants()
        except AssertionError as violation:
            self._violations += 1
            logger.error("cache invariant violated: %s", violation)
        self._next_check = self._clock() + 100 * (self._clock() - started)

    def stats(self, *, include_tree: bool = False, include_tenants: bool = False) -> EngineStats:
        """Counters since the start and gauges of this moment."""
        stats = self._scheduler.stats(include_tenants=include_tenants)
        stats.steps_total = self._steps
        stats.step_seconds = self._step_seconds
        stats.batch_size = self._batch_size
        stats.step_tokens = self._step_tokens
        stats.invariant_violations = self._violations
        if include_tree:
            stats.tree = self._scheduler.tree()
        return stats

    def digest(self, max_keys: int) -> list[CacheDigest]:
        """Describe what is cached, unless that would take more than a hundredth of the time."""
        if self.make_digest is None or self._clock() < self._next_digest:
            return []
        started = self._clock()
        levels = self.make_digest(self._scheduler.nodes(), self.info.chunk_size, max_keys)
        self._next_digest = self._clock() + 100 * (self._clock() - started)
        return [CacheDigest(levels=levels)]

    def stats_to_push(self) -> EngineStats | None:
        """A snapshot if the last one is ``_PUSH_SECONDS`` old: a step may take longer than anyone
        waits for an answer."""
        now = self._clock()
        if now - self._pushed_at < _PUSH_SECONDS:
            return None
        self._pushed_at = now
        stats = self.stats()
        stats.is_pushed = True
        return stats

    def cache_command(self, command: CacheCommand) -> CommandReply:
        """Run an operator's command on the cache, between two steps."""
        if command.action == "packs":
            packs = [] if self.packs is None else self.packs.infos()
            return CommandReply(command_id=command.command_id, packs=packs)
        if command.action in ("drop_branch", "drop_tenant") and self.snapshots is not None:
            self.snapshots.forget(command.tenant if command.action == "drop_tenant" else None)
        return self._scheduler.cache_command(command)

    def file_command(self, command: LoadPack | KeepSnapshot | WriteSnapshot) -> list[FromEngine]:
        """Begin to load a file, or to write one."""
        assert self.packs is not None and self.snapshots is not None
        match command:
            case LoadPack():
                self.packs.load(command)
            case KeepSnapshot():
                self.snapshots.keep(command)
            case WriteSnapshot():
                return [*self.snapshots.write(command)]
        return []

    def is_moving_chunks(self) -> bool:
        """Tell whether ``move_chunks`` has work."""
        loads = self.packs is not None and self.packs.is_loading
        loads = loads or (self._tier is not None and self._tier.is_moving)
        return loads or (self.snapshots is not None and self.snapshots.is_writing)

    def move_chunks(self) -> list[CommandReply]:
        """Insert chunks of files and copy others for a snapshot: a few while requests run, else
        all that the threads have ready; returns replies to commands that have ended."""
        is_busy = self.has_work()
        if self._tier is not None and self._tier.is_moving:
            self._tier.turn(0.0 if is_busy else _LOADING_POLL)
        if self.packs is not None and self.packs.is_loading:
            self.packs.turn(0.0 if is_busy else _LOADING_POLL)
        return [] if self.snapshots is None else self.snapshots.turn(is_busy=is_busy)

    def tuning_command(self, command: StartTuning | StopTuning) -> list[FromEngine]:
        """Begin or end the training of an adapter."""
        assert self.tuner is not None
        match command:
            case StartTuning():
                return [*self.tuner.start(command)]
            case StopTuning():
                return [*self.tuner.stop(command.job_id)]

    def is_tuning(self) -> bool:
        """Tell whether ``tune`` has work."""
        return self.tuner is not None and self.tuner.is_active

    def tune(self) -> list[TuningProgress]:
        """Train in the time that requests leave; returns what has become of the job."""
        return [] if self.tuner is None else self.tuner.turn(is_busy=self.has_work())

    def watch_cache(self, command: WatchCache) -> list[FromEngine]:
        """Begin or end sending changes of the cache; earlier changes precede the snapshot."""
        replies: list[FromEngine] = [*self.cache_events()]
        stored = self._scheduler.watch_cache(
            is_watched=command.watch_id != 0, with_contents=command.with_contents
        )
        if command.watch_id:
            replies.append(CacheEvents(watch_id=command.watch_id, events=stored))
        return replies

    def cache_events(self) -> list[CacheEvents]:
        """Changes of the cache since the last call, as at most one message."""
        events = self._scheduler.take_cache_events()
        return [CacheEvents(watch_id=0, events=events)] if events else []

    def explain(self, command: ExplainPrompt) -> CommandReply:
        """Explain why the match of a prompt would end."""
        reply = CommandReply(command_id=command.command_id)
        try:
            use = self._adapter_use(command.adapter, command.prompt_token_ids)
        except InvalidRequestError as error:
            reply.error = error.message
            return reply
        reply.explanation = self._scheduler.explain(
            command.prompt_token_ids, command.namespace, command.tenant, use
        )
        return reply

    def close(self) -> None:
        for part in (self.tuner, self._adapters, self.snapshots, self.packs, self._tier):
            if part is not None:
                part.close()
        self._executor.close()
