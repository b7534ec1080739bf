"""The interface of a backend: what a device does for a model, with the same signatures everywhere.

``select.py`` chooses one per device: ``reference`` (torch, everywhere), ``cpu`` (C++) or ``cuda``
(CuPy RawKernels).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from chunkllama.attention.plan_format import AttentionPlan, Packing
from chunkllama.backends.checks import (
    check_copy_chunks,
    check_rms_norm,
    check_rope_append,
    check_silu_and_mul,
    check_tpp_attention,
)
from chunkllama.backends.draws import Draw, draw_tokens
from chunkllama.backends.elementwise import apply_activation, rotate_heads
from chunkllama.backends.kivi import Bytes, KiviCodec
from chunkllama.backends.model import Linear, PlainModel, RunnableModel
from chunkllama.backends.quantized import widen_model
from chunkllama.errors import ConfigError
from chunkllama.model_spec import KV_SCALE_BYTES, Activation

CopyTriple = tuple[int, int, int]
Quantization = Literal["auto", "bf16", "fp32", "int8", "int4"]
Activations = Literal["int8", "float"]
KVStorage = Literal["auto", "int8"]

_WIDENED_ROWS = 4096


@dataclass(slots=True)
class KVCache:
    """The chunk pool's tensors, one per layer, in the backend's own layout: only backends may index
    them.

    ``layers[i]`` holds K and V of ``num_chunks`` chunks of ``chunk_size`` tokens x ``num_kv_heads``
    x ``head_dim``, which the model computes in ``dtype``. They are stored in it, or as int8 codes
    with their scales (``int8_kv.py``). ``state`` belongs to the backend.
    """

    layers: list[torch.Tensor]
    num_chunks: int
    chunk_size: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    is_int8: bool = False
    state: Any = None

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of ``layers``."""
        return torch.int8 if self.is_int8 else self.dtype

    @property
    def row_elements(self) -> int:
        """Canonical elements of K, or V, of one head of a token."""
        return self.head_dim + KV_SCALE_BYTES if self.is_int8 else self.head_dim


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """An attention plan on the device: ``host`` keeps the sizes, ``buffer`` is the one int32 tensor
    of its arrays.

    ``state`` belongs to the backend (workspaces, gather indices, launch arguments) and is built
    once per plan. ``others`` are plans of the same rows for layers with other windows.
    """

    host: AttentionPlan
    buffer: torch.Tensor
    state: Any = None
    others: tuple[DevicePlan, ...] = ()

    def for_window(self, window: int | None) -> DevicePlan:
        """The plan of layers with that window."""
        for plan in (self, *self.others):
            if plan.host.window == window:
                return plan
        raise AssertionError(f"no plan was built for a window of {window}")


@dataclass(frozen=True, slots=True)
class LayerRows:
    """The rows of a step in one layer: where they stand and which chunks they read and write.

    Attributes:
        positions: [T] int32.
    """

    kv: KVCache
    layer: int
    positions: torch.Tensor
    plan: DevicePlan


