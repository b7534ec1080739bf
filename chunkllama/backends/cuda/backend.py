"""The backend on NVIDIA GPUs: output tensors, parameter structs, grids.

Knows the kernels' parameter structs (kernels/cuda/*.cuh) and no CuPy: a ``Launcher`` runs what this
file describes, so that the same code drives the CPU emulator in the tests. Kernels run on torch's
current stream; nothing here waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import torch

from chunkllama.attention.plan_format import AttentionPlan, Packing
from chunkllama.backends.base import Backend, CopyTriple, DevicePlan, KVCache, LayerRows
from chunkllama.backends.cuda.launch import CupyLauncher, Launcher
from chunkllama.backends.cuda.plan import (
    CudaPlan,
    PartialLaunch,
    gpu_packing,
    partial_launches,
    plan_addresses,
)
from chunkllama.backends.cuda.source import (
    CHUNK_SIZE,
    DRAW_ROW,
    HEAD_DIMS,
    PARAMS,
    copy_chunks_kernel,
    draw_tokens_kernel,
    merge_kernel,
    rms_norm_kernel,
    rope_append_kernel,
    silu_and_mul_kernel,
)
from chunkllama.backends.draws import LOG2E, Draw
from chunkllama.backends.reference.rms_norm import rms_norm_reference
from chunkllama.errors import ConfigError

DTYPE_NAMES: Final = {torch.bfloat16: "bf16", torch.float16: "fp16"}

_MERGE_WARPS = 4  # rows of heads per CTA of tpp_merge
_SILU_ELEMENTS = 256 * 8  # elements per CTA of silu_and_mul


class CudaBackend(Backend):
    """Implement ``Backend`` on CUDA; K/V layout [num_chunks, 2, num_kv_heads, 64, head_dim] per
    layer, bf16 or fp16.

    Args:
        device: the GPU.
        launcher: runs the kernels; None: CuPy on ``device``.

    Raises:
        ConfigError: no CuPy or GPU, or a dtype or head_dim that the kernels lack.
    """

    name = "cuda"
    chunk_sizes = (CHUNK_SIZE,)

    def __init__(
        self,
        device: torch.device,
        *,
        dtype: torch.dtype,
        head_dim: int,
        num_kv_heads: int,
        launcher: Launcher | None = None,
    ) -> None:
        if dtype not in DTYPE_NAMES:
            raise ConfigError(
                f"dtype: {dtype} does not run on cuda, use --dtype bfloat16 or float16"
            )
        if head_dim not in HEAD_DIMS:
            raise ConfigError(f"head_dim: {head_dim} is not one of {HEAD_DIMS} (cuda ops)")
        self.device = device
        self.dtype = dtype
        self.head_dim = head_dim
        self.num_kv_heads = num_kv_heads
        self._launcher = launcher or CupyLauncher(device)
        name = DTYPE_NAMES[dtype]
        self._merge_kernel = merge_kernel(name, head_dim)
        self._rope_append_kernel = rope_append_kernel(name, head_dim)
        self._rms_norm_kernel = rms_norm_kernel(name)
        self._silu_and_mul_kernel = silu_and_mul_kernel(name)
        self._copy_chunks_kernel = copy_chunks_kernel()
        self._draw_tokens_kernel = draw_tokens_kernel()

    def prepare(self, *, is_bounded: bool) -> None:
        tiles = self._launcher.table.tiles[self.head_dim]
        name = DTYPE_NAMES[self.dtype]
        kernels = [tile.kernel(name) for tile in tiles]
        if is_bounded:
            kernels += [tile.kernel(name, bounded=True) for tile in tiles]
        self._launcher.prepare(
            [
                *kernels,
                self._merge_kernel,
                self._rope_append_kernel,
                self._rms_norm_kernel,
                self._silu_and_mul_kernel,
                self._copy_chunks_kernel,
                self._draw_tokens_kernel,
            ]
        )

    def packing(self, *, num_qo_heads: int, num_kv_heads: int, head_dim: int) -> Packing:
        """Items as wide as the largest tile, single rows (with their group of heads) in the
        smallest that holds one; runs cut until every CTA that fits the device has work.
        """
        return gpu_packing(
            self._launcher.table,
            self._launcher.num_sms,
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
        )

    def _allocate_layers(self, kv: KVCache, num_layers: int) -> list[torch.Tensor]:
        if (kv.head_dim, kv.dtype) != (self.head_dim, self.dtype):
            raise ConfigError(
                f"allocate_kv: head_dim {kv.head_dim}, {kv.dtype} differ from the backend's "
                f"{self.head_dim}, {self.dtype}"
            )
        if kv.is_int8:
            raise ConfigError("kv_dtype: int8 is not available with the cuda backend; use auto")
        return super()._allocate_layers(kv, num_layers)

    def upload_plan(
        self,
        plan: AttentionPlan,
        kv: KVCache,
        *,
        num_qo_heads: int,
        replayable: bool = False,
    ) -> DevicePlan:
        """Copy the plan and prepare its launches.

        Args:
            replayable: launch for all that a plan of this capacity may hold (both tile classes, the
                largest tile, the merge), so that a CUDA graph of these launches stays right when
                the buffer's contents change. Otherwise only for what this plan holds.
        """
        buffer = self.upload(plan.buffer)
        packing = self.packing(
            num_qo_heads=num_qo_heads, num_kv_heads=kv.num_kv_heads, head_dim=kv.head_dim
        )
        launches = partial_launches(
            plan,
            packing,
            self._launcher.table,
            self._launcher.num_sms,
            dtype=DTYPE_NAMES[self.dtype],
            head_dim=kv.head_dim,
            group=num_qo_heads // kv.num_kv_heads,
            replayable=replayable,
        )
        state = self._state(plan, buffer, kv, num_qo_heads, tuple(launches), replayable)
        return DevicePlan(plan, buffer, state)

    def _state(
        self,
        plan: AttentionPlan,
        buffer: torch.Tensor,
        kv: KVCache,
        num_qo_heads: int,
        launches: tuple[PartialLaunch, ...],
        replayable: bool,
    ) -> CudaPlan:
        """Workspace, and the part of every parameter struct that stays the same over the layers."""
        shape, stride = (plan.capacity.slots, num_qo_heads), kv.layers[0].stride(0)
        partial_out = torch.empty((*shape, kv.head_dim), dtype=torch.float32, device=self.device)
        partial_lse = torch.empty(shape, dtype=torch.float32, device=self.device)
        workspace = (partial_out.data_ptr(), partial_lse.data_ptr())
        at = plan_addresses(plan, buffer.data_ptr())
        partial = tuple(
            (
                launch,
                PARAMS[launch.kernel.params].plan.pack(
                    kv.num_kv_heads,
                    num_qo_heads // kv.num_kv_heads,
                    launch.row_tiles,
                    launch.tile_class,
                    plan.window or 0,
                    *workspace,
                    *(at.header, at.items, at.chunk_ids, at.row_flags),
                    stride,
                ),
            )
            for launch in launches
        )
        merge = PARAMS[self._merge_kernel.params].plan.pack(
            *workspace,
            *(at.header, at.merge_indptr, at.merge_slots, at.row_flags),
            num_qo_heads,
        )
        append = PARAMS[self._rope_append_kernel.params].plan.pack(
            *(at.header, at.chunk_ids, at.row_tail), stride, num_qo_heads, kv.num_kv_heads
        )
        merges = replayable or not bool(plan.row_flags[: plan.num_rows].all())
        return CudaPlan(partial_out, partial_lse, partial, merge if merges else None, append)

    def draw(self, logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
        assert logits.dtype == torch.float32 and logits.is_contiguous()
        rows = self.upload(np.frombuffer(bytearray().join(map(_draw_row, draws)), np.int32))
        tokens = torch.empty(len(draws), dtype=torch.int64, device=self.device)
        params = PARAMS[self._draw_tokens_kernel.params].call.pack(
            logits.data_ptr(), rows.data_ptr(), tokens.data_ptr(), logits.shape[1]
        )
        self._launcher.launch(self._draw_tokens_kernel, (len(draws), 1, 1), params)
        return tokens

    def _rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if weight.dtype != x.dtype:  # float32 weights, where an offset needs their precision
            return rms_norm_reference(x, weight, eps, residual)
        _check_vectors("rms_norm", x, x.shape[1])
        if residual is None:
            out, total, total_address, residual_address = torch.empty_like(x), x, 0, 0
        else:  # both inputs are dead afterwards: the row is normalised where it stands
            out, total = x, residual
            total_address = residual_address = residual.data_ptr()
        params = PARAMS[self._rms_norm_kernel.params].call.pack(
            x.data_ptr(),
            weight.data_ptr(),
            residual_address,
            total_address,
            out.data_ptr(),
            x.shape[1],
            eps,
        )
        self._launcher.launch(self._rms_norm_kernel, (x.shape[0], 1, 1), params)
        return out, total

    def _rope_append(
        self, qkv: torch.Tensor, cos_sin: torch.Tensor, rows: LayerRows, num_qo_heads: int
    ) -> torch.Tensor:
        kv, positions, num_rows = rows.kv, rows.positions, qkv.shape[0]
        _check_vectors("rope_append", qkv, kv.head_dim)
        assert positions.dtype == torch.int32 and cos_sin.dtype == torch.float32
        q = qkv.new_empty(num_rows, num_qo_heads, kv.head_dim)
        params = PARAMS[self._rope_append_kernel.params].call.pack(
            qkv.data_ptr(),
            q.data_ptr(),
            kv.layers[rows.layer].data_ptr(),
            cos_sin.data_ptr(),
            positions.data_ptr(),
        )
        params += rows.plan.state.append
        self._launcher.launch(self._rope_append_kernel, (num_rows, 1, 1), params)
        return q

    def _num_rows(self, plan: DevicePlan, rows: torch.Tensor) -> int:
        assert plan.host.num_rows <= len(rows), "fewer rows than the plan has"
        return len(rows)

    def _tpp_attention(
        self, q: torch.Tensor, rows: LayerRows, scale: float, softcap: float | None
    ) -> torch.Tensor:
        kv, positions = rows.kv, rows.positions
        num_rows, num_qo_heads, _ = q.shape
        _check_vectors("tpp_attention", q, kv.head_dim)
        assert positions.dtype == torch.int32 and scale > 0.0
        state: CudaPlan = rows.plan.state
        out = torch.empty_like(q)
        params = PARAMS["TppPartialParams"].call.pack(
            q.data_ptr(),
            kv.layers[rows.layer].data_ptr(),
            out.data_ptr(),
            positions.data_ptr(),
            (scale if softcap is None else softcap) * math.log2(math.e),
            0.0 if softcap is None else scale / softcap,
        )
        is_bounded = softcap is not None or rows.plan.host.window is not None
        for launch, fixed in state.partial:
            kernel = launch.bounded_kernel if is_bounded else launch.kernel
            self._launcher.launch(kernel, launch.grid, params + fixed)
        if state.merge is not None:
            params = PARAMS[self._merge_kernel.params].call.pack(out.data_ptr()) + state.merge
            grid = (num_rows, -(-num_qo_heads // _MERGE_WARPS), 1)
            self._launcher.launch(self._merge_kernel, grid, params)
        return out.view(num_rows, -1)

    def _silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        _check_vectors("silu_and_mul", gate_up, size)
        out = gate_up.new_empty(rows, size)
        params = PARAMS[self._silu_and_mul_kernel.params].call.pack(
            gate_up.data_ptr(), out.data_ptr(), size
        )
        self._launcher.launch(
            self._silu_and_mul_kernel, (rows, -(-size // _SILU_ELEMENTS), 1), params
        )
        return out

    def _copy_chunks(self, kv: KVCache, triples: list[CopyTriple]) -> None:
        """One triple after the other: a launch takes as many as do not depend on one another."""
        for batch in independent_copies(triples):
            layers = np.array([layer.data_ptr() for layer in kv.layers], np.uint64)
            words = np.array(batch, np.int32).reshape(-1)
            buffer = self.upload(np.concatenate((layers.view(np.int32), words)))
            params = PARAMS[self._copy_chunks_kernel.params].call.pack(
                buffer.data_ptr(),
                buffer.data_ptr() + layers.nbytes,
                kv.layers[0].stride(0),
                kv.head_dim,
            )
            grid = (len(batch), 2 * kv.num_kv_heads, len(kv.layers))
            self._launcher.launch(self._copy_chunks_kernel, grid, params)


def independent_copies(triples: list[CopyTriple]) -> Iterator[list[CopyTriple]]:
    """The triples in order, in runs in which no chunk is written that another triple reads or
    writes; copies of a chunk onto itself and of nothing are left out.
    """
    batch: list[CopyTriple] = []
    read: set[int] = set()
    written: set[int] = set()
    for source, destination, num_tokens in triples:
        if source == destination or num_tokens == 0:
            continue
        if source in written or destination in written or destination in read:
            yield batch
            batch, read, written = [], set(), set()
        batch.append((source, destination, num_tokens))
        read.add(source)
        written.add(destination)
    if batch:
        yield batch


def _draw_row(draw: Draw) -> bytes:
    top_p = 0 if draw.top_p >= 1.0 else min(max(round(draw.top_p * 2**32), 1), 2**32 - 1)
    return DRAW_ROW.pack(
        draw.seed & 0xFFFF_FFFF_FFFF_FFFF,
        *(draw.row, draw.choice, draw.position),
        *(draw.top_k, top_p, draw.min_p, LOG2E / draw.temperature),
    )


def _check_vectors(op: str, tensor: torch.Tensor, width: int) -> None:
    """The kernels read rows 16 bytes at a time."""
    if width % 8 or not tensor.is_contiguous():
        raise ValueError(
            f"{op}: needs contiguous rows of a multiple of 8 elements, got {tuple(tensor.shape)} "
            f"with strides {tensor.stride()}"
        )
