"""Rotary position embedding tables (RoFormer, arXiv 2104.09864), numerically as in transformers."""

from __future__ import annotations

import math

import torch

from chunkllama.model_spec import ModelSpec, RopeSpec


def rotary_tables(spec: ModelSpec, num_positions: int) -> tuple[torch.Tensor, ...]:
    """A table for each of ``spec.ropes``, and a last one that does not rotate, for layers without
    rotation and those that are rotated before.
    """
    tables = [rotary_table(rope, spec.head_dim, num_positions) for rope in spec.ropes]
    if any(layer.rope is None or layer.norm_after_rotation for layer in spec.layers):
        half = torch.ones(num_positions, spec.head_dim // 2)
        tables.append(torch.cat((half, torch.zeros_like(half)), dim=-1))
    return tuple(tables)


def rotary_table(rope: RopeSpec, head_dim: int, num_positions: int) -> torch.Tensor:
    """cos of the D/2 frequencies, then sin: [num_positions, head_dim] float32.

    Dimensions beyond ``rope.rotary_dim`` get the angle 0, which leaves them as they are.
    """
    inv_freq, attention_factor = inverse_frequencies(
        rope, rope.rotary_dim or head_dim, num_positions
    )
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * inv_freq
    cos, sin = angles.cos() * attention_factor, angles.sin() * attention_factor
    still = head_dim // 2 - len(inv_freq)
    if still:
        cos = torch.nn.functional.pad(cos, (0, still), value=1.0)
        sin = torch.nn.functional.pad(sin, (0, still))
    return torch.cat((cos, sin), dim=-1)


def head_order(rope: RopeSpec, head_dim: int) -> list[int] | None:
    """Which dimension of a q or k head goes where, so that all pairs are (i, i + D / 2) and those
    that do not rotate come last in each half; None: they already lie so.

    Scores are sums over the dimensions of a head, so that q and k may be reordered alike.
    """
    rotary_dim = rope.rotary_dim or head_dim
    if rotary_dim == head_dim and not rope.interleaved:
        return None
    half, rest = rotary_dim // 2, (head_dim - rotary_dim) // 2
    if rope.interleaved:
        low, high = range(0, rotary_dim, 2), range(1, rotary_dim, 2)
    else:
        low, high = range(half), range(half, rotary_dim)
    middle = rotary_dim + rest
    return [*low, *range(rotary_dim, middle), *high, *range(middle, head_dim)]


def inverse_frequencies(
    rope: RopeSpec, rotary_dim: int, num_positions: int
) -> tuple[torch.Tensor, float]:
    """([rotary_dim / 2] float32, factor on cos and sin)."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    inv_freq = 1.0 / rope.theta**exponents
    match rope.type:
        case "default":
            return inv_freq, 1.0
        case "dynamic":
            return _dynamic(rope, rotary_dim, num_positions), 1.0
        case "linear":
            return inv_freq / rope.factor, 1.0
        case "llama3":
            return _llama3(rope, inv_freq), 1.0
        case "yarn":
            return _yarn(rope, rotary_dim), _yarn_attention_factor(rope)
        case "longrope":
            return _longrope(rope, exponents, num_positions), _longrope_attention_factor(rope)


def _dynamic(rope: RopeSpec, rotary_dim: int, num_positions: int) -> torch.Tensor:
    """Dynamic NTK scaling with the base of the longest sequence, for all positions alike: cached
    keys cannot be rotated again when a sequence grows.
    """
    original = rope.original_max_position
    stretch = rope.factor * max(num_positions, original) / original - (rope.factor - 1)
    base = rope.theta * math.pow(stretch, rotary_dim / max(rotary_dim - 2, 1))
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    return torch.reciprocal(torch.pow(base, exponents))


def _longrope(rope: RopeSpec, exponents: torch.Tensor, num_positions: int) -> torch.Tensor:
    """LongRoPE (arXiv 2402.13753): the long factors if sequences may exceed the original length."""
    is_long = num_positions > rope.original_max_position
    factors = torch.tensor(rope.long_factor if is_long else rope.short_factor)
    return torch.reciprocal(factors * torch.pow(rope.theta, exponents))


def _longrope_attention_factor(rope: RopeSpec) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.factor <= 1.0:
        return 1.0
    return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position))


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
