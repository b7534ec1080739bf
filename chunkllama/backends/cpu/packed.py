"""Weights in the order of the CPU kernels (``kernels/cpu/linear.h``), and products with them."""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Final

import torch

from chunkllama.backends.base import Quantization
from chunkllama.backends.cpu.abi import (
    BF16,
    F16,
    F32,
    INT4,
    INT8,
    NO_EXTRA,
    OFFSETS,
    SOURCE_TYPES,
    TYPES,
    UPPER_SCALES,
    mirrors,
)
from chunkllama.backends.cpu.interleaved import InterleavedRows, halves
from chunkllama.backends.cpu.memory import allocate_lazily
from chunkllama.backends.cpu.sizes import STRIDE, UNIT, round_up
from chunkllama.backends.cpu.tuning import FewRows
from chunkllama.backends.model import Linear, ModelWeights
from chunkllama.backends.quantized import (
    QuantFormat,
    QuantizedLinear,
    StackedRows,
    WeightRows,
    is_quantized,
    rows_of,
    widened,
)
from chunkllama.errors import ConfigError

MAX_PARTS: Final = 3
_EXTRAS: Final = {"none": NO_EXTRA, "offsets": OFFSETS, "upper_scales": UPPER_SCALES}
_CODE_BITS: Final = {F32: 32, BF16: 16, INT8: 8, INT4: 4}
_CHUNK_ELEMENTS: Final = 1 << 21  # weights that are read and packed at a time


@mirrors("Weights")
class CWeights(Structure):
    _fields_ = (
        *(("data", c_void_p), ("n", c_int64), ("type", c_int32), ("scale_type", c_int32)),
        *(("extra", c_int32), ("factor", c_float), ("table", c_void_p), ("bytes", c_void_p)),
        ("few_rows", c_int64),
    )


@mirrors("Linear")
class CLinear(Structure):
    _fields_ = (
        *(("parts", CWeights * MAX_PARTS), ("bias", c_void_p)),
        *(("n", c_int64), ("k", c_int64)),
    )


