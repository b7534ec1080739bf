"""Every architecture against transformers: random models, the same log-probabilities and tokens."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from model_families import (
    CASES,
    FULL_CASES,
    LENGTHS,
    LONGROPE,
    SMALL,
    VOCAB,
    BuildCore,
    assert_equals_transformers,
    random_model,
)

from chunkllama.backends.cpu.fused_model import FusedModel, can_fuse
from chunkllama.backends.cpu.packed import PackedLinear
from chunkllama.backends.model import RunnableModel
from chunkllama.engine.load import build_attention, build_model
from chunkllama.errors import ConfigError
from chunkllama.model_spec import ModelSpec
from chunkllama.models.architectures import ARCHITECTURES
from chunkllama.models.config import read_spec
from chunkllama.models.config_file import ConfigFile
from chunkllama.models.llama import Llama
from chunkllama.models.loading.safetensors import Checkpoint
from chunkllama.models.loading.weights import load_weights
from chunkllama.models.rotary import rotary_tables
from chunkllama.scheduler.output import ScheduledSlice, SchedulerOutput


@pytest.fixture(scope="module", params=CASES)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, torch.nn.Module]:
    family, changes = CASES[request.param]
    model = random_model(family, changes)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_log_probabilities_and_greedy_ids_equal_transformers(
    case: tuple[Path, torch.nn.Module], backend: str, build_core: BuildCore
) -> None:
    folder, model = case
    assert_equals_transformers(build_core(folder, backend=backend), model, LENGTHS)


def test_every_architecture_has_cases_here_and_at_least_four_with_the_full_ones() -> None:
    assert {f"{family}ForCausalLM" for family, _ in CASES.values()} == set(ARCHITECTURES)
    counts = Counter(family for family, _ in FULL_CASES.values())
    assert min(counts.values()) >= 4


def test_longrope_beyond_the_original_length_uses_the_long_factors(
    tmp_path: Path, build_core: BuildCore
) -> None:
    model = random_model(
        "Phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}
    )
    model.save_pretrained(tmp_path)
    short = build_core(tmp_path)
    assert short.info.max_model_len == 64
    assert_equals_transformers(short, model, (1, 5, 40))
    assert_equals_transformers(build_core(tmp_path, max_model_len=300), model, (65, 150))


PHI3_FACTORS = {key: LONGROPE[key] for key in ("short_factor", "long_factor")}
ORIGINAL = "original_max_position_embeddings"
# Keys as published files have them, beside or in place of those that transformers writes.
# Family, changes of a small config, and changes of its config.json (None: removed).
PUBLISHED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "rope_scaling beside rope_parameters": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "rope_theta": 777.0},
    ),
    "yarn of transformers 4": (
        "Qwen2",
        {},
        {"rope_parameters": None, "rope_theta": 1e6}
        | {"rope_scaling": {"type": "yarn", "factor": 4.0}, "max_position_embeddings": 128},
    ),
    "a partial rotation that Llama ignores": ("Llama", {}, {"partial_rotary_factor": 0.5}),
    "Phi-4's partial rotation": (
        "Phi3",
        {"rope_parameters": {**LONGROPE, "rope_type": "default"}},
        {"rope_parameters": None, "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ),
    "Exaone's pattern of letters": (
        "Exaone4",
        {"sliding_window": 70},
        {"sliding_window_pattern": "LLLG"},
    ),
    "gelu of the first Gemma": ("Gemma", {}, {"hidden_act": "gelu"}),
    "Gemma 3 of transformers 4": (
        "Gemma3",
        {"sliding_window": 70, "num_hidden_layers": 7},
        {"layer_types": None, "rope_parameters": None, "sliding_window_pattern": 3}
        | {"rope_theta": 1e6, "rope_local_base_freq": 1e4}
        | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
    ),
    "a private key that transformers does not read": (
        "Gemma3",
        {"sliding_window": 70, "num_hidden_layers": 7},
        {"layer_types": None, "_sliding_window_pattern": 3},
    ),
    "rope_scaling beside ropes of layer types": (
        "Olmo3",
        {"sliding_window": 70},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 256},
    ),
    "a type of rope_scaling that Olmo 3 does not read": (
        "Olmo3",
        {"sliding_window": 70},
        {"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 4.0}},
    ),
    "parameters beside those of layer types": (
        "Olmo3",
        {"sliding_window": 70},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}},
    ),
    "a class that was renamed": ("Ernie4_5", {}, {"architectures": ["Ernie4_5_ForCausalLM"]}),
    "rope_theta in place of ropes of layer types": (
        "Olmo3",
        {"sliding_window": 70},
        {"rope_parameters": None, "rope_theta": 1e4},
    ),
    "windows in all layers": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 30, "max_window_layers": 0},
        {"layer_types": None},
    ),
    "yarn that is Phi-3's longrope": (
        "Phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 384},
        {"rope_parameters": None, "rope_theta": 1e4, "partial_rotary_factor": 0.5}
        | {"rope_scaling": {"type": "yarn", **PHI3_FACTORS}},
    ),
    "dynamic beside an original length": (
        "Llama",
        {"max_position_embeddings": 128},
        {"rope_parameters": None, "rope_theta": 1e4}
        | {"rope_scaling": {"type": "dynamic", "factor": 2.0} | {ORIGINAL: 64}},
    ),
    "lists longer than the model": ("SmolLM3", {}, {"no_rope_layers": [1, 0, 1, 1, 0, 0, 1]}),
    "windows beside rotation": (
        "SmolLM3",
        {
            **{"sliding_window": 30, "use_sliding_window": True, "no_rope_layers": [1, 0, 1, 1]},
            "layer_types": ["full_attention"] * 2 + ["sliding_attention", "full_attention"],
        },
        {},
    ),
    "a soft cap that Gemma 3 does not read": ("Gemma3", {"attn_logit_softcapping": 2.0}, {}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_of_published_files_mean_what_they_mean_to_transformers(
    name: str, tmp_path: Path, build_core: BuildCore
) -> None:
    family, changes, edits = PUBLISHED[name]
    random_model(family, changes).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = {**json.loads(path.read_text()), **edits}
    path.write_text(json.dumps({key: x for key, x in values.items() if x is not None}))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert read_spec(tmp_path).is_native
    assert_equals_transformers(build_core(tmp_path), model.eval(), (65, 100))


def test_a_pattern_of_letters_stands_for_layer_types() -> None:
    entry = ARCHITECTURES["Exaone4ForCausalLM"]
    values = {**SMALL, "sliding_window": 70, "sliding_window_pattern": "LLLG"}
    layers = entry.layers(ConfigFile(Path("config.json"), values, entry.defaults))
    assert [(layer.window, layer.rope) for layer in layers] == [(70, 0)] * 3 + [(None, None)]


@pytest.mark.parametrize("is_equal", [True, False])
def test_a_head_beside_tied_embeddings_is_used_if_it_differs(
    is_equal: bool, tmp_path: Path, build_core: BuildCore
) -> None:
    """Fine-tunes and merged adapters leave one; transformers keeps it as well."""
    model = random_model("Llama", {})
    if is_equal:
        model.lm_head.weight.data.copy_(model.model.embed_tokens.weight)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    assert_equals_transformers(build_core(tmp_path), model, (5, 65))


def test_the_model_of_the_cpu_backend_equals_the_plain_one(
    case: tuple[Path, torch.nn.Module], rng: np.random.Generator
) -> None:
    """Fused where the kernels know the specification, else itself with packed weights."""
    folder, _ = case
    assert_native_equals_plain(folder, rng)


@pytest.mark.parametrize("family", ["Mistral", "Qwen2", "Phi3"])
def test_the_fused_model_equals_the_plain_one_beyond_its_window(
    family: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    windows = {"use_sliding_window": True, "max_window_layers": 0} if family == "Qwen2" else {}
    random_model(family, {"sliding_window": 30, **windows}).save_pretrained(tmp_path)
    assert isinstance(assert_native_equals_plain(tmp_path, rng), FusedModel)


def assert_native_equals_plain(folder: Path, rng: np.random.Generator) -> RunnableModel:
    """Return the model of the cpu backend."""
    spec = read_spec(folder)
    ids = rng.integers(0, VOCAB, 70).astype(np.int32)
    results = []
    for is_plain in (True, False):
        attention = build_attention(
            spec, device="cpu", dtype=torch.float32, num_chunks=2, chunk_size=64, backend="cpu"
        )
        weights = load_weights(Checkpoint(folder, spec), spec, torch.float32, torch.device("cpu"))
        if is_plain:
            model: RunnableModel = Llama(spec, weights, attention, rotary_tables(spec, 128))
        else:
            model = build_model(spec, weights, attention, max_model_len=128)
            plain_layers = all(x.pre_norm and x.qk_norm == "none" for x in spec.layers)
            if isinstance(model, FusedModel):
                assert plain_layers
            else:
                assert isinstance(weights.layers[0].qkv, PackedLinear)
        piece = ScheduledSlice(0, 0, ids, np.arange(2, dtype=np.int32), 0, True)
        plan = attention.plan(SchedulerOutput(step=1, slices=[piece], plan_version=0))
        positions = torch.arange(len(ids), dtype=torch.int32)
        with torch.inference_mode():
            hidden = model.forward(torch.from_numpy(ids).long(), positions, plan)
            results.append(model.logits(hidden).clone())
    torch.testing.assert_close(*results, atol=2e-5, rtol=2e-5)
    return model


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Ministral", "Qwen2", "Phi3", "Ernie4_5"])
def test_families_of_plain_layers_run_fused(family: str) -> None:
    spec = spec_of(family)
    assert can_fuse(spec)


def test_layers_with_different_windows_run_plain() -> None:
    spec = spec_of("Mistral")
    other = replace(spec.layers[0], window=8)
    assert can_fuse(replace(spec, layers=(other, other)))
    assert not can_fuse(replace(spec, layers=(spec.layers[0], other)))
    assert can_fuse(replace(spec, layers=(replace(other, window=None), other)).for_length(8))


@pytest.mark.parametrize(
    "family", ["Qwen3", "SmolLM3", "Granite", "Olmo2", "Arcee", "Gemma", "Gemma2", "HunYuanDenseV1"]
)
def test_families_with_other_layers_run_plain(family: str) -> None:
    assert not can_fuse(spec_of(family))


def spec_of(family: str) -> ModelSpec:
    entry = ARCHITECTURES[f"{family}ForCausalLM"]
    values = {**SMALL, "attention_multiplier": 0.5, "residual_multiplier": 0.5}
    config = ConfigFile(Path("config.json"), values, entry.defaults)
    return ModelSpec(
        **{"num_layers": 4, "hidden_size": 64, "intermediate_size": 96, "num_qo_heads": 4},
        **{"num_kv_heads": 2, "head_dim": 16, "vocab_size": VOCAB, "max_position": 512},
        layers=entry.layers(config),
        ropes=entry.ropes(config, 16),
        **entry.fields(config),
    )


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("Qwen3", {"layer_types": ["full_attention"], "use_sliding_window": True}, "layer_types"),
        ("Gemma3", {"layer_types": ["linear_attention"] * 4}, "'linear_attention' is not one of"),
        ("SmolLM3", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ("Granite", {"logits_scaling": 0}, "logits_scaling must not be 0"),
        ("Phi3", {"partial_rotary_factor": 0.3}, "needs pairs"),
        ("Phi3", {"partial_rotary_factor": 2}, "above 0 and at most 1"),
        ("Gemma2", {"use_bidirectional_attention": True}, "only causal"),
        ("Mistral", {"sliding_window": 0}, "sliding_window must be a positive integer"),
    ],
)
def test_values_that_do_not_fit_are_named(family: str, change: dict[str, Any], words: str) -> None:
    entry = ARCHITECTURES[f"{family}ForCausalLM"]
    values = {**SMALL, "num_hidden_layers": 4, "sliding_window": 256, "head_dim": 10, **change}
    config = ConfigFile(Path("config.json"), values, entry.defaults)
    with pytest.raises(ConfigError, match=words):
        entry.layers(config), entry.fields(config), entry.ropes(config, 10)
