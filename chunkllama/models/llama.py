"""Llama (arXiv 2302.13971, 2407.21783): the architecture and nothing else."""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn.functional import embedding, linear

from chunkllama.backends.base import DevicePlan
from chunkllama.models.attention import Attention
from chunkllama.models.config import ModelSpec
from chunkllama.models.layers import LlamaWeights

_HEAD_ROWS = 4096


class RunnableModel(Protocol):
    """What a model runner needs of a model.

    An backend may offer ``prepare_model(model, weights=...) -> RunnableModel``: the same model with
    its weights packed and its layers fused as the device likes them.
    """

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, plan: DevicePlan
    ) -> torch.Tensor:
        """token_ids [T] int64 and positions [T] int32 -> final hidden states [T, H], normalised."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [N, H] -> [N, vocab_size] float32."""
        ...

    def best_tokens(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The largest logit [N] of hidden [N, H] and its token [N]; NaN where a logit is NaN."""
        ...


class Llama:
    """A decoder-only transformer: RMSNorm, rotary grouped-query attention, SwiGLU.

    Args:
        spec: its numbers.
        weights: on the device of ``attention.backend``, in the dtype to compute in.
        attention: plans, the chunk pool and the backend.
        cos_sin: [max_position, D] float32, see ``rotary_table``.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: LlamaWeights,
        attention: Attention,
        cos_sin: torch.Tensor,
    ) -> None:
        self.spec = spec
        self.weights = weights
        self.attention = attention
        self.cos_sin = cos_sin

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, plan: DevicePlan
    ) -> torch.Tensor:
        ops, eps = self.attention.backend, self.spec.rms_norm_eps
        x = embedding(token_ids, self.weights.embedding)
        residual: torch.Tensor | None = None
        for index, layer in enumerate(self.weights.layers):
            x, residual = ops.rms_norm(x, layer.input_norm, eps, residual)
            x = self.attention.forward(layer.qkv(x), positions, self.cos_sin, index, plan)
            x = layer.output(x)
            x, residual = ops.rms_norm(x, layer.mlp_norm, eps, residual)
            x = layer.down(ops.silu_and_mul(layer.gate_up(x)))
        x, _ = ops.rms_norm(x, self.weights.norm, eps, residual)
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        head = self.weights.lm_head
        if hidden.dtype == torch.float32:
            return linear(hidden, head)
        if hidden.is_cuda:
            return torch.mm(hidden, head.t(), out_dtype=torch.float32)
        # A CPU's bfloat16 product rounds its result (between 16 and 32 to eighths): tokens tie.
        # Widened a block at a time, the head needs no second copy.
        wide = hidden.float()
        blocks = (head[row : row + _HEAD_ROWS] for row in range(0, len(head), _HEAD_ROWS))
        return torch.cat([linear(wide, block.float()) for block in blocks], dim=1)

    def best_tokens(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, tokens = self.logits(hidden).max(dim=1)
        return values, tokens
