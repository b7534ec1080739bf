"""RMSNorm with a fused residual add (Zhang & Sennrich 2019, equation 4)."""

from __future__ import annotations

import torch


def check_rms_norm(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None) -> None:
    """Raise ValueError unless x [T, H], weight [H] and residual [T, H] fit together."""
    if x.dim() != 2 or weight.shape != x.shape[1:]:
        raise ValueError(f"rms_norm: x {tuple(x.shape)} does not fit weight {tuple(weight.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"rms_norm: residual {tuple(residual.shape)} differs from x {tuple(x.shape)}"
        )


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, H] (+ residual) -> (weight * x / rms(x), the sum); the norm in float32, both in x's
    dtype.
    """
    check_rms_norm(x, weight, residual)
    if residual is not None:
        x = x + residual
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight, x
