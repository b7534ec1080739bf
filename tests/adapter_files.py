"""Adapter folders as PEFT writes them, with random weights; without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
ALL = ATTENTION + MLP

# What PEFT 0.21 writes beside the fields that a test sets.
_DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": "some/model",
    "bias": "none",
    "corda_config": None,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_bias": False,
    "lora_dropout": 0.0,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "qalora_group_size": 16,
    "rank_pattern": {},
    "revision": None,
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
}


def linear_shapes(model: Path) -> dict[str, tuple[int, int]]:
    """Shapes [out, in] of the linear modules of a model's layers."""
    weights = load_file(model / "model.safetensors")
    return {
        name.removesuffix(".weight"): weight.shape
        for name, weight in weights.items()
        if weight.ndim == 2 and ".layers." in name
    }


def write_adapter(
    folder: Path,
    model: Path,
    *,
    targets: tuple[str, ...] = ALL,
    rank: int = 8,
    ranks: dict[str, int] | None = None,
    seed: int = 0,
    size: float = 0.3,
    **config: Any,
) -> Path:
    """Write an adapter of a model.

    Args:
        targets: last parts of the names of the modules that get weights.
        ranks: rank by last part of a module's name, where it is not ``rank``.
        size: spread of what the adapter adds, relative to its input.
        config: fields of adapter_config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    tensors = {}
    for name, (rows, columns) in linear_shapes(model).items():
        last = name.rpartition(".")[2]
        if last not in targets:
            continue
        r = (ranks or {}).get(last, rank)
        prefix = f"base_model.model.{name}"
        a = random.normal(0, columns**-0.5, (r, columns))
        tensors[f"{prefix}.lora_A.weight"] = a.astype(np.float32)
        b = random.normal(0, size * r**-0.5, (rows, r))
        tensors[f"{prefix}.lora_B.weight"] = b.astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    fields = {"r": rank, "lora_alpha": rank, "target_modules": sorted(targets)}
    text = json.dumps({**_DEFAULTS, **fields, **config}, indent=2)
    (folder / "adapter_config.json").write_text(text)
    return folder
