"""Sliding windows: sequences of more than three windows with shared prefixes equal transformers,
and each layer reads the chunks of its own window and no other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_families import (
    LONG_TOLERANCE,
    VOCAB,
    Answer,
    BuildCore,
    answers,
    assert_equals_transformers,
    log_probabilities,
    random_model,
)

from chunkllama.attention.plan_format import CHUNK_OFFSET, NUM_TOKENS, AttentionPlan
from chunkllama.backends.cpu.fused_model import FusedModel
from chunkllama.engine.core import EngineCore
from chunkllama.messages import EngineRequest
from chunkllama.sampling_params import SamplingParams

CHUNK = 64
LENGTHS = (1, 69, 70, 71, 150, 230, 300)
WINDOW = {"sliding_window": 70}
# Name -> (transformers class, changes): one window for all layers, and several kinds of patterns.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("Mistral", WINDOW),
    "phi3": ("Phi3", {"sliding_window": 64}),
    "ministral": ("Ministral", WINDOW),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "max_window_layers": 2, **WINDOW}),
    "qwen3": ("Qwen3", {"use_sliding_window": True, "max_window_layers": 1, **WINDOW}),
    "gemma3": ("Gemma3", {"num_hidden_layers": 7, "query_pre_attn_scalar": 16, **WINDOW}),
    "gemma2": ("Gemma2", {"query_pre_attn_scalar": 32, **WINDOW}),
    "olmo3": ("Olmo3", WINDOW),
    "exaone4": ("Exaone4", WINDOW),
}


@pytest.fixture(scope="module", params=CASES)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, torch.nn.Module]:
    model = random_model(*CASES[request.param])
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_sequences_of_many_windows_equal_transformers(
    case: tuple[Path, torch.nn.Module], backend: str, build_core: BuildCore
) -> None:
    folder, model = case
    core = build_core(folder, backend=backend)
    assert core.info.max_model_len == 512
    assert_equals_transformers(core, model, LENGTHS)


def chunks_of(plan: AttentionPlan) -> set[int]:
    items = plan.items[: plan.num_items]
    return {
        int(chunk)
        for offset, tokens in items[:, [CHUNK_OFFSET, NUM_TOKENS]]
        for chunk in plan.chunk_ids[offset : offset + tokens // CHUNK]
    }


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_each_layer_reads_the_chunks_of_its_window(
    family: str, tmp_path: Path, build_core: BuildCore
) -> None:
    model = random_model(*CASES[family])
    model.save_pretrained(tmp_path)
    core = build_core(tmp_path)
    attention = core._executor.step_model.attention  # type: ignore[attr-defined]
    windows = {"mistral": {70}, "gemma3": {70, None}}[family]
    assert set(attention.windows) == windows
    plain, checked = attention.plan, []

    def plan(step: Any) -> Any:
        known = attention._decode_plan
        made = plain(step)
        if made is known:  # its tails have grown
            return made
        for window in windows:
            host = made.for_window(window).host
            needed, spare = set(), set()
            for piece in step.slices:
                last = piece.first_position + piece.num_tokens - 1
                first = 0 if window is None else max(0, piece.first_position + 1 - window)
                needed |= set(piece.chunk_ids[first // CHUNK : last // CHUNK + 1].tolist())
                spare |= set(piece.chunk_ids[last // CHUNK + 1 :].tolist())
            assert needed <= chunks_of(host) <= needed | spare
            assert host.window == window
            checked.append(len(needed))
        return made

    attention.plan = plan
    assert_equals_transformers(core, model, (150, 230, 300))
    assert len(checked) > 4


def test_one_window_for_all_layers_runs_fused(tmp_path: Path, build_core: BuildCore) -> None:
    random_model("Mistral", WINDOW).save_pretrained(tmp_path)
    core = build_core(tmp_path, backend="cpu")
    assert isinstance(core._executor.step_model.model, FusedModel)  # type: ignore[attr-defined]


def test_a_window_that_hides_nothing_is_none(tmp_path: Path, build_core: BuildCore) -> None:
    random_model("Mistral", WINDOW).save_pretrained(tmp_path)
    core = build_core(tmp_path, max_model_len=70)
    assert core._executor.step_model.attention.windows == (None,)  # type: ignore[attr-defined]
    assert core.info.max_model_len == 70


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("mistral", {"backend": "reference"}),
        ("mistral", {"backend": "cpu"}),
        ("ministral", {"backend": "cpu"}),
        ("mistral", {"backend": "cpu", "speculation": "auto"}),
    ],
)
def test_what_no_layer_sees_is_dropped_when_the_pool_is_full(
    family: str, settings: dict[str, Any], tmp_path: Path, build_core: BuildCore
) -> None:
    """Three sequences of six chunks, of which a window shows two or three, in a pool of 13."""
    model = random_model(*CASES[family])
    model.save_pretrained(tmp_path)
    core = build_core(tmp_path, num_chunks=13, **settings)
    prompts = long_prompts(core)
    got = answers(core, prompts, with_prompts=False, max_tokens=250)
    stats = core.stats()
    assert stats.preemptions_total == 0
    # guesses let fewer sequences run at once, as many as measured times allow
    assert stats.evicted_chunks_total >= (1 if "speculation" in settings else 3)
    for prompt, answer in zip(prompts, got, strict=True):
        assert_greedy(model, prompt, answer)
    assert_equals_transformers(core, model, (100,))


def test_a_deterministic_engine_drops_no_chunk_that_its_plan_begins_at(
    tmp_path: Path, build_core: BuildCore
) -> None:
    """Its runs begin at every eighth chunk, before the window."""
    family, changes = CASES["mistral"]
    model = random_model(family, {**changes, "max_position_embeddings": 2048})
    model.save_pretrained(tmp_path)
    core = build_core(tmp_path, num_chunks=36, deterministic=True)
    attention = core._executor.step_model.attention  # type: ignore[attr-defined]
    assert attention.reach == 70 + 7 * CHUNK
    prompts = long_prompts(core)
    got = answers(core, prompts, with_prompts=False, max_tokens=1000)
    stats = core.stats()
    assert (stats.preemptions_total, stats.evicted_chunks_total > 0) == (0, True)
    for prompt, answer in zip(prompts, got, strict=True):
        assert_greedy(model, prompt, answer)


def test_one_layer_without_a_window_sees_everything(tmp_path: Path, build_core: BuildCore) -> None:
    random_model(*CASES["gemma3"]).save_pretrained(tmp_path)
    core = build_core(tmp_path)
    assert core._executor.step_model.attention.reach is None  # type: ignore[attr-defined]


def long_prompts(core: EngineCore) -> list[list[int]]:
    """Prompts that share a chunk; their requests are admitted as if answers were short."""
    for _ in range(600):
        core._scheduler._admission.lengths.add(1)
    rng = np.random.default_rng(6)
    shared = rng.integers(3, VOCAB, CHUNK).tolist()
    return [[*shared, *rng.integers(3, VOCAB, 36).tolist()] for _ in range(3)]


def assert_greedy(model: torch.nn.Module, prompt: list[int], answer: Answer) -> None:
    expected = log_probabilities(model, (*prompt, *answer.ids[:-1]))[len(prompt) - 1 :]
    chosen = expected[np.arange(len(answer.ids)), answer.ids]
    assert np.abs(answer.numbers - chosen).max() <= LONG_TOLERANCE
    assert (expected.max(axis=1) - chosen).max() <= 2 * LONG_TOLERANCE


SENT = [3 + i % 60 for i in range(300)]
OTHER = [70 + i % 60 for i in range(300)]


def explanations(core: EngineCore) -> list[tuple[str, int, int]]:
    """Send prompts to a pool of one of them; returns why each match ended."""
    found = []
    for prompt in (
        SENT,
        SENT,
        [*SENT, 9],
        [*SENT[:290], *OTHER[:9]],  # another token inside the last window
        [*SENT[:40], *OTHER[:9]],  # and before it, where no layer with a window reads
        SENT[:40],
        OTHER,  # takes most of the chunks
        SENT,
        SENT[200:],  # the last windows alone, at other positions
    ):
        sampling = SamplingParams(max_tokens=1, temperature=0.0, seed=1)
        core.add(
            EngineRequest(request_id="r", prompt_token_ids=prompt, sampling=sampling, explain=True)
        )
        while core.has_work():
            for delta in core.step():
                said = delta.explanation
                if said is not None:
                    found.append((said.reason, said.num_matched_tokens, said.num_known_tokens))
    return found


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_a_match_ends_for_the_same_reasons_with_windows(
    family: str, tmp_path: Path, build_core: BuildCore
) -> None:
    found = []
    for name, changes in {"some": CASES[family][1], "none": {}}.items():
        random_model(CASES[family][0], changes).save_pretrained(tmp_path / name)
        found.append(explanations(build_core(tmp_path / name, num_chunks=7)))
    assert found[0] == found[1]
    assert found[0] == [
        ("never_seen", 0, 0),
        ("complete", 299, 299),
        ("complete", 300, 300),
        ("diverged", 290, 290),
        ("diverged", 40, 40),
        ("complete", 39, 39),
        ("never_seen", 0, 0),
        ("evicted", 64, 299),
        ("never_seen", 0, 0),
    ]
