"""Chunks held and tokens computed equal the tree's arithmetic; chunks of 64 tokens."""

from __future__ import annotations

import random

import pytest

from chunkllama.simulation.engine import SimulatedEngine


def engine(num_chunks: int, **limits: object) -> SimulatedEngine:
    defaults = {"max_num_seqs": 64, "max_num_batched_tokens": 8192, "spare_chunks": 0}
    return SimulatedEngine(num_chunks, 64, vocab_size=1000, **{**defaults, **limits})


def tokens(seed: int, count: int) -> list[int]:
    rnd = random.Random(seed)
    return [rnd.randrange(1000) for _ in range(count)]


@pytest.mark.parametrize(("tenants", "each"), [(1, 8), (4, 4), (8, 2)])
def test_peak_chunks_of_tenants_times_requests(tenants: int, each: int) -> None:
    system, own, output = 256, 64, 30
    run = engine(400)
    for tenant in range(tenants):
        for request in range(each):
            prompt = tokens(tenant, system) + tokens(1000 + tenant * 100 + request, own)
            run.add(prompt, output)
    run.run()
    run.check_outputs()
    stats = run.scheduler.stats()
    shared = tenants * (system // 64)
    assert stats.chunks_peak == shared + tenants * each * (own // 64 + 1)
    assert stats.prefill_tokens_computed_total == tenants * (system + each * own)


def test_sixteen_cold_requests_compute_their_system_prompt_once() -> None:
    system = tokens(0, 1024)
    run = engine(200, max_num_batched_tokens=2048)
    for i in range(16):
        run.add(system + tokens(i + 1, 40), 4)
    run.run()
    run.check_outputs()
    assert run.scheduler.stats().prefill_tokens_computed_total == 1024 + 16 * 40
    second = [run.add(system + tokens(i + 50, 40), 2) for i in range(16)]
    run.run()
    assert all(run.cached[name] >= 1024 for name in second)


def test_sixty_four_cold_tenants_of_one_prompt_prefill_it_once() -> None:
    prompt = tokens(0, 2048)
    run = engine(240, max_num_batched_tokens=2048, check=False)
    for _ in range(64):
        run.add(prompt, 2)
    run.run()
    run.check_outputs()
    assert run.scheduler.stats().prefill_tokens_computed_total == 2048 + 63


@pytest.mark.parametrize("system", [50, 100, 200, 300])
def test_short_system_prompts_are_shared_too(system: int) -> None:
    """What is left of it beyond whole chunks is copied where that saves 32 tokens."""
    run = engine(100, max_num_batched_tokens=2048)
    for i in range(8):
        run.add(tokens(0, system) + tokens(i + 1, 20), 3)
    run.run()
    run.check_outputs()
    again = 0 if system % 64 >= 32 else 7 * (system % 64)
    assert run.scheduler.stats().prefill_tokens_computed_total == system + again + 8 * 20
