"""``chunkllama verify`` finds a planted fault and names its area."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from verify_models import PARTIAL, Weights, edit_config, edit_weights, verified, write_model

from chunkllama.verify.report import LOG_PROBABILITIES

Plant = Callable[[Path], None]
ATTENTION = "attention (scale, window or soft cap)"
PROJECTIONS = "q, k, v projections"
ROTARY = "rotary embedding"
RESIDUAL = "residual stream"
SELF = "model.layers.1.self_attn"
MLP = "model.layers.1.mlp"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ORIGINAL = {"original_max_position_embeddings": 64}


def config(**changes: Any) -> Plant:
    return lambda folder: edit_config(folder, **changes)


def rope(**parameters: Any) -> Plant:
    return config(rope_parameters={"rope_type": "default", "rope_theta": 1e4, **parameters})


def weights(edit: Callable[[Weights], None]) -> Plant:
    return lambda folder: edit_weights(folder, edit)


def scaled(name: str, factor: float = 1.5) -> Plant:
    return weights(lambda w: w.update({name: w[name] * factor}))


def swapped(one: str, other: str) -> Plant:
    return weights(lambda w: w.update({one: w[other], other: w[one]}))


def layers_swapped(weights: Weights) -> None:
    for name in [x for x in weights if x.startswith("model.layers.1.")]:
        other = name.replace(".1.", ".2.", 1)
        weights[name], weights[other] = weights[other], weights[name]


def in_pairs(weights: Weights) -> None:
    """Rows of q as the original Llama's files have them: each head's pairs side by side."""
    name = f"{SELF}.q_proj.weight"
    rows, columns = weights[name].shape
    halves = weights[name].view(4, 2, rows // 8, columns)
    weights[name] = halves.transpose(1, 2).reshape(rows, columns).contiguous()


# Fault -> (family, what plants it, area).
FAULTS: dict[str, tuple[str, Plant, str]] = {
    "theta": ("llama", rope(rope_theta=500.0), ROTARY),
    "q/k norms": ("qwen3", swapped(f"{SELF}.q_norm.weight", f"{SELF}.k_norm.weight"), "q/k norms"),
    "norms after rotation": ("hunyuan", scaled(f"{SELF}.key_layernorm.weight"), "q/k norms"),
    "head": ("llama", weights(lambda w: w.update({HEAD: w[HEAD].flip(0).contiguous()})), "head"),
    "tied head": ("llama", weights(lambda w: w.update({HEAD: w[EMBEDDING].clone()})), "head"),
    "embedding": ("llama", scaled(EMBEDDING), "embedding"),
    "embedding of a token in no text": (
        "llama",
        weights(lambda w: w[EMBEDDING][0].add_(0.5)),
        "embedding",
    ),
    "norm": ("llama", scaled("model.layers.2.input_layernorm.weight"), "norms"),
    "down": ("llama", scaled(f"{MLP}.down_proj.weight"), "down projection"),
    "window": ("gemma3", config(sliding_window=33), ATTENTION),
    "activation": ("mistral", config(hidden_act="gelu"), "activation"),
    "residual multiplier": ("granite", config(residual_multiplier=0.45), RESIDUAL),
    "multiplier": ("granite", config(logits_scaling=4.0), "head"),
}
MORE_FAULTS: dict[str, tuple[str, Plant, str]] = {
    "theta before norms": ("hunyuan", rope(rope_theta=500.0), ROTARY),
    "theta of pairs": ("ernie", rope(rope_theta=1e4), ROTARY),
    "linear": ("mistral", rope(rope_type="linear", factor=2.0), ROTARY),
    "yarn": ("qwen3", rope(rope_type="yarn", factor=4.0, **ORIGINAL), ROTARY),
    "llama3": (
        "llama",
        rope(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, **ORIGINAL),
        ROTARY,
    ),
    "share that rotates": ("phi3", rope(**{PARTIAL: 1.0}), ROTARY),
    "layer that rotates": ("smollm3", config(no_rope_layers=[1, 0, 1, 0]), ROTARY),
    "norms of all heads": ("olmo2", scaled(f"{SELF}.q_norm.weight"), "q/k norms"),
    "epsilon": ("llama", config(rms_norm_eps=1e-5), "norms"),
    "epsilon of an offset norm": ("gemma2", config(rms_norm_eps=1e-4), "norms"),
    "norm behind the MLP": (
        "olmo2",
        scaled("model.layers.0.post_feedforward_layernorm.weight"),
        "norms",
    ),
    "bias left out": ("biased", scaled(f"{SELF}.k_proj.bias", 0.0), PROJECTIONS),
    "rows in pairs": ("mistral", weights(in_pairs), PROJECTIONS),
    "k and v swapped": (
        "llama",
        swapped(f"{SELF}.k_proj.weight", f"{SELF}.v_proj.weight"),
        PROJECTIONS,
    ),
    "gate and up swapped": (
        "llama",
        swapped(f"{MLP}.gate_proj.weight", f"{MLP}.up_proj.weight"),
        "gate and up projections",
    ),
    "output": ("granite", scaled(f"{SELF}.o_proj.weight"), "attention output projection"),
    "layers swapped": ("llama", weights(layers_swapped), "norms"),
    "window one too small": ("mistral", config(sliding_window=31), ATTENTION),
    "window beyond the rows compared": ("gemma3 wide", config(sliding_window=101), ATTENTION),
    "scale": ("granite", config(attention_multiplier=0.25), ATTENTION),
    "scale of a scalar": ("gemma2", config(query_pre_attn_scalar=18), ATTENTION),
    "soft cap of scores": ("gemma2", config(attn_logit_softcapping=None), ATTENTION),
    "soft cap of logits": ("gemma2", config(final_logit_softcapping=20.0), "head"),
    "activation of tanh": ("gemma2", config(hidden_activation="gelu"), "activation"),
    "embedding multiplier": ("granite", config(embedding_multiplier=1.01), "embedding"),
}


# What no log-probability of the text shows.
HIDDEN = ("embedding of a token in no text",)


def planted(fault: str, tmp_path: Path) -> tuple[Path, Path, str]:
    """Two folders, the first with the fault, and its area."""
    family, plant, area = {**FAULTS, **MORE_FAULTS}[fault]
    reference = write_model(tmp_path / "reference", family)
    folder = tmp_path / "model"
    shutil.copytree(reference, folder)
    plant(folder)
    return folder, reference, area


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_its_area_named(fault: str, tmp_path: Path) -> None:
    folder, reference, area = planted(fault, tmp_path)
    report = verified(folder, reference)
    assert report.areas == ([area] if fault in HIDDEN else [area, LOG_PROBABILITIES])


@pytest.mark.nightly
@pytest.mark.parametrize("fault", [*FAULTS, *MORE_FAULTS])
def test_each_backend_and_quantization_is_compared_beside_the_area(
    fault: str, tmp_path: Path
) -> None:
    folder, reference, area = planted(fault, tmp_path)
    options = {"backends": ("reference", "cpu"), "quantizations": ("auto", "int8", "int4")}
    report = verified(folder, reference, max_tokens=150, **options)
    is_hidden = fault in HIDDEN
    assert report.areas == ([area] if is_hidden else [area, LOG_PROBABILITIES])
    found = {x.subject: x.is_equal for x in report.findings if x.area == LOG_PROBABILITIES}
    assert set(found) == {
        *("reference, float32", "reference, bfloat16", "cpu, float32", "cpu, bfloat16"),
        *("cpu, bfloat16, int8", "cpu, bfloat16, int4"),
    }
    assert found["reference, float32"] is found["cpu, float32"] is is_hidden
