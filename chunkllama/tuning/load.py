"""From a model's folder and examples to a training that is ready to run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch

from chunkllama.backends.model import Linear, ModelWeights
from chunkllama.backends.quantized import QuantizedLinear
from chunkllama.errors import ConfigError
from chunkllama.model_spec import ModelSpec
from chunkllama.models.identity import hash_weights
from chunkllama.models.loading.safetensors import Checkpoint
from chunkllama.models.loading.sizes import allocated_bytes
from chunkllama.models.loading.weights import load_weights
from chunkllama.models.rotary import rotary_tables
from chunkllama.resources import memory_left
from chunkllama.tuning.files import StepResult
from chunkllama.tuning.folder import Example, source_digest
from chunkllama.tuning.lora import Lora
from chunkllama.tuning.memory import tuning_size
from chunkllama.tuning.model import TunedModel
from chunkllama.tuning.trainer import Trainer
from chunkllama.tuning_messages import TuningOptions


def load_trainer(  # noqa: PLR0913
    *,
    model_path: Path,
    spec: ModelSpec,
    name: str,
    max_model_len: int,
    device: torch.device,
    examples: list[Example],
    options: TuningOptions,
    folder: Path,
    max_bytes: int,
    slice_tokens: int,
    on_step: Callable[[StepResult], None],
) -> Trainer:
    """Load plain weights in the checkpoint's type, and the state of a former process.

    Args:
        model_path, spec: of the model.
        name: of the model, noted in the adapter.
        max_model_len: that the model is served with; a stretched rotary embedding depends on it.
        folder: of the training's state and of the adapter.
        max_bytes: that the training may take.

    Raises:
        ConfigError: the model cannot be trained, the memory does not suffice, or the folder has a
            state of another training.
    """
    if not spec.is_native:
        raise ConfigError(
            f"model: fine-tuning needs an architecture of this server, not {spec.architecture}"
        )
    longest = max(example.num_inputs for example in examples)
    if longest >= max_model_len:
        raise ConfigError(f"an example has {longest + 1} tokens; the model takes {max_model_len}")
    checkpoint = Checkpoint(model_path, spec)
    weight_bytes = allocated_bytes(checkpoint, spec.dtype, "auto")
    size = tuning_size(spec, weight_bytes, options.rank, longest, slice_tokens)
    max_tokens = size.max_tokens(max_bytes, longest)
    if device.type == "cpu":
        max_tokens = min(max_tokens, size.free_tokens(memory_left(), longest))
    weights = load_weights(checkpoint, spec, getattr(torch, spec.dtype), device)
    if _is_quantized(weights):
        raise ConfigError(
            "model: its linear layers are quantized; fine-tuning needs a checkpoint in bfloat16, "
            "float16 or float32"
        )
    source = source_digest(hash_weights(model_path, spec), examples)
    lora = Lora(spec, options.rank, options.alpha, options.seed, device)
    rotary = tuple(table.to(device) for table in rotary_tables(spec, max_model_len))
    model = TunedModel(spec, weights, lora, rotary)
    return Trainer(
        model, examples, options, folder, name, source, max_tokens, slice_tokens, on_step=on_step
    )


def _is_quantized(weights: ModelWeights) -> bool:
    layers = [getattr(layer, item.name) for layer in weights.layers for item in fields(layer)]
    linears = [each for each in (weights.lm_head, *layers) if isinstance(each, Linear)]
    return any(isinstance(each, QuantizedLinear) for each in linears)
