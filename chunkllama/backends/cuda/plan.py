"""How an attention plan runs on a GPU: how to cut it, and its kernels' launches and memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from chunkllama.attention.plan_format import NUM_ROWS, TILE_CLASS, AttentionPlan, Packing
from chunkllama.backends.cuda.source import HardwareTable, KernelSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class PartialLaunch:
    """One launch of ``tpp_partial``: a tile class of a plan.

    Attributes:
        kernel: without windows and soft caps.
        bounded_kernel: with them.
    """

    kernel: KernelSpec
    bounded_kernel: KernelSpec
    grid: tuple[int, int, int]
    row_tiles: int
    tile_class: int


@dataclass(frozen=True, slots=True)
class PlanAddresses:
    """Device addresses of a plan's arrays."""

    header: int
    items: int
    chunk_ids: int
    row_tail: int
    merge_indptr: int
    merge_slots: int
    row_flags: int


@dataclass(frozen=True, slots=True)
class CudaPlan:
    """What ``upload_plan`` prepares for every layer.

    Attributes:
        partial_out: [S, Hq, D] float32 workspace.
        partial_lse: [S, Hq] float32 workspace.
        partial: launches of phase one, at most one per tile class, each with what the plan fixes of
            its parameters.
        merge: what the plan fixes of the merge's parameters; None: no row has two partials.
        append: what the plan fixes of ``rope_append``'s parameters.
    """

    partial_out: torch.Tensor
    partial_lse: torch.Tensor
    partial: tuple[tuple[PartialLaunch, bytes], ...]
    merge: bytes | None
    append: bytes


def gpu_packing(
    table: HardwareTable, num_sms: int, *, num_qo_heads: int, num_kv_heads: int, head_dim: int
) -> Packing:
    """Items as wide as the largest tile; few rows (with their group of heads) in the smallest tile
    that holds one; runs cut until every CTA that fits the device has work.
    """
    group = num_qo_heads // num_kv_heads
    large, small = table.tiles[head_dim][-1], table.tile_for(head_dim, group)
    return Packing(
        rows_per_item=max(1, large.rows // group),
        small_rows_per_item=max(1, small.rows // group) if small.rows < large.rows else 0,
        min_run_chunks=table.min_run_chunks,
        target_units=table.waves * num_sms * small.min_ctas,
        num_kv_heads=num_kv_heads,
        split_private=True,
        chunk_cost_rows=table.chunk_cost_rows,
        spare_chunks=table.spare_chunks,
    )


def partial_launches(
    plan: AttentionPlan,
    packing: Packing,
    table: HardwareTable,
    num_sms: int,
    *,
    dtype: str,
    head_dim: int,
    group: int,
    replayable: bool,
) -> Iterator[PartialLaunch]:
    """Each tile class in the smallest tile that holds its largest item: of this plan, or of any
    plan of its capacity and packing (``replayable``). As many CTAs as the device runs at once: they
    walk all units, however many the device buffer holds when the launch is replayed.
    """
    items = plan.items[: plan.num_items]
    widest = (packing.rows_per_item, packing.small_rows_per_item)
    for tile_class in (0, 1):
        rows = items[items[:, TILE_CLASS] == tile_class, NUM_ROWS]
        largest = widest[tile_class] if replayable else int(rows.max(initial=0))
        assert rows.max(initial=0) <= largest, "the plan is of another packing"
        if largest == 0:
            continue
        tile = table.tile_for(head_dim, largest * group)
        row_tiles = -(-largest * group // tile.rows)
        num_items = plan.capacity.items if replayable else len(rows)
        units = num_items * packing.num_kv_heads * row_tiles
        ctas = min(units, table.waves * num_sms * tile.min_ctas)
        kernels = tile.kernel(dtype), tile.kernel(dtype, bounded=True)
        yield PartialLaunch(*kernels, (ctas, 1, 1), row_tiles, tile_class)


def plan_addresses(plan: AttentionPlan, device_buffer: int) -> PlanAddresses:
    """Where the plan's arrays lie in its copy at address ``device_buffer``."""

    def address(array: np.ndarray) -> int:  # several times faster than array.ctypes.data
        return int(array.__array_interface__["data"][0])

    moved = device_buffer - address(plan.buffer)

    def at(array: np.ndarray) -> int:
        return address(array) + moved

    return PlanAddresses(
        header=at(plan.header),
        items=at(plan.items),
        chunk_ids=at(plan.chunk_ids),
        row_tail=at(plan.row_tail),
        merge_indptr=at(plan.merge_indptr),
        merge_slots=at(plan.merge_slots),
        row_flags=at(plan.row_flags),
    )
