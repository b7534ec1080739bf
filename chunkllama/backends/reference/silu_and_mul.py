"""The gate of the SwiGLU feed-forward layer (Shazeer 2020, equation 6)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def silu_and_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [T, 2 I] -> silu(gate) * up [T, I], in float32, returned in the input's dtype."""
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.silu(gate.float()) * up).to(gate_up.dtype)
