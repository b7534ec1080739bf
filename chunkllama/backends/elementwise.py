"""What torch computes element by element, for backends and for fine-tuning."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from chunkllama.model_spec import Activation


def rotate_heads(
    heads: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor
) -> torch.Tensor:
    """Rotate heads [T, N, D] to positions [T], in float32; cos_sin as in ``rope_append``."""
    cos, sin = cos_sin[positions.long()].unsqueeze(1).chunk(2, dim=-1)
    low, high = heads.float().chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(heads.dtype)


def apply_activation(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """Return activation(x)."""
    match activation:
        case "silu":
            return F.silu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "relu2":
            return F.relu(x).square()
