"""Every architecture in at least four shapes against transformers: 300 and 3,000 tokens in float32,
and the distance of bfloat16 from float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from model_families import (
    FULL_CASES,
    LENGTHS,
    LONG_TOLERANCE,
    VOCAB,
    BuildCore,
    answers,
    assert_equals_transformers,
    log_probabilities,
    random_model,
)

from chunkllama.backends.cpu.build import available_levels

pytestmark = pytest.mark.nightly

NUM_PROMPTS = 15  # of 300 tokens
BACKENDS = ("reference", "auto")


@pytest.fixture(params=FULL_CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return FULL_CASES[request.param]


@pytest.fixture(scope="module", params=FULL_CASES)
def long_model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, torch.nn.Module]:
    """Both backends are compared with one run of transformers, which takes most of the time."""
    family, changes = FULL_CASES[request.param]
    # torch's attention has no soft cap of scores.
    attention = "eager" if family == "Gemma2" else "sdpa"
    model = random_model(family, {**changes, "max_position_embeddings": 4096}, attention)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("backend", BACKENDS)
def test_up_to_300_tokens_equal_transformers(
    case: tuple[str, dict[str, Any]], backend: str, tmp_path: Path, build_core: BuildCore
) -> None:
    model = random_model(*case)
    model.save_pretrained(tmp_path)
    assert_equals_transformers(build_core(tmp_path, backend=backend), model, LENGTHS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_large_vocabulary_and_71_heads_on_one_equal_transformers(
    backend: str, tmp_path: Path, build_core: BuildCore
) -> None:
    """Falcon's 71 query heads share one of keys and values; Qwen's vocabulary is this large."""
    heads = {"num_attention_heads": 71, "num_key_value_heads": 1, "hidden_size": 71 * 16}
    model = random_model("Qwen2", {**heads, "vocab_size": 152_064, "num_hidden_layers": 2})
    model.save_pretrained(tmp_path)
    assert_equals_transformers(build_core(tmp_path, backend=backend), model, (1, 65, 150))


@pytest.mark.parametrize("backend", BACKENDS)
def test_3000_tokens_equal_transformers(
    long_model: tuple[Path, torch.nn.Module], backend: str, build_core: BuildCore
) -> None:
    """Windows of 256 are passed many times; longrope uses its long factors."""
    folder, model = long_model
    core = build_core(folder, backend=backend, num_chunks=160, max_model_len=4096)
    assert_equals_transformers(core, model, (3000,), LONG_TOLERANCE)


@dataclass(frozen=True)
class Narrow:
    """A model of rounded weights, and what transformers makes of prompts.

    Attributes:
        exact: log-probabilities in float32 of each prompt's tokens but the first.
        distances: of transformers' bfloat16 from them, of all prompts' tokens.
    """

    folder: Path
    prompts: list[list[int]]
    exact: list[np.ndarray]
    distances: np.ndarray


@pytest.fixture(scope="module", params=FULL_CASES)
def narrow_model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Narrow:
    folder = tmp_path_factory.mktemp("model")
    random_model(*FULL_CASES[request.param]).to(torch.bfloat16).save_pretrained(folder)
    # Loaded from the files: to() has narrowed the buffer of rotary frequencies, too.
    narrow, wide = (
        transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager"
        ).eval()
        for dtype in (torch.bfloat16, torch.float32)
    )
    rng = np.random.default_rng(4)
    prompts = [rng.integers(3, VOCAB, count).tolist() for count in (100, *[300] * NUM_PROMPTS)]
    exact = [of_tokens(wide, prompt) for prompt in prompts]
    rounded = [of_tokens(narrow, prompt) for prompt in prompts]
    return Narrow(folder, prompts, exact, distances(rounded, exact))


@pytest.mark.parametrize("level", ["reference", *(x.name for x in available_levels())])
def test_bfloat16_is_not_further_from_float32_than_transformers_is(
    narrow_model: Narrow, level: str, build_core: BuildCore, record_property: Any
) -> None:
    """On every level that this CPU has. The reference backend rounds where transformers does, so
    few prompts would not tell the two apart; the others keep activations in float32.
    """
    settings = {"backend": level} if level == "reference" else {"isa_level": level}
    core = build_core(narrow_model.folder, dtype="bfloat16", **settings)
    assert core.info.backend == ("reference" if level == "reference" else "cpu")
    found = [x.numbers for x in answers(core, narrow_model.prompts, with_prompts=True)]
    exact, theirs = narrow_model.exact, narrow_model.distances
    ours = distances([x[: len(y)] for x, y in zip(found, exact, strict=True)], exact)
    record_property("distance", f"{ours.mean():.5f} transformers {theirs.mean():.5f}")
    assert ours.mean() <= theirs.mean()


def distances(some: Iterable[Any], exact: list[np.ndarray]) -> np.ndarray:
    """Of all tokens."""
    return np.concatenate([np.abs(np.asarray(x) - y) for x, y in zip(some, exact, strict=True)])


def of_tokens(model: torch.nn.Module, prompt: list[int]) -> np.ndarray:
    """Of every token but the first: [len(prompt) - 1]."""
    values = log_probabilities(model, tuple(prompt))
    return values[np.arange(len(prompt) - 1), prompt[1:]]
