"""The forward pass of the Llama family (arXiv 2302.13971, 2407.21783), driven by its spec."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import embedding

from chunkllama.backends.adapter import AdapterRows, AdapterWeights, LinearName
from chunkllama.backends.base import DevicePlan, KVCache
from chunkllama.backends.model import LayerWeights, ModelWeights
from chunkllama.errors import ConfigError
from chunkllama.model_spec import LayerSpec, ModelSpec
from chunkllama.models.attention import Attention
from chunkllama.models.shard import AllReduce


class Llama:
    """A decoder-only transformer: RMSNorm, rotary grouped-query attention, an MLP.

    Implements ``PlainModel``: every op goes to the backend of ``attention``.

    Args:
        spec: its numbers.
        weights: on the device of ``attention.backend``, in the dtype to compute in.
        attention: plans, the chunk pool and the backend.
        rotary: see ``rotary_tables``.
        all_reduce: where ``spec`` and ``weights`` are one rank's part of a model: adds up over the
            ranks what its projections out of heads and out of the MLP give.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: ModelWeights,
        attention: Attention,
        rotary: tuple[torch.Tensor, ...],
        all_reduce: AllReduce | None = None,
    ) -> None:
        self.spec = spec
        self.weights = weights
        self.attention = attention
        self.rotary = rotary
        self.all_reduce = all_reduce
        self._adapters: Sequence[AdapterRows] = ()  # of the step in progress

    @property
    def kv(self) -> KVCache:
        """The chunk pool."""
        return self.attention.kv

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        plan: DevicePlan,
        adapters: Sequence[AdapterRows] = (),
    ) -> torch.Tensor:
        """Return the normalised final hidden states [T, H]."""
        self._adapters = adapters
        x = self._embed(token_ids)
        residual: torch.Tensor | None = None
        for index, layer in enumerate(self.weights.layers):
            spec = self.spec.layer(index)
            x, residual = self._norm(x, layer.input_norm, residual)
            x = self._attend(x, index, spec, layer, positions, plan)
            x = self._branch_output(x, layer.attention_output_norm)
            x, residual = self._norm(x, layer.mlp_norm, residual)
            x = self._mlp(x, index, spec, layer)
            x = self._branch_output(x, layer.mlp_output_norm)
        x, _ = self._norm(x, self.weights.norm, residual)
        return x

    def prepare_adapter(self, weights: AdapterWeights) -> tuple[AdapterWeights, int]:
        """Return the adapter in the type of the activations, and its bytes.

        Raises:
            ConfigError: the rows of a step are to be independent, which torch's products are not.
        """
        if self.attention.backend.arithmetic:
            raise ConfigError(
                f"deterministic: {self.spec.architecture} takes no adapters with it; leave it out"
            )
        dtype = self.attention.backend.activation_dtype(self.weights.embedding.dtype)
        prepared = weights.to(dtype)
        return prepared, prepared.num_bytes

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [N, H] -> [N, vocab_size] float32."""
        logits = self.attention.backend.logits(hidden, self.weights.lm_head)
        if self.spec.logit_multiplier != 1.0:
            logits = logits * self.spec.logit_multiplier
        if (softcap := self.spec.logit_softcap) is not None:
            logits = softcap * self.attention.backend.map_rows(torch.tanh, logits / softcap)
        return logits

    def best_tokens(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the largest logit [N] of hidden [N, H] and its token [N]."""
        values, tokens = self.logits(hidden).max(dim=1)
        return values, tokens

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        weight = self.weights.embedding
        x = embedding(token_ids, weight)
        if self.spec.embedding_multiplier != 1.0:
            # In the weights' own dtype, as the model was trained.
            x = x * torch.tensor(self.spec.embedding_multiplier, dtype=weight.dtype)
        return x.to(self.attention.backend.activation_dtype(weight.dtype))

    def _norm(
        self, x: torch.Tensor, weight: torch.Tensor | None, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add x to the residual stream: (what enters the next block, the sum)."""
        if weight is None:
            total = x if residual is None else residual + x
            return total, total
        return self.attention.backend.rms_norm(x, weight, self.spec.rms_norm_eps, residual)

    def _branch_output(self, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """What attention or MLP adds to the residual stream."""
        if weight is not None:
            x, _ = self.attention.backend.rms_norm(x, weight, self.spec.rms_norm_eps)
        if self.spec.residual_multiplier != 1.0:
            x = x * self.spec.residual_multiplier
        return x

    def _attend(
        self,
        x: torch.Tensor,
        index: int,
        spec: LayerSpec,
        layer: LayerWeights,
        positions: torch.Tensor,
        plan: DevicePlan,
    ) -> torch.Tensor:
        ops = self.attention.backend
        qkv = self._linear(x, index, "qkv", layer)
        cos_sin = self.rotary[-1 if spec.rope is None else spec.rope]
        if spec.norm_after_rotation:
            qkv = ops.rotate(qkv, positions, cos_sin, self.kv)
            cos_sin = self.rotary[-1]  # nothing is left to rotate
        if layer.q_norm is not None and layer.k_norm is not None:
            qkv = self._normalise_heads(qkv, layer.q_norm, layer.k_norm)
        x = self.attention.forward(qkv, positions, cos_sin, index, plan)
        return self._linear(x, index, "output", layer)

    def _normalise_heads(
        self, qkv: torch.Tensor, q_norm: torch.Tensor, k_norm: torch.Tensor
    ) -> torch.Tensor:
        """Normalise q and k, in groups as long as the norms' weights."""
        head_dim, eps = self.spec.head_dim, self.spec.rms_norm_eps
        kv_size = self.spec.num_kv_heads * head_dim
        parts = torch.split(qkv, [self.spec.num_qo_heads * head_dim, kv_size, kv_size], dim=1)
        normed = []
        for part, weight in zip(parts, (q_norm, k_norm), strict=False):
            rows = part.reshape(-1, len(weight)).contiguous()
            y, _ = self.attention.backend.rms_norm(rows, weight, eps)
            normed.append(y.view(part.shape))
        return torch.cat((*normed, parts[2]), dim=1)

    def _mlp(
        self, x: torch.Tensor, index: int, spec: LayerSpec, layer: LayerWeights
    ) -> torch.Tensor:
        x = self._linear(x, index, "gate_up", layer)
        x = self.attention.backend.activate(x, spec.activation, gated=spec.gated)
        return self._linear(x, index, "down", layer)

    def _linear(
        self, x: torch.Tensor, index: int, name: LinearName, layer: LayerWeights
    ) -> torch.Tensor:
        """One linear layer, with what the adapters of the step's rows add to it."""
        y = self.attention.backend.linear(x, getattr(layer, name))
        if self.all_reduce is not None and name in ("output", "down"):
            y = self.all_reduce(y)
        for rows in self._adapters:
            assert isinstance(rows.adapter, AdapterWeights)
            if added := rows.adapter.layers[index].get(name):
                added.add_to(y[rows.begin : rows.end], x[rows.begin : rows.end])
        return y
