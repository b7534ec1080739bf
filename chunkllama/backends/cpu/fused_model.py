"""A Llama with packed weights and one native call per step (``CpuBackend.prepare_model``)."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from typing import Any, Final, Literal, Protocol

import torch

from chunkllama.backends.base import DevicePlan, KVCache
from chunkllama.backends.cpu.abi import BF16, F32, INT8, TYPES, CHeads, CPlan
from chunkllama.backends.cpu.memory import allocate_lazily
from chunkllama.errors import ConfigError

WeightType = Literal["auto", "bf16", "fp32", "int8"]
WEIGHT_TYPES: Final = {"fp32": F32, "bf16": BF16, "int8": INT8}
BITS: Final = {F32: 32, BF16: 16, INT8: 8.5}  # int8: with a bf16 scale for each 32 of them
UNIT: Final = 32  # output columns that are packed together
STRIDE: Final = 64  # k of packed weights is a multiple of this
KEPT_LOGIT_ROWS: Final = 64


class CLinear(Structure):
    _fields_ = (
        *(("weight", c_void_p), ("bias", c_void_p)),
        *(("n", c_int64), ("k", c_int64), ("type", c_int32)),
    )


class CLayer(Structure):
    _fields_ = (
        *(("attention_norm", c_void_p), ("mlp_norm", c_void_p)),
        *(("qkv", CLinear), ("o", CLinear), ("gate_up", CLinear), ("down", CLinear)),
    )


class CModel(Structure):
    _fields_ = (
        *(("layers", POINTER(CLayer)), ("num_layers", c_int64), ("heads", CHeads)),
        *(("hidden", c_int64), ("final_norm", c_void_p), ("eps", c_float), ("scale", c_float)),
        *(("vector_rows", c_int32), ("embedding", c_void_p), ("embedding_type", c_int32)),
        ("head", CLinear),
    )


class CStep(Structure):
    _fields_ = (
        *(("plan", CPlan), ("token_ids", c_void_p), ("positions", c_void_p), ("cos_sin", c_void_p)),
        *(("kv", c_void_p), ("partial_out", c_void_p), ("partial_lse", c_void_p)),
        *((name, c_void_p) for name in ("hidden", "normed", "qkv", "attention", "mlp")),
    )


class DenseLayer(Protocol):
    """y = x W^T + b (``models.layers.Linear``); the weight is taken over."""

    weight: torch.Tensor
    bias: torch.Tensor | None


class FusedModel:
    """Implements ``RunnableModel``: what ``Llama`` computes, in one native call per step.

    Activations between the ops are bf16 (AMX) or float32, the residual stream is float32. One copy
    of the weights: packed ones replace the model's, whose own tensors are given up; with tied
    embeddings rows are read from the packed head, only int8 heads keep the embedding beside them.

    Args:
        library: of the level that runs it.
        vector_rows: query rows per kv head up to which attention runs on the vector units.
        model: a ``models.llama.Llama`` on the native backend; it cannot run any more afterwards.
        weights: type of the packed matrices; "auto" is the model's own.

    Raises:
        ConfigError: an unknown weight type, or one wider than the model's own.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        vector_rows: int,
        model: Any,
        weights: WeightType = "auto",
    ) -> None:
        spec, attention = model.spec, model.attention
        own = TYPES[model.weights.embedding.dtype]
        if weights != "auto" and weights not in WEIGHT_TYPES:
            raise ConfigError(f"weights: {weights!r} is not one of auto, {', '.join(WEIGHT_TYPES)}")
        self._type = own if weights == "auto" else WEIGHT_TYPES[weights]
        if self._type != INT8 and self._type != own:
            raise ConfigError(f"weights: {weights} does not fit --dtype; use auto or int8")
        self._library = library
        activation = self._library.ck_activation_type(own)
        self._activation = torch.bfloat16 if activation == BF16 else torch.float32
        self._hidden, self._vocab = spec.hidden_size, spec.vocab_size
        self._kv: KVCache = attention.kv
        self._cos_sin = model.cos_sin.float().contiguous()
        self._keep: list[torch.Tensor] = []
        self._arena = _Arena(_packed_bytes(model.weights, self._type))
        heads = CHeads(
            *(spec.num_qo_heads, spec.num_kv_heads, spec.head_dim),
            *(TYPES[self._kv.layers[0].dtype], activation),
        )
        self._widths = {
            "hidden": _stride(spec.hidden_size),
            "qkv": _round_up(spec.qkv_size, UNIT),
            "attention": _stride(spec.num_qo_heads * spec.head_dim),
            "mlp": _stride(spec.intermediate_size),
        }
        packed = (CLayer * spec.num_layers)(*(self._pack_layer(x) for x in model.weights.layers))
        self._model = CModel(
            *(packed, spec.num_layers, heads, spec.hidden_size, self._vector(model.weights.norm)),
            *(spec.rms_norm_eps, attention.scale, vector_rows),
        )
        self._pack_head(model.weights)
        self._kv_pointers = (c_void_p * spec.num_layers)(*(x.data_ptr() for x in self._kv.layers))
        self._rows = 0
        self._kept_logits = torch.empty(0, 0)
        self._reserve(UNIT)

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, plan: DevicePlan
    ) -> torch.Tensor:
        """[T] ids and positions -> normalised hidden states [T, H] float32, valid until the next
        call.
        """
        rows = plan.host.num_rows
        assert token_ids.shape == positions.shape == (rows,), (token_ids.shape, rows)
        self._reserve(rows)
        ids, positions = token_ids.int().contiguous(), positions.int().contiguous()
        step = self._step
        step.plan = plan.state.plan
        step.token_ids, step.positions = ids.data_ptr(), positions.data_ptr()
        step.partial_out = plan.state.partial_out.data_ptr()
        step.partial_lse = plan.state.partial_lse.data_ptr()
        self._library.ck_forward(
            ctypes.byref(self._model), ctypes.byref(step), torch.get_num_threads()
        )
        return self._buffers["hidden"][:rows, : self._hidden]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, H] -> [N, vocab_size] float32; up to 64 rows in a buffer the next call reuses."""
        rows, head = len(hidden), self._model.head
        if rows > KEPT_LOGIT_ROWS:
            y = torch.empty(rows, head.n)
        else:
            if not self._kept_logits.numel():
                self._kept_logits = torch.empty(KEPT_LOGIT_ROWS, head.n)
            y = self._kept_logits[:rows]
        x = self._head_input(hidden)
        self._library.ck_linear(
            *(ctypes.byref(head), x.data_ptr(), x.stride(0), TYPES[self._activation]),
            *(y.data_ptr(), head.n, rows, torch.get_num_threads()),
        )
        return y[:, : self._vocab]

    def best_tokens(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = len(hidden)
        values, tokens = torch.empty(rows), torch.empty(rows, dtype=torch.int64)
        x = self._head_input(hidden)
        self._library.ck_best(
            *(ctypes.byref(self._model.head), x.data_ptr(), x.stride(0), TYPES[self._activation]),
            *(self._vocab, values.data_ptr(), tokens.data_ptr(), rows, torch.get_num_threads()),
        )
        return values, tokens

    def _head_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """Rows of the activations' type, padded as the kernels want them."""
        x = torch.zeros(
            _round_up(len(hidden), UNIT), self._widths["hidden"], dtype=self._activation
        )
        x[: len(hidden), : self._hidden] = hidden
        return x

    def _reserve(self, rows: int) -> None:
        """Buffers for so many rows, zeroed once: what lies beyond the end of a row stays zero."""
        if rows <= self._rows:
            return
        self._rows = rows = _round_up(rows, UNIT)
        widths = self._widths
        self._buffers = {
            "hidden": torch.zeros(rows, widths["hidden"]),
            "normed": torch.zeros(rows, widths["hidden"], dtype=self._activation),
            "qkv": torch.zeros(rows, widths["qkv"], dtype=self._activation),
            "attention": torch.zeros(rows, widths["attention"], dtype=self._activation),
            "mlp": torch.zeros(rows, widths["mlp"], dtype=self._activation),
        }
        self._step = CStep(
            cos_sin=self._cos_sin.data_ptr(),
            kv=ctypes.cast(self._kv_pointers, c_void_p),
            **{name: buffer.data_ptr() for name, buffer in self._buffers.items()},
        )

    def _pack_layer(self, layer: Any) -> CLayer:
        return CLayer(
            self._vector(layer.input_norm),
            self._vector(layer.mlp_norm),
            self._pack(layer.qkv),
            self._pack(layer.output),
            self._pack(layer.gate_up, interleaved=True),
            self._pack(layer.down),
        )

    def _pack_head(self, weights: Any) -> None:
        tied = weights.lm_head is weights.embedding
        self._model.head = self._pack_matrix(weights.lm_head, None)
        if not tied or self._type == INT8:
            self._keep.append(weights.embedding.contiguous())
            self._model.embedding = self._keep[-1].data_ptr()
            self._model.embedding_type = TYPES[self._keep[-1].dtype]
        weights.embedding = weights.lm_head = torch.empty(0)

    def _pack(self, linear: DenseLayer, *, interleaved: bool = False) -> CLinear:
        weight, bias = linear.weight, linear.bias
        if interleaved:
            weight = _interleave(weight)
            bias = None if bias is None else _interleave(bias)
        packed = self._pack_matrix(weight, bias)
        linear.weight, linear.bias = torch.empty(0), None
        return packed

    def _pack_matrix(self, weight: torch.Tensor, bias: torch.Tensor | None) -> CLinear:
        weight = weight.contiguous()
        n, k = (
            _round_up(size, unit) for size, unit in zip(weight.shape, (UNIT, STRIDE), strict=True)
        )
        padded_bias = 0
        if bias is not None:
            padded_bias = self._vector(torch.nn.functional.pad(bias, (0, n - len(bias))))
        packed = CLinear(
            self._arena.take(_packed_size(n, k, self._type)), padded_bias, n, k, self._type
        )
        self._library.ck_pack(
            *(weight.data_ptr(), TYPES[weight.dtype], *weight.shape, ctypes.byref(packed)),
            torch.get_num_threads(),
        )
        return packed

    def _vector(self, values: torch.Tensor) -> int:
        """A float32 copy that lives as long as the model."""
        self._keep.append(values.float().contiguous())
        return self._keep[-1].data_ptr()


