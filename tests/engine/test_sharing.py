"""What is shared is stored once and computed once: chunk counts equal the tree's arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

CHUNK = 64


@pytest.mark.parametrize(("tenants", "requests"), [(1, 16), (4, 4), (8, 2), (3, 5)])
def test_peak_chunks_of_tenants_times_requests(tiny_core, run, tenants, requests) -> None:
    rng = np.random.default_rng(tenants)
    engine = run(tiny_core(num_chunks=128, max_num_batched_tokens=2048))
    for _ in range(tenants):
        system = rng.integers(3, 300, 4 * CHUNK).tolist()
        for _ in range(requests):
            user = rng.integers(3, 300, CHUNK + 10).tolist()
            engine.add(system + user, max_tokens=4)
    engine.finish()
    stats = engine.core.stats()
    spare = tenants * requests  # at most one chunk reserved beyond each tail
    tree = tenants * (4 + 2 * requests)
    assert tree <= stats.chunks_peak <= tree + spare
    assert stats.prefill_tokens_computed_total == tenants * (4 * CHUNK + requests * (CHUNK + 10))


def test_64_cold_tenants_of_one_prompt_prefill_it_once(tiny_core, run) -> None:
    rng = np.random.default_rng(0)
    system = rng.integers(3, 300, 2048).tolist()
    engine = run(tiny_core(num_chunks=256, max_num_batched_tokens=512))
    names = [engine.add([*system, 3 + i, 4, 5], max_tokens=2) for i in range(64)]
    engine.finish()
    assert engine.core.stats().prefill_tokens_computed_total == 2048 + 64 * 3
    assert [engine.cached[name] for name in names] == [0] + [2048] * 63


def test_a_greedy_answer_is_the_same_beside_a_drawn_one(tiny_core, run) -> None:
    """Greedy batches never see logits; a batch in which one request draws does."""
    prompt = np.random.default_rng(3).integers(3, 300, 40).tolist()
    answers = []
    for beside in ({}, {"temperature": 1.0}, {"logprobs": 2}):
        engine = run(tiny_core(num_chunks=16))
        name = engine.add(prompt, max_tokens=24)
        engine.add(prompt[::-1], max_tokens=24, **beside)
        engine.finish()
        answers.append(engine.outputs[name])
    assert answers[1:] == answers[:1] * 2
