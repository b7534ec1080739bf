"""Commands to all replicas of a cluster, and one reply of theirs.

What a command changes is kept, so that replicas which join later have it too: adapters, files of
chunks, limits of tenants, public prefixes.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from abc import abstractmethod
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

import msgspec

from chunkllama.adapter_messages import AdapterInfo, LoadAdapter, UnloadAdapter
from chunkllama.cache_messages import CacheCommand, EndedPin, KeepSnapshot, LoadPack, PackInfo
from chunkllama.cluster.merge import StatsMerger, tag_chunk, untag_chunk
from chunkllama.cluster.messages import REPEATED, Dropped, Spending, Spent, ToReplica
from chunkllama.cluster.shares import LimitShares
from chunkllama.engine.cache_watch import CacheStream
from chunkllama.engine.client import MessageClient, as_exception
from chunkllama.errors import ConfigError, EngineDeadError, InvalidRequestError
from chunkllama.messages import (
    CommandReply,
    EngineReady,
    EngineRequest,
    EngineStats,
    ExplainPrompt,
    SetTenants,
    ToEngine,
    TokenDelta,
)

T = TypeVar("T")

_STATS_SECONDS = 5.0  # for a replica's answer
_MOST_DROP_IDS = 4096
Kept = AdapterInfo | EngineRequest | LoadPack | KeepSnapshot


class Channel(Protocol):
    """A front end's connection to one replica.

    Attributes:
        name: of the replica.
        info: of its engine.
        lost: set when the front end no longer uses the replica, which may have ended or hang.
    """

    name: str
    info: EngineReady
    lost: asyncio.Event

    def send(self, messages: Sequence[ToReplica]) -> None:
        """Queue messages; lost if the replica has ended."""
        ...

    async def stats(self, include_tree: bool, include_tenants: bool) -> EngineStats:
        """A fresh snapshot.

        Raises:
            EngineDeadError: the replica has ended.
        """
        ...

    async def ask(self, command: ToEngine) -> CommandReply:
        """The engine's reply to a command.

        Raises:
            EngineDeadError: the replica has ended.
        """
        ...

    async def use_files(self, commands: list[LoadPack]) -> None:
        """Load files of chunks; returns when each has been loaded, or refused.

        Raises:
            EngineDeadError: the replica has ended.
        """
        ...

    async def compute(self, request: EngineRequest) -> TokenDelta:
        """Run a request to its end; returns its first delta, or its failure.

        Raises:
            EngineDeadError: the replica has ended.
        """
        ...


class CommandsToAll(MessageClient):
    """The part of a cluster's client that concerns all replicas.

    Attributes:
        take_spent: returns what tenants have spent of their rates since its last call.
        on_spent: called with what they have spent at other front ends.
    """

    def __init__(self) -> None:
        super().__init__()
        self._public: dict[str, EngineRequest] = {}
        self._shares = LimitShares()
        self._merger = StatsMerger()
        self._dropped: list[set[str]] = []  # tenants, since each replica began to be prepared
        self._drop_ids: dict[int, None] = {}  # of drops that are known, the oldest first
        self.take_spent: Callable[[], dict[str, Spending]] = dict
        self.on_spent: Callable[[dict[str, Spending]], None] = lambda _: None

    @abstractmethod
    def _channels(self) -> dict[int, Channel]:
        """The replicas in use, by number."""

    @abstractmethod
    async def _explain(self, command: ExplainPrompt) -> CommandReply:
        """Ask the replica that would get a prompt."""

    def set_tenants(self, tenants: SetTenants) -> None:
        """As ``EngineClient.set_tenants``; the limits are those of all replicas together."""
        self._shares.set_limits(tenants)
        self._give_shares()

    def _give_shares(self, tenant: str | None = None) -> None:
        """Send each replica its shares of the limits, where they have changed.

        Args:
            tenant: the only one whose limits are divided again.
        """
        shares = self._shares
        changes = shares.changes() if tenant is None else shares.changes_of(tenant)
        for channel in self._channels().values() if changes else ():
            if channel.name in changes:
                channel.send([changes[channel.name]])

    def _tell_spent(self, channel: Channel) -> None:
        """Let other front ends know what tenants have spent here, through one of the replicas."""
        if spent := self.take_spent():
            channel.send([Spent(tenants=spent)])

    def _receive_news(self, news: Spent | Dropped) -> None:
        """Take what a front end, perhaps this one, has told all of them through a replica."""
        if isinstance(news, Spent):
            self.on_spent(news.tenants)
            return
        self._end_pins(news.ended_pins)
        if news.tenant is None or not self._is_first(news.drop_id):
            return
        if self._leave_out(news.tenant):
            # A replica may have got the tenant's chunks from here which the other front end did
            # not know yet.
            drop = _repeated_drop(news.tenant)
            for channel in self._channels().values():
                channel.send([drop])

    def _is_first(self, drop_id: int) -> bool:
        """Note a drop; False: it is known, and what came since must stay."""
        if drop_id in self._drop_ids:
            return False
        if drop_id:
            self._drop_ids[drop_id] = None
            if len(self._drop_ids) > _MOST_DROP_IDS:
                del self._drop_ids[next(iter(self._drop_ids))]
        return True

    def _leave_out(self, tenant: str) -> bool:
        for dropped in self._dropped:
            dropped.add(tenant)
        return super()._leave_out(tenant)

    async def prepare(self, channel: Channel) -> None:
        """Bring a replica what every replica must have before it gets requests.

        Raises:
            ChunkLlamaError: it cannot have it, or has ended.
        """
        dropped: set[str] = set()
        self._dropped.append(dropped)
        try:
            await self._bring(channel, dropped)
        finally:
            self._dropped = [each for each in self._dropped if each is not dropped]

    async def _bring(self, channel: Channel, dropped: set[str]) -> None:
        """Bring a replica what is kept.

        Args:
            dropped: tenants that are dropped meanwhile.
        """
        given: dict[str, Kept] = {}
        while given != (kept := self._kept()) or dropped:  # they may change meanwhile
            if dropped:
                await channel.ask(_repeated_drop(dropped.pop()))
                continue
            for key, item in given.items():
                if isinstance(item, AdapterInfo) and kept.get(key) != item:
                    await channel.ask(UnloadAdapter(command_id=0, name=item.name))
            for key, item in kept.items():
                if given.get(key) != item:
                    await _give(channel, item)
            given = kept

    def _kept(self) -> dict[str, Kept]:
        """What every replica has, each under a key of its own."""
        files = {f"file {path}": file for path, file in self._files.items()}
        adapters = {f"adapter {name}": info for name, info in self.adapters.items()}
        public = {f"prompt {name}": request for name, request in self._public.items()}
        return {**files, **adapters, **public}

    async def keep_public(self, request: EngineRequest) -> TokenDelta:
        """As ``EngineClient.keep_public``, on every replica."""
        deltas = list((await self._from_all(lambda each: each.compute(request))).values())
        for delta in deltas:
            if delta.error is not None:
                raise as_exception(delta.error)
        self._public[request.request_id] = request
        return next((delta for delta in deltas if delta.pin_refused), deltas[0])

    async def _from_all(self, call: Callable[[Channel], Coroutine[Any, Any, T]]) -> dict[int, T]:
        """What every replica answers, by number, also those that join meanwhile.

        Raises:
            EngineDeadError: there is none, or one has ended or hangs.
        """
        answers: dict[int, T] = {}
        while new := {n: each for n, each in self._channels().items() if n not in answers}:
            found = await asyncio.gather(*(unless_lost(each, call(each)) for each in new.values()))
            answers |= zip(new, found, strict=True)
        if not answers:
            raise EngineDeadError("no replica is ready")
        return answers

    async def _ask(self, make: Callable[[int], ToEngine]) -> CommandReply:
        if self._dead is not None:
            raise self._dead
        channels = self._channels()
        command = make(0)
        if isinstance(command, CacheCommand) and command.action == "drop_tenant":
            command.command_id = 1 + secrets.randbits(62)
            self._is_first(command.command_id)
        match command:
            case ExplainPrompt():
                return await self._explain(command)
            case CacheCommand() if command.chunk_id >= 0:
                number, chunk_id = untag_chunk(command.chunk_id)
                if number not in channels:
                    return CommandReply(command_id=0, found=False)
                own = msgspec.structs.replace(command, chunk_id=chunk_id)
                channel = channels[number]
                reply = await unless_lost(channel, channel.ask(own))
            case _:
                reply = merge_replies(await self._from_all(lambda each: each.ask(command)))
        if isinstance(command, UnloadAdapter) and not reply.error:
            self.adapters.pop(command.name, None)
        self._take_reply(reply)
        return reply

    def _take_reply(self, reply: CommandReply) -> None:
        self._end_pins(reply.ended_pins)
        super()._take_reply(reply)

    def _end_pins(self, pins: list[EndedPin]) -> None:
        """Let no other replica make a pin again that was ended."""
        for pin in pins:
            for stream in self._streams.values():
                stream.state.end_pin(pin)

    async def stats(
        self, *, include_tree: bool = False, include_tenants: bool = False
    ) -> EngineStats:
        if self._dead is not None:
            raise self._dead
        if include_tree or include_tenants:
            await self._pull_stats(include_tree, include_tenants)
        total = self._merger.total()
        if include_tenants:
            total.tenants = self._merger.tenants()
        if include_tree:
            total.tree = self._merger.tree({c.name: n for n, c in self._channels().items()})
        return total

    async def _pull_stats(self, include_tree: bool, include_tenants: bool) -> None:
        """Ask every replica; one that does not answer in time keeps its last snapshot."""

        async def ask(number: int, channel: Channel) -> None:
            with contextlib.suppress(EngineDeadError, TimeoutError):
                async with asyncio.timeout(_STATS_SECONDS):
                    stats = await channel.stats(include_tree, include_tenants)
                if self._channels().get(number) is channel:
                    self._merger.update(channel.name, stats)

        await asyncio.gather(*(ask(*each) for each in self._channels().items()))

    def watch_cache(self, max_waiting: int, *, with_contents: bool = False) -> CacheStream:
        raise InvalidRequestError(
            "a cluster has a cache in each replica; its events are not joined"
        )


async def unless_lost(channel: Channel, call: Coroutine[Any, Any, T]) -> T:
    """Return what a call to a replica gives; one that hangs is lost, and would never answer.

    Raises:
        EngineDeadError: the replica has ended, or was lost meanwhile.
    """
    calling = asyncio.ensure_future(call)
    losing = asyncio.ensure_future(channel.lost.wait())
    try:
        await asyncio.wait({calling, losing}, return_when=asyncio.FIRST_COMPLETED)
        if not calling.done():
            raise EngineDeadError(f"replica {channel.name} was lost")
        return calling.result()
    finally:
        calling.cancel()
        losing.cancel()


def _repeated_drop(tenant: str) -> CacheCommand:
    return CacheCommand(command_id=REPEATED, action="drop_tenant", tenant=tenant)


async def _give(channel: Channel, item: Kept) -> None:
    """Bring a replica one thing that every replica has."""
    match item:
        case AdapterInfo():
            command = LoadAdapter(command_id=0, name=item.name, folder=item.folder)
            reply = await channel.ask(command)
            if reply.adapter is None or reply.adapter.digest != item.digest:
                reason = reply.error or "its files have changed"
                raise ConfigError(f"adapter {item.name}: {reason}")
        case EngineRequest():
            delta = await channel.compute(item)
            if delta.error is not None:
                raise as_exception(delta.error)
        case LoadPack():
            await channel.use_files([item])
        case KeepSnapshot():
            raise AssertionError("the settings of a cluster exclude snapshots")


def merge_replies(replies: dict[int, CommandReply]) -> CommandReply:
    """Join the replies of replicas, by number, to one command."""
    merged = CommandReply(command_id=0, found=False)
    packs: dict[str, PackInfo] = {}
    for number, reply in replies.items():
        merged.found |= reply.found
        merged.num_dropped += reply.num_dropped
        merged.num_kept += reply.num_kept
        merged.ended_pins += reply.ended_pins
        merged.error = merged.error or reply.error
        merged.adapter = merged.adapter or reply.adapter
        for pin in reply.pins:
            merged.pins.append(
                msgspec.structs.replace(pin, chunk_id=tag_chunk(number, pin.chunk_id))
            )
        for node in reply.tree:
            ids = {
                name: tag_chunk(number, getattr(node, name))
                for name in ("chunk_id", "parent_chunk_id")
            }
            merged.tree.append(msgspec.structs.replace(node, **ids))
        for pack in reply.packs:
            _add_pack(packs, pack)
    merged.packs = list(packs.values())
    if merged.error:
        merged.adapter = None
    return merged


def _add_pack(packs: dict[str, PackInfo], pack: PackInfo) -> None:
    """Add one replica's part of loading a pack: the least of their states is that of all."""
    known = packs.setdefault(pack.name, pack)
    if known is pack:
        return
    order = ("refused", "loading", "loaded")
    known.state = min(known.state, pack.state, key=order.index)
    known.reason = known.reason or pack.reason
    known.seconds = max(known.seconds, pack.seconds)
    for name in ("chunks_loaded", "chunks_present", "chunks_damaged", "chunks_left_out"):
        setattr(known, name, getattr(known, name) + getattr(pack, name))
