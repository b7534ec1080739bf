"""GGUF files of every architecture: what llama.cpp's converter would write of a random model gives
transformers' logits of that model.

The writer below follows the converter on its own: its names of tensors and keys, its order of rows
in q and k, its norms.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from model_families import CASES, random_model

from chunkllama.errors import ConfigError
from chunkllama.models.config import read_spec
from chunkllama.models.loading.gguf import convert_gguf
from chunkllama.models.loading.gguf_config import GGUF_ARCHITECTURES

PROMPT = np.random.default_rng(4).integers(0, 151, 40).tolist()
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(148))]

TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LLAMA = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
HUNYUAN = {
    **LLAMA,
    "self_attn.query_layernorm": "attn_q_norm",
    "self_attn.key_layernorm": "attn_k_norm",
}
SANDWICH = {
    **LLAMA,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
NAMES = {
    **dict.fromkeys(("gemma2", "gemma3", "olmo2", "exaone4"), SANDWICH),
    "hunyuan-dense": HUNYUAN,
    "seed_oss": {**LLAMA, "post_attention_layernorm": "post_attention_norm"},
}
PERMUTED = {"llama", "mistral3", "granite", "smollm3", "arcee"}
OFFSET = {"gemma", "gemma2", "gemma3"}
LAYERS = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]

# Case of CASES -> (architecture in the file, keys beyond those that all have).
FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral wide": ("mistral3", {}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3 bias": ("qwen3", {}),
    "smollm3": ("smollm3", {}),
    "phi3": ("phi3", {}),
    "phi3 partial": ("phi3", {"rope.dimension_count": 12}),
    "phi3 short": (
        "phi3",
        {"rope.dimension_count": 8, "rope.scaling.original_context_length": 512},
    ),
    "granite": (
        "granite",
        {
            "attention.scale": 0.1,
            "embedding_scale": 6.0,
            "residual_scale": 0.22,
            "logit_scale": 3.0,
        },
    ),
    "granite bias": ("granite", {"logit_scale": 8.0, "attention.scale": 1.0}),
    "seed_oss": ("seed_oss", {}),
    "arcee": ("arcee", {}),
    "arcee bias": ("arcee", {}),
    "ernie": ("ernie4_5", {}),
    "hunyuan": ("hunyuan-dense", {}),
    # The converter writes the base that alpha stretches.
    "hunyuan alpha": ("hunyuan-dense", {"rope.freq_base": 1e4 * 1000.0 ** (16 / 14)}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo2", {"attention.sliding_window": 256}),
    "olmo3 yarn": (
        "olmo2",
        {
            "attention.sliding_window": 256,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 128,
        },
    ),
    "exaone4": ("exaone4", {"attention.sliding_window": 256}),
    "exaone4 global": ("exaone4", {}),
    "gemma": ("gemma", {}),
    "gemma mqa": ("gemma", {}),
    "gemma2": (
        "gemma2",
        {
            "attention.sliding_window": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3": ("gemma3", {"attention.sliding_window": 256, "rope.freq_base": 1e6}),
    "gemma3 linear": (
        "gemma3",
        {
            "attention.sliding_window": 256,
            "rope.freq_base": 1e5,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
    ),
}
# What the file cannot say, and llama.cpp assumes.
ASSUMED: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3 linear": {"query_pre_attn_scalar": 16},
    "phi3 short": {"original_max_position_embeddings": 512},
    "ernie": {"tie_word_embeddings": False},
}


def write(path: Path, case: str, model: torch.nn.Module, **changes: Any) -> None:
    architecture, keys = FILES[case]
    config = model.config
    rope = config.rope_parameters or {}
    theta = rope.get("full_attention", rope).get("rope_theta", 10000.0)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.freq_base": theta,
        **keys,
        **changes,
    }.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](f"{architecture}.{key}", value)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([0.0] * len(TOKENS))
    writer.add_token_types([2, 3, 3, *[6] * 148])
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(7)
    names = NAMES.get(architecture, LLAMA)
    tied = config.tie_word_embeddings
    for name, parameter in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        values = parameter.float().numpy()
        stem, suffix = name.rsplit(".", 1)
        if stem in TOP:
            new = f"{TOP[stem]}.{suffix}"
        else:
            _, _, block, rest = stem.split(".", 3)
            new = f"blk.{block}.{names[rest]}.{suffix}"
        if architecture in OFFSET and name.endswith("norm.weight"):
            values = values + 1
        for part, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            if f"{part}_proj" in name and architecture in PERMUTED:
                halves = values.reshape(heads, 2, -1, *values.shape[1:])
                values = halves.swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(new, values)
    if "long_factor" in rope:
        for kind in ("long", "short"):
            factors = np.array(config.rope_parameters[f"{kind}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{kind}.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def model_of(case: str) -> torch.nn.Module:
    family, changes = CASES[case]
    return random_model(family, {**changes, **ASSUMED.get(case, {})})


def converted(path: Path, folder: Path) -> Path:
    folder.mkdir()
    convert_gguf(path, folder, lambda done, total: None)
    return folder


@pytest.mark.parametrize("case", FILES)
def test_a_file_gives_the_logits_of_its_model(case: str, our_logits, tmp_path: Path) -> None:
    model = model_of(case)
    write(tmp_path / "m.gguf", case, model)
    ours = our_logits(converted(tmp_path / "m.gguf", tmp_path / "out"), PROMPT)
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT])).logits[0]
    torch.testing.assert_close(ours, expected, atol=4e-5, rtol=2e-5)


def test_transformers_reads_the_converted_folder_alike(our_logits, tmp_path: Path) -> None:
    """``chunkllama verify`` compares with it."""
    from transformers import AutoModelForCausalLM

    for case in ("gemma3 linear", "olmo3 yarn", "phi3 short", "smollm3"):
        write(tmp_path / f"{case}.gguf", case, model_of(case))
        folder = converted(tmp_path / f"{case}.gguf", tmp_path / case)
        theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        with torch.inference_mode():
            expected = theirs.float().eval()(torch.tensor([PROMPT])).logits[0]
        torch.testing.assert_close(our_logits(folder, PROMPT), expected, atol=4e-5, rtol=2e-5)


def test_every_architecture_of_the_table_has_a_file() -> None:
    assert {architecture for architecture, _ in FILES.values()} == set(GGUF_ARCHITECTURES)


def test_every_token_that_ends_an_answer_is_kept(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", "qwen2", model_of("qwen2"))
    folder = converted(tmp_path / "m.gguf", tmp_path / "out")
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 7]


ORIGINAL = {"rope.scaling.original_context_length": 128}
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, **ORIGINAL}
# Keys of a file -> what the rotary embedding becomes, as llama.cpp reads them.
ROPE_KEYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no type": ({"rope.scaling.factor": 4.0}, {"type": "linear", "factor": 4.0}),
    "the old key": ({"rope.scale_linear": 8.0}, {"type": "linear", "factor": 8.0}),
    "the old key of none": ({"rope.scale_linear": 1.0}, {"type": "default"}),
    "none beside a factor": (
        {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
        {"type": "default"},
    ),
    "yarn": (YARN, {"type": "yarn", "factor": 4.0, "attention_factor": None}),
    "yarn with its whole factor": (
        {**YARN, "rope.scaling.yarn_attn_factor": 1.25},
        {"type": "yarn", "attention_factor": 1.25},
    ),
    "yarn with a factor of the default": (
        {**YARN, "rope.scaling.attn_factor": 0.5},
        {"type": "yarn", "attention_factor": pytest.approx(0.5 * (1 + 0.1 * np.log(4.0)))},
    ),
}


@pytest.mark.parametrize("keys", ROPE_KEYS)
def test_keys_of_rotary_embedding(keys: str, tmp_path: Path) -> None:
    written, expected = ROPE_KEYS[keys]
    write(tmp_path / "m.gguf", "qwen2", model_of("qwen2"), **written)
    (rope,) = read_spec(converted(tmp_path / "m.gguf", tmp_path / "out")).ropes
    assert {key: getattr(rope, key) for key in expected} == expected


def test_longrope_of_another_architecture_is_kept(our_logits, tmp_path: Path) -> None:
    factors = {"short_factor": [1.0 + x / 8 for x in range(8)], "long_factor": [8.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    original = {"original_max_position_embeddings": 512}
    model = random_model("Llama", {"rope_parameters": {**rope, **original}})
    write(tmp_path / "m.gguf", "llama", model, **{"rope.scaling.original_context_length": 512})
    ours = our_logits(converted(tmp_path / "m.gguf", tmp_path / "out"), PROMPT)
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT])).logits[0]
    torch.testing.assert_close(ours, expected, atol=4e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("case", "keys", "words"),
    [
        ("llama", {"expert_count": 8}, "mixtures of experts"),
        ("mistral wide", {"attention.temperature_scale": 0.1}, "temperature_scale"),
        ("qwen3", {"block_count": 5}, r"tensor blk\.4\.attn_norm\.weight is missing"),
        ("qwen3", {"block_count": 3}, r"tensor blk\.3\.\w+\.weight is not part"),
        ("qwen2", {"rope.scaling.type": "dynamic"}, "rope scaling 'dynamic'"),
    ],
)
def test_what_does_not_fit_is_named(
    case: str, keys: dict[str, Any], words: str, tmp_path: Path
) -> None:
    write(tmp_path / "m.gguf", case, model_of(case), **keys)
    with pytest.raises(ConfigError, match=words) as caught:
        converted(tmp_path / "m.gguf", tmp_path / "out")
    assert "\n" not in str(caught.value)
