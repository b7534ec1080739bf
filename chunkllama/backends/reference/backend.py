"""The torch backend: readable, float32 inside, on any device; the oracle of the native ones and the
fallback.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from chunkllama.attention.plan_format import AttentionPlan, Packing
from chunkllama.backends.base import Backend, CopyTriple, DevicePlan, KVCache, LayerRows
from chunkllama.backends.reference.copy_chunks import copy_chunks_reference
from chunkllama.backends.reference.rms_norm import rms_norm_reference
from chunkllama.backends.reference.rope_append import AppendTables, rope_append_reference
from chunkllama.backends.reference.silu_and_mul import silu_and_mul_reference
from chunkllama.backends.reference.tpp_attention import AttentionTables, tpp_attention_reference


@dataclass(frozen=True, slots=True)
class ReferencePlan:
    """What ``upload_plan`` precomputes: the gathers of every layer."""

    append: AppendTables
    attention: AttentionTables


class ReferenceBackend(Backend):
    """Implement ``Backend`` in torch.

    K/V layout per layer: [num_chunks, 2, num_kv_heads, chunk_size, row_elements].
    """

    name = "reference"
    chunk_sizes = (16, 32, 64, 128)

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def packing(self, *, num_qo_heads: int, num_kv_heads: int, head_dim: int) -> Packing:
        """Runs are never split: a batched call has parallelism enough. Single rows are a tile class
        of their own.
        """
        return Packing(
            rows_per_item=64, small_rows_per_item=1, target_units=1, num_kv_heads=num_kv_heads
        )

    def upload_plan(self, plan: AttentionPlan, kv: KVCache, *, num_qo_heads: int) -> DevicePlan:
        state = ReferencePlan(
            AppendTables.of(plan, self.device), AttentionTables.of(plan, kv, num_qo_heads)
        )
        return DevicePlan(plan, torch.as_tensor(plan.buffer, device=self.device), state)

    def _rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return rms_norm_reference(x, weight, eps, residual)

    def _rope_append(
        self, qkv: torch.Tensor, cos_sin: torch.Tensor, rows: LayerRows, num_qo_heads: int
    ) -> torch.Tensor:
        return rope_append_reference(qkv, cos_sin, rows)

    def _tpp_attention(
        self, q: torch.Tensor, rows: LayerRows, scale: float, softcap: float | None
    ) -> torch.Tensor:
        return tpp_attention_reference(q, rows, scale, softcap)

    def _silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return silu_and_mul_reference(gate_up)

    def _copy_chunks(self, kv: KVCache, triples: list[CopyTriple]) -> None:
        copy_chunks_reference(kv, triples)
