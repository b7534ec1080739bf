"""Quantized weights as a checkpoint of any format holds them: codes, scales, offsets.

A loader describes each matrix by ``WeightRows``, which reads rows when a backend asks for them; so
a quantized checkpoint is never in memory as floats, unless a backend has nothing narrower.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch

from chunkllama.backends.model import Linear, ModelWeights

BLOCK: Final = 32  # inputs that share a scale
_WIDENED_ROWS: Final = 256


@dataclass(frozen=True, slots=True)
class QuantFormat:
    """How codes become weights: scale * value of the code (+ offset), a scale for 32 inputs.

    Attributes:
        bits: 4 (codes 0 to 15) or 8 (codes 0 to 255, their value is code - 128).
        scale_dtype: float16 or bfloat16, of scales and offsets.
        extra: a second number for 32 inputs: an offset, or the scale of their upper 16.
        values: of the 16 codes of 4 bits; None: code - 8.
    """

    bits: Literal[4, 8]
    scale_dtype: torch.dtype = torch.float16
    extra: Literal["none", "offsets", "upper_scales"] = "none"
    values: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Codes:
    """Rows of a quantized matrix.

    Attributes:
        codes: [rows, columns] uint8.
        scales: [rows, ceil(columns / 32)] in the format's ``scale_dtype``.
        extra: the same shape and type; None without any.
    """

    format: QuantFormat
    codes: torch.Tensor
    scales: torch.Tensor
    extra: torch.Tensor | None = None

    def head(self, count: int) -> Codes:
        """Return the first rows."""
        extra = None if self.extra is None else self.extra[:count]
        return Codes(self.format, self.codes[:count], self.scales[:count], extra)

    def floats(self) -> torch.Tensor:
        """Return the weights [rows, columns] float32."""
        rows, columns = self.codes.shape
        if self.format.bits == 8:
            values = self.codes.float() - 128
        elif self.format.values is None:
            values = self.codes.float() - 8
        else:
            values = torch.tensor(self.format.values)[self.codes.long()]
        values = torch.nn.functional.pad(values, (0, -columns % BLOCK)).view(rows, -1, BLOCK)
        scales = self.scales.float()[:, :, None]
        if self.extra is None:
            weights = values * scales
        elif self.format.extra == "offsets":
            weights = values * scales + self.extra.float()[:, :, None]
        else:
            both = torch.cat((scales, self.extra.float()[:, :, None]), dim=2)
            weights = values * both.repeat_interleave(BLOCK // 2, dim=2)
        return weights.reshape(rows, -1)[:, :columns]


class WeightRows(ABC):
    """The rows of a weight matrix [rows, columns], read a range at a time.

    Attributes:
        format: of the codes; None: ``codes`` is not available.
    """

    rows: int
    columns: int
    format: QuantFormat | None = None

    @abstractmethod
    def floats(self, begin: int, end: int) -> torch.Tensor:
        """Return rows [begin, end) as floats of any width, contiguous."""

    def codes(self, begin: int, end: int) -> Codes:
        """Return rows [begin, end) as codes; only where there is a format."""
        raise AssertionError(f"rows {begin} to {end} have no codes")


class TensorRows(WeightRows):
    """The rows of a tensor."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight
        self.rows, self.columns = weight.shape

    def floats(self, begin: int, end: int) -> torch.Tensor:
        return self._weight[begin:end].contiguous()


class StackedRows(WeightRows):
    """Matrices above each other; their codes are available if they have one format."""

    def __init__(self, parts: Sequence[WeightRows]) -> None:
        self._parts = tuple(parts)
        self.rows = sum(part.rows for part in parts)
        self.columns = parts[0].columns
        formats = {part.format for part in parts}
        self.format = formats.pop() if len(formats) == 1 else None

    def floats(self, begin: int, end: int) -> torch.Tensor:
        found = [part.floats(b, e) for part, b, e in self._ranges(begin, end)]
        return found[0] if len(found) == 1 else torch.cat([each.float() for each in found])

    def codes(self, begin: int, end: int) -> Codes:
        return concatenate([part.codes(b, e) for part, b, e in self._ranges(begin, end)])

    def _ranges(self, begin: int, end: int) -> list[tuple[WeightRows, int, int]]:
        ranges, first = [], 0
        for part in self._parts:
            b, e = max(begin - first, 0), min(end - first, part.rows)
            if b < e:
                ranges.append((part, b, e))
            first += part.rows
        return ranges


def concatenate(codes: Sequence[Codes]) -> Codes:
    """Return the rows of several codes of one format above each other."""
    if len(codes) == 1:
        return codes[0]
    extra = [each.extra for each in codes if each.extra is not None]
    return Codes(
        codes[0].format,
        torch.cat([each.codes for each in codes]),
        torch.cat([each.scales for each in codes]),
        torch.cat(extra) if extra else None,
    )


@dataclass(slots=True)
class QuantizedLinear(Linear):
    """A linear layer whose ``weight`` is empty: its rows are those of ``parts``, stacked."""

    parts: tuple[WeightRows, ...] = ()


def rows_of(linear: Linear) -> tuple[WeightRows, ...]:
    """Return what is stacked in a layer's weight."""
    return linear.parts if isinstance(linear, QuantizedLinear) else (TensorRows(linear.weight),)


def is_quantized(weights: ModelWeights) -> bool:
    """Whether some linear layer of a model is quantized."""
    return any(
        isinstance(linear, QuantizedLinear)
        for layer in weights.layers
        for linear in (layer.qkv, layer.output, layer.gate_up, layer.down)
    )


def widen_model(weights: ModelWeights, device: torch.device) -> None:
    """Replace every quantized matrix by a tensor of the model's dtype on ``device``."""
    dtype = weights.embedding.dtype
    is_tied = weights.is_tied
    if weights.embedding_rows is not None:
        weights.embedding = widened([weights.embedding_rows], dtype, device)
        weights.embedding_rows = None
        if is_tied:
            weights.lm_head = Linear(weights.embedding)
    for layer in weights.layers:
        for name in ("qkv", "output", "gate_up", "down"):
            linear = getattr(layer, name)
            if isinstance(linear, QuantizedLinear):
                setattr(layer, name, Linear(widened(linear.parts, dtype, device), linear.bias))
    if isinstance(weights.lm_head, QuantizedLinear):
        weights.lm_head = Linear(widened(weights.lm_head.parts, dtype, device))


def widened(parts: Sequence[WeightRows], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return stacked matrices as one tensor, converted a few rows at a time."""
    source = StackedRows(parts)
    weight = torch.empty(source.rows, source.columns, dtype=dtype, device=device)
    for begin in range(0, source.rows, _WIDENED_ROWS):
        end = min(begin + _WIDENED_ROWS, source.rows)
        weight[begin:end].copy_(source.floats(begin, end))
    return weight