class _Arena:
    """One lazily committed block on huge pages, handed out piece by piece."""

    def __init__(self, size: int) -> None:
        self._memory = allocate_lazily(size, torch.uint8)
        self._used = 0

    def take(self, size: int) -> int:
        at = self._used
        self._used += _round_up(size, STRIDE)
        assert self._used <= self._memory.numel(), "the arena was sized for other weights"
        return self._memory.data_ptr() + at


def _packed_bytes(weights: Any, weight_type: int) -> int:
    """Size of all packed matrices."""
    shapes = [tuple(weights.lm_head.shape)]
    for layer in weights.layers:
        rows, columns = layer.gate_up.weight.shape
        shapes += [tuple(x.weight.shape) for x in (layer.qkv, layer.output, layer.down)]
        shapes.append((2 * _round_up(rows // 2, STRIDE), columns))
    padded = ((_round_up(n, UNIT), _round_up(k, STRIDE)) for n, k in shapes)
    return sum(_round_up(_packed_size(n, k, weight_type), STRIDE) for n, k in padded)


def _packed_size(n: int, k: int, weight_type: int) -> int:
    return int(n * k * BITS[weight_type]) // 8


def _interleave(stacked: torch.Tensor) -> torch.Tensor:
    """[gate; up] -> 16 rows of gate, 16 of up, ...: each padded with zeros to whole strides."""
    gate, up = stacked.chunk(2)
    size = _round_up(len(gate), STRIDE)
    both = stacked.new_zeros(size // 16, 2, 16, *stacked.shape[1:])
    for at, part in enumerate((gate, up)):
        padded = torch.nn.functional.pad(part, (0, 0) * (part.dim() - 1) + (0, size - len(part)))
        both[:, at] = padded.view(size // 16, 16, *stacked.shape[1:])
    return both.flatten(0, 2)


def _stride(width: int) -> int:
    """Elements from one row of an activation to the next, as ``stride`` in model.cpp."""
    return _round_up(width, STRIDE) + 32


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
