"""Greedy ids equal transformers' in fp32 on the demo model: alone, together, cold, warm, edges."""

from __future__ import annotations

import numpy as np
import pytest

EDGES = [63, 64, 65, 127, 128, 129]
LENGTHS = [1, 2, 17, *EDGES, 200, 256, 300, 511, 640, 900, 1100]


def prompts_sharing_a_prefix(lengths: list[int], seed: int) -> list[list[int]]:
    """Prompts of these lengths: each a prefix of one text, then eight ids of its own."""
    rng = np.random.default_rng(seed)
    text = rng.integers(300, 40000, max(lengths)).tolist()
    return [text[: max(n - 8, 0)] + rng.integers(300, 40000, min(n, 8)).tolist() for n in lengths]


@pytest.mark.parametrize(
    "lengths",
    [[1, 64, 65, 300], pytest.param(LENGTHS, marks=pytest.mark.nightly)],
    ids=["four", "sixteen"],
)
def test_prompts_alone_and_together_cold_and_warm(make_core, run, truth, lengths) -> None:
    prompts = prompts_sharing_a_prefix(lengths, seed=11)
    alone = run(make_core(num_chunks=32))
    for prompt in prompts:
        alone.add(prompt)
        alone.finish()
    together = run(make_core())
    cold = [together.add(prompt) for prompt in prompts]
    together.finish()
    warm = [together.add(prompt) for prompt in prompts]
    together.finish()
    for name, prompt in zip(alone.outputs, prompts, strict=True):
        truth.check(prompt, alone.outputs[name])
    for name, prompt in zip(cold + warm, prompts * 2, strict=True):
        reference = alone.outputs[f"r{prompts.index(prompt)}"]
        if together.outputs[name] != reference:
            truth.check(prompt, together.outputs[name])
    for name, prompt in zip(warm, prompts, strict=True):
        assert together.cached[name] == len(prompt) - 1, (
            "a whole prompt in the cache is all but one hit"
        )


@pytest.fixture(scope="module")
def small_core(make_core):
    """An engine whose pool holds one conversation at a time."""
    return make_core(num_chunks=16)


@pytest.mark.parametrize("length", EDGES)
def test_a_continued_conversation_at_the_edge_of_a_chunk(small_core, run, truth, length) -> None:
    rng = np.random.default_rng(length)
    prompt = rng.integers(300, 40000, length).tolist()
    engine = run(small_core)
    first = engine.add(prompt, max_tokens=3)
    engine.finish()
    second_prompt = prompt + engine.outputs[first] + [1000, 1001]
    second = engine.add(second_prompt, max_tokens=3)
    engine.finish()
    truth.check(prompt, engine.outputs[first])
    truth.check(second_prompt, engine.outputs[second])
    assert engine.cached[second] >= length + 2, "prompt and answer are found again, to the token"


@pytest.mark.nightly
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_slice_at_a_time_gives_the_same_ids(make_core, run, truth, backend) -> None:
    rng = np.random.default_rng(5)
    prompt = rng.integers(300, 40000, 700).tolist()
    engine = run(make_core(max_num_batched_tokens=96, num_chunks=32, backend=backend))
    names = [engine.add(prompt), engine.add([*prompt[:650], 5, 6, 7])]
    engine.finish()
    truth.check(prompt, engine.outputs[names[0]])
    truth.check([*prompt[:650], 5, 6, 7], engine.outputs[names[1]])


@pytest.mark.nightly
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_64_prompts_up_to_3000_tokens(make_core, run, truth, rng, backend) -> None:
    trunks = [rng.integers(300, 40000, 3000).tolist() for _ in range(4)]
    cuts = rng.integers(1, 2990, 64).tolist()
    tails = rng.integers(300, 40000, (64, 8)).tolist()
    engine = run(make_core(num_chunks=1024, backend=backend))
    names = [engine.add(trunks[i % 4][:cut] + tails[i]) for i, cut in enumerate(cuts)]
    engine.finish()
    outputs = [engine.outputs[name] for name in names]
    for i, trunk in enumerate(trunks):
        truth.check_below(trunk, list(zip(cuts, tails, outputs, strict=True))[i::4])
