"""The context that a model is served with: as long as its rotary embedding is stretched to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from model_families import BuildCore, assert_equals_transformers, random_model

from chunkllama.errors import ConfigError
from chunkllama.models.config import parse_spec

STATED = 96
# Rotary parameters -> positions that the model can be served with.
STRETCHED: dict[str, tuple[dict[str, Any], int]] = {
    "linear": ({"rope_type": "linear", "factor": 4.0}, 384),
    "yarn": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 80}, 320),
    "yarn, stated": (
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 40},
        96,
    ),
    "llama3": (
        {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 12}
        | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        96,
    ),
}


@pytest.mark.parametrize("kind", STRETCHED)
def test_a_stretched_model_is_served_to_its_whole_length(
    kind: str, tmp_path: Path, build_core: BuildCore
) -> None:
    parameters, positions = STRETCHED[kind]
    rope = {"rope_theta": 1e4, **parameters}
    changes = {"rope_parameters": rope, "max_position_embeddings": STATED}
    model = random_model("Llama", changes)
    model.save_pretrained(tmp_path)
    core = build_core(tmp_path)
    assert core.info.max_model_len == positions
    assert_equals_transformers(core, model, (5, positions - 10))


def test_a_dynamic_model_is_stretched_only_when_asked_for(
    tmp_path: Path, build_core: BuildCore, caplog: pytest.LogCaptureFixture
) -> None:
    """Its frequencies depend on the length, for all requests alike."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    changes = {"rope_parameters": rope, "max_position_embeddings": STATED}
    model = random_model("Llama", changes)
    model.save_pretrained(tmp_path)
    plain = build_core(tmp_path)
    assert plain.info.max_model_len == STATED
    assert "set it (up to 192) to stretch it" in caplog.text
    assert_equals_transformers(plain, model, (5, 80))
    assert build_core(tmp_path, max_model_len=192).info.max_model_len == 192
    with pytest.raises(ConfigError, match="max_model_len: 193 is above the model's own limit"):
        build_core(tmp_path, max_model_len=193)


def test_a_model_with_several_ropes_states_the_stretched_length() -> None:
    scaled = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
    values = {
        **{"architectures": ["Gemma3ForCausalLM"], "num_hidden_layers": 6, "hidden_size": 64},
        **{"intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16, "vocab_size": 100},
        **{"max_position_embeddings": 131072, "rope_scaling": scaled},
    }
    assert parse_spec(values, Path("config.json")).max_position == 131072
