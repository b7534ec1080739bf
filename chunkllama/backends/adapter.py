"""Low-rank adapters (LoRA, arXiv 2106.09685): what a backend adds to the linear layers of a model.

A layer's output y = x W^T becomes y + (x A^T) (s B)^T for the rows of a step that use the adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

import torch
import torch.nn.functional as F

LinearName = Literal["qkv", "output", "gate_up", "down"]
LINEARS: Final[tuple[LinearName, ...]] = ("qkv", "output", "gate_up", "down")


@dataclass(frozen=True, slots=True)
class AdapterPart:
    """One adapted module among those that are stacked in a linear layer.

    Attributes:
        first: of its rows in the stacked layer.
        offset: of its rank in ``LinearAdapter.a``.
        b: [rows, rank], times the adapter's scale.
    """

    first: int
    offset: int
    b: torch.Tensor


@dataclass(frozen=True, slots=True)
class LinearAdapter:
    """The adapted modules of one linear layer: ``a`` [sum of ranks, in] stacks theirs."""

    a: torch.Tensor
    parts: tuple[AdapterPart, ...]

    def add_to(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add what the adapter adds to y [T, out], given x [T, in] of the same dtype."""
        inner = F.linear(x, self.a)
        for part in self.parts:
            rows, rank = part.b.shape
            columns = y[:, part.first : part.first + rows]
            columns += F.linear(inner[:, part.offset : part.offset + rank], part.b)

    def to(self, dtype: torch.dtype) -> LinearAdapter:
        """The same in another dtype."""
        parts = tuple(replace(part, b=part.b.to(dtype)) for part in self.parts)
        return LinearAdapter(self.a.to(dtype), parts)


class PreparedAdapter:
    """An adapter as the model that has prepared it reads it; others know no more of it."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class AdapterWeights(PreparedAdapter):
    """An adapter on the model's device: per layer, what it adds to which linear layers."""

    layers: tuple[Mapping[LinearName, LinearAdapter], ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(
            tensor.numel() * tensor.element_size()
            for layer in self.layers
            for linear in layer.values()
            for tensor in (linear.a, *(part.b for part in linear.parts))
        )

    def to(self, dtype: torch.dtype) -> AdapterWeights:
        """The same in another dtype."""
        return AdapterWeights(
            tuple({name: each.to(dtype) for name, each in layer.items()} for layer in self.layers)
        )


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """Rows [begin, end) of a step use an adapter, as ``RunnableModel.prepare_adapter`` made it."""

    begin: int
    end: int
    adapter: PreparedAdapter
