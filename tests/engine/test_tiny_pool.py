"""A pool too small for the load: every request still ends with the right tokens, none is lost."""

from __future__ import annotations

import math

import numpy as np
import pytest

CHUNK = 64


def ids(rng: np.random.Generator, count: int) -> list[int]:
    return rng.integers(3, 300, count).tolist()


@pytest.mark.parametrize("length", [1, 62, 63, 64, 65, 127, 128, 129, 200])
@pytest.mark.parametrize("new", [1, 2, 64, 65])
def test_alone_in_a_pool_of_exactly_its_size(tiny_core, run, tiny_truth, length, new) -> None:
    chunks = math.ceil((length + new - 1) / CHUNK)
    engine = run(tiny_core(num_chunks=chunks, max_num_batched_tokens=96))
    prompt = ids(np.random.default_rng(length + new), length)
    for _ in range(2):  # the second time over its own leftovers
        name = engine.add(prompt, max_tokens=new)
        engine.finish()
        assert len(engine.outputs[name]) == new
        tiny_truth.check(prompt, engine.outputs[name])


def test_32_at_once_in_a_pool_of_two(tiny_core, run, tiny_truth) -> None:
    rng = np.random.default_rng(1)
    shared = ids(rng, 64)
    prompts = [shared[: 20 + i] + ids(rng, 10) for i in range(32)]
    engine = run(tiny_core(num_chunks=2))
    names = [engine.add(prompt, max_tokens=12) for prompt in prompts]
    engine.finish()
    for name, prompt in zip(names, prompts, strict=True):
        assert engine.finished[name] == "length"
        tiny_truth.check(prompt, engine.outputs[name])


@pytest.mark.parametrize("prefix", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK])
def test_a_storm_of_cancels_around_a_shared_prefix(tiny_core, run, tiny_truth, prefix) -> None:
    """The trace that corrupted K/V in other engines: same prefix, cancelled mid-way, sent again."""
    rng = np.random.default_rng(prefix)
    shared = ids(rng, prefix)
    engine = run(tiny_core(num_chunks=12, max_num_batched_tokens=80))
    kept: list[tuple[str, list[int]]] = []
    live: list[str] = []
    for _ in range(40):
        for _ in range(int(rng.integers(1, 4))):
            prompt = shared + ids(rng, int(rng.integers(1, 40)))
            name = engine.add(prompt, max_tokens=int(rng.integers(1, 30)))
            if rng.random() < 0.5:
                live.append(name)
            else:
                kept.append((name, prompt))
        for _ in range(int(rng.integers(0, 4))):
            engine.step()
        while live and rng.random() < 0.6:
            engine.core.abort(live.pop(int(rng.integers(len(live)))))
    for name in live:
        engine.core.abort(name)
    engine.finish()
    for name, prompt in kept:
        assert engine.finished[name] == "length"
        tiny_truth.check(prompt, engine.outputs[name])
