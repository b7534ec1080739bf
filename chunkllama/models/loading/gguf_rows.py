"""Rows of a GGUF file's quantized matrices."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from chunkllama.backends.quantized import Codes, WeightRows
from chunkllama.errors import ConfigError
from chunkllama.models.loading.gguf_blocks import BLOCK_TYPES, decode_rows
from chunkllama.models.loading.tensor_info import TensorInfo


class GgufRows(WeightRows):
    """A quantized matrix; rows are read from the file when they are asked for.

    Args:
        info: of the tensor.
        order: row of the file for each row of the matrix; None: the same.
    """

    def __init__(self, info: TensorInfo, order: NDArray[np.int64] | None) -> None:
        self._info, self._order = info, order
        self.rows, self.columns = info.shape
        self._kind = BLOCK_TYPES.get(info.dtype)
        self.format = None if self._kind is None else self._kind.format

    def codes(self, begin: int, end: int) -> Codes:
        assert self._kind is not None, self._info
        return decode_rows(self._kind, self._read(begin, end), self.columns)

    def floats(self, begin: int, end: int) -> torch.Tensor:
        import gguf

        kind = gguf.GGMLQuantizationType[self._info.dtype]
        try:
            values = gguf.dequantize(self._read(begin, end), kind)
        except NotImplementedError:
            raise ConfigError(
                f"{self._info.path}: quantization {self._info.dtype} cannot be read"
            ) from None
        return torch.from_numpy(np.ascontiguousarray(values, np.float32))

    def _read(self, begin: int, end: int) -> NDArray[np.uint8]:
        """Raw rows [begin, end)."""
        row_bytes = (self._info.end - self._info.begin) // self.rows
        order = np.arange(begin, end) if self._order is None else self._order[begin:end]
        first, last = int(order.min()), int(order.max()) + 1
        with self._info.path.open("rb", buffering=0) as file:
            raw = np.fromfile(
                file,
                np.uint8,
                (last - first) * row_bytes,
                offset=self._info.begin + first * row_bytes,
            )
        if len(raw) != (last - first) * row_bytes:
            raise ConfigError(f"{self._info.path}: became shorter while it was read")
        raw = raw.reshape(-1, row_bytes)
        return raw if self._order is None else raw[order - first]


def file_order(info: TensorInfo) -> NDArray[np.int64] | None:
    """Row of the file for each row in Hugging Face's order (all first halves of a head, then all
    second halves); None: the same.
    """
    if not info.permuted_heads:
        return None
    rows = np.arange(info.shape[0]).reshape(info.permuted_heads, -1, 2)
    return rows.swapaxes(1, 2).reshape(-1)
