"""Rotary position embedding tables (RoFormer, arXiv 2104.09864), numerically as in transformers."""

from __future__ import annotations

import math

import torch

from chunkllama.models.config import RopeSpec


def rotary_table(rope: RopeSpec, head_dim: int, num_positions: int) -> torch.Tensor:
    """cos of the D/2 frequencies, then sin: [num_positions, head_dim] float32."""
    inv_freq, attention_factor = inverse_frequencies(rope, head_dim)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * inv_freq
    return torch.cat((angles.cos(), angles.sin()), dim=-1) * attention_factor


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> tuple[torch.Tensor, float]:
    """([D/2] float32, factor on cos and sin)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inv_freq = 1.0 / rope.theta**exponents
    match rope.type:
        case "default":
            return inv_freq, 1.0
        case "linear":
            return inv_freq / rope.factor, 1.0
        case "llama3":
            return _llama3(rope, inv_freq), 1.0
        case "yarn":
            return _yarn(rope, head_dim), _yarn_attention_factor(rope)


def _llama3(rope: RopeSpec, inv_freq: torch.Tensor) -> torch.Tensor:
    """Long wavelengths are divided by ``factor``, short ones kept, those between interpolated."""
    low_wavelength = rope.original_max_position / rope.low_freq_factor
    high_wavelength = rope.original_max_position / rope.high_freq_factor
    wavelength = 2 * math.pi / inv_freq
    scaled = torch.where(wavelength > low_wavelength, inv_freq / rope.factor, inv_freq)
    smooth = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    smoothed = (1 - smooth) * scaled / rope.factor + smooth * scaled
    between = ~(wavelength < high_wavelength) & ~(wavelength > low_wavelength)
    return torch.where(between, smoothed, scaled)


def _yarn(rope: RopeSpec, head_dim: int) -> torch.Tensor:
    """YaRN's "NTK by parts" (arXiv 2309.00071, section 3.2)."""

    def dimension_of(rotations: float) -> float:
        ratio = rope.original_max_position / (rotations * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a ramp needs a width
    positions = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    extrapolation, interpolation = 1.0 / positions, 1.0 / (rope.factor * positions)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)
    keep = 1 - ramp.clamp(0, 1)
    return interpolation * (1 - keep) + extrapolation * keep


def _yarn_attention_factor(rope: RopeSpec) -> float:
    """The temperature of attention folded into cos and sin (arXiv 2309.00071, section 3.4)."""
    if rope.attention_factor is not None:
        return rope.attention_factor

    def mscale(scale: float, weight: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.factor, rope.mscale) / mscale(rope.factor, rope.mscale_all_dim)
    return mscale(rope.factor)