class Backend(ABC):
    """Tensors in, tensors out; shapes use T rows (query tokens), Hq and Hkv heads, D head_dim.

    The public ops state the contract, check their arguments and call the method of a backend, named
    with an underscore.

    Attributes:
        isa_level: instructions that the kernels were compiled for, where there is a choice.
        arithmetic: what the numbers of a row depend on beside the model and its tokens, where they
            do not depend on the other rows; "" where they do.
    """

    name: str
    device: torch.device
    chunk_sizes: tuple[int, ...]
    isa_level: str = ""
    arithmetic: str = ""

    @abstractmethod
    def packing(self, *, num_qo_heads: int, num_kv_heads: int, head_dim: int) -> Packing:
        """Return how the planner cuts rows and runs for this device."""

    @abstractmethod
    def upload_plan(self, plan: AttentionPlan, kv: KVCache, *, num_qo_heads: int) -> DevicePlan:
        """Bring a plan to the device, once per plan; attention runs per layer then take only
        tensors.
        """

    def upload(self, array: NDArray[Any]) -> torch.Tensor:
        """Bring an array to the device, which copies it while this process goes on; on a CPU it is
        the same memory.
        """
        host = torch.from_numpy(array)
        if self.device.type != "cuda":
            return host.to(self.device)
        return host.pin_memory().to(self.device, non_blocking=True)

    def prepare(self, *, is_bounded: bool) -> None:  # noqa: B027
        """Compile what a model needs, so that no request waits for it.

        Args:
            is_bounded: the model has sliding windows or a soft cap of scores.
        """

    def settle(self, kv: KVCache) -> None:  # noqa: B027
        """Wait until the system has given the memory that a pool begins with."""

    def fuse(
        self,
        model: PlainModel,
        quantization: Quantization = "auto",
        int4_activations: Activations = "int8",
    ) -> RunnableModel:
        """Return the model as this device runs it best: fused, or itself with packed weights.

        Quantized weights are widened to the model's dtype where a backend has no kernels for them.
        ``model`` must not be used afterwards unless it is what is returned.

        Args:
            quantization: storage of the linear layers.
            int4_activations: what few rows are multiplied by 4-bit weights in, where the backend
                has a choice.

        Raises:
            ConfigError: a quantization that the backend lacks.
        """
        is_bf16 = model.weights.embedding.dtype == torch.bfloat16
        if quantization == "auto" or (quantization == "bf16" and is_bf16):
            widen_model(model.weights, self.device)
            return model
        raise ConfigError(
            f"quantization: {quantization} is not available with the {self.name} backend; use auto"
        )

    def activation_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the type of activations in a plain model whose weights have ``dtype``."""
        return dtype

    def allocate_kv(
        self,
        *,
        num_layers: int,
        num_chunks: int,
        chunk_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        is_int8: bool = False,
    ) -> KVCache:
        """Allocate the pool; unwritten memory may hold anything, NaN included.

        Args:
            dtype: that the model computes in.
            is_int8: store K/V as int8 codes.

        Raises:
            ValueError: a count below 1, or a chunk size that the backend lacks.
            ConfigError: a head_dim, dtype or storage that it lacks.
        """
        if chunk_size not in self.chunk_sizes:
            raise ValueError(
                f"allocate_kv: chunk size {chunk_size} is not one of {list(self.chunk_sizes)}"
            )
        counts = (num_layers, num_chunks, num_kv_heads, head_dim)
        if min(counts) < 1:
            raise ValueError(f"allocate_kv: every count must be at least 1, got {counts}")
        kv = KVCache([], num_chunks, chunk_size, num_kv_heads, head_dim, dtype, is_int8)
        kv.layers.extend(self._allocate_layers(kv, num_layers))
        return kv

    def _allocate_layers(self, kv: KVCache, num_layers: int) -> list[torch.Tensor]:
        """One contiguous [num_chunks, 2, num_kv_heads, chunk_size, row_elements] tensor per layer,
        K then V, unwritten.
        """
        shape = (kv.num_chunks, 2, kv.num_kv_heads, kv.chunk_size, kv.row_elements)
        dtype, device = kv.stored_dtype, self.device
        return [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]

    def arrange_chunk(self, kv: KVCache, chunk: torch.Tensor) -> torch.Tensor:
        """Rearrange canonical K/V [layers, 2, kv heads, chunk_size, row_elements] on the host, K
        then V, as a chunk of each layer of ``kv`` lies in memory: [layers, ...]. Any thread may
        call it.
        """
        return chunk

    def restore_chunk(self, kv: KVCache, chunk: torch.Tensor) -> torch.Tensor:
        """Return the canonical K/V of what ``arrange_chunk`` returns. Any thread may call it."""
        return chunk

    def widen_chunk(self, kv: KVCache, codec: KiviCodec, data: Bytes) -> torch.Tensor:
        """Return what ``arrange_chunk`` returns of the chunk that ``codec`` has encoded. Any thread
        may call it."""
        return self.arrange_chunk(kv, codec.decode(data))

    def copy_chunk(self, kv: KVCache, chunk_id: int) -> torch.Tensor:
        """Copy a whole chunk to the host, as ``arrange_chunk`` returns it."""
        return torch.stack([layer[chunk_id] for layer in kv.layers]).cpu()

    def write_chunk(self, kv: KVCache, chunk_id: int, arranged: torch.Tensor) -> None:
        """Store a whole chunk, as ``arrange_chunk`` returns it."""
        for layer, part in zip(kv.layers, arranged, strict=True):
            layer[chunk_id].copy_(part)

    def linear(self, x: torch.Tensor, layer: Linear) -> torch.Tensor:
        """x [T, in] -> x W^T + b [T, out] in x's dtype."""
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, layer.weight.to(x.dtype), bias)

    def logits(self, hidden: torch.Tensor, head: Linear) -> torch.Tensor:
        """hidden [N, H] -> hidden W^T [N, vocab_size] float32."""
        if hidden.dtype == torch.float32 == head.weight.dtype:
            return F.linear(hidden, head.weight)
        if hidden.is_cuda:
            return torch.mm(hidden, head.weight.t(), out_dtype=torch.float32)
        # A CPU's bfloat16 product rounds its result (between 16 and 32 to eighths): tokens tie.
        # Widened a block at a time, the head needs no second copy.
        wide, blocks = hidden.float(), torch.split(head.weight, _WIDENED_ROWS)
        return torch.cat([F.linear(wide, block.float()) for block in blocks], dim=1)

    def draw(self, logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
        """Draw a token from a row of logits [N, V] float32, for each of D draws on different rows:
        [D] int64, any token where a row allows none. ``logits`` may be overwritten.
        """
        return draw_tokens(logits, draws, self.upload)

    def rms_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        residual: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, H] (+ residual [T, H]) -> (normalised, the sum). The sum is the next residual;
        inputs may be reused.
        """
        check_rms_norm(x, weight, residual)
        return self._rms_norm(x, weight, eps, residual)

    @abstractmethod
    def _rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def rope_append(
        self,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        kv: KVCache,
        layer: int,
        plan: DevicePlan,
    ) -> torch.Tensor:
        """Rotate q and k of qkv [T, (Hq + 2 Hkv) D], write k and v into the rows' chunks, return q
        [T, Hq, D] (mixed as the keys of an int8 pool are).

        positions [T] int32; cos_sin [max_position, D] float32: cos of the D/2 frequencies, then sin
        (rotate-half).
        """
        num_rows = self._num_rows(plan, qkv)
        num_qo_heads = check_rope_append(qkv, positions, cos_sin, kv, num_rows)
        return self._rope_append(qkv, cos_sin, LayerRows(kv, layer, positions, plan), num_qo_heads)

    @abstractmethod
    def _rope_append(
        self, qkv: torch.Tensor, cos_sin: torch.Tensor, rows: LayerRows, num_qo_heads: int
    ) -> torch.Tensor: ...

    def rotate(
        self, qkv: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, kv: KVCache
    ) -> torch.Tensor:
        """Rotate q and k of qkv [T, (Hq + 2 Hkv) D] as ``rope_append`` does, and write nothing: for
        models that normalise them afterwards. Returns qkv's shape and dtype.
        """
        heads = qkv.view(len(qkv), -1, kv.head_dim)
        q_and_k, v = heads[:, : -kv.num_kv_heads], heads[:, -kv.num_kv_heads :]
        return torch.cat((rotate_heads(q_and_k, positions, cos_sin), v), dim=1).view_as(qkv)

    def tpp_attention(
        self,
        q: torch.Tensor,
        kv: KVCache,
        layer: int,
        positions: torch.Tensor,
        plan: DevicePlan,
        scale: float,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Two-phase partition attention and merge: q [T, Hq, D] -> [T, Hq D] in q's dtype.

        Scores are q k times ``scale``; with ``softcap`` they become softcap * tanh(s / softcap).
        """
        check_tpp_attention(q, kv, positions, self._num_rows(plan, q))
        return self._tpp_attention(q, LayerRows(kv, layer, positions, plan), scale, softcap)

    @abstractmethod
    def _tpp_attention(
        self, q: torch.Tensor, rows: LayerRows, scale: float, softcap: float | None
    ) -> torch.Tensor: ...

    def _num_rows(self, plan: DevicePlan, rows: torch.Tensor) -> int:
        """Number of rows that a tensor must have."""
        return plan.host.num_rows

    def activate(self, x: torch.Tensor, activation: Activation, *, gated: bool) -> torch.Tensor:
        """Apply the MLP's activation: [T, 2 I] -> act(gate) * up [T, I], or [T, I] -> act(x).

        Computed in float32 and rounded once, to x's dtype.
        """
        if not gated:
            wide = self.map_rows(partial(apply_activation, activation=activation), x.float())
            return wide.to(x.dtype)
        if activation == "silu":
            return self.silu_and_mul(x)
        gate, up = x.chunk(2, dim=-1)
        wide = self.map_rows(partial(apply_activation, activation=activation), gate.float())
        return (wide * up).to(x.dtype)

    def map_rows(
        self, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
    ) -> torch.Tensor:
        """Apply a function of single elements to x [N, ...].

        torch computes the last elements of a thread's part by other instructions than the rest, so
        with ``arithmetic`` each row is a call of its own.
        """
        if not self.arithmetic or len(x) <= 1:
            return function(x)
        return torch.cat([function(row) for row in torch.split(x, 1)])

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """gate_up [T, 2 I] -> silu(gate) * up [T, I]."""
        check_silu_and_mul(gate_up)
        return self._silu_and_mul(gate_up)

    @abstractmethod
    def _silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor: ...

    def copy_chunks(self, kv: KVCache, triples: list[CopyTriple]) -> None:
        """Copy the first ``num_tokens`` of chunk src to chunk dst, in every layer, for (src, dst,
        num_tokens).
        """
        check_copy_chunks(kv, triples)
        if triples:
            self._copy_chunks(kv, triples)

    @abstractmethod
    def _copy_chunks(self, kv: KVCache, triples: list[CopyTriple]) -> None: ...
