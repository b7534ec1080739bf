"""Which type a model computes in when the user names none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_families import random_model

from chunkllama.model_spec import ModelSpec
from chunkllama.models import config
from chunkllama.models.config import read_spec, resolve_dtype

SPEC = ModelSpec(
    num_layers=1,
    hidden_size=64,
    intermediate_size=64,
    num_qo_heads=1,
    num_kv_heads=1,
    head_dim=64,
    vocab_size=16,
    max_position=64,
)


@pytest.mark.parametrize(
    ("stored", "backend", "instructions", "expected"),
    [
        ("bfloat16", "auto", False, "bfloat16"),
        ("bfloat16", "cpu", False, "bfloat16"),
        ("bfloat16", "reference", False, "float32"),
        ("bfloat16", "reference", True, "bfloat16"),
        ("float16", "cpu", True, "bfloat16"),
        ("float16", "auto", False, "bfloat16"),
        ("float16", "reference", False, "float32"),
        ("float16", "reference", True, "bfloat16"),
        ("float32", "cpu", True, "float32"),
    ],
)
def test_a_cpu_stores_16_bits_where_its_kernels_widen_them(
    monkeypatch: pytest.MonkeyPatch, stored: str, backend: str, instructions: bool, expected: str
) -> None:
    monkeypatch.setattr(config, "_cpu_has_bfloat16", lambda: instructions)
    spec = replace(SPEC, dtype=stored)
    assert resolve_dtype(spec, "auto", "cpu", backend) == expected
    assert resolve_dtype(spec, "float32", "cpu", backend) == "float32"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_config_without_a_dtype_means_that_of_the_tensors(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    random_model("Llama", {}).to(dtype).save_pretrained(tmp_path, max_shard_size="40KB")
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    for stated in ({}, {"torch_dtype": None}):
        path.write_text(json.dumps({k: v for k, v in values.items() if k != "dtype"} | stated))
        assert read_spec(tmp_path).dtype == str(dtype).removeprefix("torch.")
    for shard in tmp_path.glob("*.safetensors"):
        shard.unlink()
    assert read_spec(tmp_path).dtype == "float32"


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
@pytest.mark.parametrize(
    ("stored", "backend", "expected"),
    [
        ("float32", "auto", "bfloat16"),
        ("float32", "cuda", "bfloat16"),
        ("float32", "reference", "float32"),
        ("float16", "auto", "float16"),
        ("bfloat16", "cuda", "bfloat16"),
    ],
)
def test_a_gpu_computes_in_what_its_kernels_have(
    stored: str, backend: str, expected: str, device: str
) -> None:
    spec = replace(SPEC, dtype=stored)
    assert resolve_dtype(spec, "auto", device, backend) == expected
    assert resolve_dtype(spec, "float32", device, backend) == "float32"
