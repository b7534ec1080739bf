"""Pins against a plain list of them: which end when, and what that costs."""

from __future__ import annotations

import random

import pytest
from cache_driver import CacheDriver

from chunkllama.cache.node import Node
from chunkllama.cache.pins import Pins

TENANTS = ["", "A", "B", "C"]


def many_nodes(count: int) -> tuple[CacheDriver, list[Node]]:
    """Paths of one to three chunks, all of them cached."""
    driver = CacheDriver(num_chunks=4 * count)
    rng = random.Random(0)
    for _ in range(count):
        driver.store("".join(rng.choice("abc") for _ in range(4 * rng.randrange(1, 4))))
    return driver, list(driver.cache.tree.nodes())


def broken_next(plain: dict[tuple[Node, str], float]) -> set[tuple[Node, str]]:
    """The pins of which one is broken: several if they end at once."""
    covered = {
        tenant: {above for node, name in plain if name == tenant for above in node.upward()}
        for _, tenant in plain
    }
    order = {key: (key[1] == "", -len(covered[key[1]]), until) for key, until in plain.items()}
    return {key for key, place in order.items() if place == min(order.values())}


@pytest.mark.parametrize("seed", range(4))
def test_pins_are_those_of_a_plain_list(seed: int) -> None:
    rng = random.Random(seed)
    driver, nodes = many_nodes(30)
    pins = driver.cache.pins
    plain: dict[tuple[Node, str], float] = {}
    now = 0.0
    for _ in range(400):
        action = rng.random()
        node, tenant = rng.choice(nodes), rng.choice(TENANTS)
        if action < 0.6:
            until = now + rng.choice([1.0, 3.0, 50.0])
            if pins.add(node, until, tenant, 4):
                plain[node, tenant] = max(until, plain.get((node, tenant), 0.0))
        elif action < 0.7 and (node, tenant) in plain:
            pins.remove(node, tenant)
            del plain[node, tenant]
        elif action < 0.85:
            now += rng.random()
            ended = {key for key, until in plain.items() if until <= now}
            assert set(pins.expire(now)) == ended
            plain = {key: until for key, until in plain.items() if key not in ended}
        elif plain:
            candidates = broken_next(plain)
            assert pins.break_one()
            (gone,) = plain.keys() - pins.expiry().keys()
            assert gone in candidates
            del plain[gone]
        assert pins.expiry() == plain
        pins.check_invariants()
    while plain:
        assert pins.break_one()
        plain.popitem()
    assert not pins.break_one()


def test_a_step_does_not_look_at_pins_that_last(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, nodes = many_nodes(60)
    pins, looks = driver.cache.pins, [0]
    first = Pins._first

    def counted(self: Pins, tenant: str):
        looks[0] += 1
        return first(self, tenant)

    monkeypatch.setattr(Pins, "_first", counted)
    for i, node in enumerate(nodes):
        pins.add(node, 100.0 + i, "", 4)
    for step in range(1000):
        driver.cache.expire_pins()
        pins.add(nodes[0], 200.0 + step, "", 4)  # extended by each request
    assert looks[0] == 0
    assert len(pins._ends[""]) == len(pins.expiry())
    driver.now = 101.5
    driver.cache.expire_pins()
    assert looks[0] <= 4


def test_ending_pins_early_one_by_one_does_not_look_at_all_others() -> None:
    driver, nodes = many_nodes(200)
    pins, looks = driver.cache.pins, [0]

    class Counted(dict):
        def __iter__(self):
            looks[0] += 1
            return super().__iter__()

        def items(self):
            looks[0] += 1
            return super().items()

    pins._pins = Counted(pins._pins)
    for i, node in enumerate(nodes):
        pins.add(node, 100.0 + i, "", 4)
    while pins.break_one():
        pass
    assert looks[0] == 0
