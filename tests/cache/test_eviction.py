"""Eviction between tenants: exact victims."""

from __future__ import annotations

import random

import pytest
from cache_driver import CacheDriver, ids

from chunkllama.cache import eviction
from chunkllama.cache.node import PUBLIC


def owners(driver: CacheDriver) -> dict[str, int]:
    order = driver.cache.tree.order
    return {name: order.num_nodes(name) for name in ("", "A", "B") if order.num_nodes(name)}


def test_a_flood_does_not_evict_another_tenants_prompt() -> None:
    driver = CacheDriver(num_chunks=40)
    driver.store("abcdefghijklmnopqrst", "B", "B")
    for i in range(500):
        driver.store(f"{i:08d}....", "A", "A")
        assert driver.match("abcdefghijklmnopqrstu", "B").num_tokens == 20
    assert owners(driver) == {"A": 35, "B": 5}
    driver.check()


def test_a_tenant_alone_may_use_the_whole_pool() -> None:
    driver = CacheDriver(num_chunks=40)
    for i in range(20):
        driver.store(chr(97 + i) * 8, "A", "A")
    assert owners(driver) == {"A": 40}


def test_within_a_tenant_the_least_recently_used_goes_first() -> None:
    driver = CacheDriver(num_chunks=8)
    for text in ("aaaa", "bbbb", "cccc", "aaaa."):
        driver.store(text, "A", "A")
    driver.cache.tree.evict(1)
    assert driver.match("bbbb.", "A").num_tokens == 0
    assert driver.match("aaaa.", "A").num_tokens == 4


def test_equal_tenants_together_are_least_recently_used_first() -> None:
    driver = CacheDriver(num_chunks=4)
    for text, tenant in (("aaaa", "A"), ("bbbb", "B"), ("cccc", "A"), ("dddd", "B")):
        driver.store(text, tenant, tenant)
    gone = []
    for _ in range(4):
        driver.cache.tree.evict(1)
        for text, tenant in (("aaaa", "A"), ("bbbb", "B"), ("cccc", "A"), ("dddd", "B")):
            if text not in gone and driver.match(text + ".", tenant).num_tokens == 0:
                gone.append(text)
    assert gone == ["aaaa", "bbbb", "cccc", "dddd"]


def test_public_chunks_without_a_tenant_go_last() -> None:
    driver = CacheDriver(num_chunks=12)
    driver.store("pppppppp", PUBLIC, "")
    for i in range(30):
        driver.store(chr(97 + i) * 8, "A", "A")
    assert driver.match("pppppppp.", "A").num_tokens == 8
    assert driver.cache.tree.evict(12) == 12


def test_chunks_in_use_and_pinned_stay() -> None:
    driver = CacheDriver(num_chunks=12)
    live = driver.start("aaaaaaaa", "A", tenant="A")
    live.compute()
    driver.store("bbbb", "A", "A")
    driver.store("cccc", "B", "B")
    assert driver.cache.pin(ids("cccc"), "B", 10.0, "B")
    assert driver.cache.tree.evict(12) == 1
    assert owners(driver) == {"A": 2, "B": 1}
    driver.check()


@pytest.mark.parametrize("seed", range(4))
def test_every_unused_chunk_can_be_evicted(seed: int) -> None:
    """Tenants come and go, and the heaps lose no leaf."""
    rng = random.Random(seed)
    driver = CacheDriver(num_chunks=24)
    for _ in range(300):
        tenant = rng.choice(["", "A", "B", f"t{rng.randrange(40)}"])
        length = rng.randrange(1, 20)
        driver.store("".join(rng.choice("ab") for _ in range(length)), tenant, tenant)
        if rng.random() < 0.1:
            driver.cache.tree.evict(rng.randrange(1, 8))
        driver.check()
    cached = driver.cache.tree.num_nodes
    assert driver.cache.tree.evict(24) == cached
    assert driver.cache.pool.num_free == 24


def test_the_work_of_an_eviction_does_not_grow_with_tenants(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Entries out of date are dropped once, however long prompts come and go."""
    rng = random.Random(0)
    driver = CacheDriver(num_chunks=1024)
    looks = 0
    oldest = eviction._Owner.oldest

    def count(owner: eviction._Owner) -> int | None:
        nonlocal looks
        looks += 1
        return oldest(owner)

    def store() -> None:
        tenant = f"t{rng.randrange(256)}"
        length = 4 * rng.choice((1, 2, 30))
        driver.store("".join(rng.choice("abcd") for _ in range(length)), tenant, tenant)

    for _ in range(800):
        store()
    monkeypatch.setattr(eviction._Owner, "oldest", count)
    before = driver.cache.tree.evicted_chunks_total
    for _ in range(400):
        store()
    evicted = driver.cache.tree.evicted_chunks_total - before
    assert evicted > 3000
    assert looks < 12 * evicted
