"""Chunk-seconds, evictions and shares of tenants: exact numbers."""

from __future__ import annotations

import random

import pytest
from cache_driver import CacheDriver, ids

from chunkllama.messages import TenantStats
from chunkllama.tenant_limits import TenantLimits, TenantTable


def read(driver: CacheDriver) -> dict[str, TenantStats]:
    return driver.cache.usage.read([live.chunks for live in driver.live])


def seconds(driver: CacheDriver) -> dict[str, tuple[float, float]]:
    return {n: (s.chunk_seconds, s.cached_chunk_seconds) for n, s in read(driver).items()}


def test_a_shared_chunk_is_divided_among_those_who_use_it() -> None:
    driver = CacheDriver()
    a = driver.start("ppppaa", tenant="A")
    a.compute()
    driver.now = 3.0  # two chunks of A
    b = driver.start("ppppbb", tenant="B")
    b.compute()
    driver.now = 5.0  # one of each, and half of a shared one each
    assert seconds(driver)["A"] == (6.0 + 3.0, 0.0) and seconds(driver)["B"] == (3.0, 0.0)
    a.release()
    driver.now = 6.0  # two of B; the tail of A is cached
    assert seconds(driver)["A"] == (9.0, 1.0) and seconds(driver)["B"] == (5.0, 0.0)
    b.release()
    driver.now = 8.0
    assert seconds(driver) == {"A": (9.0, 1.0 + 4.0), "B": (5.0, 2.0)}
    gauges = {n: (s.chunks_used, s.chunks_cached) for n, s in read(driver).items()}
    assert gauges == {"A": (0.0, 2), "B": (0.0, 1)}


@pytest.mark.parametrize("seed", range(6))
def test_all_parts_add_up_to_the_chunks_that_are_not_free(seed: int) -> None:
    rng = random.Random(seed)
    driver = CacheDriver(num_chunks=40)
    expected = 0.0
    for _ in range(400):
        action = rng.random()
        if action < 0.4 and len(driver.live) < 4:
            tenant = rng.choice(["", "A", "B"])
            text = "".join(rng.choice("ab") for _ in range(rng.randrange(1, 20)))
            driver.start(text, rng.choice(["", tenant]), tenant=tenant).compute()
        elif action < 0.6 and driver.live:
            live = rng.choice(driver.live)
            if driver.cache.num_available > 3:
                live.write("".join(rng.choice("ab") for _ in range(rng.randrange(1, 6))))
        elif action < 0.8 and driver.live:
            rng.choice(driver.live).release()
        elif action < 0.85:
            driver.cache.tree.evict(rng.randrange(1, 4))
        driver.check()
        more = rng.random()
        driver.now += more
        expected += more * (40 - driver.cache.pool.num_free)
        stats = read(driver).values()
        in_use = sum(s.chunks_used + s.chunks_cached for s in stats)
        assert in_use == pytest.approx(40 - driver.cache.pool.num_free)
    total = sum(s.chunk_seconds + s.cached_chunk_seconds for s in read(driver).values())
    assert total == pytest.approx(expected)


def test_an_eviction_counts_for_its_owner_and_for_who_needed_the_chunk() -> None:
    driver = CacheDriver(num_chunks=4)
    driver.store("aaaabb", "A", "A")
    driver.store("cccc", "B", "B")
    driver.store("dddddddd", "B", "B")
    stats = read(driver)
    lost = {n: (s.evicted_chunks, s.evicted_tokens) for n, s in stats.items()}
    caused = {n: (s.evictions_for, s.evictions_of_others) for n, s in stats.items()}
    assert lost == {"A": (1, 2), "B": (0, 0)}
    assert caused == {"A": (0, 0), "B": (1, 1)}


def limited(driver: CacheDriver, **tenants: TenantLimits) -> None:
    driver.cache.set_tenants(TenantTable(tenants))


def owned(driver: CacheDriver, *names: str) -> list[int]:
    return [driver.cache.tree.order.num_nodes(name) for name in names]


