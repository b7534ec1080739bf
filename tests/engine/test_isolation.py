"""What one tenant has cached, another neither reads nor can measure."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from chunkllama.engine.core import EngineCore
from chunkllama.messages import EngineRequest
from chunkllama.sampling_params import SamplingParams

MakeCore = Callable[..., EngineCore]


def ask(core: EngineCore, name: str, prompt: list[int], namespace: str) -> tuple[int, int, float]:
    """(cached tokens, computed prompt tokens, seconds to the first token) of one request."""
    sampling = SamplingParams(max_tokens=1, temperature=0.0, seed=1, ignore_eos=True)
    request = EngineRequest(
        request_id=name,
        prompt_token_ids=prompt,
        sampling=sampling,
        namespace=namespace,
        tenant=namespace,
    )
    before = core.stats().prefill_tokens_computed_total
    started = time.perf_counter()
    core.add(request)
    deltas = []
    while core.has_work():
        deltas += core.step()
    seconds = time.perf_counter() - started
    computed = core.stats().prefill_tokens_computed_total - before
    return deltas[0].num_cached_tokens, computed, seconds


def prompt(seed: int, length: int = 200) -> list[int]:
    return np.random.default_rng(seed).integers(3, 290, length).tolist()


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200, 640])
def test_S26_a_prompt_of_another_tenant_is_computed_like_one_of_nobody(
    tiny_core: MakeCore, length: int
) -> None:
    core = tiny_core(num_chunks=64)
    known, new = prompt(1, length), prompt(2, length)
    ask(core, "a", known, "A")
    foreign = ask(core, "b", known, "B")[:2]
    assert foreign == ask(core, "c", new, "B")[:2] == (0, length)
    own = ask(core, "d", known, "A")
    assert own[0] == length - 1 and own[1] == 1, "the same tenant finds it, so the test can fail"


def auc(positive: list[float], negative: list[float]) -> float:
    """Probability that a positive is below a negative."""
    values = np.concatenate([positive, negative])
    ranks = values.argsort().argsort() + 1.0
    below = ranks[len(positive) :].sum() - len(negative) * (len(negative) + 1) / 2
    return float(below / (len(positive) * len(negative)))


@pytest.mark.nightly
def test_S26_a_timing_classifier_learns_nothing_across_tenants(tiny_core: MakeCore) -> None:
    """2,000 probes of each class, in random order: cached by another tenant, not cached."""
    core = tiny_core(num_chunks=64)
    rng = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {"foreign": [], "unseen": [], "own": []}
    for number in range(2000):
        for kind in rng.permutation(list(seconds)):
            text = prompt(int(rng.integers(2**40)), 512)
            other = {"foreign": "A", "own": "B"}.get(str(kind))
            if other is not None:
                ask(core, f"w{number}{kind}", text, other)
            else:  # the same work before the probe
                ask(core, f"w{number}{kind}", prompt(int(rng.integers(2**40)), 512), "A")
            seconds[str(kind)].append(ask(core, f"p{number}{kind}", text, "B")[2])
    across = auc(seconds["foreign"], seconds["unseen"])
    within = auc(seconds["own"], seconds["unseen"])
    print(f"AUC across tenants {across:.3f}, within one {within:.3f}")
    assert 0.45 <= across <= 0.55
    assert within >= 0.9
