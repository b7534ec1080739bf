"""Weights in the order of the CPU kernels (``kernels/cpu/linear.h``), and products with them."""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from typing import Final

import torch

from chunkllama.backends.base import Quantization
from chunkllama.backends.cpu.abi import BF16, F32, INT8, TYPES, mirrors
from chunkllama.backends.cpu.memory import allocate_lazily
from chunkllama.backends.model import Linear, ModelWeights
from chunkllama.errors import ConfigError

WEIGHT_TYPES: Final = {"fp32": F32, "bf16": BF16, "int8": INT8}
BITS: Final = {F32: 32, BF16: 16, INT8: 8.5}  # int8: with a bf16 scale for each 32 of them
UNIT: Final = 32  # output columns that are packed together
STRIDE: Final = 64  # k of packed weights is a multiple of this


@mirrors("Linear")
class CLinear(Structure):
    _fields_ = (
        *(("weight", c_void_p), ("bias", c_void_p)),
        *(("n", c_int64), ("k", c_int64), ("type", c_int32)),
    )


@dataclass(slots=True, kw_only=True)
class PackedLinear(Linear):
    """A linear layer whose ``weight`` is empty: the kernels read ``packed``.

    Attributes:
        out: columns of the result; ``packed`` rounds them up.
        memory: what ``packed`` points to.
    """

    packed: CLinear
    out: int
    memory: tuple[torch.Tensor, ...]


class Arena:
    """One lazily committed block on huge pages, handed out piece by piece."""

    def __init__(self, size: int) -> None:
        self.memory = allocate_lazily(size, torch.uint8)
        self._used = 0

    def take(self, size: int) -> int:
        """Address of the next ``size`` bytes."""
        at = self._used
        self._used += round_up(size, STRIDE)
        assert self._used <= self.memory.numel(), "the arena was sized for other weights"
        return self.memory.data_ptr() + at


def packed_type(dtype: torch.dtype, quantization: Quantization) -> int:
    """Type of the packed matrices of a model whose weights have ``dtype``.

    Raises:
        ConfigError: an unknown quantization, or one wider than the model's own type.
    """
    own = TYPES[dtype]
    if quantization == "auto":
        return own
    if quantization not in WEIGHT_TYPES:
        raise ConfigError(
            f"quantization: {quantization!r} is not one of auto, {', '.join(WEIGHT_TYPES)}"
        )
    wanted = WEIGHT_TYPES[quantization]
    if wanted not in (INT8, own):
        raise ConfigError(f"quantization: {quantization} does not fit --dtype; use auto or int8")
    return wanted


def packed_bytes(weights: ModelWeights, weight_type: int) -> int:
    """Size of all packed matrices, the gate and up projections interleaved."""
    shapes = [tuple(weights.lm_head.weight.shape)]
    for layer in weights.layers:
        rows, columns = layer.gate_up.weight.shape
        shapes += [tuple(x.weight.shape) for x in (layer.qkv, layer.output, layer.down)]
        shapes.append((2 * round_up(rows // 2, STRIDE), columns))
    return sum(_matrix_bytes(n, k, weight_type) for n, k in shapes)


def pack(
    library: ctypes.CDLL, arena: Arena, weight: torch.Tensor, bias_address: int, weight_type: int
) -> CLinear:
    """Copy a matrix [out, in] into the arena; ``bias_address``: [round_up(out, UNIT)] float32."""
    weight = weight.contiguous()
    n, k = _padded(*weight.shape)
    address = arena.take(_matrix_bytes(n, k, weight_type))
    packed = CLinear(address, bias_address, n, k, weight_type)
    library.ck_pack(
        *(weight.data_ptr(), TYPES[weight.dtype], *weight.shape, ctypes.byref(packed)),
        torch.get_num_threads(),
    )
    return packed


def padded_bias(bias: torch.Tensor) -> torch.Tensor:
    """A float32 copy of a bias, padded with zeros to whole units."""
    size = round_up(len(bias), UNIT)
    return torch.nn.functional.pad(bias.float(), (0, size - len(bias))).contiguous()


def pack_linear(library: ctypes.CDLL, linear: Linear, weight_type: int) -> PackedLinear:
    """Pack one layer into memory of its own; ``linear`` gives its weight back."""
    out, columns = linear.weight.shape
    arena = Arena(_matrix_bytes(out, columns, weight_type))
    memory: tuple[torch.Tensor, ...] = (arena.memory,)
    bias_address = 0
    if linear.bias is not None:
        bias = padded_bias(linear.bias)
        memory, bias_address = (arena.memory, bias), bias.data_ptr()
    packed = pack(library, arena, linear.weight, bias_address, weight_type)
    return PackedLinear(torch.empty(0), packed=packed, out=out, memory=memory)


def pack_model(library: ctypes.CDLL, weights: ModelWeights, weight_type: int) -> None:
    """Replace every linear layer of a model by its packed form, one at a time, and norms by float32
    ones. The embedding stays: its rows are looked up.
    """
    for layer in weights.layers:
        for name in ("qkv", "output", "gate_up", "down"):
            setattr(layer, name, pack_linear(library, getattr(layer, name), weight_type))
        for name in ("input", "q", "k", "attention_output", "mlp", "mlp_output"):
            norm = getattr(layer, f"{name}_norm")
            setattr(layer, f"{name}_norm", None if norm is None else norm.float())
    weights.norm = weights.norm.float()
    weights.lm_head = pack_linear(library, weights.lm_head, weight_type)


def interleave(stacked: torch.Tensor) -> torch.Tensor:
    """[gate; up] -> 16 rows of gate, 16 of up, ...: each padded with zeros to whole strides."""
    gate, up = stacked.chunk(2)
    size = round_up(len(gate), STRIDE)
    both = stacked.new_zeros(size // 16, 2, 16, *stacked.shape[1:])
    for at, part in enumerate((gate, up)):
        padded = torch.nn.functional.pad(part, (0, 0) * (part.dim() - 1) + (0, size - len(part)))
        both[:, at] = padded.view(size // 16, 16, *stacked.shape[1:])
    return both.flatten(0, 2)


def row_stride(width: int) -> int:
    """Elements from one row of an activation to the next, as ``stride`` in model.cpp."""
    return round_up(width, STRIDE) + 32


def round_up(value: int, unit: int) -> int:
    """The next multiple of ``unit``."""
    return -(-value // unit) * unit


def _padded(out: int, columns: int) -> tuple[int, int]:
    return round_up(out, UNIT), round_up(columns, STRIDE)


def _matrix_bytes(out: int, columns: int, weight_type: int) -> int:
    n, k = _padded(out, columns)
    return round_up(int(n * k * BITS[weight_type]) // 8, STRIDE)
