"""One rank's part of a model: tensor parallelism as in Megatron-LM (arXiv 1909.08053).

Each rank has some of the heads and some of the MLP's columns: the rows of the projections into
them, and the columns of those out of them, whose results are added up over the ranks. The
embedding, the norms and the head are whole on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from chunkllama.backends.model import LayerWeights, Linear
from chunkllama.model_spec import LayerSpec, ModelSpec

AllReduce = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of a model a rank has.

    Args:
        rank: of ``size``, from 0 on.
        all_reduce: returns the sum of a tensor over the ranks; all of them call it alike.
    """

    rank: int
    size: int
    all_reduce: AllReduce

    def spec(self, whole: ModelSpec) -> ModelSpec:
        """The numbers of a rank's part; every one of them divides by the number of ranks."""
        return replace(
            whole,
            num_qo_heads=whole.num_qo_heads // self.size,
            num_kv_heads=whole.num_kv_heads // self.size,
            intermediate_size=whole.intermediate_size // self.size,
        )

    def layer(self, layer: LayerWeights, whole: ModelSpec, spec: LayerSpec) -> LayerWeights:
        """A rank's part of a layer of floats; the norms of heads are those of one head."""
        head_dim, inner = whole.head_dim, whole.intermediate_size
        q_size, kv_size = whole.num_qo_heads * head_dim, whole.num_kv_heads * head_dim
        return replace(
            layer,
            qkv=self._rows(layer.qkv, (q_size, kv_size, kv_size)),
            output=self._columns(layer.output),
            gate_up=self._rows(layer.gate_up, (inner, inner) if spec.gated else (inner,)),
            down=self._columns(layer.down),
        )

    def _rows(self, linear: Linear, sizes: Sequence[int]) -> Linear:
        """This rank's rows of each of the stacked matrices."""

        def own(tensor: torch.Tensor) -> torch.Tensor:
            parts = torch.split(tensor, list(sizes))
            return torch.cat([part.chunk(self.size)[self.rank] for part in parts])

        return Linear(own(linear.weight), None if linear.bias is None else own(linear.bias))

    def _columns(self, linear: Linear) -> Linear:
        """This rank's columns; the first rank alone adds the bias."""
        weight = linear.weight.chunk(self.size, dim=1)[self.rank].contiguous()
        return Linear(weight, linear.bias if self.rank == 0 else None)
