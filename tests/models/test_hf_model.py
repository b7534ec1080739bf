"""Decoders that transformers runs on this server's chunks and attention: mixtures of experts, and
families without an entry, equal transformers; what keeps another state is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_families import (
    SMALL,
    VOCAB,
    BuildCore,
    assert_equals_transformers,
    fill_randomly,
    random_model,
)
from safetensors.torch import load_file, save_file
from transformers import masking_utils

from chunkllama.config import EngineConfig
from chunkllama.engine.build import build_engine
from chunkllama.errors import ConfigError
from chunkllama.models import library_classes
from chunkllama.models.config import parse_spec, read_spec
from chunkllama.models.hf_model import TransformersModel
from chunkllama.models.hf_probe import ACTIVE, Probe, _mask

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {**EXPERTS, "sliding_window": None}),
    "mixtral window": ("Mixtral", {**EXPERTS, "sliding_window": 70}),
    "qwen3 moe": (
        "Qwen3Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    ),
    # Their layers show a window in the mask alone.
    "phimoe window": ("Phimoe", {**EXPERTS, "sliding_window": 70}),
    "qwen2 moe windows": (
        "Qwen2Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
        | {"shared_expert_intermediate_size": 48, "max_window_layers": 4}
        | {"use_sliding_window": True, "sliding_window": 70},
    ),
    "cohere": ("Cohere", {"logit_scale": 0.5}),
    "stablelm": ("StableLm", {"partial_rotary_factor": 0.5}),
    "dynamic rotation": (
        "StableLm",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
        | {"max_position_embeddings": 160},
    ),
    "starcoder2": ("Starcoder2", {"sliding_window": None}),
    "gpt-neox": ("GPTNeoX", {}),
    "opt": ("OPT", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    # Latent attention: values are shorter than keys.
    "deepseek": (
        "DeepseekV3",
        {"num_key_value_heads": 4, "head_dim": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 24}
        | {"v_head_dim": 16, "q_lora_rank": 32, "kv_lora_rank": 16, "moe_intermediate_size": 48}
        | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
        | {"first_k_dense_replace": 1},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_log_probabilities_and_greedy_ids_equal_transformers(
    case: str, tmp_path: Path, build_core: BuildCore, caplog: pytest.LogCaptureFixture
) -> None:
    model = random_model(*CASES[case])
    model.save_pretrained(tmp_path)
    core = build_core(tmp_path)
    assert not read_spec(tmp_path).is_native
    assert "transformers runs it" in caplog.text
    assert_equals_transformers(core, model, (1, 5, 64, 65, 150))


@pytest.mark.nightly
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("case", CASES)
def test_3000_tokens_equal_transformers(
    case: str, backend: str, tmp_path: Path, build_core: BuildCore
) -> None:
    family, changes = CASES[case]
    model = random_model(family, {**changes, "max_position_embeddings": 4096})
    model.save_pretrained(tmp_path)
    core = build_core(tmp_path, backend=backend, num_chunks=160, max_model_len=4096)
    assert_equals_transformers(core, model, (3000,), tolerance=2e-4)


def test_gpt_2_with_learned_positions_equals_transformers(
    tmp_path: Path, build_core: BuildCore
) -> None:
    sizes = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256}
    config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(3)
    model = transformers.GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"  # with the masks that old files keep
    masks = {f"transformer.h.0.attn.{x}": torch.ones(1) for x in ("bias", "masked_bias")}
    save_file({**load_file(path), **masks}, path, metadata={"format": "pt"})
    core = build_core(tmp_path)
    assert core.info.max_model_len == 256
    assert_equals_transformers(core, model, (1, 5, 64, 65, 150))


def test_exaone_with_its_own_names_of_sizes_equals_transformers(
    tmp_path: Path, build_core: BuildCore
) -> None:
    """transformers runs it as a Llama; its files have other names of keys and tensors."""
    config = transformers.ExaoneConfig(**{**SMALL, "num_hidden_layers": 3})
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    fill_randomly(model)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = {**json.loads(path.read_text()), "architectures": ["ExaoneForCausalLM"]}
    for old, new in (("num_hidden_layers", "num_layers"), ("hidden_act", "activation_function")):
        values[new] = values.pop(old)
    path.write_text(json.dumps(values))
    assert "transformer.h.0.ln_1.weight" in load_file(tmp_path / "model.safetensors")
    assert_equals_transformers(build_core(tmp_path), model, (1, 65, 150))


def test_reference_and_cpu_backends_run_it(tmp_path: Path, build_core: BuildCore) -> None:
    model = random_model(*CASES["mixtral window"])
    model.save_pretrained(tmp_path)
    core = build_core(tmp_path, backend="reference")
    assert core.info.backend == "reference"
    assert_equals_transformers(core, model, (65, 230))


def test_bfloat16_serves(tmp_path: Path, build_core: BuildCore) -> None:
    model = random_model(*CASES["qwen3 moe"])
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    core = build_core(tmp_path, dtype="bfloat16")
    assert core.info.vocab_size == VOCAB


def refused(folder: Path, words: str, **changes: Any) -> None:
    settings: dict[str, Any] = {"device": "cpu", "num_chunks": 8, "dtype": "float32", **changes}
    with pytest.raises(ConfigError, match=words) as caught:
        build_engine(EngineConfig.from_flat(model=str(folder), **settings))
    assert "\n" not in str(caught.value)


def test_a_tensor_that_would_stay_unused_is_named(tmp_path: Path, build_core: BuildCore) -> None:
    random_model(*CASES["mixtral"]).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file({**weights, **buffer}, path, metadata={"format": "pt"})
    assert build_core(tmp_path).info.vocab_size == VOCAB
    other = {"model.layers.1.self_attn.q_proj.bias": torch.ones(64)}
    save_file({**weights, **other}, path, metadata={"format": "pt"})
    refused(tmp_path, r"unexpected tensor model\.layers\.1\.self_attn\.q_proj\.bias \(1 in all\)")


def test_what_transformers_itself_cannot_run_is_one_line(tmp_path: Path) -> None:
    """Rotary embedding of another size than the heads' rotated part."""
    random_model(*CASES["deepseek"]).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "head_dim": 16}))
    refused(tmp_path, "DeepseekV3ForCausalLM cannot run .* fails before: RuntimeError: The size")


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_latent_attention_is_planned_with_keys_of_all_heads(tmp_path: Path, kv_heads: int) -> None:
    """The pool is planned as the layers use it, not by the groups that the configuration names."""
    random_model(*CASES["deepseek"]).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_key_value_heads": kv_heads}))
    planned = read_spec(tmp_path)
    used = TransformersModel(tmp_path, planned, torch.float32, torch.device("cpu")).spec
    assert (used.num_kv_heads, used.head_dim) == (4, 32)
    assert (planned.num_kv_heads, planned.head_dim) == (4, 32)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
        (torch.AcceleratorError("an illegal memory access was encountered"), RuntimeError),
        (RuntimeError("CUDA error: device-side assert triggered"), RuntimeError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"), MemoryError),
        (RuntimeError("The size of tensor a (8) must match"), ConfigError),
    ],
    ids=["out of memory", "device", "CUDA", "allocator", "sizes"],
)
def test_an_error_of_the_machine_is_not_blamed_on_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, raised: type[Exception]
) -> None:
    random_model(*CASES["stablelm"]).save_pretrained(tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(TransformersModel, "_hidden", fail)
    device = torch.device("cpu")
    with pytest.raises(raised) as failed:
        TransformersModel(tmp_path, read_spec(tmp_path), torch.float32, device)
    assert ("cannot run on this server" in str(failed.value)) == (raised is ConfigError)


@pytest.fixture
def unlisted(monkeypatch: pytest.MonkeyPatch) -> None:
    """No class is refused by its name."""
    monkeypatch.setattr(library_classes, "_REFUSED", {})


@pytest.mark.usefixtures("unlisted")
def test_a_state_other_than_keys_and_values_is_refused(tmp_path: Path) -> None:
    config = transformers.MambaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4
    )
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    sizes = {"num_attention_heads": 2, "max_position_embeddings": 64}
    path.write_text(json.dumps({**json.loads(path.read_text()), **sizes}))
    refused(tmp_path, "MambaForCausalLM cannot run on this server's attention")


