"""Where a tensor lies in a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Bytes [begin, end) of ``path``.

    Attributes:
        dtype: as the file calls it: F32, BF16, I32, or a quantized type of GGUF.
        permuted_heads: rows are so many heads in llama.cpp's order, the two dimensions of each
            rotation adjacent; 0: rows are in the model's order.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    permuted_heads: int = 0
