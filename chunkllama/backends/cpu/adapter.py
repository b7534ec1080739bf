"""Adapters in the order of the CPU kernels (``kernels/cpu/adapter.h``)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_int32, c_int64, c_void_p
from typing import Final

import torch

from chunkllama.backends.adapter import (
    LINEARS,
    AdapterRows,
    AdapterWeights,
    LinearAdapter,
    PreparedAdapter,
)
from chunkllama.backends.cpu.abi import TYPES, mirrors
from chunkllama.backends.cpu.packed import MAX_PARTS, Arena
from chunkllama.backends.cpu.sizes import STRIDE, round_up

BLOCK: Final = 16


@mirrors("AdapterPart")
class CAdapterPart(Structure):
    _fields_ = (
        *(("b", c_void_p), ("first", c_int64), ("step", c_int64), ("blocks", c_int64)),
        *(("offset", c_int64), ("rank", c_int64)),
    )


@mirrors("AdapterLinear")
class CAdapterLinear(Structure):
    _fields_ = (
        *(("a", c_void_p), ("ranks", c_int64), ("k", c_int64)),
        *(("parts", CAdapterPart * MAX_PARTS), ("num_parts", c_int64)),
    )


@mirrors("AdapterRange")
class CAdapterRange(Structure):
    _fields_ = (("begin", c_int64), ("end", c_int64), ("linears", POINTER(CAdapterLinear)))


@mirrors("StepAdapters")
class CStepAdapters(Structure):
    _fields_ = (
        *(("ranges", POINTER(CAdapterRange)), ("num_ranges", c_int64)),
        *(("inner", c_void_p), ("inner_stride", c_int64), ("type", c_int32)),
    )


class PackedAdapter(PreparedAdapter):
    """An adapter as the kernels read it.

    Args:
        intermediate_size: rows of the gate projection.

    Attributes:
        linears: [num_layers * 4], in the order of ``LINEARS``.
        ranks: most of one layer, rounded up to 8.
        num_bytes: of its matrices.
    """

    def __init__(self, weights: AdapterWeights, intermediate_size: int) -> None:
        self._matrices: list[torch.Tensor] = []
        self.linears = (CAdapterLinear * (len(weights.layers) * len(LINEARS)))()
        for index, layer in enumerate(weights.layers):
            for at, name in enumerate(LINEARS):
                if name in layer:
                    half = intermediate_size if name == "gate_up" else 0
                    self.linears[index * len(LINEARS) + at] = self._pack(layer[name], half)
        self.ranks = max(linear.ranks for linear in self.linears)
        self._place()

    def _pack(self, linear: LinearAdapter, half: int) -> CAdapterLinear:
        parts: list[CAdapterPart] = []
        later: list[torch.Tensor] = []
        for part in linear.parts:
            rank = part.b.shape[1]
            for first, step, b in _pieces(part.first, part.b, half):
                blocks = _padded(b).view(-1, BLOCK, rank).transpose(1, 2)
                parts.append(CAdapterPart(0, first, step, len(blocks), part.offset, rank))
                later.append(blocks)
        a = _stacked(linear.a)
        ranks, columns = a.shape
        whole = ranks // BLOCK * BLOCK
        blocks = a[:whole].view(-1, BLOCK, columns).transpose(1, 2).reshape(-1)
        self._matrices += [torch.cat((blocks, a[whole:].T.reshape(-1))), *later]
        unused = [CAdapterPart()] * (MAX_PARTS - len(parts))
        given = (CAdapterPart * MAX_PARTS)(*parts, *unused)
        return CAdapterLinear(0, ranks, columns, given, len(parts))

    def _place(self) -> None:
        """Copy all matrices into one block, in the order in which they are read."""
        sizes = [round_up(each.numel() * each.element_size(), STRIDE) for each in self._matrices]
        self.num_bytes = sum(sizes)
        self._arena = Arena(self.num_bytes)
        matrices = iter(self._matrices)

        def placed() -> int:
            matrix = next(matrices)
            values = matrix.contiguous().view(-1).view(torch.uint8)
            return self._arena.put(values)

        for linear in self.linears:
            if linear.num_parts:
                linear.a = placed()
                for number in range(linear.num_parts):
                    linear.parts[number].b = placed()
        self._matrices.clear()


def _pieces(first: int, b: torch.Tensor, half: int) -> list[tuple[int, int, torch.Tensor]]:
    """First column and distance of the blocks of a module's B in the packed layer.

    Gate and up projections alternate there, 16 columns of each.

    Args:
        half: rows of the gate projection; 0 in other layers.
    """
    if not half:
        return [(first, BLOCK, b)]
    gate, up = b[: max(half - first, 0)], b[max(half - first, 0) :]
    both = ((0, 2 * BLOCK, gate), (BLOCK, 2 * BLOCK, up))
    return [piece for piece in both if len(piece[2])]


def _stacked(a: torch.Tensor) -> torch.Tensor:
    """A [ranks, k] with ranks rounded up to half a block and k to an even number, with zeros."""
    padding = (0, a.shape[1] % 2, 0, -len(a) % (BLOCK // 2))
    return torch.nn.functional.pad(a, padding)


def _padded(rows: torch.Tensor) -> torch.Tensor:
    """Rows rounded up to whole blocks, with zeros."""
    return torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % BLOCK))


def _packed(rows: AdapterRows) -> PackedAdapter:
    assert isinstance(rows.adapter, PackedAdapter)
    return rows.adapter


class AdapterBuffers:
    """What a step with adapters needs beside its rows."""

    def __init__(self) -> None:
        self._inner = torch.empty(0)
        self._ranges: ctypes.Array[CAdapterRange] | None = None

    def step(self, adapters: Sequence[AdapterRows], rows: int, dtype: torch.dtype) -> CStepAdapters:
        """The kernels' view of a step's adapters; valid until the next call."""
        packed = [_packed(each) for each in adapters]
        ranks = round_up(max(each.ranks for each in packed), BLOCK)
        if self._inner.numel() < rows * ranks:
            self._inner = torch.empty(rows * ranks)
        self._ranges = (CAdapterRange * len(adapters))()
        for at, (each, adapter) in enumerate(zip(adapters, packed, strict=True)):
            self._ranges[at] = CAdapterRange(each.begin, each.end, adapter.linears)
        return CStepAdapters(
            self._ranges, len(adapters), self._inner.data_ptr(), ranks, TYPES[dtype]
        )
