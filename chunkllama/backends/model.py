"""What a backend knows of a model: its weights, and the two interfaces around ``Backend.fuse``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from chunkllama.backends.adapter import AdapterRows, AdapterWeights, PreparedAdapter
from chunkllama.model_spec import ModelSpec

if TYPE_CHECKING:
    from chunkllama.backends.base import DevicePlan, KVCache
    from chunkllama.backends.quantized import WeightRows


@dataclass(slots=True)
class Linear:
    """y = x W^T + b: weight [out, in], bias [out] or None; ``Backend.linear`` computes it.

    A backend may replace it with a subclass that holds the weight in its own order.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(slots=True)
class LayerWeights:
    """One decoder layer; a norm that the layer's specification lacks is None.

    ``qkv`` stacks the query, key and value heads [(Hq + 2 Hkv) D, H]; ``gate_up`` the gate and the
    up projection [2 I, H], or is the up projection [I, H] of an MLP without a gate.
    """

    input_norm: torch.Tensor | None
    qkv: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    output: Linear
    attention_output_norm: torch.Tensor | None
    mlp_norm: torch.Tensor | None
    gate_up: Linear
    down: Linear
    mlp_output_norm: torch.Tensor | None


@dataclass(slots=True)
class ModelWeights:
    """A whole model; with tied embeddings ``lm_head.weight`` is the embedding matrix itself.

    Attributes:
        embedding: its dtype is the model's; empty where ``embedding_rows`` holds the matrix.
        embedding_rows: the quantized embedding matrix, which a tied head has as its only part.
    """

    embedding: torch.Tensor
    layers: list[LayerWeights]
    norm: torch.Tensor
    lm_head: Linear
    embedding_rows: WeightRows | None = None

    @property
    def is_tied(self) -> bool:
        if self.embedding_rows is not None:
            return getattr(self.lm_head, "parts", ()) == (self.embedding_rows,)
        return self.lm_head.weight is self.embedding


class RunnableModel(Protocol):
    """What a model runner needs of a model."""

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        plan: DevicePlan,
        adapters: Sequence[AdapterRows] = (),
    ) -> torch.Tensor:
        """token_ids and positions [T] int32 -> final hidden states [T, H], normalised.

        Rows that ``adapters``, ascending and disjoint, do not name are the model's own.
        """
        ...

    def prepare_adapter(self, weights: AdapterWeights) -> tuple[PreparedAdapter, int]:
        """Return what ``AdapterRows`` needs of an adapter, and the bytes it takes.

        Threads other than that of ``forward`` may call it.

        Raises:
            ConfigError: the model takes no adapters.
        """
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [N, H] -> [N, vocab_size] float32."""
        ...

    def best_tokens(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The largest logit [N] of hidden [N, H] and its token [N]; NaN where a logit is NaN."""
        ...


class PlainModel(RunnableModel, Protocol):
    """A model that runs op by op, with everything a backend needs to fuse it.

    Attributes:
        rotary: per entry of ``spec.ropes``, and last one that does not rotate: [max_position, D]
            float32, cos of the D / 2 frequencies, then sin.
        all_reduce: adds up over ranks, where the model is one rank's part of another one: it has to
            run op by op.
    """

    spec: ModelSpec
    weights: ModelWeights
    rotary: tuple[torch.Tensor, ...]
    all_reduce: Callable[[torch.Tensor], torch.Tensor] | None

    @property
    def kv(self) -> KVCache: ...
