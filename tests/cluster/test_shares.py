"""Limits of tenants over several replicas: shares that add up to them and follow their use."""

from __future__ import annotations

import asyncio
import copy
import math
import random
from dataclasses import dataclass

import msgspec
import pytest
from fake_replicas import Fixture, request, run, settle

from chunkllama.cluster.messages import Beat
from chunkllama.cluster.shares import DIVIDE_SECONDS, LimitShares, divide
from chunkllama.messages import EngineStats, SetTenants, TenantStats
from chunkllama.tenant_limits import TenantLimits


@pytest.mark.parametrize(
    ("limit", "used", "wanted", "given", "shares"),
    [
        (7, (0, 0, 0), (0, 0, 0), (0, 0, 0), [3, 2, 2]),
        (7, (0, 5, 0), (0, 0, 0), (3, 2, 2), [1, 6, 0]),
        (7, (0, 5, 0), (9, 0, 0), (0, 5, 0), [2, 3, 0]),
        (7, (0, 0, 0), (9, 1, 9), (0, 0, 0), [3, 1, 3]),
        (1, (0, 0, 0), (0, 0, 1), (1, 0, 0), [0, 0, 1]),
        # what a replica may be using is taken from it, and given to another one when it is free
        (4, (4, 0, 0), (9, 9, 0), (4, 0, 0), [2, 0, 0]),
        (4, (0, 0, 0), (9, 9, 0), (4, 0, 0), [2, 0, 0]),
        (4, (3, 0, 0), (9, 9, 0), (2, 0, 0), [2, 1, 0]),
        (4, (2, 0, 0), (9, 9, 0), (2, 1, 0), [2, 2, 0]),
        (7, (9, 1, 0), (0, 0, 9), (9, 1, 0), [3, 1, 0]),
        (0, (2, 0, 0), (1, 1, 1), (3, 0, 0), [0, 0, 0]),
    ],
)
def test_shares_follow_the_use_of_a_limit(
    limit: int,
    used: tuple[int, ...],
    wanted: tuple[int, ...],
    given: tuple[int, ...],
    shares: list[int],
) -> None:
    assert divide(limit, used, wanted, given, [True] * 3) == shares


def test_a_draining_replica_gets_no_part_of_the_rest() -> None:
    assert divide(9, (1, 0, 0), (0, 0, 1), (9, 0, 0), [False, True, True]) == [1, 4, 4]
    assert divide(9, (1, 0), (0, 0), (9, 0), [False, False]) == [1, 0]


@dataclass
class Engine:
    """A replica's engine, which runs as many requests of a tenant as its share."""

    share: int = 0
    running: int = 0
    waiting: int = 0

    def start(self) -> None:
        more = min(self.waiting, max(self.share - self.running, 0))
        self.running, self.waiting = self.running + more, self.waiting - more

    def report(self) -> dict[str, TenantStats]:
        return {"t": TenantStats(requests_running=self.running, requests_waiting=self.waiting)}


EVENTS = ("arrive", "end", "report", "divide")


def give(shares: LimitShares, engines: dict[str, Engine]) -> None:
    """Give each engine its share, up to which it starts requests."""
    take(shares.changes(), engines)


def take(changes: dict[str, SetTenants], engines: dict[str, Engine]) -> None:
    for name, message in changes.items():
        engines[name].share = message.tenants["t"].max_concurrent_requests or 0
    for engine in engines.values():
        engine.start()


def happen(event: str, name: str, shares: LimitShares, engines: dict[str, Engine]) -> None:
    engine = engines[name]
    match event:
        case "arrive":
            if shares.is_short(name, "t", pin_chunks=0):
                take(shares.changes_of("t"), engines)
            engine.waiting += 1
        case "end":
            engine.running = max(engine.running - 1, 0)
        case "report":
            shares.report(name, engine.report())
        case _:
            give(shares, engines)
    engine.start()


@pytest.mark.parametrize("seed", range(20))
def test_no_more_requests_run_than_the_limit_in_any_order_of_events(seed: int) -> None:
    rng = random.Random(seed)
    limit = rng.randrange(1, 9)
    engines = {name: Engine() for name in "abcd"}
    shares = LimitShares(lambda: 0.0)
    for name in engines:
        shares.add(name)
    shares.set_limits(limits(max_concurrent_requests=limit))
    give(shares, engines)
    for turn in range(600):
        name = rng.choice("aab") if turn < 300 else rng.choice("abcd")
        happen(rng.choice(EVENTS if turn < 500 else EVENTS[1:]), name, shares, engines)
        assert sum(each.running for each in engines.values()) <= limit
    for _ in range(1000):
        for name, engine in engines.items():
            engine.running = 0
            shares.report(name, engine.report())
        give(shares, engines)
    assert not any(engine.running or engine.waiting for engine in engines.values())


