"""Argument checks of the ops: each stands here once, ``Backend`` calls them for every backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from chunkllama.backends.base import CopyTriple, KVCache


def check_rms_norm(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None) -> None:
    """Raise ValueError unless x [T, H], weight [H] and residual [T, H] fit together."""
    if x.dim() != 2 or weight.shape != x.shape[1:]:
        raise ValueError(f"rms_norm: x {tuple(x.shape)} does not fit weight {tuple(weight.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"rms_norm: residual {tuple(residual.shape)} differs from x {tuple(x.shape)}"
        )


def check_rope_append(
    qkv: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, kv: KVCache, num_rows: int
) -> int:
    """Return the number of query heads; raise ValueError unless the shapes fit together."""
    num_qo_heads = qkv.shape[-1] // kv.head_dim - 2 * kv.num_kv_heads
    width = (num_qo_heads + 2 * kv.num_kv_heads) * kv.head_dim
    if qkv.shape != (num_rows, width) or num_qo_heads < kv.num_kv_heads:
        raise ValueError(
            f"rope_append: qkv {tuple(qkv.shape)} does not fit {num_rows} rows, "
            f"{kv.num_kv_heads} kv heads of {kv.head_dim}"
        )
    if positions.shape != (num_rows,) or cos_sin.shape[1:] != (kv.head_dim,):
        raise ValueError(
            f"rope_append: positions {tuple(positions.shape)} or cos_sin {tuple(cos_sin.shape)} "
            f"do not fit {num_rows} rows of head_dim {kv.head_dim}"
        )
    return num_qo_heads


def check_tpp_attention(
    q: torch.Tensor, kv: KVCache, positions: torch.Tensor, num_rows: int
) -> None:
    """Raise ValueError unless q is [num_rows, Hq, head_dim] with Hq a multiple of the kv heads."""
    fits = q.dim() == 3 and q.shape[0] == num_rows and q.shape[2] == kv.head_dim
    if not fits or q.shape[1] % kv.num_kv_heads or positions.shape != (num_rows,):
        raise ValueError(
            f"tpp_attention: q {tuple(q.shape)}, positions {tuple(positions.shape)} do not fit "
            f"{num_rows} rows, {kv.num_kv_heads} kv heads of {kv.head_dim}"
        )


def check_silu_and_mul(gate_up: torch.Tensor) -> None:
    """Raise ValueError unless gate_up is [T, 2 I]."""
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"silu_and_mul: expected [T, 2 I], got {tuple(gate_up.shape)}")


def check_copy_chunks(kv: KVCache, triples: list[CopyTriple]) -> None:
    """Raise ValueError for a chunk outside the pool or more tokens than a chunk has."""
    for source, destination, num_tokens in triples:
        inside = 0 <= source < kv.num_chunks and 0 <= destination < kv.num_chunks
        if not inside or not 0 <= num_tokens <= kv.chunk_size:
            raise ValueError(
                f"copy_chunks: ({source}, {destination}, {num_tokens}) does not fit "
                f"{kv.num_chunks} chunks of {kv.chunk_size} tokens"
            )
