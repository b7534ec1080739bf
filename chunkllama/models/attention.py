"""Attention of a model: plan once a step, run once a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from chunkllama.attention.plan import Planner
from chunkllama.attention.plan_blocks import SHORTEST_FIXED
from chunkllama.backends.base import Backend, DevicePlan, KVCache


class PlannedSlice(Protocol):
    """What a plan needs of a scheduled slice (``scheduler.output.ScheduledSlice`` has it)."""

    @property
    def slot(self) -> int: ...
    @property
    def first_position(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def chunk_ids(self) -> NDArray[np.int32]: ...
    @property
    def shared(self) -> int: ...


class PlannedStep(Protocol):
    """What a plan needs of a step (``scheduler.output.SchedulerOutput`` has it)."""

    @property
    def slices(self) -> Sequence[PlannedSlice]: ...
    @property
    def plan_version(self) -> int: ...


class Attention:
    """Rotary embedding, append and attention over the chunk pool, for all layers of a model.

    The rows of every tensor in a step are the tokens of ``step.slices`` in their order, one slice
    after the other.

    Args:
        backend: the device's ops.
        kv: the chunk pool, allocated by the same backend.
        planner: cuts rows and runs as the backend's ``packing`` says.
        num_qo_heads: query heads of this rank.
        scale: factor of the scores, usually head_dim ** -0.5.
        softcap: of the scores, see ``Backend.tpp_attention``.
        windows: keys that a row sees in each layer, itself included, None: all; repeated up to the
            model's depth.
    """

    def __init__(
        self,
        backend: Backend,
        kv: KVCache,
        planner: Planner,
        num_qo_heads: int,
        scale: float,
        softcap: float | None = None,
        windows: Sequence[int | None] = (None,),
    ) -> None:
        assert planner.chunk_size == kv.chunk_size, (planner.chunk_size, kv.chunk_size)
        self.backend = backend
        self.kv = kv
        self.planner = planner
        self.num_qo_heads = num_qo_heads
        self.scale = scale
        self.softcap = softcap
        self.windows = tuple(windows)
        self._decode_plan: DevicePlan | None = None

    @property
    def reach(self) -> int | None:
        """Tokens up to the next one that some layer of a step may read; None: all."""
        windows = [window for window in self.windows if window is not None]
        if len(windows) < len(self.windows):
            return None
        unit = SHORTEST_FIXED if self.planner.packing.fixed_runs else 1
        return max(windows) + (unit - 1) * self.kv.chunk_size

    def replace_pool(self, num_chunks: int) -> None:
        """Allocate a pool of another size; what the old one holds is lost."""
        old, self._decode_plan = self.kv, None
        num_layers = len(old.layers)
        old.layers.clear()
        self.kv = self.backend.allocate_kv(
            num_layers=num_layers,
            num_chunks=num_chunks,
            chunk_size=old.chunk_size,
            num_kv_heads=old.num_kv_heads,
            head_dim=old.head_dim,
            dtype=old.dtype,
            is_int8=old.is_int8,
        )

    def plan(self, step: PlannedStep) -> DevicePlan:
        """The step's plan on the device; while ``plan_version`` stays the same, the one built
        before.
        """
        version = step.plan_version
        cached = self._decode_plan
        if version != 0 and cached is not None and cached.host.version == version:
            assert cached.host.num_rows == len(step.slices), "rows changed, the version did not"
            return cached
        first, *others = (self._plan(step, window) for window in dict.fromkeys(self.windows))
        plan = replace(first, others=tuple(others))
        if version != 0:
            self._decode_plan = plan
        return plan

    def _plan(self, step: PlannedStep, window: int | None) -> DevicePlan:
        slices = step.slices
        host = self.planner.build(
            first_positions=[s.first_position for s in slices],
            num_tokens=[s.num_tokens for s in slices],
            chunk_ids=[s.chunk_ids for s in slices],
            shared=[s.shared for s in slices],
            version=step.plan_version,
            window=window,
        )
        return self.backend.upload_plan(host, self.kv, num_qo_heads=self.num_qo_heads)

    def forward(
        self,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        layer: int,
        plan: DevicePlan,
    ) -> torch.Tensor:
        """Append the rows' K and V to the pool, then attend: qkv [T, (Hq + 2 Hkv) D] -> [T, Hq D].

        Args:
            qkv: fused projections, in the model's dtype.
            positions: [T] int32.
            cos_sin: [max_position, D] float32, cos of the D / 2 frequencies, then sin.
            layer: index into ``kv.layers``.
            plan: of this step.
        """
        plan = plan.for_window(self.windows[layer % len(self.windows)])
        q = self.backend.rope_append(qkv, positions, cos_sin, self.kv, layer, plan)
        return self.backend.tpp_attention(
            q, self.kv, layer, positions, plan, self.scale, self.softcap
        )
