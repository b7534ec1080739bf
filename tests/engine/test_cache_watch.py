"""Readers of the cache's events: a snapshot, then every change, within a bounded buffer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from chunkllama.cache_messages import CacheEvents, ChunkRemoved, ChunkStored, WatchCache
from chunkllama.engine.cache_watch import CacheWatchers
from chunkllama.engine.in_process import InProcessEngineClient
from chunkllama.errors import EngineDeadError, RequestFailedError
from chunkllama.messages import EngineRequest
from chunkllama.sampling_params import SamplingParams


def removed(chunk_id: int, count: int = 1) -> CacheEvents:
    return CacheEvents(watch_id=0, events=[ChunkRemoved(chunk_id=chunk_id, hash="00")] * count)


def stored(watch_id: int, *chunk_ids: int) -> CacheEvents:
    events = [
        ChunkStored(chunk_id=i, hash="00", parent_hash=None, depth=0, tenant="", is_public=True)
        for i in chunk_ids
    ]
    return CacheEvents(watch_id=watch_id, events=events)


async def begin(stream: AsyncGenerator[CacheEvents, None]) -> asyncio.Task[CacheEvents]:
    """Start reading, up to the first wait."""
    first = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    return first


def test_each_reader_has_its_own_snapshot_and_the_changes_after_it() -> None:
    async def scenario() -> None:
        sent: list[WatchCache] = []
        watchers = CacheWatchers(sent.append, lambda: None)
        one, two = watchers.watch(100), watchers.watch(100)
        first = await begin(one)
        assert [message.watch_id for message in sent] == [1] and len(watchers) == 1
        watchers.deliver(removed(1))  # before its snapshot, which knows of it
        watchers.deliver(stored(1, 5, 6))
        assert await first == stored(1, 5, 6)
        other = await begin(two)
        watchers.deliver(removed(5))
        watchers.deliver(stored(2, 6))
        watchers.deliver(removed(6))
        assert [await anext(one) for _ in range(2)] == [removed(5), removed(6)]
        assert await other == stored(2, 6)
        assert await anext(two) == removed(6)
        await one.aclose()
        assert [message.watch_id for message in sent] == [1, 2]
        await two.aclose()
        assert [message.watch_id for message in sent] == [1, 2, 0], "the engine records no more"

    asyncio.run(scenario())


def test_a_slow_reader_is_dropped_and_counted() -> None:
    async def scenario() -> None:
        sent: list[WatchCache] = []
        dropped: list[bool] = []
        watchers = CacheWatchers(sent.append, lambda: dropped.append(True))
        slow, quick = watchers.watch(10), watchers.watch(11)
        for stream, number in ((slow, 1), (quick, 2)):
            first = await begin(stream)
            watchers.deliver(stored(number, *range(50)))
            assert len((await first).events) == 50, "a snapshot is no backlog"
        watchers.deliver(removed(1, 6))
        watchers.deliver(removed(2, 4))
        assert not dropped
        watchers.deliver(removed(3))
        assert len(dropped) == 1 and len(watchers) == 1
        with pytest.raises(RequestFailedError, match="too slow") as caught:
            await anext(slow)
        assert caught.value.code == "slow_reader"
        assert [len((await anext(quick)).events) for _ in range(3)] == [6, 4, 1]
        watchers.deliver(removed(4, 1000))  # one step may change more than the bound
        assert len((await anext(quick)).events) == 1000
        await quick.aclose()
        assert [message.watch_id for message in sent] == [1, 2, 0]

    asyncio.run(scenario())


def test_a_reader_that_begins_after_the_end_is_told() -> None:
    async def scenario() -> None:
        watchers = CacheWatchers(lambda _: None, lambda: None)
        stream = watchers.watch(10)
        watchers.close(EngineDeadError("the engine was closed"))
        with pytest.raises(EngineDeadError, match="closed"):
            await anext(stream)
        assert not len(watchers)

    asyncio.run(scenario())


def test_a_restarted_engine_has_an_empty_cache() -> None:
    async def scenario() -> None:
        sent: list[WatchCache] = []
        watchers = CacheWatchers(sent.append, lambda: None)
        stream = watchers.watch(100)
        first = await begin(stream)
        watchers.deliver(stored(1, 5))
        await first
        watchers.deliver(removed(5))
        watchers.went_down()
        watchers.deliver(removed(9))
        watchers.came_up()
        assert await anext(stream) == stored(1)
        watchers.deliver(stored(1, 7))
        assert await anext(stream) == stored(1, 7)
        assert [message.watch_id for message in sent] == [1, 1]
        watchers.close(EngineDeadError("closed"))
        with pytest.raises(EngineDeadError):
            await anext(stream)

    asyncio.run(scenario())


def test_an_engine_sends_what_it_stores_and_evicts(tiny_core) -> None:
    async def scenario() -> None:
        client = InProcessEngineClient(tiny_core(num_chunks=8))

        async def run(name: str, first: int) -> None:
            request = EngineRequest(
                request_id=name,
                prompt_token_ids=[first] * 200,
                sampling=SamplingParams(max_tokens=2, temperature=0.0),
                tenant="a",
            )
            async for _ in client.generate(request):
                pass

        async def changes(count: int) -> list[ChunkStored | ChunkRemoved]:
            events: list[ChunkStored | ChunkRemoved] = []
            while len(events) < count:
                batch = await anext(stream)
                assert batch.watch_id == 0
                events += batch.events
            return events

        await run("before", 5)
        stream = client.watch_cache(100)
        snapshot = await anext(stream)
        assert snapshot.watch_id and [event.depth for event in snapshot.events] == [0, 1, 2]
        await run("second", 6)
        events = await changes(3)
        assert [event.depth for event in events] == [0, 1, 2]
        assert {event.tenant for event in events} == {"a"}
        await run("third", 7)  # the pool holds two of them
        events = await changes(5)
        gone = [event.hash for event in events if isinstance(event, ChunkRemoved)]
        assert set(gone) <= {event.hash for event in snapshot.events} and gone
        dropped = await client.cache_command("drop_tenant", tenant="a")
        assert dropped.num_dropped
        while len(gone) < 9:
            gone += [e.hash for e in (await anext(stream)).events if isinstance(e, ChunkRemoved)]
        await client.close()
        with pytest.raises(EngineDeadError):
            await anext(stream)
        with pytest.raises(EngineDeadError):
            client.watch_cache(100)

    asyncio.run(scenario())
