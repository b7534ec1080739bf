"""CPU backend: C++ kernels (``kernels/cpu``) behind ctypes; the only module that calls them.

``python -m chunkllama.backends.cpu.backend`` compiles every level this machine can run.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from ctypes import c_void_p
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch

from chunkllama.attention.plan_format import AttentionPlan, Packing
from chunkllama.backends.base import (
    Activations,
    Backend,
    CopyTriple,
    DevicePlan,
    KVCache,
    LayerRows,
    Quantization,
)
from chunkllama.backends.cpu import chunk_layout
from chunkllama.backends.cpu.abi import (
    KV_TYPES,
    TYPES,
    CAttention,
    CHeads,
    CNorm,
    CPlan,
    CRope,
    load_library,
)
from chunkllama.backends.cpu.build import (
    NativeBuildError,
    available_levels,
    build,
    known_levels,
)
from chunkllama.backends.cpu.fused_model import FusedModel, RowSettings, can_fuse
from chunkllama.backends.cpu.memory import PoolCommitter, allocate_lazily
from chunkllama.backends.cpu.packed import (
    PackedLinear,
    pack_model,
    weight_types,
)
from chunkllama.backends.cpu.sizes import UNIT, round_up, row_stride
from chunkllama.backends.cpu.tuning import NO_FEW_ROWS, load_tuning
from chunkllama.backends.kivi import Bytes, KiviCodec
from chunkllama.backends.model import Linear, PlainModel, RunnableModel
from chunkllama.errors import ConfigError
from chunkllama.resources import cpu_name

logger = logging.getLogger(__name__)

_ALL_ROWS: Final = (1 << 31) - 1  # more than an item has


@dataclass(frozen=True, slots=True)
class CpuPlan:
    """A plan as the kernels take it, and the workspace of its partials."""

    plan: CPlan
    partial_out: torch.Tensor  # [slots, Hq, D] float32
    partial_lse: torch.Tensor  # [slots, Hq] float32


class CpuBackend(Backend):
    """Implement ``Backend`` with the library of one instruction-set level; bf16 and fp32.

    Args:
        dtype: of the model and its K/V.
        head_dim: a multiple of 16, at most 256.
        num_kv_heads: kv heads of this rank.
        level: name of an instruction-set level; the best one that this machine has if empty.
        sanitizer: "address" or "undefined" for an instrumented library.
        deterministic: the numbers of a row do not depend on the other rows: weights are always
            widened, attention takes one kind of unit and runs of fixed length.

    Raises:
        ConfigError: the dtype or head_dim has no kernel, or no level can be built or used here.
    """

    name = "cpu"
    chunk_sizes = (64,)

    def __init__(
        self,
        *,
        dtype: torch.dtype,
        head_dim: int,
        num_kv_heads: int,
        level: str = "",
        sanitizer: str = "",
        deterministic: bool = False,
    ) -> None:
        _check_shape(dtype, head_dim)
        self.device = torch.device("cpu")
        self.level, self.library = _best_library(level, sanitizer)
        self.isa_level = self.level
        self.tuning = load_tuning(self.level)
        # AMX rounds queries and probabilities to bf16: a model in float32 is to keep its precision.
        few = 0 if deterministic else self.tuning.vector_rows
        self.vector_rows = few if dtype == torch.bfloat16 else _ALL_ROWS
        if deterministic:
            # The name has hashes of the sources, the flags and the compiler.
            build_name, threads = Path(self.library._name).stem, torch.get_num_threads()
            self.arithmetic = f"{build_name} on {cpu_name()}, {threads} threads"
        self._partials = torch.empty(0)
        self._product_type = int(self.library.ck_activation_type(TYPES[dtype]))
        self._product_dtype = {code: dtype for dtype, code in TYPES.items()}[self._product_type]
        self._inputs: dict[int, torch.Tensor] = {}
        logger.info("CPU kernels: level %s", self.level)

    def fuse(
        self,
        model: PlainModel,
        quantization: Quantization = "auto",
        int4_activations: Activations = "int8",
    ) -> RunnableModel:
        """Return one native call per step where the kernels know the model's specification and all
        of it is here; for any other the model itself, its linear layers packed.
        """
        types = weight_types(model.weights, quantization)
        # A model in float32 is to keep its precision.
        rounds = int4_activations == "int8" and types.own == TYPES[torch.bfloat16]
        few = replace(self.tuning.few_rows, rounds=rounds)
        types = replace(types, few=NO_FEW_ROWS if self.arithmetic else few)
        fused: RunnableModel = model
        if model.all_reduce is None and can_fuse(model.spec):
            rows = RowSettings(self.vector_rows, bool(self.arithmetic))
            fused = FusedModel(self.library, rows, model, types)
        else:
            pack_model(self.library, model.weights, types)
        model.kv.state.reach(0)  # not before: it would take processors from packing
        return fused

    def settle(self, kv: KVCache) -> None:
        kv.state.join()

    def activation_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return float32: the kernels sum in it, and narrow what a product reads themselves."""
        return torch.float32

    def packing(self, *, num_qo_heads: int, num_kv_heads: int, head_dim: int) -> Packing:
        """The longest runs that still give each thread a few units: fewer partials to merge."""
        group = num_qo_heads // num_kv_heads
        tuning = self.tuning.packing
        return Packing(
            rows_per_item=max(1, tuning.query_rows_per_item // group),
            min_run_chunks=tuning.min_run_chunks,
            target_units=tuning.units_per_thread * torch.get_num_threads(),
            num_kv_heads=num_kv_heads,
            split_private=tuning.split_private,
            spare_chunks=tuning.spare_chunks,
            fixed_runs=bool(self.arithmetic),
        )

    def _allocate_layers(self, kv: KVCache, num_layers: int) -> list[torch.Tensor]:
        """A [num_chunks, elements] tensor per layer on huge pages, committed from ``fuse`` on."""
        _check_shape(kv.dtype, kv.head_dim)
        heads = _heads(kv.num_kv_heads, kv, kv.dtype)
        elements = self.library.ck_chunk_elements(ctypes.byref(heads))
        pool = allocate_lazily(num_layers * kv.num_chunks * elements, kv.stored_dtype)
        layers = list(pool.view(num_layers, kv.num_chunks, elements).unbind())
        kv.state = PoolCommitter(layers, kv.num_chunks)
        return layers

    def arrange_chunk(self, kv: KVCache, chunk: torch.Tensor) -> torch.Tensor:
        return chunk_layout.arrange(chunk, kv.head_dim)

    def widen_chunk(self, kv: KVCache, codec: KiviCodec, data: Bytes) -> torch.Tensor:
        return chunk_layout.widen(self.library, codec, data, kv.layers[0].shape[1])

    def restore_chunk(self, kv: KVCache, chunk: torch.Tensor) -> torch.Tensor:
        return chunk_layout.restore(chunk, kv.num_kv_heads, kv.chunk_size, kv.head_dim)

    def write_chunk(self, kv: KVCache, chunk_id: int, arranged: torch.Tensor) -> None:
        kv.state.reach(chunk_id)
        super().write_chunk(kv, chunk_id, arranged)

    def upload_plan(self, plan: AttentionPlan, kv: KVCache, *, num_qo_heads: int) -> DevicePlan:
        kv.state.reach(int(plan.chunk_ids.max()))
        state = CpuPlan(
            c_plan(plan),
            *self._workspace(plan.num_slots, num_qo_heads, kv.head_dim),
        )
        return DevicePlan(plan, torch.from_numpy(plan.buffer), state)

    def _workspace(self, slots: int, heads: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views into one buffer, as large as the largest plan so far: one plan runs at a time."""
        size = slots * heads * (dim + 1)
        if self._partials.numel() < size:
            self._partials = torch.empty(size)
        flat = self._partials[:size]
        split = slots * heads * dim
        return flat[:split].view(slots, heads, dim), flat[split:].view(slots, heads)

    def linear(self, x: torch.Tensor, layer: Linear) -> torch.Tensor:
        if not isinstance(layer, PackedLinear):
            return super().linear(x, layer)
        return self._product(x, layer).to(x.dtype)

    def logits(self, hidden: torch.Tensor, head: Linear) -> torch.Tensor:
        if not isinstance(head, PackedLinear):
            return super().logits(hidden, head)
        return self._product(hidden, head)

    def _product(self, x: torch.Tensor, layer: PackedLinear) -> torch.Tensor:
        """x [T, in] -> [T, out] float32."""
        rows, width = x.shape
        y = torch.empty(rows, layer.packed.n)
        padded = self._input(rows, width)
        padded[:rows, :width] = x
        self.library.ck_linear(
            *(ctypes.byref(layer.packed), padded.data_ptr(), padded.stride(0), self._product_type),
            *(y.data_ptr(), layer.packed.n, rows, torch.get_num_threads()),
        )
        return y[:, : layer.out]

    def _input(self, rows: int, width: int) -> torch.Tensor:
        """A buffer per width, zeroed once: what lies beyond the end of a row stays zero."""
        buffer = self._inputs.get(width)
        if buffer is None or len(buffer) < rows:
            shape = (round_up(rows, UNIT), row_stride(width))
            buffer = self._inputs[width] = torch.zeros(shape, dtype=self._product_dtype)
        return buffer

    def _rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.contiguous()
        y, hidden = torch.empty_like(x), x.shape[-1]
        weight = weight.float().contiguous()
        total = x
        if residual is not None:
            residual, total = residual.contiguous(), torch.empty_like(x)
        args = CNorm(
            x.data_ptr(),
            None if residual is None else residual.data_ptr(),
            total.data_ptr(),
            y.data_ptr(),
            weight.data_ptr(),
            *(hidden, hidden, hidden),
            *(TYPES[x.dtype], TYPES[x.dtype], eps),
        )
        self.library.ck_rms_norm(ctypes.byref(args), x.numel() // hidden, torch.get_num_threads())
        return y, total

    def _rope_append(
        self, qkv: torch.Tensor, cos_sin: torch.Tensor, rows: LayerRows, num_qo_heads: int
    ) -> torch.Tensor:
        kv, plan = rows.kv, rows.plan
        qkv, positions = qkv.contiguous(), rows.positions.int().contiguous()
        q = qkv.new_empty(plan.host.num_rows, num_qo_heads, kv.head_dim)
        args = CRope(
            plan.state.plan,
            _heads(num_qo_heads, kv, qkv.dtype),
            *(positions.data_ptr(), cos_sin.data_ptr(), qkv.data_ptr(), q.data_ptr()),
            *(qkv.shape[1], num_qo_heads * kv.head_dim, kv.layers[rows.layer].data_ptr()),
        )
        self.library.ck_rope_append(ctypes.byref(args), torch.get_num_threads())
        return q

    def _tpp_attention(
        self, q: torch.Tensor, rows: LayerRows, scale: float, softcap: float | None
    ) -> torch.Tensor:
        kv, plan = rows.kv, rows.plan
        q, positions = q.contiguous(), rows.positions.int().contiguous()
        num_rows, num_qo_heads, head_dim = q.shape
        width = num_qo_heads * head_dim
        out = q.new_empty(num_rows, width)
        args = CAttention(
            plan.state.plan,
            _heads(num_qo_heads, kv, q.dtype),
            *(positions.data_ptr(), q.data_ptr(), out.data_ptr(), width, width),
            kv.layers[rows.layer].data_ptr(),
            *(plan.state.partial_out.data_ptr(), plan.state.partial_lse.data_ptr()),
            *((scale, 0.0) if softcap is None else (softcap, scale / softcap)),
            *(self.vector_rows, bool(self.arithmetic)),
        )
        self.library.ck_attention(ctypes.byref(args), torch.get_num_threads())
        return out

    def _silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate_up = gate_up.contiguous()
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        y = gate_up.new_empty(rows, size)
        self.library.ck_silu_and_mul(
            *(gate_up.data_ptr(), y.data_ptr(), rows, size, TYPES[y.dtype], torch.get_num_threads())
        )
        return y

    def _copy_chunks(self, kv: KVCache, triples: list[CopyTriple]) -> None:
        table = np.array([t for t in triples if t[0] != t[1]], np.int32)
        layers = (c_void_p * len(kv.layers))(*(layer.data_ptr() for layer in kv.layers))
        heads = _heads(kv.num_kv_heads, kv, kv.dtype)
        self.library.ck_copy_chunks(
            *(layers, len(layers), ctypes.byref(heads), table.ctypes.data, len(table)),
            torch.get_num_threads(),
        )


def c_plan(plan: AttentionPlan) -> CPlan:
    """Pointers into the plan's buffer, which must outlive them."""
    arrays = (plan.items, plan.chunk_ids, plan.row_tail, plan.merge_indptr, plan.merge_slots)
    pointers = [array.ctypes.data for array in (*arrays, plan.row_flags)]
    return CPlan(*pointers, plan.num_items, plan.num_rows, plan.window or 0)


def _check_shape(dtype: torch.dtype, head_dim: int) -> None:
    if dtype not in TYPES:
        raise ConfigError(f"dtype: the cpu backend has bfloat16 and float32, not {dtype}")
    if head_dim % 16 or not 16 <= head_dim <= 256:
        raise ConfigError(f"head_dim: {head_dim} is not a multiple of 16 up to 256 (cpu backend)")


def _heads(num_qo_heads: int, kv: KVCache, activation: torch.dtype) -> CHeads:
    kv_type = KV_TYPES[kv.stored_dtype]
    return CHeads(num_qo_heads, kv.num_kv_heads, kv.head_dim, kv_type, TYPES[activation])


def _best_library(level: str, sanitizer: str) -> tuple[str, ctypes.CDLL]:
    failures: list[str] = []
    for candidate in available_levels():
        if level not in ("", candidate.name):
            continue
        try:
            library = load_library(candidate, sanitizer)
        except NativeBuildError as error:
            failures.append(f"{candidate.name}: {error}")
            continue
        for failure in failures:
            logger.warning("CPU kernels without level %s", failure)
        return candidate.name, library
    if not failures:
        names = ", ".join(each.name for each in available_levels())
        raise ConfigError(f"isa_level: this CPU lacks {level}; use auto or one of {names}")
    raise ConfigError(f"backend: cpu is not available here: {failures[0]}")


def main() -> int:
    """Build every level this machine can run; 0 if at least one came out."""
    built = 0
    for level in known_levels():
        if level not in available_levels():
            print(f"{level.name}: not on this machine")
            continue
        try:
            print(f"{level.name}: {build(level)}", flush=True)
            built += 1
        except NativeBuildError as error:
            print(f"{level.name}: {error}", flush=True)
    return 0 if built else 1


if __name__ == "__main__":
    sys.exit(main())
