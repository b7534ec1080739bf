"""How much memory a model's weights take, before one of them is read. No torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from chunkllama.models.loading.safetensors import ITEM_SIZES, Checkpoint
from chunkllama.models.loading.tensor_info import TensorInfo
from chunkllama.models.tensors import EMBEDDING, HEAD

if TYPE_CHECKING:
    from chunkllama.backends.base import Quantization

_BITS: Final = {"float32": 32, "float16": 16, "bfloat16": 16}
_QUANTIZED_BITS: Final = {"int8": 8.5, "int4": 4.5}
# As ``gguf_blocks.BLOCK_TYPES`` packs them: codes, and one or two half-precision numbers for 32.
PACKED_BITS: Final = {
    **{"Q4_0": 4.5, "IQ4_NL": 4.5, "IQ4_XS": 4.5, "Q5_0": 8.5, "Q8_0": 8.5},
    **{"Q4_1": 5.0, "Q3_K": 5.0, "Q4_K": 5.0, "Q5_1": 9.0, "Q5_K": 9.0, "Q6_K": 9.0},
}


def allocated_bytes(
    checkpoint: Checkpoint, dtype: str, quantization: Quantization, num_ranks: int = 1
) -> int:
    """Return the bytes that a checkpoint's tensors take once they are loaded.

    Args:
        checkpoint: only the tensors of the model count, not what else is in its folder.
        dtype: that the model computes in.
        quantization: of the linear layers.
        num_ranks: that load it: each has the embedding and the head, and its part of the rest.
    """
    copied = [checkpoint[name] for name in (EMBEDDING, HEAD) if name in checkpoint]
    infos: list[TensorInfo] = [*checkpoint, *copied * (num_ranks - 1)]
    return math.ceil(
        sum(_bits(info, dtype, quantization) * math.prod(info.shape) for info in infos) / 8
    )


def _bits(info: TensorInfo, dtype: str, quantization: Quantization) -> float:
    words = 8 if info.dtype == "I32" else 1  # weights in a number of the file
    if len(info.shape) == 2 and quantization in _QUANTIZED_BITS:
        return _QUANTIZED_BITS[quantization] * words
    if info.dtype in (*ITEM_SIZES, "F8_E4M3") or quantization == "bf16":
        return _BITS[dtype] * words
    if info.dtype in PACKED_BITS:
        return PACKED_BITS[info.dtype]
    own = 8 * (info.end - info.begin) / max(math.prod(info.shape), 1)
    return max(own, _BITS[dtype]) if own < 8 else own
