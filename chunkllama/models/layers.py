"""Weights of a Llama as plain tensors, fused where one product does the work of several."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import linear


@dataclass(slots=True)
class Linear:
    """y = x W^T + b: weight [out, in], bias [out] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


@dataclass(slots=True)
class LayerWeights:
    """One decoder layer.

    ``qkv`` stacks the query, key and value heads [(Hq + 2 Hkv) D, H], ``gate_up`` the gate and the
    up projection [2 I, H].
    """

    input_norm: torch.Tensor
    qkv: Linear
    output: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear


@dataclass(slots=True)
class LlamaWeights:
    """A whole model; with tied embeddings ``lm_head`` is the embedding matrix itself."""

    embedding: torch.Tensor
    layers: list[LayerWeights]
    norm: torch.Tensor
    lm_head: torch.Tensor
