"""What keeps a model from being split over ranks. No torch."""

from __future__ import annotations

from chunkllama.errors import ConfigError
from chunkllama.model_spec import ModelSpec
from chunkllama.models.loading.safetensors import Checkpoint, is_quantized


def check_ranks(size: int, spec: ModelSpec, checkpoint: Checkpoint, device: str) -> None:
    """Refuse a model or a device that ``size`` ranks cannot share.

    Args:
        device: "cpu", "cuda" or "cuda:N".

    Raises:
        ConfigError: one line that names the setting and the fix.
    """
    if size == 1:
        return
    key = "tensor_parallel_size"
    if not spec.is_native:
        raise ConfigError(f"{key}: transformers runs {spec.architecture}, on one rank only; use 1")
    if any(layer.qk_norm == "all" for layer in spec.layers):
        raise ConfigError(
            f"{key}: {spec.architecture} normalises all heads together, on one rank only; use 1"
        )
    if spec.quantization_method or any(map(is_quantized, checkpoint)):
        raise ConfigError(
            f"{key}: the checkpoint's weights are quantized, which only one rank can use; use 1, "
            "or a checkpoint of floats with quantization int8 or int4"
        )
    counts = {
        "attention heads": spec.num_qo_heads,
        "key/value heads": spec.num_kv_heads,
        "columns of the MLP": spec.intermediate_size,
    }
    for name, count in counts.items():
        if count % size:
            fits = next(n for n in range(size, 0, -1) if not any(c % n for c in counts.values()))
            raise ConfigError(f"{key}: {size} does not divide the {count} {name}; use {fits}")
    if ":" in device:
        raise ConfigError(f"device: {device} is one GPU; use cuda with {key} {size}")
    if device == "cuda":
        _check_gpus(size, key)


def _check_gpus(size: int, key: str) -> None:
    import torch

    count = torch.cuda.device_count()
    if count < size:
        raise ConfigError(
            f"{key}: {size} ranks need a GPU each, and the number of GPUs is {count}; use at most "
            f"{count}"
        )


def rank_device(device: str, rank: int, size: int) -> str:
    """The device of a rank: the GPU of its number, or the CPU."""
    return f"{device}:{rank}" if size > 1 and device != "cpu" else device
