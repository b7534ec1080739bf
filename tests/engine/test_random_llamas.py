"""Random tiny Llamas of every RoPE kind and GQA group, whole engine against transformers, fp32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from chunkllama.config import EngineConfig
from chunkllama.engine.build import build_engine

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 256,
    },
}
HEADS = [(4, 4), (6, 2), (4, 1), (8, 2), (5, 1)]  # query heads, K/V heads


def random_llama(folder: Path, heads: tuple[int, int], rope: str) -> torch.nn.Module:
    torch.manual_seed(sum(heads))
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=heads[0] * 64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=64,
        max_position_embeddings=1024,
        rope_parameters=dict(ROPES[rope]),
        tie_word_embeddings=heads[0] % 2 == 0,
        attention_bias=heads[1] == 2,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_greedy_ids_equal_transformers(tmp_path, run, truth_of, heads, rope, backend) -> None:
    model = random_llama(tmp_path, heads, rope)
    settings = {"dtype": "float32", "device": "cpu", "backend": backend, "threads": 1}
    core = build_engine(EngineConfig.from_flat(model=str(tmp_path), num_chunks=64, **settings))
    rng = np.random.default_rng(3)
    text = rng.integers(3, 300, 700).tolist()
    cuts = [1, 63, 64, 65, 127, 129, 400, 690]
    prompts = [text[:cut] + rng.integers(3, 300, 3).tolist() for cut in cuts]
    engine = run(core)
    cold = [engine.add(prompt, max_tokens=6) for prompt in prompts]
    engine.finish()
    warm = [engine.add(prompt, max_tokens=6) for prompt in prompts]
    engine.finish()
    truth = truth_of(model)
    for name, prompt in zip(cold + warm, prompts * 2, strict=True):
        truth.check(prompt, engine.outputs[name])
    core.close()
