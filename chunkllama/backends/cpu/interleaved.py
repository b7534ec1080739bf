"""Gate and up projections as one matrix whose rows alternate, 16 of each."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from chunkllama.backends.cpu.sizes import STRIDE, round_up
from chunkllama.backends.quantized import Codes, StackedRows, WeightRows


def halves(sources: Sequence[WeightRows]) -> tuple[WeightRows, WeightRows]:
    """Return the gate and the up projection."""
    if len(sources) == 2:
        return sources[0], sources[1]
    stacked = StackedRows(sources)
    half = stacked.rows // 2
    return _Slice(stacked, 0, half), _Slice(stacked, half, half)


class _Slice(WeightRows):
    def __init__(self, source: WeightRows, first: int, rows: int) -> None:
        self._source, self._first = source, first
        self.rows, self.columns, self.format = rows, source.columns, source.format

    def floats(self, begin: int, end: int) -> torch.Tensor:
        return self._source.floats(self._first + begin, self._first + end)

    def codes(self, begin: int, end: int) -> Codes:
        return self._source.codes(self._first + begin, self._first + end)


class InterleavedRows(WeightRows):
    """16 rows of gate, 16 of up, ...: each padded with zeros to whole strides.

    Ranges begin and end at multiples of 32.
    """

    def __init__(self, gate: WeightRows, up: WeightRows) -> None:
        self._both = (gate, up)
        self.rows, self.columns = 2 * round_up(gate.rows, STRIDE), gate.columns
        self.format = gate.format if gate.format == up.format else None

    def floats(self, begin: int, end: int) -> torch.Tensor:
        first, last, count = self._range(begin, end)
        gate, up = (half.floats(first, last)[:count] for half in self._both)
        if gate.dtype != up.dtype:
            gate, up = gate.float(), up.float()
        return _interleaved(gate, up, end - begin)

    def codes(self, begin: int, end: int) -> Codes:
        first, last, count = self._range(begin, end)
        gate, up = (half.codes(first, last).head(count) for half in self._both)
        extra = None
        if gate.extra is not None and up.extra is not None:
            extra = _interleaved(gate.extra, up.extra, end - begin)
        return Codes(
            gate.format,
            _interleaved(gate.codes, up.codes, end - begin),
            _interleaved(gate.scales, up.scales, end - begin),
            extra,
        )

    def _range(self, begin: int, end: int) -> tuple[int, int, int]:
        """Rows to read of each half, at least one, and how many of them count."""
        rows = self._both[0].rows
        first, last = min(begin // 2, rows - 1), min(end // 2, rows)
        return first, last, max(last - begin // 2, 0)


def _interleaved(gate: torch.Tensor, up: torch.Tensor, rows: int) -> torch.Tensor:
    both = gate.new_zeros(rows // 32, 2, 16, *gate.shape[1:])
    for at, part in enumerate((gate, up)):
        padding = (0, 0) * (part.dim() - 1) + (0, rows // 2 - len(part))
        both[:, at] = torch.nn.functional.pad(part, padding).view(-1, 16, *part.shape[1:])
    return both.flatten(0, 2)


def interleave(stacked: torch.Tensor) -> torch.Tensor:
    """[gate; up] of a bias -> 16 of gate, 16 of up, ...: zeros pad each to whole strides."""
    gate, up = stacked.chunk(2)
    return _interleaved(gate, up, 2 * round_up(len(gate), STRIDE))
