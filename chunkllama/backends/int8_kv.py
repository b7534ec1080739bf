"""K/V in 8 bits: each head of each token has a scale of its own, so that a token is stored once, by
the step that computes it, and never changed when others join its chunk.

The scale is the largest magnitude divided by 127, rounded to bfloat16; a code is a value divided by
the scale and rounded to the nearest integer. Keys, and queries with them, are mixed first: some
dimensions are large in every key, and would leave the others few codes.
``kernels/cpu/elementwise.cpp`` does the same.
"""

from __future__ import annotations

import math

import torch

from chunkllama.model_spec import KV_SCALE_BYTES


def mix_heads(x: torch.Tensor) -> torch.Tensor:
    """Multiply blocks of the last dimension [..., D], as long as the largest power of two that
    divides D, by an orthonormal Hadamard matrix (QuaRot, arXiv 2404.00456, section 4.2): products
    of mixed queries and keys are those of the queries and keys. In float32 inside.
    """
    block = x.shape[-1] & -x.shape[-1]
    matrix = torch.ones(1, 1, device=x.device)
    while len(matrix) < block:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    mixed = x.float().reshape(*x.shape[:-1], -1, block) @ (matrix / math.sqrt(block))
    return mixed.reshape(x.shape).to(x.dtype)


def quantize_kv(x: torch.Tensor) -> torch.Tensor:
    """[..., D] floats -> [..., D + 2] int8: codes, then the bytes of their bfloat16 scale.

    Values that are not all finite get a scale of NaN; values too small for a scale become zero.
    """
    x = x.float()
    scale = (x.abs().amax(dim=-1, keepdim=True) / 127).bfloat16()
    is_tiny = scale.float() < torch.finfo(torch.float32).tiny
    is_finite = x.isfinite().all(dim=-1, keepdim=True)
    factor = torch.where(is_tiny, 0.0, scale.float().reciprocal())
    codes = torch.where(is_finite, (x * factor).round(), 0.0).to(torch.int8)
    scale = torch.where(is_finite, torch.where(is_tiny, 0.0, scale), torch.nan).bfloat16()
    return torch.cat((codes, scale.view(torch.int8)), dim=-1)


def dequantize_kv(stored: torch.Tensor) -> torch.Tensor:
    """Return the float32 values [..., D] of what ``quantize_kv`` returns."""
    scale = stored[..., -KV_SCALE_BYTES:].clone(memory_format=torch.contiguous_format)
    return stored[..., :-KV_SCALE_BYTES].float() * scale.view(torch.bfloat16).float()
