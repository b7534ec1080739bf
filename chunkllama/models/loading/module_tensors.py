"""Tensors of a quantized linear module in safetensors: AWQ, GPTQ, compressed-tensors, FP8.

A module is quantized where it has the tensors of its checkpoint's format instead of a float weight,
regardless of lists of ignored modules. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from chunkllama.errors import ConfigError
from chunkllama.models.loading.tensor_info import TensorInfo

METHODS: Final = ("awq", "gptq", "compressed-tensors", "fp8")
_FLOATS: Final = ("F16", "BF16", "F32")
_FORMATS: Final = (  # of compressed-tensors
    *("dense", "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"),
    "mixed-precision",
)
_GROUP_LISTS: Final = ("g_idx", "weight_g_idx")  # the group of each input
# Of activations and of K/V: products and K/V are bfloat16 or float32 here.
_IGNORED: Final = ("input_scale", "input_zero_point", "input_global_scale", "output_scale")


@dataclass(frozen=True, slots=True)
class ModuleTensors:
    """The tensors of one module.

    Attributes:
        method: of the checkpoint.
        bits: of a code; 0: the weight is an 8-bit float.
        rows, columns: of the weight [out, in].
        infos: by the last part of their names.
    """

    method: str
    bits: int
    rows: int
    columns: int
    infos: dict[str, TensorInfo] = field(default_factory=dict)


def quantization_method(settings: Any) -> str:
    """Return the method that a config.json's ``quantization_config`` states.

    Raises:
        ValueError: not one that can be read; the message says what is.
    """
    if not isinstance(settings, Mapping):
        raise ValueError("must be an object")
    method = str(settings.get("quant_method", ""))
    if not method:  # as MLX writes it
        raise ValueError("no quant_method; use a checkpoint of " + ", ".join(METHODS))
    if method not in METHODS:
        raise ValueError(f"quant_method {method!r} is not supported; use {', '.join(METHODS)}")
    match method:
        case "awq" if str(settings.get("version", "gemm")).lower() not in ("gemm", "marlin"):
            raise ValueError(f"AWQ version {settings['version']!r:.40} is not supported; use gemm")
        case "gptq":
            kind = str(settings.get("checkpoint_format") or "gptq")
            if kind not in ("gptq", "gptq_v2"):
                raise ValueError(f"checkpoint_format {kind!r:.40} is not supported; use gptq")
            return kind
        case "compressed-tensors":
            sparsity = settings.get("sparsity_config") or {}
            if str(sparsity.get("format", "dense")) != "dense":
                raise ValueError("sparsity_config: sparse weights are not supported")
            kind = str(settings.get("format") or "dense")
            if kind not in _FORMATS:
                raise ValueError(f"format {kind!r:.40} is not supported; use {', '.join(_FORMATS)}")
            if settings.get("transform_config"):
                raise ValueError("transform_config: transformed weights are not supported")
    return method


def find_module(
    infos: Mapping[str, TensorInfo], method: str, module: str, shape: tuple[int, ...]
) -> ModuleTensors | None:
    """Return a module's tensors, checked; None: its weight is not quantized.

    Raises:
        ConfigError: a tensor is missing or has another shape or type.
    """
    weight = infos.get(f"{module}.weight")
    if weight is not None and weight.dtype in _FLOATS:
        return None
    found = _Finder(infos, method, module, *shape)
    if method == "awq":
        return found.awq()
    if method.startswith("gptq"):
        return found.gptq()
    if weight is not None:
        return found.plain(weight)
    return found.packed() if method == "compressed-tensors" else None


def unused_tensors(infos: Mapping[str, TensorInfo], module: str) -> list[str]:
    """Tensors of a module that only matter to 8-bit activations."""
    names = [f"{module}.{suffix}" for suffix in _IGNORED]
    return [name for name in names if name in infos]


class _Finder:
    def __init__(
        self,
        infos: Mapping[str, TensorInfo],
        method: str,
        module: str,
        rows: int,
        columns: int,
    ) -> None:
        self._infos, self._method, self._module = infos, method, module
        self._rows, self._columns = rows, columns
        self._found: dict[str, TensorInfo] = {}

    def awq(self) -> ModuleTensors | None:
        qweight = self._optional("qweight")
        if qweight is None:
            return None
        rows, columns = self._rows, self._columns
        self._check(qweight, "qweight", [(columns, rows // 8)], "I32")
        scales = self._scales("scales", lambda groups: (groups, rows))
        self._take("qzeros", [(scales.shape[0], rows // 8)], "I32")
        return self._module_of(4)

    def gptq(self) -> ModuleTensors | None:
        qweight = self._optional("qweight")
        if qweight is None:
            return None
        rows, columns = self._rows, self._columns
        bits = self._bits(qweight.shape[0] * 32, columns)
        self._check(qweight, "qweight", [(columns * bits // 32, rows)], "I32")
        scales = self._scales("scales", lambda groups: (groups, rows))
        self._take("qzeros", [(scales.shape[0], rows * bits // 32)], "I32")
        if self._optional("g_idx") is not None:
            self._take("g_idx", [(columns,)], "I32")
        return self._module_of(bits)

    def packed(self) -> ModuleTensors | None:
        weight = self._optional("weight_packed")
        if weight is None:
            return None
        rows, columns = self._rows, self._columns
        bits = self._bits(weight.shape[-1] * 32, columns)
        self._check(weight, "weight_packed", [(rows, -(-columns * bits // 32))], "I32")
        scales = self._scales("weight_scale", lambda groups: (rows, groups))
        if self._optional("weight_zero_point") is not None:
            packed = (-(-rows * bits // 32), scales.shape[1])
            self._take("weight_zero_point", [packed], "I32")
        if self._optional("weight_g_idx") is not None:
            self._take("weight_g_idx", [(columns,)], "I32")
        self._optional("weight_shape")
        return self._module_of(bits)

    def plain(self, weight: TensorInfo) -> ModuleTensors | None:
        """A byte a weight: integers, or floats with a scale for a row, a block or all."""
        rows, columns = self._rows, self._columns
        if weight.dtype not in ("I8", "F8_E4M3"):
            return None
        self._found["weight"] = weight
        self._check(weight, "weight", [(rows, columns)], weight.dtype)
        name = "weight_scale_inv" if self._optional("weight_scale_inv") else "weight_scale"
        if weight.dtype == "I8":
            self._scales(name, lambda groups: (rows, groups))
            if self._optional("weight_zero_point") is not None:
                self._take("weight_zero_point", [self._found[name].shape], "I8")
            return self._module_of(8)
        blocks = (-(-rows // 128), -(-columns // 128))
        self._take(name, [(), (1,), (rows,), (rows, 1), blocks], *_FLOATS)
        return self._module_of(0)

    def _module_of(self, bits: int) -> ModuleTensors:
        return ModuleTensors(self._method, bits, self._rows, self._columns, self._found)

    def _optional(self, suffix: str) -> TensorInfo | None:
        info = self._infos.get(f"{self._module}.{suffix}")
        if info is not None:
            self._found[suffix] = info
        return info

    def _take(self, suffix: str, shapes: list[tuple[int, ...]], *dtypes: str) -> TensorInfo:
        info = self._optional(suffix)
        if info is None:
            raise ConfigError(f"the weights have no tensor {self._module}.{suffix}")
        self._check(info, suffix, shapes, *dtypes)
        return info

    def _scales(self, suffix: str, shape: Any) -> TensorInfo:
        """Scales for groups of inputs, whose number follows from their shape."""
        info = self._take(suffix, [], *_FLOATS)
        sizes = set(info.shape)
        counts = [groups for groups in sizes | {1} if shape(groups) == info.shape]
        if not counts or counts[0] < 1 or self._columns % counts[0]:
            raise self._wrong(
                info, suffix, f"{list(shape(1))} or a scale for each group of equal size"
            )
        size = self._columns // counts[0]
        has_list = any(f"{self._module}.{name}" in self._infos for name in _GROUP_LISTS)
        if counts[0] > 1 and size & (size - 1) and not has_list:
            # Perhaps the last of larger groups is a part of one: their number does not tell.
            raise ConfigError(
                f"tensor {self._module}.{suffix} has {counts[0]} groups for {self._columns} "
                "inputs; groups must be of 2, 4, 8, ... inputs, and all be whole"
            )
        return info

    def _bits(self, held: int, numbers: int) -> int:
        """Bits of a code, from the bits that hold so many."""
        bits = held // max(numbers, 1)
        if bits not in (4, 8):
            raise ConfigError(f"{self._module}: the shape of its codes is not one of 4 or 8 bits")
        return bits

    def _check(
        self, info: TensorInfo, suffix: str, shapes: list[tuple[int, ...]], *dtypes: str
    ) -> None:
        if info.dtype not in dtypes:
            raise ConfigError(
                f"tensor {self._module}.{suffix} is {info.dtype}, expected {' or '.join(dtypes)}"
            )
        if shapes and info.shape not in shapes:
            raise self._wrong(info, suffix, " or ".join(str(list(shape)) for shape in shapes))

    def _wrong(self, info: TensorInfo, suffix: str, expected: str) -> ConfigError:
        return ConfigError(
            f"tensor {self._module}.{suffix} has shape {list(info.shape)}, "
            f"config.json asks for {expected}"
        )