def test_a_tenant_over_its_share_loses_its_chunks_first() -> None:
    """Although its chunks are the most recently used, and others have more of them."""
    driver = CacheDriver(num_chunks=40)
    limited(driver, A=TenantLimits(chunk_share=0.1))
    for i in range(20):
        driver.store(f"b{i:03d}", "B", "B")
    for letter in "abcdefghij":
        driver.store(4 * letter, "A", "A")
    driver.cache.tree.evict(6)
    assert owned(driver, "A", "B") == [4, 20]
    kept = [letter for letter in "abcdefghij" if driver.match(5 * letter, "A").num_tokens]
    assert kept == list("ghij"), "the least recently used of A were evicted"
    driver.cache.tree.evict(4)
    assert owned(driver, "A", "B") == [4, 16], "within its share, and within half an equal one"
    driver.check()


def test_a_free_pool_may_be_used_beyond_the_share() -> None:
    driver = CacheDriver(num_chunks=40)
    limited(driver, A=TenantLimits(chunk_share=0.1))
    for i in range(40):
        driver.store(f"a{i:03d}", "A", "A")
    assert owned(driver, "A") == [40]


def test_a_floor_protects_until_no_other_tenant_has_an_unused_chunk() -> None:
    driver = CacheDriver(num_chunks=40)
    limited(driver, A=TenantLimits(chunk_floor=0.5), B=TenantLimits(chunk_floor=0.0))
    for i in range(20):
        driver.store(f"a{i:03d}", "A", "A")
    for i in range(200):
        driver.store(f"b{i:03d}", "B", "B")
        assert owned(driver, "A") == [20]
    driver.cache.tree.evict(20)
    assert owned(driver, "A", "B") == [20, 0]
    assert driver.cache.tree.evict(1) == 1


def test_new_limits_hold_for_what_is_cached_already() -> None:
    driver = CacheDriver(num_chunks=40)
    for i in range(20):
        driver.store(f"a{i:03d}", "A", "A")
    for i in range(20):
        driver.store(f"b{i:03d}", "B", "B")
    limited(driver, B=TenantLimits(chunk_share=0.25))
    driver.cache.tree.evict(10)
    assert owned(driver, "A", "B") == [20, 10]
    limited(driver, A=TenantLimits(chunk_share=0.25))
    driver.cache.tree.evict(10)
    assert owned(driver, "A", "B") == [10, 10]
    limited(driver)
    driver.check()
    assert driver.cache.tree.evict(40) == 20


def test_chunks_in_use_and_pinned_of_a_tenant_over_its_share_stay() -> None:
    driver = CacheDriver(num_chunks=12)
    limited(driver, A=TenantLimits(chunk_share=0.1))
    driver.start("aaaaaaaa", "A", tenant="A").compute()
    driver.store("cccc", "A", "A")
    assert driver.cache.pin(ids("cccc"), "A", 10.0, "A")
    driver.store("bbbb", "B", "B")
    assert driver.cache.tree.evict(12) == 1
    assert owned(driver, "A", "B") == [3, 0]


def test_an_eviction_looks_at_few_tenants() -> None:
    """256 tenants with all kinds of limits; counted are the looks at a tenant's heap."""
    driver = CacheDriver(num_chunks=2048)
    kinds = [
        TenantLimits(), TenantLimits(chunk_share=0.001), TenantLimits(chunk_floor=0.001),
        TenantLimits(chunk_share=0.002, chunk_floor=0.001),
    ]  # fmt: skip
    limited(driver, **{f"t{i}": kinds[i % 4] for i in range(256)})
    rng = random.Random(0)
    for i in range(2048):
        tenant = f"t{rng.randrange(256)}"
        driver.store(f"{i:04d}", tenant, tenant)
    order = driver.cache.tree.order
    looks = 0
    first = order._first

    def counted(key: int, heap: list[tuple[int, int, str]]) -> str | None:
        nonlocal looks
        looks += 1
        return first(key, heap)

    order._first = counted  # type: ignore[method-assign]
    assert driver.cache.tree.evict(1000) == 1000
    assert looks <= 1000 * 4 * 12
    assert looks < 1000 * 40, "most classes are empty"
