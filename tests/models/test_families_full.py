"""Every architecture in at least four shapes against transformers: 300 and 3,000 tokens in float32,
and the distance of bfloat16 from float32.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_families import (
    FULL_CASES,
    LENGTHS,
    VOCAB,
    BuildCore,
    answers,
    assert_equals_transformers,
    random_model,
)

pytestmark = pytest.mark.nightly

LONG = (1500, 3000)
LONG_TOLERANCE = 2e-4
BACKENDS = ("reference", "auto")


@pytest.fixture(params=FULL_CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    family, changes = FULL_CASES[request.param]
    return family, changes


@pytest.mark.parametrize("backend", BACKENDS)
def test_up_to_300_tokens_equal_transformers(
    case: tuple[str, dict[str, Any]], backend: str, tmp_path: Path, build_core: BuildCore
) -> None:
    model = random_model(*case)
    model.save_pretrained(tmp_path)
    assert_equals_transformers(build_core(tmp_path, backend=backend), model, LENGTHS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_3000_tokens_equal_transformers(
    case: tuple[str, dict[str, Any]], backend: str, tmp_path: Path, build_core: BuildCore
) -> None:
    """Windows of 256 are passed many times; longrope uses its long factors."""
    family, changes = case
    model = random_model(family, {**changes, "max_position_embeddings": 4096})
    model.save_pretrained(tmp_path)
    core = build_core(tmp_path, backend=backend, num_chunks=160, max_model_len=4096)
    assert_equals_transformers(core, model, LONG, LONG_TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_not_further_from_float32_than_transformers_is(
    case: tuple[str, dict[str, Any]],
    backend: str,
    tmp_path: Path,
    build_core: BuildCore,
    record_property: Any,
) -> None:
    """Mean distance of the log-probabilities of three prompts, over one set of rounded weights."""
    narrow = random_model(*case).to(torch.bfloat16)
    narrow.save_pretrained(tmp_path)
    wide = copy.deepcopy(narrow).float()
    rng = np.random.default_rng(4)
    prompts = [rng.integers(3, VOCAB, count).tolist() for count in (64, 200, 300)]
    core = build_core(tmp_path, backend=backend, dtype="bfloat16")
    ours, theirs = [], []
    for prompt, (numbers, _) in zip(prompts, answers(core, prompts), strict=True):
        exact = log_probabilities(wide, prompt)
        ours.append(numbers[: len(prompt) - 1] - exact)
        theirs.append(log_probabilities(narrow, prompt) - exact)
    own, other = (float(np.abs(np.concatenate(x)).mean()) for x in (ours, theirs))
    record_property("distance", f"{own:.5f} transformers {other:.5f}")
    assert own <= other


def log_probabilities(model: torch.nn.Module, prompt: list[int]) -> np.ndarray:
    """Of every token but the first: [len(prompt) - 1]."""
    with torch.inference_mode():
        values = model(torch.tensor([prompt])).logits[0].float().log_softmax(-1).numpy()
    return values[np.arange(len(prompt) - 1), prompt[1:]]
