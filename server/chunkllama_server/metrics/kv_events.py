"""Publish the cache's events over ZeroMQ in vLLM's form, for routers that match prompts exactly.

Each message has three frames: the topic, a number that rises by one, as eight bytes, big-endian,
and a msgpack array of the Unix time, the events, and the data-parallel rank 0. An event is an array
that begins with its type, as vLLM's ``kv_events.py`` defines them: ``BlockStored``,
``BlockRemoved``, ``AllBlocksCleared``. A new subscriber causes a snapshot: everything is cleared
and stored again.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from itertools import count
from typing import Any, Final

import msgspec

from chunkllama.cache.adapter_tags import TOKEN_BITS
from chunkllama.cache_messages import CacheEvent, CacheEvents, ChunkStored
from chunkllama.cluster.prefix_keys import chunk_key
from chunkllama.engine.client import EngineClient
from chunkllama.errors import ConfigError, EngineDeadError, RequestFailedError
from chunkllama.logger import init_logger
from chunkllama_server.config.settings import Settings

logger = init_logger(__name__)

_MEDIUM: Final = "GPU"  # vLLM's name for where the engine reads K/V, on a CPU too
_EVENTS_PER_MESSAGE: Final = 256
_MAX_MESSAGES: Final = 100_000  # that wait for a subscriber; later ones are dropped


@contextlib.asynccontextmanager
async def publish_kv_events(settings: Settings, engine: EngineClient) -> AsyncIterator[None]:
    """Publish events while the context is open, if the settings say where.

    Raises:
        ConfigError: the endpoint cannot be opened.
    """
    if settings.kv_events_endpoint is None:
        yield
        return
    import zmq
    import zmq.asyncio

    context = zmq.asyncio.Context()
    socket = context.socket(zmq.XPUB)
    # Every subscription is reported, and the end of a topic's last one.
    socket.setsockopt(zmq.XPUB_VERBOSE, 1)
    socket.setsockopt(zmq.SNDHWM, _MAX_MESSAGES)
    socket.setsockopt(zmq.LINGER, 0)
    try:
        socket.bind(settings.kv_events_endpoint)
    except zmq.ZMQError as error:
        context.destroy()
        raise ConfigError(
            f"kv_events_endpoint: cannot open {settings.kv_events_endpoint}: {error}"
        ) from None
    publisher = _Publisher(
        socket, settings.kv_events_topic.encode(), engine, settings.max_cache_events
    )
    task = asyncio.create_task(publisher.run())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        context.destroy()


class _Publisher:
    """Watches the cache while there are subscribers.

    Args:
        socket: a bound XPUB socket of zmq.asyncio.
        max_waiting: changes that may wait to be published.
    """

    def __init__(self, socket: Any, topic: bytes, engine: EngineClient, max_waiting: int) -> None:
        self._socket = socket
        self._topic = topic
        self._engine = engine
        self._max_waiting = max_waiting
        self._numbers = count()
        self._keys: dict[int, int] = {}  # by chunk id

    async def run(self) -> None:
        """Begin with a snapshot whenever a subscriber comes."""
        topics: set[bytes] = set()  # that have subscribers
        publishing: asyncio.Task[None] | None = None
        try:
            while True:
                message: bytes = await self._socket.recv()
                if message[:1] not in (b"\x00", b"\x01"):
                    continue  # a peer may send anything
                is_new = message[:1] == b"\x01"
                if is_new:
                    topics.add(message[1:])
                else:
                    topics.discard(message[1:])
                if publishing is not None and (is_new or not topics):
                    publishing.cancel()
                    publishing = None
                if publishing is None and topics:
                    publishing = asyncio.create_task(self._publish())
        finally:
            if publishing is not None:
                publishing.cancel()

    async def _publish(self) -> None:
        while True:
            batches = self._engine.watch_cache(self._max_waiting, with_contents=True)
            try:
                async with contextlib.aclosing(batches):
                    async for batch in batches:
                        await self._send(batch)
            except RequestFailedError:
                logger.warning("kv_events: too many changes wait; subscribers get a snapshot")
            except EngineDeadError:
                return
            except Exception:
                logger.exception("kv_events: nothing is published until a subscriber comes")
                return

    async def _send(self, batch: CacheEvents) -> None:
        events = [] if not batch.watch_id else [["AllBlocksCleared"]]
        if batch.watch_id:
            self._keys.clear()
        for event in batch.events:
            events.extend(self._in_vllms_form(event))
        for start in range(0, len(events), _EVENTS_PER_MESSAGE):
            part = events[start : start + _EVENTS_PER_MESSAGE]
            payload = msgspec.msgpack.encode([time.time(), part, 0])
            number = next(self._numbers).to_bytes(8, "big")
            await self._socket.send_multipart([self._topic, number, payload])

    def _in_vllms_form(self, event: CacheEvent) -> Iterator[list[Any]]:
        """Yield the event; none for a chunk under an adapter, whose number is ours alone."""
        if not isinstance(event, ChunkStored):
            key = self._keys.pop(event.chunk_id, None)
            if key is not None:
                yield ["BlockRemoved", [key], _MEDIUM]
            return
        contents = event.contents
        assert contents is not None
        if contents.token_ids[-1] >> TOKEN_BITS:
            return
        key = chunk_key(bytes.fromhex(event.hash), contents.namespace)
        self._keys[event.chunk_id] = key
        parent = None
        if event.parent_hash is not None:
            parent = chunk_key(bytes.fromhex(event.parent_hash), contents.parent_namespace)
        extra = [[contents.namespace]] if contents.namespace else None
        size = len(contents.token_ids)
        yield [
            "BlockStored", [key], parent, contents.token_ids, size, None, _MEDIUM, None, extra,
        ]  # fmt: skip
