"""A front end's channel to one replica, over Ray actors.

Imports Ray inside the functions that need it.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from chunkllama.cache_messages import LoadPack
from chunkllama.cluster.client import ClusterEngineClient
from chunkllama.cluster.host import BEAT_SECONDS
from chunkllama.cluster.messages import ENCODER, FROM_REPLICA, ToReplica
from chunkllama.errors import EngineDeadError
from chunkllama.messages import (
    CommandReply,
    EngineReady,
    EngineRequest,
    EngineStats,
    ToEngine,
    TokenDelta,
)


class RayChannel:
    """A front end's channel to one replica: an actor's stream of items, and calls that bring it
    messages, one after the other.

    Args:
        name: of the host actor.
        actor: its handle.
        info: of its engine.
    """

    def __init__(self, name: str, actor: Any, info: EngineReady) -> None:
        self.name = name
        self.info = info
        self.lost = asyncio.Event()
        self._actor = actor
        self._front = secrets.token_hex(8)
        self._outbox: list[ToReplica] = []
        self._has_messages = asyncio.Event()
        self._heard_at = time.monotonic()

    @classmethod
    async def open(cls, name: str, actor: Any) -> RayChannel:
        """Wait until a replica has loaded its model."""
        info = msgspec.msgpack.decode(await actor.hello.remote(), type=EngineReady)
        return cls(name, actor, info)

    def send(self, messages: Sequence[ToReplica]) -> None:
        """Queue messages."""
        self._outbox += messages
        self._has_messages.set()

    async def stats(self, include_tree: bool, include_tenants: bool) -> EngineStats:
        """As ``Channel.stats``."""
        payload = await self._call("stats", include_tree, include_tenants)
        return msgspec.msgpack.decode(payload, type=EngineStats)

    async def ask(self, command: ToEngine) -> CommandReply:
        """As ``Channel.ask``."""
        payload = await self._call("ask", ENCODER.encode([command]))
        return msgspec.msgpack.decode(payload, type=CommandReply)

    async def use_files(self, commands: list[LoadPack]) -> None:
        """As ``Channel.use_files``."""
        await self._call("use_files", ENCODER.encode(commands))

    async def compute(self, request: EngineRequest) -> TokenDelta:
        """As ``Channel.compute``."""
        payload = await self._call("compute", ENCODER.encode([request]))
        return msgspec.msgpack.decode(payload, type=TokenDelta)

    async def _call(self, method: str, *args: Any) -> bytes:
        from ray.exceptions import RayError

        try:
            payload = await getattr(self._actor, method).remote(*args)
        except RayError as error:
            raise EngineDeadError(f"replica {self.name}: {type(error).__name__}") from None
        return bytes(payload or b"")

    async def run(self, client: ClusterEngineClient, hang_seconds: float) -> None:
        """Read the channel until the replica ends or hangs, and tell the client."""
        parts = [
            asyncio.create_task(self._read(client)),
            asyncio.create_task(self._write()),
            asyncio.create_task(self._watch(hang_seconds)),
        ]
        try:
            await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            hung = parts[2].done()
            reason = f"no message for {hang_seconds:g} s" if hung else "the actor has ended"
            client.lose(self, reason, None, hung=hung)
        finally:
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)

    async def _read(self, client: ClusterEngineClient) -> None:
        stream = self._actor.subscribe.options(num_returns="streaming").remote(self._front)
        async for reference in stream:
            items = FROM_REPLICA.decode(await reference)
            self._heard_at = time.monotonic()
            client.receive(self, items)

    async def _write(self) -> None:
        """Send what has been queued, each second an empty list if there is nothing."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BEAT_SECONDS):
                    await self._has_messages.wait()
            self._has_messages.clear()
            messages, self._outbox = self._outbox, []
            await self._actor.send.remote(self._front, ENCODER.encode(messages))

    async def _watch(self, hang_seconds: float) -> None:
        """Return when the replica has sent nothing for too long."""
        last = time.monotonic()
        silent = 0.0
        tick = min(hang_seconds / 4, BEAT_SECONDS)
        while silent < hang_seconds:
            await asyncio.sleep(tick)
            now = time.monotonic()
            # if this process itself was stopped or starved, so perhaps was the replica
            silent = silent + min(now - last, 2 * tick) if self._heard_at < last else 0.0
            last = now
