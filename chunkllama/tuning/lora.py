"""The A and B matrices of an adapter that is trained (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from chunkllama.backends.adapter import LINEARS, LinearName
from chunkllama.backends.model import Linear
from chunkllama.model_spec import ModelSpec
from chunkllama.models.loading.weights import row_order
from chunkllama.models.rotary import head_order
from chunkllama.models.tensors import layer_tensors


@dataclass(frozen=True, slots=True)
class LoraPart:
    """One module among those that are stacked in a linear layer.

    Attributes:
        name: of the module, as the checkpoint has it.
        first: of its rows in the stacked layer.
        a: [rank, in] float32, trained.
        b: [rows, rank] float32, trained, its rows in the checkpoint's order.
        order: row of ``b`` for each row of the stacked layer; None: they are in the same order.
    """

    name: str
    first: int
    a: torch.Tensor
    b: torch.Tensor
    order: torch.Tensor | None

    def rows(self, begin: int, end: int) -> torch.Tensor:
        """The part's rows of b in [begin, end) of the stacked layer; they may be none."""
        low = max(begin - self.first, 0)
        high = max(min(end - self.first, len(self.b)), low)
        return self.b[low:high] if self.order is None else self.b[self.order[low:high]]


class Lora:
    """An adapter of all linear layers.

    Args:
        seed: of A, which begins as PEFT's does: uniform in +-1/sqrt(in). B begins at zero.
    """

    def __init__(
        self, spec: ModelSpec, rank: int, alpha: float, seed: int, device: torch.device
    ) -> None:
        self.scale = alpha / rank
        heads = head_order(spec.ropes[0], spec.head_dim)
        generator = torch.Generator().manual_seed(seed)
        self.layers: list[Mapping[LinearName, tuple[LoraPart, ...]]] = []
        for index in range(spec.num_layers):
            sources = layer_tensors(spec, index)
            layer: dict[LinearName, tuple[LoraPart, ...]] = {}
            for linear in LINEARS:
                source = getattr(sources, linear)
                total = sum(rows for _, rows in source.parts)
                order = row_order(heads, total, source.rotary_heads)
                parts, first = [], 0
                for name, rows in source.parts:
                    bound = 1 / math.sqrt(source.columns)
                    a = torch.empty(rank, source.columns).uniform_(
                        -bound, bound, generator=generator
                    )
                    b = torch.zeros(rows, rank)
                    own = None
                    if order is not None:
                        own = torch.from_numpy(order[first : first + rows] - first).to(device)
                    parts.append(
                        LoraPart(
                            name,
                            first,
                            a.to(device).requires_grad_(),
                            b.to(device).requires_grad_(),
                            own,
                        )
                    )
                    first += rows
                layer[linear] = tuple(parts)
            self.layers.append(layer)

    def parameters(self) -> dict[str, torch.Tensor]:
        """The trained tensors by their names in the model: "<module>.lora_A.weight"."""
        return dict(self._named())

    def _named(self) -> Iterator[tuple[str, torch.Tensor]]:
        for layer in self.layers:
            for parts in layer.values():
                for part in parts:
                    yield f"{part.name}.lora_A.weight", part.a
                    yield f"{part.name}.lora_B.weight", part.b


def adapted_linear(
    x: torch.Tensor,
    linear: Linear,
    parts: tuple[LoraPart, ...],
    scale: float,
    begin: int = 0,
    end: int | None = None,
) -> torch.Tensor:
    """Rows [begin, end) of a linear layer with its adapter: x [T, in] -> [T, end - begin]."""
    end = len(linear.weight) if end is None else end
    bias = None if linear.bias is None else linear.bias[begin:end]
    y = F.linear(x, linear.weight[begin:end], bias)
    added = [
        F.linear(F.linear(x, part.a), rows) for part in parts if len(rows := part.rows(begin, end))
    ]
    return y + scale * torch.cat(added, dim=1)