@pytest.mark.usefixtures("unlisted")
def test_attention_in_code_of_its_own_is_refused(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "hidden_size": 32}
    config = transformers.FalconConfig(**sizes, bos_token_id=1, eos_token_id=2)
    transformers.FalconForCausalLM(config).save_pretrained(tmp_path / "falcon")
    refused(tmp_path / "falcon", "no AttentionInterface")
    mpt = transformers.MptConfig(vocab_size=64, d_model=32, n_heads=4, n_layers=2)
    transformers.MptForCausalLM(mpt).save_pretrained(tmp_path / "mpt")
    refused(tmp_path / "mpt", "MptForCausalLM .*no AttentionInterface")


@pytest.mark.usefixtures("unlisted")
def test_attention_sinks_are_refused(tmp_path: Path) -> None:
    config = transformers.GptOssConfig(
        **{**SMALL, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 32}
    )
    transformers.GptOssForCausalLM(config).save_pretrained(tmp_path)
    refused(tmp_path, "s_aux")


WINDOW = masking_utils.sliding_window_causal_mask_function(2047)
PADDING = torch.zeros(1, dtype=torch.long)
RULES: dict[str, tuple[Any, int | None, int | None]] = {
    "causal": (masking_utils.causal_mask_function, None, None),
    "window": (WINDOW, 2047, 2047),
    "another window than stated": (WINDOW, 2046, 0),
    "chunks": (masking_utils.chunked_causal_mask_function(64, PADDING), 64, 0),
    "both directions": (masking_utils.bidirectional_mask_function, None, 0),
    "by tokens": (masking_utils.packed_sequence_mask_function(torch.zeros(1, 2)), None, 0),
}


