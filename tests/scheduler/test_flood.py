"""A tenant that floods leaves another its start and its cached prompt, counted in steps."""

from __future__ import annotations

import random

import pytest

from chunkllama.errors import OverloadedError
from chunkllama.simulation.engine import SimulatedEngine
from chunkllama.tenant_limits import TenantLimits, TenantTable

SIZE = 64
SYSTEM = 10 * SIZE


def engine(num_chunks: int = 400, **settings: object) -> SimulatedEngine:
    run = SimulatedEngine(
        num_chunks,
        SIZE,
        vocab_size=1000,
        check=False,
        **{"max_num_batched_tokens": 512, "max_waiting": 1024, **settings},
    )
    run.scheduler.set_tenants(TenantTable({"a": TenantLimits(), "b": TenantLimits()}))
    return run


def tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(1000) for _ in range(count)]


def steps_to_first_token(run: SimulatedEngine, prompt: list[int]) -> tuple[int, int]:
    """Steps, and cached tokens, of a request of tenant b."""
    name = run.add(prompt, 4, tenant="b", namespace="b")
    before = run.num_steps
    while name not in run.first_deltas:
        run.step()
    return run.num_steps - before, run.cached[name]


@pytest.mark.parametrize("priority", [0, -1000])
@pytest.mark.parametrize(("length", "output", "count"), [(100, 60, 500), (3000, 4, 60)])
def test_a_flood_costs_another_tenant_no_step_and_no_cached_token(
    length: int, output: int, count: int, priority: int
) -> None:
    """As many requests as one tenant may send, of any length and priority."""
    rng = random.Random(0)
    run = engine()
    system = tokens(rng, SYSTEM)
    run.add([*system, *tokens(rng, 8)], 4, tenant="b", namespace="b")
    run.run()
    accepted = 0
    for _ in range(count):
        try:
            prompt = tokens(rng, length)
            run.add(prompt, output, tenant="a", namespace="a", priority=priority, pin_seconds=9e9)
            accepted += 1
        except OverloadedError:
            break
    assert accepted > 50
    for _ in range(20):
        run.step()
    for _ in range(12):
        steps, cached = steps_to_first_token(run, [*system, *tokens(rng, 8)])
        assert (steps, cached) == (1, SYSTEM)
        for _ in range(7):
            run.step()
    stats = run.scheduler.stats(include_tenants=True).tenants
    assert stats["a"].requests_waiting > 0, "the flood was over before the other's last request"
    assert stats["b"].evicted_chunks == 0


def test_a_new_tenant_finds_a_slot_and_chunks_beside_several_others() -> None:
    """Four tenants leave 1 / (1 + 8 * 4) of 64 slots: one."""
    rng = random.Random(1)
    run = engine(2000)
    for i in range(400):
        run.add(tokens(rng, 20), 60, tenant=f"t{i % 4}", namespace=f"t{i % 4}")
    for _ in range(10):
        run.step()
    assert steps_to_first_token(run, tokens(rng, 30))[0] == 1


@pytest.mark.parametrize("max_num_seqs", [2, 3, 8, 9, 16, 64])
@pytest.mark.parametrize(
    "fields", [{"n": 64}, {"n": 1, "best_of": 20}, {"beam_width": 2}, {"beam_width": 1}]
)
def test_choices_and_beams_leave_a_slot(max_num_seqs: int, fields: dict[str, int]) -> None:
    """Further choices of a running request, and beams that are not forked yet, count too."""
    if fields.get("beam_width", 1) >= max_num_seqs:
        pytest.skip("one search needs every slot")
    rng = random.Random(6)
    run = engine(2000, max_num_seqs=max_num_seqs)
    for _ in range(12 if "n" in fields else max_num_seqs + 4):
        run.add(tokens(rng, 20), 200, tenant="a", namespace="a", **fields)
    for _ in range(6):
        run.step()
    for _ in range(4):
        assert steps_to_first_token(run, tokens(rng, 30))[0] == 1
        for _ in range(9):
            run.step()
    assert run.scheduler.stats(include_tenants=True).tenants["a"].requests_waiting > 0


def test_beams_of_a_search_run_together_beside_other_requests_of_the_tenant() -> None:
    """A search with a beam for every slot begins when nothing else of its tenant runs."""
    rng = random.Random(7)
    run = engine(2000, max_num_seqs=4)
    for fields in ({}, {"beam_width": 4}, {"n": 3}, {"beam_width": 3}):
        run.add(tokens(rng, 20), 8, tenant="a", namespace="a", **fields)
    run.run()
    run.check_outputs()


def test_the_headroom_costs_a_flooding_tenant_little() -> None:
    """Short requests run in 57 slots instead of 64; long ones are limited by prefill anyway."""

    def num_steps(tenant: str, length: int, output: int, count: int) -> int:
        rng = random.Random(2)
        run = engine()
        for _ in range(count):
            run.add(tokens(rng, length), output, tenant=tenant, namespace=tenant)
        run.run()
        return run.num_steps

    for length, output, count, most in ((100, 60, 400, 1.14), (3000, 4, 60, 1.02)):
        with_headroom = num_steps("a", length, output, count)
        assert with_headroom <= most * num_steps("", length, output, count)


def test_one_request_of_a_tenant_may_take_the_whole_pool() -> None:
    rng = random.Random(3)
    run = engine(50, max_model_len=4000)
    run.add(tokens(rng, 49 * SIZE), 2, tenant="a", namespace="a")
    run.add(tokens(rng, 49 * SIZE), 2, tenant="a", namespace="a")
    run.add(tokens(rng, 3), 2, tenant="b", namespace="b")
    run.run()
    run.check_outputs()


def test_a_server_with_one_tenant_uses_every_slot() -> None:
    rng = random.Random(4)
    run = SimulatedEngine(400, SIZE, vocab_size=1000, check=False)
    run.scheduler.set_tenants(TenantTable({"a": TenantLimits()}))
    for _ in range(100):
        run.add(tokens(rng, 20), 9, tenant="a", namespace="a")
    run.step()
    assert len(run.scheduler._running) == 64


def test_pins_of_a_flood_leave_another_tenant_a_pin() -> None:
    rng = random.Random(5)
    run = engine(200)

    def pin(tenant: str) -> bool:
        name = run.add(tokens(rng, SYSTEM), 1, tenant=tenant, namespace=tenant, pin_seconds=86400.0)
        run.run()
        return not run.first_deltas[name].pin_refused

    granted = 0
    while pin("a"):
        granted += 1
    assert granted == 5, "half of the budget of 100 chunks"
    assert pin("b")
