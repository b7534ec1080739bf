"""Our Llama against transformers': the same weights, the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from chunkllama.model_spec import LayerSpec, ModelSpec
from chunkllama.models.config import read_spec
from chunkllama.models.loading.weights import random_weights
from chunkllama.models.rotary import rotary_table

PROMPT = np.random.default_rng(3).integers(0, 131, 100).tolist()

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "theta": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn_no_factor": {
        "rope_type": "yarn",
        "rope_theta": 1000.0,
        "factor": None,
        "original_max_position_embeddings": 32,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
    },
    "yarn_mscale": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 16,
        "mscale": 0.7,
        "mscale_all_dim": 1.2,
        "truncate": False,
    },
    "yarn_attention_factor": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 2.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.3,
    },
}


def assert_same_logits(ours: torch.Tensor, model: torch.nn.Module) -> None:
    with torch.inference_mode():
        theirs = model(torch.tensor([PROMPT])).logits[0]
    assert theirs.std() > 0.3, "logits too small to tell models apart"
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", ROPES)
def test_rope_kinds_equal_transformers(kind: str, make_tiny, our_logits, tmp_path: Path) -> None:
    model = make_tiny(rope_parameters=dict(ROPES[kind]))
    model.save_pretrained(tmp_path)
    assert_same_logits(our_logits(tmp_path, PROMPT), model)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 6},
        {"num_key_value_heads": 3},
        {"num_key_value_heads": 1},
        {"num_attention_heads": 8, "num_key_value_heads": 1},
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"mlp_bias": True, "attention_bias": True, "tie_word_embeddings": True},
        {"head_dim": 20},
    ],
    ids=str,
)
def test_shapes_and_options_equal_transformers(
    changes: dict[str, Any], make_tiny, our_logits, tmp_path: Path
) -> None:
    model = make_tiny(**changes)
    model.save_pretrained(tmp_path)
    assert_same_logits(our_logits(tmp_path, PROMPT), model)


def test_sharded_checkpoint_equals_the_whole(make_tiny, our_logits, tmp_path: Path) -> None:
    model = make_tiny()
    model.save_pretrained(tmp_path, max_shard_size="40kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_logits(our_logits(tmp_path, PROMPT), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_checkpoints_widen_exactly(dtype, make_tiny, our_logits, tmp_path: Path) -> None:
    model = make_tiny().to(dtype)
    model.save_pretrained(tmp_path)
    assert read_spec(tmp_path).dtype == str(dtype).removeprefix("torch.")
    # Loaded again, because ``to`` has also rounded the rotary frequencies.
    widened = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same_logits(our_logits(tmp_path, PROMPT), widened)


@pytest.mark.parametrize("kind", [k for k in ROPES if k not in ("theta", "yarn_mscale")])
def test_older_rope_spelling_means_the_same(kind: str, make_tiny, tmp_path: Path) -> None:
    make_tiny(rope_parameters=dict(ROPES[kind])).save_pretrained(tmp_path)
    new = read_spec(tmp_path).ropes
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    scaling["type"] = scaling.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else scaling
    path.write_text(json.dumps(config))
    assert read_spec(tmp_path).ropes == new


@pytest.mark.parametrize("kind", ROPES)
def test_rotary_table_is_bitwise_transformers(kind: str, tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=300,
        rope_parameters=dict(ROPES[kind]),
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    table = rotary_table(read_spec(tmp_path).ropes[0], 32, 300)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(300)[None])
    assert torch.equal(table, torch.cat((cos[0, :, :16], sin[0, :, :16]), dim=1))


def test_random_weights_are_a_function_of_the_seed() -> None:
    spec = ModelSpec(
        num_layers=1,
        hidden_size=32,
        intermediate_size=48,
        num_qo_heads=4,
        num_kv_heads=2,
        head_dim=8,
        vocab_size=50,
        max_position=64,
        layers=(LayerSpec(qkv_bias=True),),
    )
    first, again, other = (random_weights(spec, seed) for seed in (1, 1, 2))
    assert torch.equal(first.layers[0].qkv.weight, again.layers[0].qkv.weight)
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert first.layers[0].qkv.weight.shape == (spec.qkv_size, 32)
    assert first.layers[0].qkv.bias is not None