def limits(**fields: int) -> SetTenants:
    return SetTenants(tenants={"t": TenantLimits(**fields), "other": TenantLimits(weight=2.0)})


def test_only_replicas_whose_shares_have_changed_are_told() -> None:
    now = [0.0]
    shares = LimitShares(lambda: now[0])
    shares.add("a")
    shares.add("b")
    shares.set_limits(limits(max_concurrent_requests=4, queue_share=0.5))
    given = shares.changes()
    assert {name: each.tenants["t"] for name, each in given.items()} == dict.fromkeys(
        "ab", TenantLimits(max_concurrent_requests=2, queue_share=0.5)
    )
    assert {each.tenants["other"] for each in given.values()} == {TenantLimits(weight=2.0)}
    assert shares.changes() == {}
    assert shares.report("b", {})
    assert not shares.report("a", {"t": TenantStats(requests_running=1)})
    now[0] = DIVIDE_SECONDS
    assert shares.report("a", {})  # not asked for tenants: the last report stays
    given = shares.changes()
    assert [given[name].tenants["t"].max_concurrent_requests for name in "ab"] == [3, 1]


def test_a_request_takes_the_rest_of_other_replicas_and_no_more_than_the_limit() -> None:
    shares = LimitShares()
    for name in "abc":
        shares.add(name)
    shares.set_limits(limits(max_concurrent_requests=2, pin_chunks=10))
    shares.changes()
    most = {name: shares._replicas[name].limits.tenants["t"] for name in "abc"}  # type: ignore[union-attr]
    assert [most[name].max_concurrent_requests for name in "abc"] == [1, 1, 0]
    assert shares.is_short("c", "t", pin_chunks=5)
    same = copy.deepcopy(shares)
    changed = shares.changes_of("t")
    assert changed == same.changes() and shares.changes() == {}
    assert changed["c"].tenants["t"].max_concurrent_requests == 1
    assert changed["c"].tenants["t"].pin_chunks is not None
    assert changed["c"].tenants["t"].pin_chunks >= 5
    assert shares.is_short("c", "t", pin_chunks=0)
    shares.changes()
    assert not shares.is_short("c", "t", pin_chunks=0), "the limit is reached"
    assert not shares.is_short("c", "other", pin_chunks=0)


def test_limits_hold_for_all_replicas_together() -> None:
    """Each fake replica runs as many requests as its share."""

    async def scenario(f: Fixture) -> None:
        f.add("c")
        f.client.set_tenants(limits(max_concurrent_requests=4))
        tasks = [
            f.begin(msgspec.structs.replace(request(f"r{i}", prompt=i % 7), tenant="t"))
            for i in range(20)
        ]
        running: dict[str, list[str]] = {name: [] for name in f.replicas}
        most = 0
        while not all(task.done() for task in tasks):
            await settle()
            for name, replica in f.replicas.items():
                running[name] = [each for each in running[name] if each in replica.live]
                share = replica.shares()["t"].max_concurrent_requests or 0
                others = [each for each in replica.live if each not in running[name]]
                running[name] += others[: max(share - len(running[name]), 0)]
            most = max(most, sum(map(len, running.values())))
            assert most <= 4
            for name, replica in f.replicas.items():
                replica.step(running[name])
                live = [each for each in running[name] if each in replica.live]
                stats = TenantStats(
                    requests_running=len(live), requests_waiting=len(replica.live) - len(live)
                )
                f.client._shares._due_at = -math.inf  # a second has passed
                f.client.receive(replica, [Beat(stats=EngineStats(tenants={"t": stats}))])
        assert most == 4, "a share that is not used goes to where requests wait"
        await asyncio.gather(*tasks)

    run(scenario)


def test_a_replica_that_joins_or_ends_changes_the_shares() -> None:
    async def scenario(f: Fixture) -> None:
        f.client.set_tenants(limits(max_queued_requests=6))

        def places() -> list[int | None]:
            return [each.shares()["t"].max_queued_requests for each in f.replicas.values()]

        assert places() == [3, 3]
        f.add("c")
        assert places() == [2, 2, 2]
        f.replicas.pop("b").die()
        assert places() == [3, 3]
        f.client.receive(f.replicas["a"], [Beat(is_draining=True)])
        f.client._give_shares()
        assert places() == [0, 6]

    run(scenario)
