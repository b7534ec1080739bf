"""Commands to all replicas of a cluster, and one reply of theirs.

What a command changes is kept, so that replicas which join later have it too: adapters, files of
chunks, limits of tenants, public prefixes.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from typing import Protocol, TypeVar

import msgspec

from chunkllama.adapter_messages import LoadAdapter, UnloadAdapter
from chunkllama.cache_messages import CacheCommand, CacheEvents, PackInfo
from chunkllama.cluster.merge import tag_chunk, untag_chunk
from chunkllama.engine.client import MessageClient, as_exception
from chunkllama.errors import ConfigError, EngineDeadError, InvalidRequestError
from chunkllama.messages import (
    CommandReply,
    EngineReady,
    EngineRequest,
    EngineStats,
    ExplainPrompt,
    ToEngine,
    TokenDelta,
)

T = TypeVar("T")


class Channel(Protocol):
    """A front end's connection to one replica.

    Attributes:
        name: of the replica.
        info: of its engine.
    """

    name: str
    info: EngineReady

    def send(self, messages: list[ToEngine]) -> None:
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

    async def compute(self, request: EngineRequest) -> TokenDelta:
        """Run a request to its end; returns its first delta, or its failure.

        Raises:
            EngineDeadError: the replica has ended.
        """
        ...


class CommandsToAll(MessageClient):
    """The part of a cluster's client that brings commands to every replica."""

    def __init__(self) -> None:
        super().__init__()
        self._public: dict[str, EngineRequest] = {}

    @abstractmethod
    def _channels(self) -> dict[int, Channel]:
        """The replicas in use, by number."""

    @abstractmethod
    def _best(self, prompt_token_ids: list[int], namespace: str) -> Channel | None:
        """The replica that would get a prompt."""

    async def prepare(self, channel: Channel) -> None:
        """Bring a replica what every replica must have before it gets requests.

        Raises:
            ChunkLlamaError: it cannot have it, or has ended.
        """
        for name, info in list(self.adapters.items()):
            command = LoadAdapter(command_id=0, name=name, folder=info.folder)
            reply = await channel.ask(command)
            if reply.adapter is None or reply.adapter.digest != info.digest:
                raise ConfigError(f"adapter {name}: {reply.error or 'its files have changed'}")
        for request in list(self._public.values()):
            delta = await channel.compute(request)
            if delta.error is not None:
                raise as_exception(delta.error)

    async def keep_public(self, request: EngineRequest) -> TokenDelta:
        """As ``EngineClient.keep_public``, on every replica."""
        deltas = await _gather(channel.compute(request) for channel in self._channels().values())
        for delta in deltas:
            if delta.error is not None:
                raise as_exception(delta.error)
        self._public[request.request_id] = request
        return next((delta for delta in deltas if delta.pin_refused), deltas[0])

    async def _ask(self, make: Callable[[int], ToEngine]) -> CommandReply:
        if self._dead is not None:
            raise self._dead
        channels = self._channels()
        command = make(0)
        match command:
            case ExplainPrompt():
                best = self._best(command.prompt_token_ids, command.namespace)
                if best is None:
                    raise EngineDeadError("no replica is ready")
                return await best.ask(command)
            case CacheCommand() if command.chunk_id >= 0:
                number, chunk_id = untag_chunk(command.chunk_id)
                if number not in channels:
                    return CommandReply(command_id=0, found=False)
                own = msgspec.structs.replace(command, chunk_id=chunk_id)
                return await channels[number].ask(own)
            case _:
                replies = await _gather(each.ask(command) for each in channels.values())
        reply = merge_replies(dict(zip(channels, replies, strict=True)))
        if isinstance(command, UnloadAdapter) and not reply.error:
            self.adapters.pop(command.name, None)
        self._take_reply(reply)
        return reply

    def watch_cache(self, max_waiting: int) -> AsyncGenerator[CacheEvents, None]:
        raise InvalidRequestError(
            "a cluster has a cache in each replica; its events are not joined"
        )


async def _gather(calls: Iterable[Awaitable[T]]) -> list[T]:
    """What every replica answers.

    Raises:
        EngineDeadError: there is none, or one has ended.
    """
    found = await asyncio.gather(*calls)
    if not found:
        raise EngineDeadError("no replica is ready")
    return found


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
