"""AWQ, GPTQ, compressed-tensors and FP8 folders: the same model as their dequantized weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_families import random_model
from safetensors.torch import load_file, save_file

from chunkllama.backends.quantized import QuantizedLinear, rows_of
from chunkllama.errors import ConfigError
from chunkllama.models.config import read_spec
from chunkllama.models.loading.safetensors import Checkpoint
from chunkllama.models.loading.sizes import allocated_bytes
from chunkllama.models.loading.weights import load_weights

PROMPT = np.random.default_rng(4).integers(0, 131, 40).tolist()
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
Tensors = dict[str, torch.Tensor]
Quantizer = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]


def pack(codes: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Codes along ``dim`` into 32-bit words, the first in the lowest bits."""
    count = 32 // bits
    codes = codes.long().movedim(dim, 0)
    words = torch.zeros(len(codes) // count, *codes.shape[1:], dtype=torch.int64)
    for i in range(count):
        words |= codes[i::count] << (bits * i)
    return words.to(torch.int32).movedim(0, dim).contiguous()


def grouped(
    weight: torch.Tensor, bits: int, size: int, symmetric: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [out, in], scales and zeros [out, groups], and the weights they stand for."""
    rows, columns = weight.shape
    groups = weight.reshape(rows, -1, size)
    top, middle = (1 << bits) - 1, 1 << (bits - 1)
    if symmetric:
        scales = (groups.abs().amax(2) / (middle - 1)).to(dtype)
        zeros = torch.full(scales.shape, middle)
    else:
        low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        scales = ((high - low) / top).to(dtype)
        zeros = (-low / scales.float()).round().clamp(0, top).long()
    steps = groups / scales.float()[..., None] + zeros[..., None]
    codes = steps.round().clamp(0, top)
    weights = (codes - zeros[..., None]) * scales.float()[..., None]
    return codes.view(rows, columns), scales, zeros, weights.view(rows, columns)


def awq(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    codes, scales, zeros, weights = grouped(weight, 4, 32, False, torch.float16)
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def words(values: torch.Tensor) -> torch.Tensor:
        mixed = values.reshape(len(values), -1, 8)[:, :, order].reshape(values.shape)
        return pack(mixed, 4, 1)

    tensors = {"qweight": words(codes.T), "qzeros": words(zeros.T), "scales": scales.T}
    return tensors, weights


def gptq(
    bits: int = 4, symmetric: bool = False, version: int = 1, shuffle: bool = False
) -> Quantizer:
    def quantize(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        order = torch.arange(weight.shape[1])
        if shuffle:
            order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(1))
        codes, scales, zeros, weights = grouped(
            weight[:, order], bits, 32, symmetric, torch.float16
        )
        back = order.argsort()
        stored = (zeros - int(version == 1)) & ((1 << bits) - 1)
        tensors = {
            "qweight": pack(codes[:, back].T, bits, 0),
            "qzeros": pack(stored.T, bits, 1),
            "scales": scales.T,
            "g_idx": (back // 32).to(torch.int32),
        }
        return tensors, weights[:, back]

    return quantize


def packed(bits: int, size: int, symmetric: bool, unordered: bool = False) -> Quantizer:
    def quantize(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        group = size or weight.shape[1]
        codes, scales, zeros, weights = grouped(weight, bits, group, symmetric, torch.bfloat16)
        tensors = {
            "weight_packed": pack(codes, bits, 1),
            "weight_scale": scales,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            tensors["weight_zero_point"] = pack(zeros, bits, 0)
        if unordered:
            tensors["weight_g_idx"] = torch.full((weight.shape[1],), -1, dtype=torch.int32)
        return tensors, weights

    return quantize


def integers(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    codes, scales, _, weights = grouped(weight, 8, weight.shape[1], True, torch.float32)
    tensors = {"weight": (codes - 128).to(torch.int8), "weight_scale": scales}
    return {**tensors, "input_scale": torch.ones(1)}, weights


def eight_bit_floats(kind: str) -> Quantizer:
    def quantize(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        rows, columns = weight.shape
        if kind == "tensor":
            scale = torch.tensor([0.01])
        elif kind == "row":
            scale = torch.linspace(0.005, 0.02, rows)[:, None]
        else:
            scale = torch.rand(-(-rows // 128), -(-columns // 128)) * 0.01 + 0.005
        spread = scale
        if kind == "block":
            spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
        small = (weight / spread).to(torch.float8_e4m3fn)
        name = "weight_scale_inv" if kind == "block" else "weight_scale"
        return {"weight": small, name: scale}, small.float() * spread

    return quantize


def compressed(**settings: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": settings}}


CASES: dict[str, tuple[dict[str, Any], Quantizer]] = {
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, awq),
    "gptq": ({"quant_method": "gptq", "bits": 4}, gptq()),
    "gptq-symmetric": ({"quant_method": "gptq", "bits": 4, "sym": True}, gptq(symmetric=True)),
    "gptq-8": ({"quant_method": "gptq", "bits": 8}, gptq(bits=8)),
    "gptq-v2": ({"quant_method": "gptq", "checkpoint_format": "gptq_v2"}, gptq(version=2)),
    "gptq-act-order": ({"quant_method": "gptq", "desc_act": True}, gptq(shuffle=True)),
    "w4a16": (compressed(), packed(4, 32, True)),
    "w4a16-16": (compressed(), packed(4, 16, True)),
    "w4a16-row": (compressed(), packed(4, 0, True)),
    "w4a16-unordered": (compressed(), packed(4, 32, True, unordered=True)),
    "w4a16-zeros": (compressed(), packed(4, 32, False)),
    "w8a16": (compressed(), packed(8, 32, True)),
    "w8a8": (compressed(), integers),
    "fp8-tensor": (compressed(), eight_bit_floats("tensor")),
    "fp8-row": (compressed(), eight_bit_floats("row")),
    "fp8-block": (
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        eight_bit_floats("block"),
    ),
}
ODD = {"w4a16-48": (compressed(), packed(4, 48, True))}
WIDENED = ("gptq-act-order", "fp8-tensor", "fp8-row", "fp8-block")


def write_pair(model: Any, name: str, folder: Path) -> tuple[Path, Path]:
    """The quantized folder, and one of the weights that it stands for."""
    settings, quantize = {**CASES, **ODD}[name]
    plain, quantized = folder / "plain", folder / "quantized"
    model.save_pretrained(plain)
    model.save_pretrained(quantized)
    tensors = load_file(plain / "model.safetensors")
    stored: Tensors = {}
    for key in list(tensors):
        if not key.endswith("_proj.weight"):
            stored[key] = tensors[key]
            continue
        parts, tensors[key] = quantize(tensors[key].float())
        module = key.removesuffix(".weight")
        stored |= {f"{module}.{suffix}": part.contiguous() for suffix, part in parts.items()}
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()}, plain / "model.safetensors"
    )
    save_file(stored, quantized / "model.safetensors")
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = settings
    (quantized / "config.json").write_text(json.dumps(config))
    return quantized, plain


@pytest.mark.parametrize("name", CASES)
def test_a_quantized_folder_equals_its_dequantized_weights(
    name: str, make_tiny, our_logits, tmp_path: Path
) -> None:
    quantized, plain = write_pair(make_tiny(**SHAPE, attention_bias=True), name, tmp_path)
    expected = our_logits(plain, PROMPT)
    torch.testing.assert_close(our_logits(quantized, PROMPT), expected, atol=2e-5, rtol=2e-5)
    # The head is 8 bits there.
    native = our_logits(quantized, PROMPT, backend="cpu", chunk_size=64)
    assert (native - expected).abs().max() <= 0.02 * expected.abs().max()
    # What is packed as codes stands for the same weights, but for offsets in 16 bits.
    spec = read_spec(quantized)
    checkpoint = Checkpoint(quantized, spec)
    weights = load_weights(checkpoint, spec, torch.float32, torch.device("cpu"))
    for layer in weights.layers:
        for linear in (layer.qkv, layer.output, layer.gate_up, layer.down):
            assert isinstance(linear, QuantizedLinear)
            for rows in rows_of(linear):
                exact = rows.floats(0, rows.rows)
                assert (rows.format is None) == (name in WIDENED)
                if rows.format is not None:
                    found = rows.codes(0, rows.rows).floats()
                    assert (found - exact).abs().max() <= 2**-8 * exact.abs().max()
                    part = rows.codes(3, 21).floats()
                    assert torch.equal(part, found[3:21])
                assert torch.equal(rows.floats(3, 21), exact[3:21])
    if name.startswith(("awq", "gptq-8", "w4a16")):
        assert allocated_bytes(checkpoint, "bfloat16", "auto") < allocated_bytes(
            Checkpoint(plain, read_spec(plain)), "bfloat16", "auto"
        )


def test_a_head_beside_tied_embeddings_of_a_quantized_folder_is_used(
    make_tiny, our_logits, tmp_path: Path
) -> None:
    folders = write_pair(make_tiny(**SHAPE), "awq", tmp_path)
    expected = our_logits(folders[1], PROMPT)
    for folder in folders:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    torch.testing.assert_close(our_logits(folders[0], PROMPT), expected, atol=2e-5, rtol=2e-5)
    weights = load_file(folders[0] / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folders[0] / "model.safetensors")
    assert not torch.allclose(our_logits(folders[0], PROMPT), expected, atol=1e-2)


@pytest.mark.parametrize("name", ["awq", "gptq", "w4a16"])
@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Phi3"])
def test_quantized_folders_of_other_families(
    family: str, name: str, our_logits, tmp_path: Path
) -> None:
    """Biases, q/k norms and fused names stand beside quantized modules."""
    quantized, plain = write_pair(random_model(family, {**SHAPE, "head_dim": 16}), name, tmp_path)
    expected = our_logits(plain, PROMPT)
    torch.testing.assert_close(our_logits(quantized, PROMPT), expected, atol=2e-5, rtol=2e-5)
    native = our_logits(quantized, PROMPT, backend="cpu", chunk_size=64)
    assert (native - expected).abs().max() <= 0.02 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("w4a16", {"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes'"),
        ("awq", {"quant_method": "awq", "version": "gemv"}, "version 'gemv'"),
        ("gptq", {"quant_method": "gptq", "checkpoint_format": "marlin"}, "'marlin'"),
        ("w4a16", compressed() | {"sparsity_config": {"format": "sparse-24"}}, "sparse"),
        ("w4a16", compressed() | {"transform_config": {"a": 1}}, "transform_config"),
        ("w4a16", compressed() | {"format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quan"),
        ("w4a16", "fp8", "must be an object"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(
    name: str, settings: Any, message: str, make_tiny, tmp_path: Path
) -> None:
    quantized, _ = write_pair(make_tiny(**SHAPE), name, tmp_path)
    path = quantized / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = settings
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message) as caught:
        read_spec(quantized)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "suffix", "message"),
    [
        ("awq", "qzeros", "no tensor .*qzeros"),
        ("awq", "qweight", "no tensor .*weight"),
        ("gptq", "scales", "no tensor .*scales"),
        ("w4a16", "weight_scale", "no tensor .*weight_scale"),
        ("w8a8", "weight_scale", "no tensor .*weight_scale"),
    ],
)
def test_a_missing_tensor_is_named(
    name: str, suffix: str, message: str, make_tiny, tmp_path: Path
) -> None:
    quantized, _ = write_pair(make_tiny(**SHAPE), name, tmp_path)
    tensors = load_file(quantized / "model.safetensors")
    del tensors[f"model.layers.1.mlp.up_proj.{suffix}"]
    save_file(tensors, quantized / "model.safetensors")
    with pytest.raises(ConfigError, match=message):
        Checkpoint(quantized, read_spec(quantized))


def test_groups_whose_size_their_number_does_not_tell_are_refused(tmp_path: Path) -> None:
    """96 inputs in groups of 64 are two, as are groups of 48."""
    changes = {"hidden_size": 96, "num_attention_heads": 6}
    quantized, _ = write_pair(random_model("Llama", changes), "w4a16-48", tmp_path)
    with pytest.raises(ConfigError, match="2 groups for 96 inputs; groups must be of 2, 4, 8"):
        Checkpoint(quantized, read_spec(quantized))


@pytest.mark.parametrize("group", [-1, 999])
def test_a_group_that_does_not_exist_is_named(group: int, make_tiny, tmp_path: Path) -> None:
    quantized, _ = write_pair(make_tiny(**SHAPE), "w4a16-unordered", tmp_path)
    tensors = load_file(quantized / "model.safetensors")
    for key in tensors:
        if key.endswith("weight_g_idx"):
            tensors[key] = torch.zeros_like(tensors[key])
            tensors[key][-1] = group
    save_file(tensors, quantized / "model.safetensors")
    spec = read_spec(quantized)
    with pytest.raises(ConfigError, match="names a group outside"):
        load_weights(Checkpoint(quantized, spec), spec, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("suffix", ["qweight", "qzeros", "scales", "g_idx"])
def test_a_tensor_of_another_shape_or_type_is_named(suffix: str, make_tiny, tmp_path: Path) -> None:
    quantized, _ = write_pair(make_tiny(**SHAPE), "gptq", tmp_path)
    tensors = load_file(quantized / "model.safetensors")
    name = f"model.layers.0.self_attn.q_proj.{suffix}"
    for wrong in (tensors[name][1:].contiguous(), tensors[name].double()):
        save_file(tensors | {name: wrong}, quantized / "model.safetensors")
        with pytest.raises(ConfigError, match="q_proj"):
            Checkpoint(quantized, read_spec(quantized))
