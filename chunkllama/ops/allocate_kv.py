"""Allocation of the chunk pool's tensors."""

from __future__ import annotations

import torch

from chunkllama.ops.op_set import KVCache


def check_allocate_kv(chunk_sizes: tuple[int, ...], chunk_size: int, *counts: int) -> None:
    """Raise ValueError for a chunk size the backend lacks or a count below 1."""
    if chunk_size not in chunk_sizes:
        raise ValueError(f"chunk size {chunk_size}: this backend has {list(chunk_sizes)}")
    if min(counts) < 1:
        raise ValueError(f"allocate_kv: every count must be at least 1, got {counts}")


def allocate_kv_reference(
    *,
    num_layers: int,
    num_chunks: int,
    chunk_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> KVCache:
    """One contiguous [num_chunks, 2, num_kv_heads, chunk_size, head_dim] tensor per layer, K then
    V, unwritten.
    """
    shape = (num_chunks, 2, num_kv_heads, chunk_size, head_dim)
    layers = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
    return KVCache(layers, num_chunks, chunk_size, num_kv_heads, head_dim)
