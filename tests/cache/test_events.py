"""Events of stored and removed chunks: a reader that applies them knows what is stored."""

from __future__ import annotations

import hashlib
import random

import pytest

from chunkllama.cache.manager import CacheManager
from chunkllama.cache.node import decode_tokens
from chunkllama.cache_messages import CacheEvent, ChunkRemoved, ChunkStored
from chunkllama.simulation.engine import SimulatedEngine
from chunkllama.simulation.random_traffic import RandomTraffic

SIZE = 4


class Mirror:
    """What a reader knows: stored chunks by id."""

    def __init__(self) -> None:
        self.chunks: dict[int, ChunkStored] = {}

    def apply(self, events: list[CacheEvent]) -> None:
        for event in events:
            if isinstance(event, ChunkStored):
                assert event.chunk_id not in self.chunks, "stored twice"
                if event.depth:
                    hashes = [chunk.hash for chunk in self.chunks.values()]
                    assert event.parent_hash in hashes, "stored before its parent"
                else:
                    assert event.parent_hash is None
                self.chunks[event.chunk_id] = event
            else:
                assert isinstance(event, ChunkRemoved)
                assert self.chunks.pop(event.chunk_id).hash == event.hash


def hash_of(tokens: list[int], size: int) -> str:
    """As docs/multi-tenant.md defines it."""
    above = b""
    for start in range(0, len(tokens), size):
        part = b"".join(token.to_bytes(4, "big") for token in tokens[start : start + size])
        above = hashlib.sha256(above + part).digest()[:16]
    return above.hex()


def expected(cache: CacheManager) -> dict[int, tuple[str, int, str, bool]]:
    """The same from the tree itself."""
    found = {}
    for node in cache.tree.nodes():
        if node.filled == cache.chunk_size:
            path = b"".join(step.key for step in reversed(list(node.upward())))
            name = hash_of(decode_tokens(path), cache.chunk_size)
            found[node.chunk_id] = (name, node.depth, node.owner, node.namespace == "")
    return found


def check(mirror: Mirror, cache: CacheManager) -> None:
    known = {
        i: (each.hash, each.depth, each.tenant, each.is_public) for i, each in mirror.chunks.items()
    }
    assert known == expected(cache)


@pytest.mark.parametrize("chunk_size", [1, 4, 8])
@pytest.mark.parametrize("seed", range(6))
def test_events_keep_a_reader_up_to_date(seed: int, chunk_size: int) -> None:
    """Under traffic of every kind, with evictions, preemptions, aborts, pins and failed rows."""
    traffic = RandomTraffic(seed, chunk_size)
    engine, mirror = traffic.engine, Mirror()
    begin = random.Random(seed).randrange(60)
    seen = 0
    while engine.num_steps < 200:
        traffic.turn()
        if engine.num_steps < begin:
            continue
        if not engine.cache.tree.events.is_on:
            mirror.apply(engine.scheduler.watch_cache(is_watched=True))
        events = engine.scheduler.take_cache_events()
        seen += len(events)
        mirror.apply(events)
        check(mirror, engine.cache)
    assert seen or not engine.limits.enable_prefix_caching


def test_the_log_is_empty_while_it_is_not_read() -> None:
    run = SimulatedEngine(40, SIZE, vocab_size=1000)
    run.add(list(range(20)), 3, tenant="a", namespace="a")
    run.run()
    assert run.scheduler.take_cache_events() == []
    stored = run.scheduler.watch_cache(is_watched=True)
    assert [(event.depth, event.tenant, event.is_public) for event in stored] == [
        (depth, "a", False) for depth in range(5)
    ]
    assert [event.parent_hash for event in stored] == [None, *(e.hash for e in stored[:-1])]
    assert run.scheduler.watch_cache(is_watched=False) == []
    run.cache.tree.evict(40)
    assert run.scheduler.take_cache_events() == []


def test_partly_filled_leaves_have_no_events() -> None:
    run = SimulatedEngine(40, SIZE, vocab_size=1000)
    run.scheduler.watch_cache(is_watched=True)
    run.add([1, 2, 3, 4, 5, 6], 1)
    run.run()
    (stored,) = run.scheduler.take_cache_events()
    assert stored.hash == hash_of([1, 2, 3, 4], SIZE) and stored.is_public
    run.cache.tree.evict(1)
    assert run.scheduler.take_cache_events() == []
    run.cache.tree.evict(1)
    (removed,) = run.scheduler.take_cache_events()
    assert (removed.chunk_id, removed.hash) == (stored.chunk_id, stored.hash)