@dataclass(frozen=True, slots=True)
class Storage:
    """How a matrix is packed: ``type`` and, for quantized types, the fields of ``Weights``."""

    type: int
    scale_type: int = BF16
    extra: int = NO_EXTRA
    values: tuple[float, ...] | None = None

    @classmethod
    def of(cls, format_: QuantFormat) -> Storage:
        """Return the storage that holds a format's codes as they are."""
        return cls(
            INT4 if format_.bits == 4 else INT8,
            F16 if format_.scale_dtype == torch.float16 else BF16,
            _EXTRAS[format_.extra],
            format_.values,
        )

    def size(self, rows: int, columns: int) -> int:
        """Bytes of a matrix."""
        n, k = _padded(rows, columns)
        scales = 0 if self.type in (F32, BF16) else 1 if self.extra == NO_EXTRA else 2
        return round_up(n * k * _CODE_BITS[self.type] // 8 + n * k // 32 * 2 * scales, STRIDE)


# What int4 makes of floats. The values are Lloyd's for blocks of 32 samples of Student's t with
# four degrees of freedom, each at its best scale: as dense around zero as trained weights are.
_INT4: Final = Storage(
    INT4,
    values=tuple(
        float(x) for x in (-127, -99, -77, -59, -44, -30, -18, -8, 1, 11, 21, 33, 46, 61, 80, 108)
    ),
)
DEFAULT_FEW: Final = FewRows()


@dataclass(frozen=True, slots=True)
class WeightTypes:
    """Types of a model's packed matrices.

    Attributes:
        own: of what is not quantized.
        layers: of all matrices of the layers; None: as the checkpoint has them.
        head: the same of the head.
        few: products with few rows.
    """

    own: int
    layers: int | None = None
    head: int | None = None
    few: FewRows = DEFAULT_FEW


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

    def put(self, values: torch.Tensor) -> int:
        """Copy bytes [n] into the next place; returns its address."""
        address = self.take(len(values))
        at = address - self.memory.data_ptr()
        self.memory[at : at + len(values)].copy_(values)
        return address


def weight_types(weights: ModelWeights, quantization: Quantization) -> WeightTypes:
    """Return the types of a model's packed matrices.

    The head of a quantized model is int8 unless the checkpoint has it quantized: its 4-bit error
    would reach every logit.

    Raises:
        ConfigError: an unknown quantization, or one wider than the model's own type.
    """
    own = TYPES[weights.embedding.dtype]
    head_is_quantized = isinstance(weights.lm_head, QuantizedLinear)
    match quantization:
        case "auto":
            head = INT8 if is_quantized(weights) and not head_is_quantized else None
            return WeightTypes(own, None, head)
        case "int8" | "int4":
            return WeightTypes(own, INT4 if quantization == "int4" else INT8, INT8)
        case "bf16" | "fp32":
            wanted = BF16 if quantization == "bf16" else F32
            if wanted == own:
                return WeightTypes(own, own, own)
            raise ConfigError(
                f"quantization: {quantization} does not fit --dtype; use auto, int8 or int4"
            )
    raise ConfigError(f"quantization: {quantization!r} is not one of auto, fp32, bf16, int8, int4")


Parts = list[tuple[WeightRows, Storage]]


def parts_of(linear: Linear, own: int, wanted: int | None, *, interleaved: bool = False) -> Parts:
    """Return the matrices that a layer is packed as.

    Codes are kept where ``wanted`` is None; what has none, or cannot be stacked by whole units, is
    widened to ``own``.
    """
    sources = rows_of(linear)
    if interleaved:
        sources = (InterleavedRows(*halves(sources)),)
    if wanted is not None:
        return [(StackedRows(sources), _INT4 if wanted == INT4 else Storage(wanted))]
    groups: list[list[WeightRows]] = []
    for source in sources:
        if groups and groups[-1][0].format == source.format:
            groups[-1].append(source)
        else:
            groups.append([source])
    stacked = [StackedRows(group) for group in groups]
    if len(stacked) > MAX_PARTS or any(rows.rows % UNIT for rows in stacked[:-1]):
        return [(StackedRows(sources), Storage(own))]
    return [
        (rows, Storage(own) if rows.format is None else Storage.of(rows.format)) for rows in stacked
    ]


def packed_bytes(parts: Parts) -> int:
    """Bytes of a packed layer."""
    return sum(storage.size(rows.rows, rows.columns) for rows, storage in parts)


def pack(
    library: ctypes.CDLL, arena: Arena, parts: Parts, bias_address: int, few: FewRows
) -> CLinear:
    """Copy matrices into the arena; ``bias_address``: [round_up(out, UNIT)] float32."""
    packed = [pack_matrix(library, arena, rows, storage, few) for rows, storage in parts]
    k = _padded(0, parts[0][0].columns)[1]
    unused = [CWeights()] * (MAX_PARTS - len(packed))
    n = sum(weights.n for weights in packed)
    return CLinear((CWeights * MAX_PARTS)(*packed, *unused), bias_address, n, k)


def pack_matrix(
    library: ctypes.CDLL, arena: Arena, rows: WeightRows, storage: Storage, few: FewRows
) -> CWeights:
    """Copy one matrix into the arena, some rows at a time."""
    n, k = _padded(rows.rows, rows.columns)
    table, factor = _table(storage.values)
    integers = _integers(storage.values) if few.rounds and storage.type == INT4 else None
    weights = CWeights(
        *(arena.take(storage.size(rows.rows, rows.columns)), n, storage.type, storage.scale_type),
        *(storage.extra, factor, table.data_ptr()),
        None if integers is None else integers.data_ptr(),
        few.of(storage.type, integers is not None),
    )
    keeps_codes = rows.format is not None and Storage.of(rows.format) == storage
    step = max(_CHUNK_ELEMENTS // rows.columns // STRIDE, 1) * STRIDE
    threads = torch.get_num_threads()
    for begin in range(0, rows.rows, step):
        end = min(begin + step, rows.rows)
        if keeps_codes:
            codes = rows.codes(begin, end)
            held = [x.contiguous() for x in (codes.codes, codes.scales)]
            extra = None if codes.extra is None else codes.extra.contiguous()
            library.ck_pack_codes(
                *(held[0].data_ptr(), held[1].data_ptr()),
                None if extra is None else extra.data_ptr(),
                *(end - begin, rows.columns, ctypes.byref(weights), k, begin, threads),
            )
        else:
            values = rows.floats(begin, end).contiguous()
            library.ck_pack(
                *(values.data_ptr(), SOURCE_TYPES[values.dtype], end - begin, rows.columns),
                *(ctypes.byref(weights), k, begin, threads),
            )
    return weights


@cache  # the kernels keep pointers to them
def _table(values: tuple[float, ...] | None) -> tuple[torch.Tensor, float]:
    """The values of the codes within [-1, 1], and the power of two they are to be multiplied by."""
    numbers = torch.tensor(values or range(-8, 8), dtype=torch.float64)
    factor = 2.0 ** torch.ceil(torch.log2(numbers.abs().max())).item()
    return (numbers / factor).float(), factor


@cache
def _integers(values: tuple[float, ...] | None) -> torch.Tensor | None:
    """128 times the table as bytes; None if that is not exact."""
    table, _ = _table(values)
    wide = table * 128
    if not torch.equal(wide, wide.round()) or wide.max() > 127:
        return None
    return wide.to(torch.int8)


def unpack(library: ctypes.CDLL, weights: CWeights, rows: int, columns: int) -> torch.Tensor:
    """Return packed weights as floats [rows, columns]."""
    y = torch.empty(rows, columns)
    library.ck_unpack(
        *(ctypes.byref(weights), _padded(0, columns)[1], 0, rows, columns),
        *(y.data_ptr(), torch.get_num_threads()),
    )
    return y


def padded_bias(bias: torch.Tensor) -> torch.Tensor:
    """A float32 copy of a bias, padded with zeros to whole units."""
    size = round_up(len(bias), UNIT)
    return torch.nn.functional.pad(bias.float(), (0, size - len(bias))).contiguous()


def pack_linear(
    library: ctypes.CDLL,
    linear: Linear,
    own: int,
    wanted: int | None,
    few: FewRows = DEFAULT_FEW,
) -> PackedLinear:
    """Pack one layer into memory of its own; ``linear`` gives its weight back."""
    parts = parts_of(linear, own, wanted)
    arena = Arena(packed_bytes(parts))
    memory: tuple[torch.Tensor, ...] = (arena.memory,)
    bias_address = 0
    if linear.bias is not None:
        bias = padded_bias(linear.bias)
        memory, bias_address = (arena.memory, bias), bias.data_ptr()
    packed = pack(library, arena, parts, bias_address, few)
    out = sum(rows.rows for rows, _ in parts)
    return PackedLinear(torch.empty(0), packed=packed, out=out, memory=memory)


def pack_model(library: ctypes.CDLL, weights: ModelWeights, types: WeightTypes) -> None:
    """Replace every linear layer of a model by its packed form, one at a time, and norms by float32
    ones. The embedding is a tensor of the model's dtype afterwards: its rows are looked up.
    """
    for layer in weights.layers:
        for name in ("qkv", "output", "gate_up", "down"):
            packed = pack_linear(library, getattr(layer, name), types.own, types.layers, types.few)
            setattr(layer, name, packed)
        for name in ("input", "q", "k", "attention_output", "mlp", "mlp_output"):
            norm = getattr(layer, f"{name}_norm")
            setattr(layer, f"{name}_norm", None if norm is None else norm.float())
    weights.norm = weights.norm.float()
    weights.lm_head = pack_linear(library, weights.lm_head, types.own, types.head, types.few)
    if weights.embedding_rows is not None:
        dtype, device = weights.embedding.dtype, torch.device("cpu")
        weights.embedding = widened([weights.embedding_rows], dtype, device)
        weights.embedding_rows = None


def _padded(out: int, columns: int) -> tuple[int, int]:
    return round_up(out, UNIT), round_up(columns, STRIDE)
