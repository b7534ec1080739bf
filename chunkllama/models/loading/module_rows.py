"""Rows of quantized linear modules: AWQ, GPTQ, compressed-tensors, FP8.

Every format is codes with a scale, and perhaps a zero point, for a group of a row's inputs:
weight = (code - zero) * scale. Groups of whole blocks of 32 inputs (or 16) stay codes, with the
offset (middle - zero) * scale where a zero point is not in the middle; all others are widened.
"""

from __future__ import annotations

from functools import cached_property
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from chunkllama.backends.quantized import BLOCK, Codes, QuantFormat, WeightRows
from chunkllama.errors import ConfigError
from chunkllama.models.loading.module_tensors import ModuleTensors
from chunkllama.models.loading.tensor_info import TensorInfo

_DTYPES: Final = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
}
# Output of each nibble of a word, from the lowest.
_AWQ_ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)


class ModuleRows(WeightRows):
    """A quantized module's weight.

    Args:
        module: its tensors.
        order: row of the checkpoint for each row; None: the same.
    """

    def __init__(self, module: ModuleTensors, order: NDArray[np.int64] | None) -> None:
        self._module, self._order = module, order
        self.rows, self.columns = module.rows, module.columns
        self._scale_name = next(
            name for name in ("scales", "weight_scale", "weight_scale_inv") if name in module.infos
        )
        self.format = None if module.bits == 0 else self._format()

    def codes(self, begin: int, end: int) -> Codes:
        assert self.format is not None
        rows = self._rows(begin, end)
        scales, zeros = self._scales[rows], self._zeros
        blocks = self._groups[::BLOCK]
        extra = None
        if self.format.extra == "offsets":
            assert zeros is not None
            middle = 1 << (self._module.bits - 1)
            offsets = (middle - zeros[rows].float()) * scales.float()
            extra = offsets.to(self.format.scale_dtype)[:, blocks]
        elif self.format.extra == "upper_scales":
            upper = self._groups[BLOCK // 2 :: BLOCK]
            missing = np.full(len(blocks) - len(upper), self._groups[-1])  # of half a block
            extra = scales.to(self.format.scale_dtype)[:, np.concatenate([upper, missing])]
        found = Codes(
            self.format,
            self._codes(rows),
            scales.to(self.format.scale_dtype)[:, blocks],
            extra,
        )
        self._release(end)
        return found

    def floats(self, begin: int, end: int) -> torch.Tensor:
        rows = self._rows(begin, end)
        if self._module.bits == 0:
            return self._eight_bit_floats(rows)
        zeros = self._zeros
        if zeros is None:
            centred = self._codes(rows).float() - (1 << (self._module.bits - 1))
        else:
            centred = self._codes(rows).float() - zeros[rows].float()[:, self._groups]
        weights = centred * self._scales[rows].float()[:, self._groups]
        self._release(end)
        return weights.contiguous()

    def _rows(self, begin: int, end: int) -> NDArray[np.int64]:
        return np.arange(begin, end) if self._order is None else self._order[begin:end]

    def _format(self) -> QuantFormat | None:
        """The format of the codes; None where groups are no whole blocks."""
        bits = self._module.bits
        assert bits in (4, 8)
        dtype = self._scales.dtype
        if dtype == torch.float32:
            sizes = self._scales.abs()
            is_half = bool(((sizes == 0) | (sizes > 2**-14) & (sizes < 2**15)).all())
            dtype = torch.float16 if is_half else torch.bfloat16
        groups = np.pad(self._groups, (0, -self.columns % BLOCK), mode="edge")
        halves = groups.reshape(-1, BLOCK // 2)
        zeros = self._zeros
        middle = 1 << (bits - 1)
        is_symmetric = zeros is None or bool((zeros == middle).all())
        self._release(self.rows)
        if (halves != halves[:, :1]).any():
            return None
        is_whole = bool((halves[::2, 0] == halves[1::2, 0]).all())
        if not is_symmetric:
            return QuantFormat(bits, dtype, "offsets") if is_whole else None  # type: ignore[arg-type]
        return QuantFormat(bits, dtype, "none" if is_whole else "upper_scales")  # type: ignore[arg-type]

    @cached_property
    def _groups(self) -> NDArray[np.int64]:
        """Group of each input."""
        for name in ("g_idx", "weight_g_idx"):
            if name in self._module.infos:
                groups = self._read(name).numpy().astype(np.int64)
                if (groups < 0).all():
                    continue  # compressed-tensors: inputs in their order
                count = self._group_count()
                if groups.size and not (groups.min() >= 0 and groups.max() < count):
                    raise self._error(name, f"names a group outside of the {count} that exist")
                return groups
        size = -(-self.columns // self._group_count())
        return np.arange(self.columns) // size

    def _group_count(self) -> int:
        shape = self._module.infos[self._scale_name].shape
        return shape[0] if self._is_transposed else shape[-1]

    @property
    def _is_transposed(self) -> bool:
        """Whether tensors have inputs first."""
        return self._scale_name == "scales"

    @cached_property
    def _scales(self) -> torch.Tensor:
        """[rows, groups]"""
        scales = self._read(self._scale_name)
        return scales.T.contiguous() if self._is_transposed else scales

    @cached_property
    def _zeros(self) -> torch.Tensor | None:
        """[rows, groups] int16, as the unsigned codes count; None: all in the middle."""
        infos, bits = self._module.infos, self._module.bits
        if "qzeros" in infos:
            words = self._read("qzeros").numpy()
            if self._module.method == "awq":
                zeros = _unpack_awq(words)
            else:
                zeros = _unpack(words, bits, axis=1)
                if self._module.method == "gptq":  # its first version stores them less one
                    zeros = (zeros + np.uint8(1)) & np.uint8((1 << bits) - 1)
            return torch.from_numpy(np.ascontiguousarray(zeros.T).astype(np.int16))
        if "weight_zero_point" not in infos:
            return None
        points = self._read("weight_zero_point")
        if "weight_packed" in infos:
            zeros = _unpack(points.numpy(), bits, axis=0)[: self.rows]
            return torch.from_numpy(zeros.astype(np.int16))
        return points.to(torch.int16) + 128

    @cached_property
    def _packed(self) -> NDArray[np.int32]:
        """The codes of a module that has inputs first, which no range of rows is read from."""
        return self._read("qweight").numpy()

    def _codes(self, rows: NDArray[np.int64]) -> torch.Tensor:
        """Codes [rows, columns] uint8."""
        infos, bits = self._module.infos, self._module.bits
        if "qweight" in infos and self._module.method == "awq":
            first, last = int(rows.min()) // 8, int(rows.max()) // 8 + 1
            codes: NDArray[np.uint8] = _unpack_awq(self._packed[:, first:last])[
                :, rows - 8 * first
            ].T
        elif "qweight" in infos:
            codes = _unpack(self._packed[:, rows], bits, axis=0).T
        elif "weight_packed" in infos:
            words = self._read_rows("weight_packed", rows).numpy()
            codes = _unpack(words, bits, axis=1)[:, : self.columns]
        else:
            codes = self._read_rows("weight", rows).numpy().view(np.uint8) ^ np.uint8(128)
        return torch.from_numpy(np.ascontiguousarray(codes, np.uint8))

    def _eight_bit_floats(self, rows: NDArray[np.int64]) -> torch.Tensor:
        """A scale for all, for each row, or for each 128 x 128 weights."""
        weights = self._read_rows("weight", rows).float()
        scales = self._read(self._scale_name).float()
        if scales.numel() == 1:
            return weights * scales.reshape(())
        if scales.shape[0] == self.rows and scales.numel() == self.rows:
            return weights * scales.reshape(-1, 1)[rows]
        columns = np.arange(self.columns) // 128
        return weights * scales[rows // 128][:, columns]

    def _release(self, end: int) -> None:
        """Forget what was read when the last rows have been asked for."""
        if end == self.rows:
            for name in ("_packed", "_scales", "_zeros", "_groups"):
                self.__dict__.pop(name, None)

    def _read(self, name: str) -> torch.Tensor:
        info = self._module.infos[name]
        return _read(info, info.begin, info.end).view(info.shape)

    def _read_rows(self, name: str, rows: NDArray[np.int64]) -> torch.Tensor:
        """Rows of a tensor that has outputs first."""
        info = self._module.infos[name]
        row_bytes = (info.end - info.begin) // info.shape[0]
        first, last = int(rows.min()), int(rows.max()) + 1
        raw = _read(info, info.begin + first * row_bytes, info.begin + last * row_bytes)
        return raw.view(last - first, -1)[torch.from_numpy(rows - first)]

    def _error(self, name: str, what: str) -> ConfigError:
        return ConfigError(f"{self._module.infos[name].path}: tensor {name} {what}")


def _read(info: TensorInfo, begin: int, end: int) -> torch.Tensor:
    """Bytes [begin, end) of a tensor's file, in its type."""
    buffer = bytearray(end - begin)
    with info.path.open("rb") as file:
        file.seek(begin)
        if file.readinto(buffer) != len(buffer):
            raise ConfigError(f"{info.path}: became shorter while it was read")
    return torch.frombuffer(buffer, dtype=_DTYPES[info.dtype])


def _unpack(words: NDArray[np.int32], bits: int, axis: int) -> NDArray[np.uint8]:
    """Fields of ``bits`` bits of each word, from the lowest, in place of the word."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    unsigned = words.view(np.uint32)
    if axis == 0:
        fields = unsigned[:, None, :] >> shifts[:, None]
        shape = (-1, words.shape[1])
    else:
        fields = unsigned[:, :, None] >> shifts
        shape = (words.shape[0], -1)
    return (fields & np.uint32((1 << bits) - 1)).astype(np.uint8).reshape(shape)


def _unpack_awq(words: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Nibbles of each word along the second dimension, in AWQ's order."""
    fields = _unpack(np.ascontiguousarray(words), 4, axis=1).reshape(len(words), -1, 8)
    ordered = np.empty_like(fields)
    ordered[:, :, _AWQ_ORDER] = fields
    return ordered.reshape(len(words), -1)
