"""A frozen model with an adapter, in float32 and with gradients of the adapter alone.

The same numbers as ``models/llama.py``, on whole sequences instead of the chunk pool. One layer at
a time is held in float32; the others stay in the checkpoint's type.
"""

from __future__ import annotations

from dataclasses import fields

import torch
import torch.nn.functional as F

from chunkllama.backends.elementwise import apply_activation, rotate_heads
from chunkllama.backends.model import LayerWeights, Linear, ModelWeights
from chunkllama.backends.reference.rms_norm import rms_norm_reference
from chunkllama.model_spec import ModelSpec
from chunkllama.tuning.lora import Lora, adapted_linear


class TunedLayer:
    """One layer; its methods can be differentiated by their inputs and by the adapter.

    Args:
        weights: of layer ``index``, in float32.
        rotary: see ``rotary_tables``.
    """

    def __init__(
        self,
        spec: ModelSpec,
        index: int,
        weights: LayerWeights,
        lora: Lora,
        rotary: tuple[torch.Tensor, ...],
    ) -> None:
        self._spec = spec
        self._layer = spec.layer(index)
        self._weights = weights
        self._parts = lora.layers[index]
        self._scale = lora.scale
        self._cos_sin = None if self._layer.rope is None else rotary[self._layer.rope]

    def keys_values(self, x: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of tokens: x [T, H] of the residual stream -> two of [T, Hkv, D].

        Args:
            first: position of the first row.
        """
        spec = self._spec
        begin, size = spec.num_qo_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        h = self._norm(x, self._weights.input_norm)
        kv = adapted_linear(
            h, self._weights.qkv, self._parts["qkv"], self._scale, begin, begin + 2 * size
        )
        k, v = torch.split(kv, size, dim=1)
        return self._position(k, self._weights.k_norm, first), v.view(len(x), -1, spec.head_dim)

    def output(
        self, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: int
    ) -> torch.Tensor:
        """The residual stream behind the layer: x [T, H] -> [T, H].

        Args:
            keys, values: [first + T, Hkv, D] of these tokens and all before them.
            first: position of the first row.
        """
        spec, weights = self._spec, self._weights
        h = self._norm(x, weights.input_norm)
        end = spec.num_qo_heads * spec.head_dim
        q = adapted_linear(h, weights.qkv, self._parts["qkv"], self._scale, 0, end)
        h = self._attend(self._position(q, weights.q_norm, first), keys, values, first)
        h = adapted_linear(h, weights.output, self._parts["output"], self._scale)
        x = x + self._branch(h, weights.attention_output_norm)
        h = self._norm(x, weights.mlp_norm)
        h = adapted_linear(h, weights.gate_up, self._parts["gate_up"], self._scale)
        h = adapted_linear(self._activate(h), weights.down, self._parts["down"], self._scale)
        return x + self._branch(h, weights.mlp_output_norm)

    def _activate(self, x: torch.Tensor) -> torch.Tensor:
        if not self._layer.gated:
            return apply_activation(x, self._layer.activation)
        gate, up = x.chunk(2, dim=1)
        return apply_activation(gate, self._layer.activation) * up

    def _norm(self, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        if weight is None:
            return x
        return rms_norm_reference(x, weight, self._spec.rms_norm_eps, None)[0]

    def _branch(self, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        return self._norm(x, weight) * self._spec.residual_multiplier

    def _position(self, rows: torch.Tensor, norm: torch.Tensor | None, first: int) -> torch.Tensor:
        """Rotate and normalise q or k: [T, N D] -> [T, N, D]."""
        positions = torch.arange(first, first + len(rows), device=rows.device)

        def rotated(heads: torch.Tensor) -> torch.Tensor:
            return heads if self._cos_sin is None else rotate_heads(heads, positions, self._cos_sin)

        def normed(heads: torch.Tensor) -> torch.Tensor:
            if norm is None:
                return heads
            return self._norm(heads.reshape(-1, len(norm)), norm).view(heads.shape)

        heads = rows.view(len(rows), -1, self._spec.head_dim)
        if self._layer.norm_after_rotation:
            return normed(rotated(heads))
        return rotated(normed(heads))

    def _attend(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: int
    ) -> torch.Tensor:
        """Causal attention: q [T, Hq, D] -> [T, Hq D]."""
        spec, rows = self._spec, len(q)
        q = q.view(rows, spec.num_kv_heads, -1, spec.head_dim)
        scores = torch.einsum("thgd,nhd->hgtn", q, keys) * spec.score_scale
        if (softcap := spec.attention_softcap) is not None:
            scores = softcap * torch.tanh(scores / softcap)
        row = torch.arange(first, first + rows, device=q.device)[:, None]
        column = torch.arange(len(keys), device=q.device)[None]
        hidden = column > row
        if self._layer.window is not None:
            hidden |= column <= row - self._layer.window
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        return torch.einsum("hgtn,nhd->thgd", weights, values).reshape(rows, -1)


class TunedModel:
    """A model whose adapter is trained.

    Args:
        weights: plain ones on the device of ``rotary``; the head is kept in float32 beside them.
        rotary: see ``rotary_tables``.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: ModelWeights,
        lora: Lora,
        rotary: tuple[torch.Tensor, ...],
    ) -> None:
        self.spec = spec
        self.lora = lora
        self._weights = weights
        self._rotary = rotary
        self._head = weights.lm_head.weight.float()
        self._norm = weights.norm.float()

    @property
    def device(self) -> torch.device:
        """Where it is computed."""
        return self._norm.device

    def head_rows(self, slice_tokens: int) -> int:
        """Rows of the head that cost about as much as so many tokens of a layer."""
        layer = self._weights.layers[0]
        linears = (layer.qkv, layer.output, layer.gate_up, layer.down)
        size = sum(linear.weight.numel() for linear in linears)
        return max(slice_tokens * size // self._head.numel(), 8)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids [T] int64 -> the residual stream before the first layer [T, H] float32."""
        weight = self._weights.embedding
        x = F.embedding(token_ids, weight)
        if self.spec.embedding_multiplier != 1.0:
            x = x * torch.tensor(self.spec.embedding_multiplier, dtype=weight.dtype)
        return x.float()

    def layer(self, index: int) -> TunedLayer:
        """Widen layer ``index`` to float32."""
        weights = _widened(self._weights.layers[index])
        return TunedLayer(self.spec, index, weights, self.lora, self._rotary)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """The residual stream behind the last layer [N, H] -> [N, vocab_size] float32."""
        hidden, _ = rms_norm_reference(x, self._norm, self.spec.rms_norm_eps, None)
        logits = F.linear(hidden, self._head) * self.spec.logit_multiplier
        if (softcap := self.spec.logit_softcap) is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return logits


def _widened(layer: LayerWeights) -> LayerWeights:
    def wide(value: Linear | torch.Tensor | None) -> Linear | torch.Tensor | None:
        if isinstance(value, Linear):
            bias = None if value.bias is None else value.bias.float()
            return Linear(value.weight.float(), bias)
        return None if value is None else value.float()

    widened = {item.name: wide(getattr(layer, item.name)) for item in fields(layer)}
    return LayerWeights(**widened)  # type: ignore[arg-type]
