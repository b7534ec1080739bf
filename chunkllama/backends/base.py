"""The backend: what a device must be able to do for the model, behind the same signatures on every
backend.

One implementation is chosen once per device (``ops/select.py``): the torch reference (everywhere),
``native`` (C++ on CPUs), ``cuda`` (CuPy RawKernels).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from chunkllama.attention.plan_format import AttentionPlan, Packing

CopyTriple = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class KVCache:
    """The chunk pool's tensors, one per layer, in the backend's own layout: nothing outside ops may
    index them.

    ``layers[i]`` holds K and V of ``num_chunks`` chunks of ``chunk_size`` tokens x ``num_kv_heads``
    x ``head_dim``.
    """

    layers: list[torch.Tensor]
    num_chunks: int
    chunk_size: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """An attention plan on the device: ``host`` stays for sizes, ``buffer`` is the one int32 tensor
    of its arrays.

    ``state`` belongs to the backend (workspaces, gather indices, launch arguments) and is built
    once per plan.
    """

    host: AttentionPlan
    buffer: torch.Tensor
    state: Any = None


class Backend(Protocol):
    """Tensors in, tensors out; shapes use T rows (query tokens), Hq and Hkv heads, D head_dim.

    Backends subclass it: what they have in common stands here.
    """

    name: str
    device: torch.device
    chunk_sizes: tuple[int, ...]

    def packing(self, *, num_qo_heads: int, num_kv_heads: int, head_dim: int) -> Packing:
        """How the planner should cut rows and runs for this device."""
        ...

    def allocate_kv(
        self,
        *,
        num_layers: int,
        num_chunks: int,
        chunk_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> KVCache:
        """Allocate the pool; unwritten memory may hold anything, NaN included.

        Raises:
            ValueError: a count below 1, or a chunk size that the backend lacks.
            ConfigError: a head_dim or dtype that it lacks.
        """
        if chunk_size not in self.chunk_sizes:
            raise ValueError(
                f"allocate_kv: chunk size {chunk_size} is not one of {list(self.chunk_sizes)}"
            )
        counts = (num_layers, num_chunks, num_kv_heads, head_dim)
        if min(counts) < 1:
            raise ValueError(f"allocate_kv: every count must be at least 1, got {counts}")
        kv = KVCache([], num_chunks, chunk_size, num_kv_heads, head_dim)
        kv.layers.extend(self._allocate_layers(kv, num_layers, dtype))
        return kv

    def _allocate_layers(
        self, kv: KVCache, num_layers: int, dtype: torch.dtype
    ) -> list[torch.Tensor]:
        """One contiguous [num_chunks, 2, num_kv_heads, chunk_size, head_dim] tensor per layer, K
        then V, unwritten.
        """
        shape = (kv.num_chunks, 2, kv.num_kv_heads, kv.chunk_size, kv.head_dim)
        return [torch.empty(shape, dtype=dtype, device=self.device) for _ in range(num_layers)]

    def upload_plan(self, plan: AttentionPlan, kv: KVCache, *, num_qo_heads: int) -> DevicePlan:
        """Bring a plan to the device, once per plan; attention runs per layer then take only
        tensors.
        """
        ...

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
        ...

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
        [T, Hq, D].

        positions [T] int32; cos_sin [max_position, D] float32: cos of the D/2 frequencies, then sin
        (rotate-half).
        """
        ...

    def tpp_attention(
        self,
        q: torch.Tensor,
        kv: KVCache,
        layer: int,
        positions: torch.Tensor,
        plan: DevicePlan,
        scale: float,
    ) -> torch.Tensor:
        """Two-phase partition attention and merge: q [T, Hq, D] -> [T, Hq D] in q's dtype."""
        ...

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """gate_up [T, 2 I] -> silu(gate) * up [T, I]."""
        ...

    def copy_chunks(self, kv: KVCache, triples: list[CopyTriple]) -> None:
        """Copy the first ``num_tokens`` of chunk src to chunk dst, in every layer, for (src, dst,
        num_tokens).
        """
        ...
