"""K/V of a whole chunk in 4 or 2 bits, for chunks that no step reads (KIVI, arXiv 2402.02750).

Keys are quantized per channel over tokens, because some of their channels are large in every token;
values per token over the channels (section 3.2 there). A code is round((x - zero) / scale), with
zero the smallest value of its group and scale the range divided by the largest code. Scales and
zeros are float16. With 2 bits a group of keys has all tokens of the chunk. With 4 bits it has 16:
rotary positions widen the range of a channel over more tokens, and errors of keys are what changes
answers most (``benchmarks/quality.py``).

In numpy, and torch in small pieces, which take one thread: the others compute meanwhile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray

Bits = Literal[2, 4]
Bytes = bytes | bytearray | memoryview
_KEY_TOKENS: Final = {2: 64, 4: 16}  # of a group
_SCALE_BYTES: Final = 2
_SERIAL: Final = 1 << 14  # values that torch converts in one thread


@dataclass(frozen=True, slots=True)
class RoundedPart:
    """K or V of a chunk.

    Attributes:
        codes: of [layers, kv heads, tokens, head_dim], neighbours in one byte, the first in the
            lowest bits.
        scales, zeros: of K [layers, kv heads, groups, 1, head_dim], of V [layers, kv heads, groups,
            tokens of a group, 1].
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zeros: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class KiviCodec:
    """Chunks of one shape.

    Attributes:
        bits: of a code.
        shape: layers, K and V, kv heads, tokens, head_dim of canonical K/V; the last is a multiple
            of 8 / bits.
        dtype: of the canonical K/V: float32, bfloat16 or float16.
    """

    bits: Bits
    shape: tuple[int, int, int, int, int]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of a chunk."""
        groups = sum(math.prod(self._parameters(part)) for part in (0, 1))
        return math.prod(self.shape) * self.bits // 8 + 2 * groups * _SCALE_BYTES

    def encode(self, chunk: torch.Tensor) -> bytes | None:
        """Quantize canonical K/V; None if they have a value beyond float16, or one that is not
        finite."""
        wide = np.empty(self.shape, np.float32)
        _convert(chunk, torch.from_numpy(wide))
        if not np.isfinite(wide).all() or np.abs(wide).max() > np.finfo(np.float16).max / 2:
            return None
        parts: list[bytes] = []
        for part in (0, 1):
            values = wide[:, part].reshape(self._grouped())
            axis = 3 + part
            low, high = values.min(axis, keepdims=True), values.max(axis, keepdims=True)
            zero = low.astype(np.float16)
            scale = ((high - low) / self._top).astype(np.float16)
            codes = np.rint((values - zero) * _inverse(scale)).clip(0, self._top).astype(np.uint8)
            parts += [self._pack(codes).tobytes(), scale.tobytes(), zero.tobytes()]
        return b"".join(parts)

    def decode(self, data: Bytes) -> torch.Tensor:
        """Return canonical K/V of what ``encode`` returns."""
        layers, _, heads, tokens, dim = self.shape
        wide = np.empty(self.shape, np.float32)
        table = _table(self.bits)
        for part, rounded in enumerate(self.parts(data)):
            values = table.take(rounded.codes, axis=0).reshape(self._grouped())
            values *= rounded.scales
            values += rounded.zeros
            wide[:, part] = values.reshape(layers, heads, tokens, dim)
        chunk = torch.empty(self.shape, dtype=self.dtype)
        _convert(torch.from_numpy(wide), chunk)
        return chunk

    def parts(self, data: Bytes) -> tuple[RoundedPart, RoundedPart]:
        """Separate K and V of what ``encode`` returns."""
        layers, _, heads, tokens, dim = self.shape
        num_packed, at = layers * heads * tokens * dim * self.bits // 8, 0
        parts = []
        for part in (0, 1):
            shape = self._parameters(part)
            count = math.prod(shape)
            codes = np.frombuffer(data, np.uint8, num_packed, at)
            at += num_packed
            parameters = np.frombuffer(data, np.float16, 2 * count, at).reshape(2, *shape)
            at += parameters.nbytes
            scales, zeros = parameters.astype(np.float32)
            parts.append(RoundedPart(codes, scales, zeros))
        keys, values = parts
        return keys, values

    @property
    def _top(self) -> int:
        return (1 << self.bits) - 1

    def _grouped(self) -> tuple[int, int, int, int, int]:
        """The shape of K, or of V, with its tokens in groups."""
        layers, _, heads, tokens, dim = self.shape
        group = math.gcd(tokens, _KEY_TOKENS[self.bits])
        return layers, heads, tokens // group, group, dim

    def _parameters(self, part: int) -> tuple[int, int, int, int, int]:
        """The shape of the scales of K (0) or V (1)."""
        layers, heads, groups, group, dim = self._grouped()
        return (layers, heads, groups, group, 1) if part else (layers, heads, groups, 1, dim)

    def _pack(self, codes: NDArray[np.uint8]) -> NDArray[Any]:
        """Neighbours in one byte, the first in the lowest bits."""
        each = codes.reshape(-1, 8 // self.bits)
        packed = each[:, 0].copy()
        for place in range(1, each.shape[1]):
            packed |= each[:, place] << (place * self.bits)
        return packed


def _table(bits: Bits) -> NDArray[np.float32]:
    """The codes [256, 8 / bits] of each byte."""
    places = np.arange(0, 8, bits)
    return ((np.arange(256)[:, None] >> places) & ((1 << bits) - 1)).astype(np.float32)


def _convert(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy values to another dtype, rounded to nearest even."""
    given, taken = source.reshape(-1), target.view(-1)
    for start in range(0, len(given), _SERIAL):
        taken[start : start + _SERIAL].copy_(given[start : start + _SERIAL])


def _inverse(scale: NDArray[np.float16]) -> NDArray[np.float32]:
    """1 / scale, 0 where that is 0: the group has one value, which is its zero."""
    wide = scale.astype(np.float32)
    return np.divide(1, wide, out=np.zeros_like(wide), where=wide > 0)
