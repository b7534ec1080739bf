"""Tokens of a step where the setting is not given: by model, instruction set and threads."""

from __future__ import annotations

from dataclasses import replace

import pytest

from chunkllama.config import EngineConfig
from chunkllama.engine.step_size import choose_step_tokens, num_multiplications, step_tokens
from chunkllama.model_spec import LayerSpec, ModelSpec

DEMO = ModelSpec(
    num_layers=30,
    hidden_size=576,
    intermediate_size=1536,
    num_qo_heads=9,
    num_kv_heads=3,
    head_dim=64,
    vocab_size=49152,
    max_position=8192,
)
TINY = replace(DEMO, num_layers=2, hidden_size=64, intermediate_size=128)


@pytest.mark.parametrize(
    ("spec", "device", "level", "threads", "tokens"),
    [
        (DEMO, "cpu", "amx", 2, 512),
        (DEMO, "cpu", "avx512_bf16", 2, 128),
        (DEMO, "cpu", "avx512_bf16", 4, 256),
        (DEMO, "cpu", "avx512_bf16", 16, 512),
        (DEMO, "cpu", "avx2", 2, 128),
        (DEMO, "cpu", "neon", 2, 128),
        (DEMO, "cpu", "", 2, 128),
        (replace(DEMO, num_layers=600), "cpu", "amx", 2, 128),
        (DEMO, "cuda", "", 2, 512),
        (TINY, "cpu", "", 1, 512),
    ],
)
def test_tokens_of_a_step(
    spec: ModelSpec, device: str, level: str, threads: int, tokens: int
) -> None:
    assert choose_step_tokens(EngineConfig(), spec, device, level, threads) == tokens


@pytest.mark.parametrize("tokens", [64, 1000])
def test_a_given_value_holds(tokens: int) -> None:
    config = EngineConfig.from_flat(max_num_batched_tokens=tokens)
    for level in ("amx", "avx512_bf16", ""):
        assert choose_step_tokens(config, DEMO, "cpu", level, 2) == tokens


def test_half_of_a_step_is_left_to_prompts() -> None:
    assert [step_tokens(1.0, seqs) for seqs in (1, 64, 100, 1024)] == [128, 128, 200, 2048]
    assert step_tokens(0.0, 64) == 512
    many = EngineConfig.from_flat(max_num_seqs=1024)
    assert choose_step_tokens(many, DEMO, "cuda", "", 2) == 2048


def test_multiplications_are_those_of_the_linear_layers() -> None:
    assert num_multiplications(DEMO) == 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    plain = replace(DEMO, layers=(LayerSpec(gated=False),))
    assert num_multiplications(DEMO) - num_multiplications(plain) == 30 * 576 * 1536
