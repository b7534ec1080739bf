"""How a GGUF file stretches rotary embedding, as rope_scaling of config.json."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

from chunkllama.models.loading.gguf_file import GgufFile, shortest

_DIVISORS: Final = "rope_freqs.weight"
_LONG_FACTORS, _SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS: Final = (_DIVISORS, _LONG_FACTORS, _SHORT_FACTORS)


def rope_scaling(file: GgufFile, config: dict[str, Any]) -> dict[str, Any] | None:
    """Return rope_scaling; None: rotary embedding is not stretched.

    Args:
        config: head_dim and rope_theta.

    Raises:
        ConfigError: a kind without an equivalent, or a tensor or key of it is missing.
    """
    original = file.get("rope.scaling.original_context_length")
    if _DIVISORS in file.tensors:
        return _llama3(file, config, original or 8192)
    if _LONG_FACTORS in file.tensors:
        return _longrope(file, original)
    kind, key = file.get("rope.scaling.type", "linear"), "rope.scaling.factor"
    if kind not in ("none", "linear", "yarn"):
        raise file.error(f"rope scaling {kind!r} is not supported")
    if file.get(key) is None and file.get("rope.scale_linear") is not None:
        key = "rope.scale_linear"  # its name until the middle of 2023
    if kind == "none" or (kind == "linear" and (file.get(key) or 1.0) == 1.0):
        return None
    scaling = {"rope_type": kind, "factor": file.number(key)}
    if original:
        scaling["original_max_position_embeddings"] = original
    if kind == "yarn":
        scaling |= _yarn(file, scaling["factor"])
    return scaling


def _yarn(file: GgufFile, factor: float) -> dict[str, float]:
    """The ramp, and the factor of cos and sin: the converter writes that of config.json as
    yarn_attn_factor; llama.cpp multiplies its default by attn_factor.
    """
    keys = {
        name: file.number(f"rope.scaling.yarn_{name}")
        for name in ("beta_fast", "beta_slow")
        if file.get(f"rope.scaling.yarn_{name}") is not None
    }
    if file.get("rope.scaling.yarn_attn_factor") is not None:
        keys["attention_factor"] = file.number("rope.scaling.yarn_attn_factor")
    elif file.get("rope.scaling.attn_factor") is not None:
        default = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
        keys["attention_factor"] = file.number("rope.scaling.attn_factor") * default
    return keys


def _longrope(file: GgufFile, original: int | None) -> dict[str, Any]:
    scaling: dict[str, Any] = {
        "rope_type": "longrope",
        "long_factor": _factors(file, _LONG_FACTORS),
        "short_factor": _factors(file, _SHORT_FACTORS),
    }
    if original:
        scaling["original_max_position_embeddings"] = original
    if file.get("rope.scaling.attn_factor") is not None:
        scaling["attention_factor"] = file.number("rope.scaling.attn_factor")
    return scaling


def _factors(file: GgufFile, name: str) -> list[float]:
    if name not in file.tensors:
        raise file.error(f"no tensor {name}; is the file complete?")
    return [shortest(float(x)) for x in np.asarray(file.tensors[name].data, np.float32).reshape(-1)]


def _llama3(file: GgufFile, config: dict[str, Any], original: int) -> dict[str, Any]:
    """Llama 3's parameters from the per-frequency divisors that llama.cpp stores instead.

    Raises:
        ConfigError: the divisors are not those of the published parameters (1, 4) for any factor.
    """
    divisors = np.asarray(file.tensors[_DIVISORS].data, np.float64).reshape(-1)
    low, high, factor = 1.0, 4.0, float(divisors.max())
    dim = config["head_dim"]
    wavelengths = 2 * np.pi * config["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    if divisors.shape != smooth.shape or not np.allclose(
        divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3
    ):
        raise file.error(f"{_DIVISORS} does not follow llama3's rule; not supported")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
