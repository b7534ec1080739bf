"""Multimodal checkpoints: their text model gives what transformers gives for text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_families import SMALL, BuildCore, assert_equals_transformers, fill_randomly
from safetensors.torch import load_file, save_file

from chunkllama.errors import ConfigError
from chunkllama.models.config import read_spec
from chunkllama.models.loading.safetensors import Checkpoint
from chunkllama.models.text_part import OUTER

TEXT: dict[str, Any] = {key: x for key, x in SMALL.items() if not key.endswith("token_id")}
SLIM = {key: x for key, x in TEXT.items() if key != "head_dim"}
MROPE = {"type": "mrope", "mrope_section": [2, 3, 3]}
TOWER = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
}
PIXTRAL = {**TOWER, "model_type": "pixtral", "head_dim": 16}
CLIP, SIGLIP = ({**TOWER, "model_type": f"{name}_vision_model"} for name in ("clip", "siglip"))
INTERN = {
    **{**TOWER, "model_type": "internvl_vision"},
    **{"image_size": [28, 28], "patch_size": [14, 14]},
}
QWEN = {
    **{"depth": 1, "hidden_size": 64, "num_heads": 2, "patch_size": 14, "out_hidden_size": 64},
    **{"intermediate_size": 48},
}
IMAGE = {"image_token_index": 150, "image_token_id": 150, "video_token_index": 149}


def nested(
    name: str, model_type: str, text: dict[str, Any], vision: dict[str, Any], **keys: Any
) -> dict[str, Any]:
    return {
        **{"architectures": [f"{name}ForConditionalGeneration"], "model_type": model_type},
        **{"text_config": text, "vision_config": vision, **keys},
    }


# config.json as published files have it.
CASES: dict[str, dict[str, Any]] = {
    "gemma 3": nested(
        *("Gemma3", "gemma3"),
        {
            **{**TEXT, "model_type": "gemma3_text", "sliding_window": 30, "num_hidden_layers": 7},
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        },
        SIGLIP,
        mm_tokens_per_image=4,
        eos_token_id=[1, 106],
    ),
    "mistral 3": nested(
        *("Mistral3", "mistral3"),
        {**TEXT, "model_type": "mistral", "sliding_window": None, "rope_theta": 1e9},
        PIXTRAL,
        tie_word_embeddings=False,
    ),
    "qwen 2 vl, all keys side by side": {
        **{"architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl"},
        **{**SLIM, "rope_theta": 1e6, "rope_scaling": MROPE, "tie_word_embeddings": True},
        **{"use_sliding_window": False, "sliding_window": 100, "max_window_layers": 2},
        "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2},
    },
    "qwen 2.5 vl": nested(
        *("Qwen2_5_VL", "qwen2_5_vl"),
        {**SLIM, "model_type": "qwen2_5_vl_text", "rope_scaling": MROPE},
        {**QWEN, "fullatt_block_indexes": [0]},
        tie_word_embeddings=False,
    ),
    "qwen 3 vl": nested(
        *("Qwen3VL", "qwen3_vl"),
        {**TEXT, "model_type": "qwen3_vl_text"},
        {**QWEN, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        tie_word_embeddings=True,
    ),
    "llava": nested("Llava", "llava", {**TEXT, "model_type": "llama"}, CLIP, **IMAGE),
    "llava next": nested(
        *("LlavaNext", "llava_next"),
        {**TEXT, "model_type": "mistral", "sliding_window": None},
        CLIP,
        **IMAGE,
    ),
    "llava onevision": nested(
        "LlavaOnevision", "llava_onevision", {**SLIM, "model_type": "qwen2"}, SIGLIP, **IMAGE
    ),
    "internvl": nested("InternVL", "internvl", {**TEXT, "model_type": "qwen3"}, INTERN, **IMAGE),
    "idefics 3": nested(
        *("Idefics3", "idefics3"),
        {**TEXT, "model_type": "llama", "pad_token_id": 0},
        TOWER,
        tie_word_embeddings=False,
        **IMAGE,
    ),
    "smolvlm": nested(
        *("SmolVLM", "smolvlm"),
        {**TEXT, "model_type": "llama", "architectures": ["VLlama3ForCausalLM"]},
        {**TOWER, "model_type": "smolvlm_vision"},
        tie_word_embeddings=False,
        pad_token_id=0,
        **IMAGE,
    ),
}
QUICK = ("gemma 3", "qwen 2 vl, all keys side by side")


def of_llava(name: str) -> str:
    """Names before transformers 4.52."""
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    return name.replace("model.language_model.", "language_model.model.").replace(
        "model.vision_tower.", "vision_tower."
    )


def of_qwen(name: str) -> str:
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


OLDER: dict[str, Callable[[str], str]] = {
    **{"gemma 3": of_llava, "mistral 3": of_llava, "llava": of_llava, "llava next": of_llava},
    **{"qwen 2 vl, all keys side by side": of_qwen, "qwen 2.5 vl": of_qwen},
}


def write(folder: Path, case: str, rename: Callable[[str], str] = str) -> torch.nn.Module:
    """A random model and its config.json of ``CASES``; returns it."""
    (folder / "config.json").write_text(json.dumps(CASES[case]))
    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForImageTextToText.from_config(
        config, attn_implementation="eager"
    )
    fill_randomly(model.float().eval())
    weights = {rename(name): x.clone() for name, x in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None), weights.pop("language_model.lm_head.weight", None)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize(
    "case", [x if x in QUICK else pytest.param(x, marks=pytest.mark.nightly) for x in CASES]
)
def test_text_gets_the_log_probabilities_of_transformers(
    case: str, tmp_path: Path, build_core: BuildCore
) -> None:
    model = write(tmp_path, case, OLDER.get(case, str))
    assert_equals_transformers(build_core(tmp_path), model, (5, 65, 100))


def test_every_class_has_a_case() -> None:
    assert {case["architectures"][0] for case in CASES.values()} == set(OUTER)


@pytest.mark.parametrize("case", ["gemma 3", "qwen 2.5 vl"])
def test_both_kinds_of_names_are_those_of_the_text_model_alone(case: str, tmp_path: Path) -> None:
    found = []
    for rename in (str, OLDER[case]):
        write(tmp_path, case, rename)
        found.append({*Checkpoint(tmp_path, read_spec(tmp_path))._infos})
    assert found[0] == found[1]
    assert all(name.startswith(("model.layers.", "model.", "lm_head.")) for name in found[0])
    assert not any("vis" in name for name in found[0])


def test_a_tensor_of_no_part_is_named(tmp_path: Path) -> None:
    write(tmp_path, "mistral 3")
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.adapter.weight"] = torch.ones(4)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"unexpected tensor model\.adapter\.weight"):
        Checkpoint(tmp_path, read_spec(tmp_path))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"text_config": {**TEXT, "model_type": "ministral3"}}, "text_config: model_type 'minis"),
        ({"text_config": {**TEXT, "model_type": ["x"]}}, r"text_config: model_type \['x'\] is not"),
        ({"text_config": {**TEXT, "model_type": {"a": 1}}}, "text_config: model_type {'a': 1} is"),
        ({"text_config": {**TEXT, "model_type": 5}}, "text_config: model_type 5 is not"),
        ({"text_config": [1]}, "text_config must be an object"),
        ({"architectures": ["PaliGemmaForConditionalGeneration"]}, "unsupported architecture Pali"),
    ],
)
def test_other_text_models_are_refused_in_one_line(
    keys: dict[str, Any], words: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**CASES["mistral 3"], **keys}))
    with pytest.raises(ConfigError, match=words) as caught:
        read_spec(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_published_files_leave_out_is_what_transformers_assumes(tmp_path: Path) -> None:
    """Gemma 3 4B states no heads and no vocabulary, Llava 1.5 no sizes at all."""
    published = {
        "Gemma3": {
            **{"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240},
            **{"num_hidden_layers": 34, "sliding_window": 1024},
        },
        "Llava": {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096},
        "LlavaNext": {"model_type": "mistral", "intermediate_size": 14336},
        "Qwen2_5_VL": {**SLIM, "model_type": "qwen2_5_vl_text", "rms_norm_eps": None}
        | {"num_key_value_heads": None, "num_attention_heads": 8},
        "Qwen3VL": {**TEXT, "model_type": "qwen3_vl_text"},
    }
    for name, text in published.items():
        stated = {key: x for key, x in text.items() if x is not None}
        config_class = getattr(transformers, f"{name}Config")
        values = nested(name, config_class.model_type, stated, {})
        (tmp_path / "config.json").write_text(json.dumps(values))
        spec = read_spec(tmp_path)
        theirs = config_class(text_config=stated).text_config
        rope = theirs.rope_parameters
        assert spec.ropes[0].theta == rope.get("full_attention", rope)["rope_theta"]
        assert spec.rms_norm_eps == theirs.rms_norm_eps
        for ours, key in {
            **{"num_layers": "num_hidden_layers", "hidden_size": "hidden_size"},
            **{"intermediate_size": "intermediate_size", "vocab_size": "vocab_size"},
            **{"num_qo_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads"},
            "max_position": "max_position_embeddings",
        }.items():
            assert getattr(spec, ours) == getattr(theirs, key), (name, key)
