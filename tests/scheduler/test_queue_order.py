"""The order of the queue is kept between steps; here it is made again for each candidate."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from chunkllama.errors import InvalidRequestError, OverloadedError
from chunkllama.scheduler.queue import WaitingQueue
from chunkllama.scheduler.request import Sequence
from chunkllama.scheduler.tenants import Clocks
from chunkllama.simulation.engine import SimulatedEngine
from chunkllama.tenant_limits import TenantLimits, TenantTable


class PlainOrder:
    """The order of one pass, found by looking at every tenant and every group each time."""

    def __init__(self, queue: WaitingQueue, clocks: Clocks) -> None:
        self.queue = queue
        self.clocks = clocks
        self.passed: set[Sequence] = set()
        groups = [name for name in queue._open if queue._tenants[name].by_age]
        self.groups = sorted(groups, key=queue._open.__getitem__)
        beams = [s for s in queue._beams if s.joins_others and s.group.is_running]
        self.beams = sorted((s for s in beams if s not in queue._parked), key=lambda s: s.age)
        self.ended: set[str] = set()
        self.begun: dict[str, list[Sequence]] = {}

    def next(self) -> Sequence | None:
        """The candidate that comes next, as things are now."""
        while self.beams:
            beam = self.beams.pop(0)
            if self.queue._tenant(beam) not in self.queue.blocked:
                self.passed.add(beam)
                return beam
        chosen = self._choose()
        if chosen is not None:
            self.passed.add(chosen)
        return chosen

    def _is_open(self, tenant: str) -> bool:
        return tenant not in self.queue.blocked and tenant not in self.queue._closed

    def _ready(self, tenant: str) -> list[Sequence]:
        waiting = self.queue._tenants.get(tenant)
        parked = self.queue._parked
        return [] if waiting is None else [s for s in waiting.by_age if s not in parked]

    def _choose(self) -> Sequence | None:
        while True:
            tenants = [t for t in self.queue._tenants if self._ready(t) and t not in self.ended]
            if not tenants:
                return None
            oldest_age = {t: self.queue._tenants[t].by_age[0].age for t in tenants}
            tenant = min(tenants, key=lambda t: (self.clocks[t], oldest_age[t], t))
            if not self._is_open(tenant):
                self.ended.add(tenant)
                continue
            most = self.clocks[tenant] + self.queue._quantum
            while self.groups:
                name = self.groups[0]
                if self._ready(name) and self._is_open(name) and self.clocks[name] < most:
                    follower = self._follower(name)
                    if follower is not None:
                        return follower
                del self.groups[0]
            follower = self._follower(tenant)
            if follower is not None:
                self.begun.setdefault(tenant, self._ready(tenant))
                return follower
            for sequence in self.begun.setdefault(tenant, self._ready(tenant)):
                if sequence in self._ready(tenant) and sequence not in self.passed:
                    return sequence
            self.ended.add(tenant)

    def _follower(self, tenant: str) -> Sequence | None:
        waiting = self.queue._tenants[tenant]
        known, waiting.may_follow = waiting.may_follow, None
        follower = self.queue._follower(waiting, self.passed)
        if known is not None:
            assert waiting.may_follow in (known, None), "what follows was not looked at again"
        waiting.may_follow = known
        return follower


def compare(patch: pytest.MonkeyPatch) -> list[int]:
    """Compare every candidate with the plain order's; returns the number of comparisons."""
    candidates, count = WaitingQueue.candidates, [0]

    def compared(self: WaitingQueue, clocks: Clocks) -> Iterator[Sequence]:
        if self._policy == "fcfs":
            yield from candidates(self, clocks)
            return
        plain = PlainOrder(self, clocks)
        for sequence in candidates(self, clocks):
            assert sequence is plain.next()
            count[0] += 1
            yield sequence
        assert plain.next() is None, "a candidate is missing"

    patch.setattr(WaitingQueue, "candidates", compared)
    return count


def limits(rng: random.Random) -> TenantLimits:
    return TenantLimits(
        max_concurrent_requests=rng.choice([None, None, 1, 2]),
        weight=rng.choice([None, 0.5, 3.0]),
    )


def send(rng: random.Random, engine: SimulatedEngine, prompt: list[int], tenant: str) -> str:
    """Queue a request of a random kind; returns its name, "" if it is refused."""
    options: dict[str, object] = {"tenant": tenant, "namespace": rng.choice(["", tenant])}
    kind = rng.random()
    if kind < 0.1:
        options["beam_width"] = 2
    elif kind < 0.2:
        options["n"] = 2
    elif kind < 0.35:
        options["priority"] = rng.choice([-1, 1, 1000])
    prompt = prompt + [rng.randrange(2) for _ in range(rng.randrange(9))]
    try:
        return engine.add(prompt, rng.choice([1, 2, 9]), **options)
    except (InvalidRequestError, OverloadedError):
        return ""


def run(seed: int, num_tenants: int, num_steps: int) -> None:
    """Many tenants over few prefixes, of every kind that changes the queue."""
    rng = random.Random(seed)
    names = [f"t{i}" for i in range(num_tenants)]
    engine = SimulatedEngine(
        rng.choice([24, 60, 200]), 4, max_num_seqs=rng.choice([2, 6, 12]),
        max_num_batched_tokens=rng.choice([16, 40]), max_model_len=80, max_waiting=400,
        min_wait_tokens=2, fair_quantum=rng.choice([1, 30, 400]),
        policy=rng.choice(["fair", "fair", "prefix"]), tier_chunks=rng.choice([0, 20]),
        read_seconds=0.02,
    )  # fmt: skip
    prefixes = [[rng.randrange(2) for _ in range(12)] for _ in range(4)]
    held: list[str] = []
    for number in range(num_steps):
        if number % 40 == 0:
            engine.scheduler.set_tenants(TenantTable({name: limits(rng) for name in names[:9]}))
        for _ in range(rng.choice([0, 0, 1, 3])):
            prompt = rng.choice(prefixes)[: rng.randrange(1, 13)]
            name = send(rng, engine, prompt, rng.choice(names))
            if name and rng.random() < 0.1:
                engine.scheduler.hold(name)
                held.append(name)
        if held and rng.random() < 0.2:
            engine.scheduler.release(held.pop(rng.randrange(len(held))))
        if engine.requests and rng.random() < 0.1:
            engine.scheduler.abort(rng.choice(list(engine.requests)))
        if engine.schedule() is None:
            engine.now += 0.01
        else:
            engine.commit()
    for name in held:
        engine.scheduler.release(name)
    engine.run()


def test_the_kept_order_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    count = compare(monkeypatch)
    for seed in range(6):
        run(seed, (3, 20)[seed % 2], 120)
    assert count[0] > 500


@pytest.mark.nightly
def test_the_kept_order_is_the_plain_one_of_many_tenants(
    monkeypatch: pytest.MonkeyPatch, child_environment: dict[str, str]
) -> None:
    compare(monkeypatch)
    first = 100 * (1 + int(child_environment["CHUNKLLAMA_TEST_SEED"]))
    for seed in range(first, first + 100):
        run(seed, (3, 20, 100)[seed % 3], 300)
