"""Canonical and rounded K/V of a chunk to the order of ``kernels/cpu/layout.h``, and back.

In one thread: the others compute meanwhile.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from chunkllama.backends.cpu.abi import TYPES, CRoundedChunk
from chunkllama.backends.kivi import Bytes, KiviCodec
from chunkllama.model_spec import KV_SCALE_BYTES

_BLOCK = 16  # tokens of a block of K
_PADDED = 32  # bf16: dimensions of K are rounded up to a multiple of it


def arrange(chunk: torch.Tensor, dim: int) -> torch.Tensor:
    """[layers, 2, H, C, D] float32 or bfloat16, or [layers, 2, H, C, D + 2] int8, K then V ->
    [layers, elements of a chunk].
    """
    layers, _, heads, tokens, _ = chunk.shape
    values, scales = np.split(_integers(chunk), [dim], axis=-1)
    k, v = values[:, 0], values[:, 1]
    if chunk.dtype == torch.bfloat16:
        k = np.pad(k, [(0, 0)] * 3 + [(0, -dim % _PADDED)]) if dim % _PADDED else k
        k = np.ascontiguousarray(k).view(np.int32)  # pairs of dimensions move together
        even, odd = np.moveaxis(v.reshape(layers, heads, tokens // 2, 2, dim), 3, 0)
        v = np.stack((even, odd), axis=-1)
    k = k.reshape(layers, heads, tokens // _BLOCK, _BLOCK, -1).swapaxes(3, 4)
    k = np.ascontiguousarray(k).reshape(layers, -1).view(values.dtype)
    scales = scales.swapaxes(1, 2)  # int8: K's and V's of a head together
    together = np.concatenate([k, *(x.reshape(layers, -1) for x in (v, scales))], axis=1)
    return torch.from_numpy(together).view(chunk.dtype)


def widen(library: ctypes.CDLL, codec: KiviCodec, data: Bytes, elements: int) -> torch.Tensor:
    """Return what ``arrange`` returns of the chunk that ``codec`` has encoded.

    Args:
        elements: of a chunk in a layer.
    """
    layers, _, heads, tokens, dim = codec.shape
    out = torch.empty(layers, elements, dtype=codec.dtype)
    keys, values = codec.parts(data)
    arrays = (keys.codes, values.codes, keys.scales, keys.zeros, values.scales, values.zeros)
    group = tokens // keys.scales.shape[2]
    chunk = CRoundedChunk(
        *(array.ctypes.data for array in arrays), out.data_ptr(),
        *(layers, heads, dim, group, codec.bits, TYPES[codec.dtype]),
    )  # fmt: skip
    library.ck_widen_chunk(ctypes.byref(chunk))
    return out


def restore(chunk: torch.Tensor, heads: int, tokens: int, dim: int) -> torch.Tensor:
    """Undo ``arrange``."""
    layers, v_size = len(chunk), heads * tokens * dim
    scale_size = 2 * heads * tokens * KV_SCALE_BYTES if chunk.dtype == torch.int8 else 0
    values = _integers(chunk)
    k_size = values.shape[1] - v_size - scale_size
    k, v, scales = np.split(values, [k_size, k_size + v_size], axis=1)
    if chunk.dtype == torch.bfloat16:
        k = np.ascontiguousarray(k).view(np.int32)
        v = v.reshape(layers, heads, tokens // 2, dim, 2).swapaxes(3, 4)
    k = k.reshape(layers, heads, tokens // _BLOCK, -1, _BLOCK).swapaxes(3, 4)
    k = np.ascontiguousarray(k).view(values.dtype)[..., :dim]
    shape = (layers, heads, tokens, dim)
    together = np.stack((k.reshape(shape), v.reshape(shape)), axis=1)
    if scale_size:
        scales = scales.reshape(layers, heads, 2, tokens, KV_SCALE_BYTES).swapaxes(1, 2)
        together = np.concatenate((together, scales), axis=-1)
    return torch.from_numpy(together).view(chunk.dtype)


def _integers(chunk: torch.Tensor) -> NDArray[Any]:
    """The bits of a tensor."""
    kind = {4: torch.int32, 2: torch.int16, 1: torch.int8}[chunk.itemsize]
    bits: NDArray[Any] = chunk.contiguous().view(kind).numpy()
    return bits
