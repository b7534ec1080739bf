"""RMSNorm with a fused residual add (Zhang & Sennrich 2019, equation 4)."""

from __future__ import annotations

import torch


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, H] (+ residual) -> (weight * x / rms(x), the sum); the norm in float32, rounded once,
    both in x's dtype.
    """
    if residual is not None:
        x = x + residual
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * weight.float()).to(x.dtype), x
