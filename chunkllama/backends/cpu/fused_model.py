"""A model with packed weights and one native call per step (``CpuBackend.fuse``)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from dataclasses import replace
from typing import Final, NamedTuple

import torch

from chunkllama.backends.adapter import AdapterRows, AdapterWeights
from chunkllama.backends.base import DevicePlan, KVCache
from chunkllama.backends.cpu.abi import BF16, KV_TYPES, TYPES, CHeads, CPlan, mirrors
from chunkllama.backends.cpu.adapter import AdapterBuffers, CStepAdapters, PackedAdapter
from chunkllama.backends.cpu.interleaved import interleave
from chunkllama.backends.cpu.packed import (
    Arena,
    CLinear,
    CWeights,
    Parts,
    Storage,
    WeightTypes,
    pack,
    pack_matrix,
    packed_bytes,
    padded_bias,
    parts_of,
)
from chunkllama.backends.cpu.sizes import UNIT, round_up, row_stride
from chunkllama.backends.model import LayerWeights, Linear, ModelWeights, PlainModel
from chunkllama.backends.quantized import WeightRows
from chunkllama.model_spec import LayerSpec, ModelSpec

KEPT_LOGIT_ROWS: Final = 64


@mirrors("Layer")
class CLayer(Structure):
    _fields_ = (
        *(("attention_norm", c_void_p), ("mlp_norm", c_void_p)),
        *(("qkv", CLinear), ("o", CLinear), ("gate_up", CLinear), ("down", CLinear)),
    )


@mirrors("Model")
class CModel(Structure):
    _fields_ = (
        *(("layers", POINTER(CLayer)), ("num_layers", c_int64), ("heads", CHeads)),
        *(("hidden", c_int64), ("final_norm", c_void_p), ("eps", c_float), ("scale", c_float)),
        *(("vector_rows", c_int32), ("independent_rows", c_int32)),
        *(("embedding", c_void_p), ("embedding_type", c_int32)),
        *(("packed_embedding", CWeights), ("head", CLinear)),
    )


@mirrors("Step")
class CStep(Structure):
    _fields_ = (
        *(("plan", CPlan), ("token_ids", c_void_p), ("positions", c_void_p), ("cos_sin", c_void_p)),
        *(("kv", c_void_p), ("partial_out", c_void_p), ("partial_lse", c_void_p)),
        *((name, c_void_p) for name in ("hidden", "normed", "qkv", "attention", "mlp")),
        ("adapters", CStepAdapters),
    )


class RowSettings(NamedTuple):
    """How attention computes the query rows of an item for one kv head.

    Attributes:
        vector_rows: up to so many run on the vector units, more on AMX.
        independent: they do not change each other's numbers.
    """

    vector_rows: int
    independent: bool


def can_fuse(spec: ModelSpec) -> bool:
    """Whether ``kernels/cpu/model.cpp`` computes this model: plain pre-norm layers, all with the
    same window or none.
    """
    return (
        all(_is_plain(layer) for layer in spec.layers)
        and len({layer.window for layer in spec.layers}) == 1
        and spec.attention_softcap is None
        and spec.logit_softcap is None
        and (spec.embedding_multiplier, spec.residual_multiplier, spec.logit_multiplier)
        == (1, 1, 1)
    )


def _is_plain(layer: LayerSpec) -> bool:
    plain = replace(LayerSpec(), window=layer.window)  # a window is the plan's
    biases = (layer.qkv_bias, layer.output_bias, layer.mlp_bias)
    return layer == replace(plain, qkv_bias=biases[0], output_bias=biases[1], mlp_bias=biases[2])


class FusedModel:
    """Implement ``RunnableModel``: what the plain model computes, in one native call per step.

    Activations between the ops are bf16 (AMX) or float32, the residual stream is float32. The
    packed weights replace the model's, whose tensors are freed one by one; with tied embeddings
    rows are read from the packed head, unless packing it lost something that the embedding has.

    Args:
        library: of the level that runs it.
        rows: how attention computes the rows of an item.
        model: of a specification that ``can_fuse`` accepts; it cannot run any more afterwards.
        types: of the packed matrices, see ``weight_types``.
    """

    def __init__(
        self, library: ctypes.CDLL, rows: RowSettings, model: PlainModel, types: WeightTypes
    ) -> None:
        spec = model.spec
        self._types = types
        self._library = library
        activation = self._library.ck_activation_type(types.own)
        self._activation = torch.bfloat16 if activation == BF16 else torch.float32
        self._hidden, self._vocab = spec.hidden_size, spec.vocab_size
        self._intermediate = spec.intermediate_size
        self._dtype = model.kv.dtype
        self._kv: KVCache = model.kv
        self._cos_sin = model.rotary[0].float().contiguous()
        self._keep: list[torch.Tensor] = []
        self._arena = Arena(self._size(model.weights))
        heads = CHeads(
            *(spec.num_qo_heads, spec.num_kv_heads, spec.head_dim),
            *(KV_TYPES[self._kv.stored_dtype], activation),
        )
        self._widths = {
            "hidden": row_stride(spec.hidden_size),
            "qkv": round_up(spec.qkv_size, UNIT),
            "attention": row_stride(spec.num_qo_heads * spec.head_dim),
            "mlp": row_stride(spec.intermediate_size),
        }
        packed = (CLayer * spec.num_layers)(*(self._pack_layer(x) for x in model.weights.layers))
        self._model = CModel(
            *(packed, spec.num_layers, heads, spec.hidden_size, self._vector(model.weights.norm)),
            *(spec.rms_norm_eps, spec.score_scale, rows.vector_rows, rows.independent),
        )
        self._adapter_buffers = AdapterBuffers()
        self._pack_head(model.weights)
        self._kv_pointers = (c_void_p * spec.num_layers)(*(x.data_ptr() for x in self._kv.layers))
        self._rows = 0
        self._kept_logits = torch.empty(0, 0)
        self._reserve(UNIT)

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        plan: DevicePlan,
        adapters: Sequence[AdapterRows] = (),
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
        step.adapters = CStepAdapters()
        if adapters:
            step.adapters = self._adapter_buffers.step(adapters, rows, self._dtype)
        self._library.ck_forward(
            ctypes.byref(self._model), ctypes.byref(step), torch.get_num_threads()
        )
        return self._buffers["hidden"][:rows, : self._hidden]

    def prepare_adapter(self, weights: AdapterWeights) -> tuple[PackedAdapter, int]:
        """Return the adapter in the order of the kernels, in the model's dtype, and its bytes."""
        packed = PackedAdapter(weights.to(self._dtype), self._intermediate)
        return packed, packed.num_bytes

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, H] -> [N, vocab_size] float32; up to 64 rows in a buffer the next call reuses."""
        rows, head = hidden.shape[0], self._model.head
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
        rows = hidden.shape[0]
        values, tokens = torch.empty(rows), torch.empty(rows, dtype=torch.int64)
        x = self._head_input(hidden)
        self._library.ck_best(
            *(ctypes.byref(self._model.head), x.data_ptr(), x.stride(0), TYPES[self._activation]),
            *(self._vocab, values.data_ptr(), tokens.data_ptr(), rows, torch.get_num_threads()),
        )
        return values, tokens

    def _head_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """Rows of the activations' type, padded as the kernels want them."""
        rows = hidden.shape[0]
        x = torch.zeros(round_up(rows, UNIT), self._widths["hidden"], dtype=self._activation)
        x[:rows, : self._hidden] = hidden
        return x

    def _reserve(self, rows: int) -> None:
        """Buffers for so many rows, zeroed once: what lies beyond the end of a row stays zero."""
        if rows <= self._rows:
            return
        self._rows = rows = round_up(rows, UNIT)
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

    def _size(self, weights: ModelWeights) -> int:
        """Bytes of all packed matrices."""
        total = packed_bytes(self._parts(weights.lm_head, head=True))
        if weights.embedding_rows is not None and not weights.is_tied:
            rows = weights.embedding_rows
            total += self._embedding_storage(rows).size(rows.rows, rows.columns)
        for layer in weights.layers:
            total += sum(
                packed_bytes(self._parts(each)) for each in (layer.qkv, layer.output, layer.down)
            )
            total += packed_bytes(self._parts(layer.gate_up, interleaved=True))
        return total

    def _parts(self, linear: Linear, *, interleaved: bool = False, head: bool = False) -> Parts:
        types = self._types
        wanted = types.head if head else types.layers
        return parts_of(linear, types.own, wanted, interleaved=interleaved)

    def _embedding_storage(self, rows: WeightRows) -> Storage:
        """An embedding beside the head stays as the checkpoint has it."""
        return Storage(self._types.own) if rows.format is None else Storage.of(rows.format)

    def _pack_layer(self, layer: LayerWeights) -> CLayer:
        assert layer.input_norm is not None and layer.mlp_norm is not None
        return CLayer(
            self._vector(layer.input_norm),
            self._vector(layer.mlp_norm),
            self._pack(layer.qkv),
            self._pack(layer.output),
            self._pack(layer.gate_up, interleaved=True),
            self._pack(layer.down),
        )

    def _pack_head(self, weights: ModelWeights) -> None:
        rows, is_tied = weights.embedding_rows, weights.is_tied
        self._model.head = self._pack(weights.lm_head, head=True)
        if rows is not None and not is_tied:
            storage = self._embedding_storage(rows)
            self._model.packed_embedding = pack_matrix(
                self._library, self._arena, rows, storage, self._types.few
            )
        elif rows is not None or (is_tied and self._types.head in (None, self._types.own)):
            self._model.packed_embedding = self._model.head.parts[0]
        else:
            self._keep.append(weights.embedding.contiguous())
            self._model.embedding = self._keep[-1].data_ptr()
            self._model.embedding_type = TYPES[self._keep[-1].dtype]
        weights.embedding, weights.embedding_rows = torch.empty(0), None

    def _pack(self, linear: Linear, *, interleaved: bool = False, head: bool = False) -> CLinear:
        bias_address = 0
        if linear.bias is not None:
            bias = interleave(linear.bias) if interleaved else linear.bias
            bias_address = self._vector(padded_bias(bias))
        parts = self._parts(linear, interleaved=interleaved, head=head)
        packed = pack(self._library, self._arena, parts, bias_address, self._types.few)
        linear.weight, linear.bias = torch.empty(0), None
        return packed

    def _vector(self, values: torch.Tensor) -> int:
        """A float32 copy that lives as long as the model."""
        self._keep.append(values.float().contiguous())
        return self._keep[-1].data_ptr()