@pytest.mark.parametrize("rule", RULES)
def test_the_rule_of_a_mask_is_found(rule: str) -> None:
    mask_function, size, window = RULES[rule]
    probe = Probe()
    token = ACTIVE.set(probe)
    try:
        _mask(q_length=2, kv_length=2, mask_function=WINDOW, local_size=2047)
        mask = _mask(q_length=2, kv_length=2, mask_function=mask_function, local_size=size)
    finally:
        ACTIVE.reset(token)
    assert mask.shape == (1, 1, 2, 2)
    assert probe._window_of(mask) == window
    assert probe._window_of((1 - mask) * -1e30) == 0
    assert probe._window_of(torch.tril(mask)) == 0


def test_quantization_and_unknown_classes_are_named(tmp_path: Path) -> None:
    random_model(*CASES["mixtral"]).save_pretrained(tmp_path)
    refused(tmp_path, "quantization: int8 is not available for Mixtral", quantization="int8")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    changes = {"architectures": ["MartianForCausalLM"], "model_type": "martian"}
    path.write_text(json.dumps({**config, **changes}))
    refused(tmp_path, "MartianForCausalLM is unknown, and transformers [0-9.]+ does not have it")
    path.write_text(json.dumps({**config, "model_type": "martian"}))
    refused(tmp_path, "model_type 'martian' is unknown")
    changes["auto_map"] = {"AutoModelForCausalLM": "modeling_martian.MartianForCausalLM"}
    path.write_text(json.dumps({**config, **changes}))
    refused(tmp_path, r"defined by code of the model's folder \(auto_map\), which is not executed")
    path.write_text(json.dumps({**config, "pad_token_id": 10**6}))
    refused(tmp_path, "cannot load MixtralForCausalLM: .*adding_idx")


def test_a_class_that_cannot_run_is_refused_by_its_name(tmp_path: Path) -> None:
    for name, why in library_classes._REFUSED.items():
        assert hasattr(transformers, name)
        path = tmp_path / "config.json"
        with pytest.raises(ConfigError, match=f"{name} cannot run here: {why}"):
            parse_spec({"architectures": [name], "quantization_config": {"x": 1}}, path)


@pytest.mark.parametrize("kind", ["mamba", "linear_attention", "conv"])
def test_some_layers_of_another_state_are_refused_before_weights_are_read(
    kind: str, tmp_path: Path
) -> None:
    """Of classes that have such layers in some models only (Granite 4's)."""
    values = {**SMALL, "architectures": ["GraniteMoeHybridForCausalLM"]}
    values |= {"model_type": "granitemoehybrid", "layer_types": ["attention", kind]}
    with pytest.raises(ConfigError, match=rf"keep a state .* \(layer_types: {kind}\)"):
        parse_spec(values, tmp_path / "config.json")
    values["layer_types"] = ["attention", "attention"]
    assert not parse_spec(values, tmp_path / "config.json").is_native


@pytest.mark.usefixtures("unlisted")
def test_an_unknown_class_is_left_to_the_library_where_it_keeps_its_names_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library_classes, "_mapping", lambda: "")
    random_model(*CASES["mixtral"]).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    changes = {"architectures": ["MartianForCausalLM"], "model_type": "martian"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    refused(tmp_path, "transformers cannot load MartianForCausalLM: .* `martian`")
