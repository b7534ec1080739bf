"""Random models with a tokenizer, edits of their files, and what ``verify`` finds.

``tests/conftest.py`` makes this file importable as ``verify_models`` anywhere under tests/.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
from model_families import random_model
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, decoders, pre_tokenizers, processors, trainers

from chunkllama.verify.report import Report
from chunkllama.verify.run import Options, verify
from chunkllama.verify.texts import PROSE

Weights = dict[str, torch.Tensor]
FAST: dict[str, Any] = {
    "max_tokens": 60,
    "backends": ("reference",),
    "quantizations": ("auto",),
}
PARTIAL = "partial_rotary_factor"
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 32}),
    "biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen3": ("Qwen3", {}),
    "gemma2": ("Gemma2", {"sliding_window": 32, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3", {"sliding_window": 32}),
    "gemma3 wide": ("Gemma3", {"sliding_window": 100}),
    "granite": (
        "Granite",
        {"attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    ),
    "phi3": (
        "Phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4} | {PARTIAL: 0.75}},
    ),
    "smollm3": ("SmolLM3", {}),
    "olmo2": ("Olmo2", {}),
    "ernie": ("Ernie4_5", {}),
    "hunyuan": ("HunYuanDenseV1", {}),
    "narrow": ("Llama", {"head_dim": 24}),
    "mixtral": ("Mixtral", {**EXPERTS, "sliding_window": 20}),
}


def write_tokenizer(folder: Path) -> int:
    """A byte-level tokenizer with BOS; returns the size of its vocabulary."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=["<pad>", "<s>", "</s>"],
    )
    backend.train_from_iterator([PROSE], trainer)
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return backend.get_vocab_size()


def write_model(folder: Path, family: str) -> Path:
    folder.mkdir()
    name, changes = FAMILIES[family]
    model = random_model(name, {**changes, "vocab_size": write_tokenizer(folder)})
    model.save_pretrained(folder)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, edit: Callable[[Weights], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def verified(folder: Path, reference: Path | None = None, **options: Any) -> Report:
    other = "" if reference is None else str(reference)
    return verify(Options(str(folder), other, **{**FAST, **options}))
