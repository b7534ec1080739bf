"""Limits of tenants in the scheduler, counted in the simulator."""

from __future__ import annotations

import random

import pytest

from chunkllama.errors import OverloadedError
from chunkllama.simulation.engine import SimulatedEngine
from chunkllama.tenant_limits import NO_LIMITS, TenantLimits, TenantTable

SIZE = 16


def engine(
    limits: dict[str, TenantLimits], num_chunks: int = 400, **settings: object
) -> SimulatedEngine:
    run = SimulatedEngine(
        num_chunks,
        SIZE,
        vocab_size=1000,
        **{"max_num_seqs": 8, "max_num_batched_tokens": 128, **settings},
    )
    run.scheduler.set_tenants(TenantTable(limits))
    return run


def prompt(rng: random.Random, length: int = 20) -> list[int]:
    return [rng.randrange(1000) for _ in range(length)]


@pytest.mark.parametrize("policy", ["fair", "prefix", "fcfs"])
@pytest.mark.parametrize("most", [1, 3])
def test_concurrent_requests(policy: str, most: int) -> None:
    rng = random.Random(0)
    run = engine({"a": TenantLimits(max_concurrent_requests=most)}, policy=policy)
    for i in range(12):
        run.add(prompt(rng), 5, tenant="a", namespace="a", n=1 + i % 3)
        run.add(prompt(rng), 5, tenant="b", namespace="b")
    seen = {"a": 0, "b": 0}
    while run.scheduler.has_unfinished():
        run.step()
        stats = run.scheduler.stats(include_tenants=True).tenants
        for name in seen:
            seen[name] = max(seen[name], stats[name].requests_running)
    assert seen["a"] == most < seen["b"]
    run.check_outputs()


def test_a_limit_may_change_while_requests_run() -> None:
    rng = random.Random(1)
    run = engine({})
    for _ in range(20):
        run.add(prompt(rng), 20, tenant="a", namespace="a")
    run.step()
    run.scheduler.set_tenants(TenantTable({"a": TenantLimits(max_concurrent_requests=2)}))
    running = []
    while run.scheduler.has_unfinished():
        running.append(run.scheduler.stats(include_tenants=True).tenants["a"].requests_running)
        run.step()
    assert running[0] > 2, "running requests stay"
    assert max(running[40:]) == 2
    run.check_outputs()


@pytest.mark.parametrize(
    ("limits", "accepted"),
    [
        (TenantLimits(max_queued_requests=0), 8),
        (TenantLimits(max_queued_requests=5), 13),
        (TenantLimits(max_queued_requests=5, max_concurrent_requests=2), 7),
        (TenantLimits(max_queued_requests=0, max_concurrent_requests=2), 2),
        (TenantLimits(queue_share=0.25), 8 + 10),
        (TenantLimits(queue_share=1.0), 8 + 40),
        (TenantLimits(queue_share=0.25, max_queued_requests=3), 8 + 3),
        (NO_LIMITS, 8 + 20),
    ],
)
@pytest.mark.parametrize("started", [False, True])
def test_queued_requests(limits: TenantLimits, accepted: int, started: bool) -> None:
    """Those that start at once do not count, whether they have started or not."""
    rng = random.Random(2)
    run = engine({"a": limits}, max_waiting=40)
    count = 0
    with pytest.raises(OverloadedError) as refused:
        while True:
            run.add(prompt(rng), 50, tenant="a", namespace="a")
            count += 1
            if started:
                run.step()
    assert count == accepted
    assert "try again when some have ended" in str(refused.value)
    if limits == NO_LIMITS:
        assert (
            "28 requests of this API key are running or waiting, and it may have 28: as many"
            in (str(refused.value))
        )
    elif accepted < 48:
        assert "(max_queued_requests, queue_share)" in str(refused.value)
    if accepted < 48:
        run.add(prompt(rng), 1, tenant="b", namespace="b")


def test_a_replay_keeps_its_place_when_limits_have_become_lower() -> None:
    """Its request was accepted by an engine process that has ended."""
    rng = random.Random(8)
    run = engine({"a": TenantLimits(max_queued_requests=0)}, max_waiting=4)
    for _ in range(30):
        run.add(prompt(rng), 5, tenant="a", namespace="a", is_replay=True)
    with pytest.raises(OverloadedError):
        run.add(prompt(rng), 5, tenant="a", namespace="a")
    run.run()
    run.check_outputs()


def test_weights_of_the_limits_divide_the_service_and_may_change() -> None:
    rng = random.Random(3)
    run = engine(
        {"heavy": TenantLimits(weight=3.0)}, max_num_seqs=4, max_waiting=999, fair_quantum=64
    )

    def serve(steps: int) -> dict[str, int]:
        accounts = run.scheduler._lifecycle.accounts
        before = {name: accounts.get(name).charged for name in ("heavy", "light")}
        for _ in range(steps):
            run.step()
        return {name: accounts[name].charged - before[name] for name in before}

    for i in range(400):
        tenant = ("heavy", "light")[i % 2]
        run.add(prompt(rng, 40), 2, tenant=tenant, namespace=tenant)
    first = serve(40)
    assert 2.5 <= first["heavy"] / first["light"] <= 3.5
    run.scheduler.set_tenants(TenantTable({"light": TenantLimits(weight=3.0)}))
    second = serve(40)
    assert 2.5 <= second["light"] / second["heavy"] <= 3.5


def test_pins_of_a_tenant_have_a_budget_of_their_own() -> None:
    rng = random.Random(4)
    limits = {"a": TenantLimits(pin_chunks=3), "none": TenantLimits(pin_chunks=0)}
    run = engine(limits, num_chunks=64)
    refused = {}
    for tenant in ("a", "none", "b"):
        names = [
            run.add(prompt(rng, 2 * SIZE), 1, tenant=tenant, namespace=tenant, pin_seconds=99.0)
            for _ in range(3)
        ]
        run.run()
        refused[tenant] = [run.first_deltas[name].pin_refused for name in names]
    assert refused == {"a": [False, True, True], "none": [True] * 3, "b": [False] * 3}
    stats = run.scheduler.stats(include_tenants=True).tenants
    assert {name: (s.chunks_pinned, s.pins_refused) for name, s in stats.items()} == {
        "a": (2, 2), "none": (0, 3), "b": (6, 0),
    }  # fmt: skip
