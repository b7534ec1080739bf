"""Sizes that the CPU kernels pack by."""

from __future__ import annotations

from typing import Final

UNIT: Final = 32  # output columns that are packed together
STRIDE: Final = 64  # k of packed weights is a multiple of this


def row_stride(width: int) -> int:
    """Return the elements from one row of an activation to the next, as ``stride`` in model.cpp."""
    return round_up(width, STRIDE) + 32


def round_up(value: int, unit: int) -> int:
    """Return the next multiple of ``unit``."""
    return -(-value // unit) * unit
