"""Blocks of GGUF's quantized types as codes, scales and offsets.

The layouts are those of ggml's ``ggml-common.h``. A type with a scale for 32 inputs or fewer keeps
its codes; scales that a file holds as products (the K types: a half-precision number times an
integer of 6 or 8 bits) are rounded to half precision, by at most 2^-12 of their value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from chunkllama.backends.quantized import Codes, QuantFormat

Bytes = NDArray[np.uint8]
_SUPER_BLOCK: Final = 256
_IQ4_VALUES: Final = tuple(
    float(x) for x in (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
)
_UNSIGNED: Final = tuple(map(float, range(16)))

# codes of blocks, their scales and extra values: each [blocks, numbers]
Decoded = tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]


@dataclass(frozen=True, slots=True)
class BlockType:
    """A quantized type: its codes' format, the bytes of a block, and how one is taken apart."""

    format: QuantFormat
    block: int
    block_bytes: int
    decode: Callable[[Bytes], Decoded]


def decode_rows(kind: BlockType, raw: Bytes, columns: int) -> Codes:
    """Return raw rows [rows, bytes] of a type as codes [rows, columns]."""
    rows = len(raw)
    codes, scales, extra = kind.decode(raw.reshape(-1, kind.block_bytes))

    def halves(values: NDArray[Any]) -> torch.Tensor:
        with np.errstate(over="ignore"):
            return torch.from_numpy(values.astype(np.float16).reshape(rows, -1))

    return Codes(
        kind.format,
        torch.from_numpy(np.ascontiguousarray(codes, np.uint8).reshape(rows, columns)),
        halves(scales),
        None if extra is None else halves(extra),
    )


def _half(raw: Bytes) -> NDArray[np.float32]:
    """Columns of two bytes as numbers."""
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)


def _nibbles(raw: Bytes, group: int) -> NDArray[Any]:
    """The lower nibbles of each ``group`` bytes, then their upper ones."""
    grouped = raw.reshape(len(raw), -1, 1, group) >> np.array([0, 4], np.uint8)[:, None]
    return (grouped & np.uint8(15)).reshape(len(raw), -1)


def _fields(raw: Bytes, bits: int, group: int) -> NDArray[Any]:
    """Fields of ``bits`` bits: the lowest of each ``group`` bytes, then the next ones."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    grouped = raw.reshape(len(raw), -1, 1, group) >> shifts
    return (grouped & np.uint8((1 << bits) - 1)).reshape(len(raw), -1)


def _high_bits(raw: Bytes) -> Bytes:
    """32 bits of four bytes, one a number."""
    return np.unpackbits(raw, axis=1, bitorder="little")


def _q4_0(b: Bytes) -> Decoded:
    return _nibbles(b[:, 2:], 16), _half(b[:, :2]), None


def _q4_1(b: Bytes) -> Decoded:
    return _nibbles(b[:, 4:], 16), _half(b[:, :2]), _half(b[:, 2:4])


def _q5_0(b: Bytes) -> Decoded:
    codes = _nibbles(b[:, 6:], 16) | _high_bits(b[:, 2:6]) << 4
    return codes + 112, _half(b[:, :2]), None


def _q5_1(b: Bytes) -> Decoded:
    codes = _nibbles(b[:, 8:], 16) | _high_bits(b[:, 4:8]) << 4
    return codes + 128, _half(b[:, :2]), _half(b[:, 2:4])


def _q8_0(b: Bytes) -> Decoded:
    return b[:, 2:] ^ 128, _half(b[:, :2]), None


def _k_scales(b: Bytes) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scales and offsets [blocks, 8] of a K block: two numbers, then twelve bytes of 6-bit ones."""
    low, middle, high = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scales = np.concatenate([low & 63, high & 15 | low >> 2 & 48], axis=1)
    offsets = np.concatenate([middle & 63, high >> 4 | middle >> 2 & 48], axis=1)
    return _half(b[:, :2]) * scales, -_half(b[:, 2:4]) * offsets


def _q4_k(b: Bytes) -> Decoded:
    return _nibbles(b[:, 16:], 32), *_k_scales(b)


def _q5_k(b: Bytes) -> Decoded:
    codes = _nibbles(b[:, 48:], 32) | _fields(b[:, 16:48], 1, 32) << 4
    return codes + 128, *_k_scales(b)


def _halves(scales: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Scales of 16 each: those of the lower and of the upper half of each 32."""
    return scales[:, ::2], scales[:, 1::2]


def _q6_k(b: Bytes) -> Decoded:
    codes = _nibbles(b[:, :128], 64) | _fields(b[:, 128:192], 2, 32) << 4
    scales = b[:, 192:208].view(np.int8) * _half(b[:, 208:])
    return codes + 96, *_halves(scales)


def _q3_k(b: Bytes) -> Decoded:
    codes = _fields(b[:, 32:96], 2, 32) | _fields(b[:, :32], 1, 32) << 2
    scales = _fields(b[:, 96:104], 4, 8) | _fields(b[:, 104:108], 2, 4) << 4
    products = (scales.astype(np.int8) - 32) * _half(b[:, 108:])
    return codes + 4, *_halves(products)


def _iq4_nl(b: Bytes) -> Decoded:
    return _nibbles(b[:, 2:], 16), _half(b[:, :2]), None


def _iq4_xs(b: Bytes) -> Decoded:
    high = np.ascontiguousarray(b[:, 2:4]).view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16)
    low = np.stack([b[:, 4:8] & 15, b[:, 4:8] >> 4], axis=2).reshape(len(b), 8)
    scales = (low | (high.astype(np.uint8) & 3) << 4).astype(np.int8) - 32
    return _nibbles(b[:, 8:], 16), scales * _half(b[:, :2]), None


_FOUR, _EIGHT = QuantFormat(4), QuantFormat(8)
BLOCK_TYPES: Final = {
    "Q4_0": BlockType(_FOUR, 32, 18, _q4_0),
    "Q4_1": BlockType(QuantFormat(4, extra="offsets", values=_UNSIGNED), 32, 20, _q4_1),
    "Q5_0": BlockType(_EIGHT, 32, 22, _q5_0),
    "Q5_1": BlockType(QuantFormat(8, extra="offsets"), 32, 24, _q5_1),
    "Q8_0": BlockType(_EIGHT, 32, 34, _q8_0),
    "Q3_K": BlockType(QuantFormat(4, extra="upper_scales"), _SUPER_BLOCK, 110, _q3_k),
    "Q4_K": BlockType(QuantFormat(4, extra="offsets", values=_UNSIGNED), _SUPER_BLOCK, 144, _q4_k),
    "Q5_K": BlockType(QuantFormat(8, extra="offsets"), _SUPER_BLOCK, 176, _q5_k),
    "Q6_K": BlockType(QuantFormat(8, extra="upper_scales"), _SUPER_BLOCK, 210, _q6_k),
    "IQ4_NL": BlockType(QuantFormat(4, values=_IQ4_VALUES), 32, 18, _iq4_nl),
    "IQ4_XS": BlockType(QuantFormat(4, values=_IQ4_VALUES), _SUPER_BLOCK, 136, _iq4_xs),
}
