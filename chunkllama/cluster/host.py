"""The engine of one replica, and the channels of the front ends that use it.

A channel is one stream of items for each front end: everything that a step of the engine has for it
is one item. Messages of a front end arrive in order, several in one call.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable

import msgspec

from chunkllama.adapter_messages import LoadAdapter, UnloadAdapter
from chunkllama.cache_messages import CacheCommand, CacheDigest, DigestRequest, LoadPack
from chunkllama.cluster.links import Link, Owner
from chunkllama.cluster.messages import (
    ENCODER,
    REPEATED,
    TO_ENGINE,
    TO_REPLICA,
    Beat,
    Dropped,
    Ended,
    FromReplica,
    Spent,
)
from chunkllama.cluster.shares import is_divided
from chunkllama.config import EngineConfig
from chunkllama.engine.process import EngineProcess, ProcessEngineClient
from chunkllama.errors import (
    ChunkLlamaError,
    EngineDeadError,
    InvalidRequestError,
    OverloadedError,
    RequestFailedError,
)
from chunkllama.logger import configure_logging, init_logger
from chunkllama.messages import (
    AbortRequest,
    CommandReply,
    EngineErrorInfo,
    EngineRequest,
    EngineStats,
    FromEngine,
    SetTenants,
    ToEngine,
    TokenDelta,
)

logger = init_logger(__name__)

BEAT_SECONDS = 1.0
# A front end sends something at least each BEAT_SECONDS; one that does not has ended.
FRONT_SECONDS = 15.0
_DIGEST_KEYS = 4096
_PACK_SECONDS = 0.1  # between two looks at packs that are being loaded
_SETTLE_SECONDS = 2 * BEAT_SECONDS  # for front ends to learn that the replica drains


class HostedEngine(ProcessEngineClient):
    """An engine whose tokens are handed on as they come, a list for each step."""

    def __init__(self, process: EngineProcess) -> None:
        super().__init__(process)
        self.on_tokens: Callable[[list[TokenDelta]], None] = lambda _: None
        self.on_digest: Callable[[list[list[int]]], None] = lambda _: None

    @property
    def process(self) -> EngineProcess:
        return self._process

    def send(self, messages: list[ToEngine]) -> None:
        """Send messages in one frame."""
        self._process.send(messages)

    async def ask(self, command: ToEngine) -> CommandReply:
        """Send a command and wait for its reply."""
        reply = await self._ask(lambda number: msgspec.structs.replace(command, command_id=number))
        if isinstance(command, UnloadAdapter) and not reply.error:
            self.adapters.pop(command.name, None)
        return reply

    def _dispatch(self, messages: list[FromEngine]) -> None:
        tokens: list[TokenDelta] = []
        others: list[FromEngine] = []
        for message in messages:
            if isinstance(message, TokenDelta) and message.request_id not in self._streams:
                tokens.append(message)
            elif isinstance(message, CacheDigest):
                self.on_digest(message.levels)
            else:
                others.append(message)
        if tokens:
            self.on_tokens(tokens)
        super()._dispatch(others)


class EngineHost:
    """Runs one engine process and serves every front end; its end is the replica's end.

    The engine process is not restarted here: its requests continue on other replicas meanwhile,
    and the replica is replaced.

    Args:
        config: of the engine, as JSON.
        hang_seconds: without progress and processor time, this long is a hang.
        environ: variables that the engine process gets beside those of this process.
    """

    def __init__(self, config: str, hang_seconds: float, environ: dict[str, str]) -> None:
        self._config = EngineConfig.model_validate_json(config)
        self._hang_seconds = hang_seconds
        os.environ.update(environ)
        self._engine: HostedEngine | None = None
        self._started = asyncio.Event()
        self._ended = asyncio.Event()
        self._end: Ended | None = None
        self._links: dict[str, Link] = {}
        self._owners: dict[str, Owner] = {}  # by the engine's ids
        self._last_stats = EngineStats()
        self._stats: EngineStats | None = None  # if newer than what front ends have
        self._heads: list[list[int]] = []
        self._asking: asyncio.Task[None] | None = None
        self._is_draining = False
        self._tells_tenants = False
        self._computed = 0
        self._loading = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []

    # -- called by the replica ----------------------------------------------------------------

    async def start(self) -> None:
        """Load the model.

        Raises:
            ConfigError: the engine could not start.
        """
        configure_logging(self._config.log.log_level, self._config.log.log_format)
        engine = await HostedEngine.start(self._config, "chunkllama.cluster.engine_process")
        assert isinstance(engine, HostedEngine)
        engine.on_tokens = self._hand_on
        engine.on_stats = self._note_stats
        engine.on_digest = self._note_digest
        engine.on_death = self._engine_died
        # Other replicas have seen prompts: what this one has not, it does not know.
        engine.send([CacheCommand(command_id=-1, action="forget_prompts")])
        self._engine = engine
        self._tasks = [asyncio.create_task(self._beat()), asyncio.create_task(self._watch())]
        self._started.set()

    async def pid(self) -> int:
        """Answer, with this process's id, while the event loop runs."""
        return os.getpid()

    async def wait_end(self) -> str:
        """Why the engine has ended, when it has."""
        await self._ended.wait()
        assert self._end is not None
        return self._end.reason

    async def drain(self) -> None:
        """Take no new requests; returns when those it has are finished."""
        self._is_draining = True
        self._put_to_all(self._make_beat())
        await asyncio.sleep(_SETTLE_SECONDS)
        while self._owners and self._end is None:
            await asyncio.sleep(0.05)
        self._finish(Ended(reason="the replica has drained"))
        await asyncio.sleep(BEAT_SECONDS / 2)  # the last items are on their way

    async def close(self) -> None:
        """End the engine process."""
        for task in self._tasks:
            task.cancel()
        if self._engine is not None:
            await self._engine.close()

    # -- called by front ends -----------------------------------------------------------------

    async def hello(self) -> bytes:
        """The engine's ``EngineReady``, when its model is loaded."""
        await self._started.wait()
        return msgspec.msgpack.encode(self._live_engine().info)

    async def subscribe(self, front: str) -> AsyncIterator[bytes]:
        """Everything for one front end, until the engine or the front end ends.

        Args:
            front: another name for each channel.
        """
        link = self._links.setdefault(front, Link(front))
        link.put(Beat(is_draining=self._is_draining, heads=self._heads))
        if self._end is not None:
            link.put(self._end)
            link.is_closed = True
        try:
            while link.items or not link.is_closed:
                await link.has_items.wait()
                link.has_items.clear()
                items, link.items = link.items, []
                yield ENCODER.encode(items)
        finally:
            self._leave(front, link)

    async def send(self, front: str, payload: bytes) -> None:
        """Take a list of messages to the engine; an empty one shows that the front end runs."""
        if self._engine is None:
            return
        link = self._links.setdefault(front, Link(front))  # it may arrive before subscribe begins
        link.heard_at = time.monotonic()
        messages: list[ToEngine] = []
        for message in TO_REPLICA.decode(payload):
            if isinstance(message, Spent):
                for other in self._links.values():
                    if other is not link:
                        other.put(message)
                continue
            messages.append(message)
            if isinstance(message, EngineRequest):
                owner = Owner(link, message)
                message.request_id = link.engine_id(owner.request_id)
                self._owners[message.request_id] = owner
            elif isinstance(message, AbortRequest):
                message.request_id = link.engine_id(message.request_id)
                self._abort(message)
            elif isinstance(message, SetTenants):
                self._tells_tenants = any(map(is_divided, message.tenants.values()))
        if messages:
            self._engine.send(messages)

    async def load(self) -> dict[str, float]:
        """Figures for autoscaling.

        Returns:
            ``load``: requests that run or wait, as a share of what may run at once; at least 1
            where requests wait and the pool has no room for them.
        """
        stats = self._last_stats
        most = self._config.scheduler.max_num_seqs
        load = (stats.requests_running + stats.requests_waiting) / most
        is_full = stats.requests_waiting > 0 and stats.chunks_free + stats.chunks_cached == 0
        return {"load": max(load, 1.0) if is_full else load}

    async def stats(self, include_tree: bool, include_tenants: bool) -> bytes:
        """A fresh ``EngineStats``."""
        found = await self._live_engine().stats(
            include_tree=include_tree, include_tenants=include_tenants
        )
        return msgspec.msgpack.encode(found)

    async def ask(self, payload: bytes) -> bytes:
        """The ``CommandReply`` to a command, which is alone in a list."""
        (command,) = TO_ENGINE.decode(payload)
        if isinstance(command, LoadAdapter):
            return msgspec.msgpack.encode(await self._load_adapter(command))
        reply = await self._live_engine().ask(command)
        if isinstance(command, CacheCommand) and command.command_id != REPEATED:
            tenant = command.tenant if command.action == "drop_tenant" else None
            if tenant is not None or reply.ended_pins:
                drop_id = 0 if tenant is None else command.command_id
                self._put_to_all(
                    Dropped(tenant=tenant, drop_id=drop_id, ended_pins=reply.ended_pins)
                )
        return msgspec.msgpack.encode(reply)

    async def use_files(self, payload: bytes) -> None:
        """Load files of chunks; returns when each has been loaded, or refused."""
        engine = self._live_engine()
        for command in TO_ENGINE.decode(payload):
            assert isinstance(command, LoadPack)
            engine.use_file(command)
        while any(pack.state == "loading" for pack in (await engine.cache_command("packs")).packs):
            await asyncio.sleep(_PACK_SECONDS)

    async def _load_adapter(self, command: LoadAdapter) -> CommandReply:
        """Load an adapter, unless another front end has had it loaded."""
        async with self._loading:
            engine = self._live_engine()
            known = engine.adapters.get(command.name)
            if known is not None and known.folder == command.folder:
                return CommandReply(command_id=0, adapter=known)
            return await engine.ask(command)

    async def compute(self, payload: bytes) -> bytes:
        """The first ``TokenDelta`` of a request, which is alone in a list, when it has ended."""
        (request,) = TO_ENGINE.decode(payload)
        assert isinstance(request, EngineRequest)
        self._computed += 1
        own = msgspec.structs.replace(request, request_id=f"{request.request_id}/{self._computed}")
        try:
            first, *_ = [delta async for delta in self._live_engine().generate(own)]
        except (InvalidRequestError, OverloadedError, RequestFailedError) as error:
            info = EngineErrorInfo(kind="failed", message=str(error))
            first = TokenDelta(request_id=request.request_id, choices=[], error=info)
        return msgspec.msgpack.encode(first)

    # -- inside -------------------------------------------------------------------------------

    def _live_engine(self) -> HostedEngine:
        """Return the engine.

        Raises:
            EngineDeadError: it has ended.
        """
        if self._engine is None or self._end is not None:
            raise EngineDeadError("the engine of this replica has ended")
        return self._engine

    def _abort(self, message: AbortRequest) -> None:
        owner = self._owners.get(message.request_id)
        if owner is None:
            return
        owner.unfinished -= owner.unfinished if message.index is None else {message.index}
        if not owner.unfinished:
            del self._owners[message.request_id]

    def _leave(self, front: str, link: Link) -> None:
        """Drop a front end and its requests."""
        link.is_closed = True
        if self._links.get(front) is link:
            del self._links[front]
        left = [name for name, owner in self._owners.items() if owner.link is link]
        for name in left:
            del self._owners[name]
        if left and self._engine is not None:
            self._engine.send([AbortRequest(request_id=name) for name in left])

    def _hand_on(self, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            owner = self._owners.get(delta.request_id)
            if owner is not None:
                if not owner.take(delta):
                    del self._owners[delta.request_id]
                delta.request_id = owner.request_id
                owner.link.put(delta)

    def _put_to_all(self, item: FromReplica) -> None:
        for link in self._links.values():
            link.put(item)

    def _note_stats(self, stats: EngineStats) -> None:
        self._last_stats = self._stats = stats
        self._put_to_all(self._make_beat())

    def _note_digest(self, levels: list[list[int]]) -> None:
        if levels != self._heads:
            self._heads = levels
            self._put_to_all(Beat(is_draining=self._is_draining, heads=levels))

    def _make_beat(self) -> Beat:
        stats, self._stats = self._stats, None
        return Beat(is_draining=self._is_draining, stats=stats)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            if self._asking is None or self._asking.done():
                self._asking = asyncio.create_task(self._ask_stats())
            self._put_to_all(self._make_beat())
            late = time.monotonic() - FRONT_SECONDS
            for front, link in list(self._links.items()):
                if link.heard_at < late:
                    logger.warning("front end %s has ended: its requests are dropped", front)
                    self._leave(front, link)
                    link.has_items.set()

    async def _ask_stats(self) -> None:
        try:
            engine = self._live_engine()
            engine.send([DigestRequest(max_keys=_DIGEST_KEYS)])
            self._note_stats(await engine.stats(include_tenants=self._tells_tenants))
        except ChunkLlamaError:
            return  # its end is reported by itself

    async def _watch(self) -> None:
        """Kill an engine process that hangs."""
        assert self._engine is not None
        await self._engine.process.wait_hang(self._hang_seconds)
        logger.error("the engine process made no progress for %g s: killed", self._hang_seconds)
        await self._engine.process.kill()

    def _engine_died(self) -> None:
        assert self._engine is not None
        ids = self._engine.process.journal.running_requests()
        running = [self._owners[name].request_id for name in ids if name in self._owners]
        self._finish(Ended(reason="the engine process has ended", running=running))

    def _finish(self, end: Ended) -> None:
        """Tell every front end that the replica has ended."""
        if self._end is not None:
            return
        self._end = end
        for link in self._links.values():
            link.put(end)
            link.is_closed = True
        self._ended.set()
