"""Rotary embedding (Su et al. 2021, section 3.4.2) of q and k, and the append of k and v to the
chunk pool.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from chunkllama.attention.plan_format import AttentionPlan
from chunkllama.backends.base import LayerRows
from chunkllama.backends.elementwise import rotate_heads
from chunkllama.backends.int8_kv import mix_heads, quantize_kv


@dataclass(frozen=True, slots=True)
class AppendTables:
    """Where each row's K/V go: chunk ``chunk_ids[offset + (position - first_position) /
    chunk_size]``.
    """

    chunk_ids: torch.Tensor  # [C] int64
    offset: torch.Tensor  # [R] int64
    first_position: torch.Tensor  # [R] int64

    @classmethod
    def of(cls, plan: AttentionPlan, device: torch.device) -> AppendTables:
        row_tail = torch.as_tensor(plan.row_tail[: plan.num_rows], device=device).long()
        chunk_ids = torch.as_tensor(plan.chunk_ids, device=device).long()
        return cls(chunk_ids, row_tail[:, 0], row_tail[:, 1])


def rope_append_reference(
    qkv: torch.Tensor, cos_sin: torch.Tensor, rows: LayerRows
) -> torch.Tensor:
    """Implement ``Backend.rope_append``; float32 inside."""
    kv, tables = rows.kv, rows.plan.state.append
    num_rows = len(tables.offset)
    heads = qkv.view(num_rows, -1, kv.head_dim)
    num_qo_heads = heads.shape[1] - 2 * kv.num_kv_heads
    positions = rows.positions.long()

    rotating = num_qo_heads + kv.num_kv_heads
    rotated = rotate_heads(heads[:, :rotating], positions, cos_sin)

    slot = positions % kv.chunk_size
    entry = tables.offset + (positions - tables.first_position) // kv.chunk_size
    chunk = tables.chunk_ids[entry]
    pool = kv.layers[rows.layer]
    q, k, v = rotated[:, :num_qo_heads], rotated[:, num_qo_heads:], heads[:, rotating:]
    if kv.is_int8:
        q, k, v = mix_heads(q), quantize_kv(mix_heads(k)), quantize_kv(v)
    pool[chunk, 0, :, slot] = k.to(pool.dtype)
    pool[chunk, 1, :, slot] = v.to(pool.dtype)
    return q.contiguous()
