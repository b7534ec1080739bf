"""Canonical K/V of a chunk to the order of ``kernels/cpu/layout.h`` and back."""

from __future__ import annotations

import torch

_BLOCK = 16  # tokens of a block of K
_PADDED = 32  # bf16: dimensions of K are rounded up to a multiple of it


def arrange(chunk: torch.Tensor) -> torch.Tensor:
    """[layers, 2, H, C, D] float32 or bfloat16, K then V -> [layers, elements of a chunk]."""
    layers, _, heads, tokens, dim = chunk.shape
    k, v = chunk[:, 0], chunk[:, 1]
    if chunk.dtype == torch.float32:
        k = k.reshape(layers, heads, tokens // _BLOCK, _BLOCK, dim).transpose(3, 4)
        return torch.cat((k.reshape(layers, -1), v.reshape(layers, -1)), dim=1)
    k = torch.nn.functional.pad(k, (0, -dim % _PADDED))
    # Pairs of dimensions move together: one 32-bit word each.
    pairs = k.contiguous().view(torch.int32)
    pairs = pairs.view(layers, heads, tokens // _BLOCK, _BLOCK, -1).transpose(3, 4)
    k = pairs.reshape(layers, -1).view(chunk.dtype)
    v = v.reshape(layers, heads, tokens // 2, 2, dim).transpose(3, 4)
    return torch.cat((k, v.reshape(layers, -1)), dim=1)


def restore(chunk: torch.Tensor, heads: int, tokens: int, dim: int) -> torch.Tensor:
    """Undo ``arrange``."""
    layers = len(chunk)
    v_size = heads * tokens * dim
    k, v = chunk[:, :-v_size], chunk[:, -v_size:]
    if chunk.dtype == torch.float32:
        k = k.reshape(layers, heads, tokens // _BLOCK, dim, _BLOCK).transpose(3, 4)
        v = v.reshape(layers, heads, tokens, dim)
    else:
        pairs = k.contiguous().view(torch.int32)
        pairs = pairs.view(layers, heads, tokens // _BLOCK, -1, _BLOCK).transpose(3, 4)
        k = pairs.contiguous().view(chunk.dtype)[..., :dim]
        v = v.reshape(layers, heads, tokens // 2, dim, 2).transpose(3, 4)
    shape = (layers, heads, tokens, dim)
    return torch.stack((k.reshape(shape), v.reshape(shape)), dim=1)
