"""The attention plan's arrays: the one format that every attention backend reads.

numpy only. ``attention/plan.py`` fills these arrays; the torch reference, the C++ kernels, the CUDA
kernels and the emulator read them. All arrays are int32 views into one buffer, so that a device
needs one copy per plan.

A *row* is a query token. An *item* is a contiguous range of rows times a run of KV chunks. An item
yields, for each of its rows, one *partial* (a normalised output and a base-2 log-sum-exp); the
merge joins a row's partials.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Int32Array = NDArray[np.int32]

# Columns of `items`.
ROW_BEGIN: Final = 0  # first row of the item
NUM_ROWS: Final = 1
CHUNK_OFFSET: Final = 2  # where the item's chunk list starts in `chunk_ids`
NUM_TOKENS: Final = (
    3  # tokens of the run; of a tail item the reserved length, clipped to the position
)
FIRST_POSITION: Final = (
    4  # absolute position of the run's first token, a multiple of the chunk size
)
PARTIAL_BASE: Final = 5  # partial slot of row r = PARTIAL_BASE + (r - ROW_BEGIN)
FLAGS: Final = 6
TILE_CLASS: Final = 7
ITEM_COLUMNS: Final = 8

# Bits of an item's flags.
ITEM_MASK: Final = 1  # mask by position (key_position <= positions[row]) and clip the run to it.
# Positions never decrease over the rows of a masked item, so its last row bounds the run.
ITEM_WINDOW: Final = 2  # some row's window begins after the run's first key: mask below it, too

# Words of `header`.
HEADER_NUM_ITEMS: Final = 0
HEADER_NUM_ROWS: Final = 1
HEADER_NUM_SLOTS: Final = 2
HEADER_VERSION: Final = 3
HEADER_NUM_CLASS0_ITEMS: Final = 4
HEADER_WINDOW: Final = 5  # keys that a row sees, its own included; 0: all before it
HEADER_WORDS: Final = 16


@dataclass(frozen=True, slots=True)
class PlanCapacity:
    """How many entries each array holds; a plan for a captured graph keeps its capacity from step
    to step.
    """

    rows: int
    items: int
    chunk_ids: int
    slots: int

    @property
    def words(self) -> int:
        """int32 words of the whole buffer."""
        return (
            HEADER_WORDS
            + self.items * ITEM_COLUMNS
            + self.chunk_ids
            + self.rows * 2  # row_tail
            + self.rows
            + 1  # merge_indptr
            + self.slots  # merge_slots
            + self.rows  # row_flags
        )


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Views into one int32 buffer (shapes in capacities; the header says how much of each is
    valid).

    Attributes:
        buffer: [capacity.words]; the views below in this order, back to back.
        header: [16]: num_items, num_rows, num_slots, version, number of items of tile class 0,
            window.
        items: [I, 8] see the column constants; sorted by tile class, then by falling cost.
        chunk_ids: [C] chunk lists of the items, concatenated; tail lists carry their spare chunks.
        row_tail: [R, 2] (offset into chunk_ids, first position) of the row's tail item: where
            append writes.
        merge_indptr: [R + 1] CSR over rows.
        merge_slots: [S] partial slots of each row, ascending by position.
        row_flags: [R] 1 = the row has a single partial: its item writes the output, the merge skips
            the row.
    """

    capacity: PlanCapacity
    buffer: Int32Array
    header: Int32Array
    items: Int32Array
    chunk_ids: Int32Array
    row_tail: Int32Array
    merge_indptr: Int32Array
    merge_slots: Int32Array
    row_flags: Int32Array

    @property
    def num_items(self) -> int:
        return int(self.header[HEADER_NUM_ITEMS])

    @property
    def num_rows(self) -> int:
        return int(self.header[HEADER_NUM_ROWS])

    @property
    def num_slots(self) -> int:
        return int(self.header[HEADER_NUM_SLOTS])

    @property
    def version(self) -> int:
        return int(self.header[HEADER_VERSION])

    @property
    def window(self) -> int | None:
        """Keys that a row sees, its own included; None: all before it."""
        return int(self.header[HEADER_WINDOW]) or None


def allocate_plan(capacity: PlanCapacity) -> AttentionPlan:
    """A zeroed plan of that capacity, every array a view into one buffer."""
    return view_plan(capacity, np.zeros(capacity.words, np.int32))


def view_plan(capacity: PlanCapacity, buffer: Int32Array) -> AttentionPlan:
    """Lay the arrays over an existing buffer of ``capacity.words`` int32 words."""
    if buffer.shape != (capacity.words,):
        raise ValueError(f"plan buffer has shape {buffer.shape}, expected ({capacity.words},)")
    rows, items = capacity.rows, capacity.items
    shapes = (
        (HEADER_WORDS,),
        (items, ITEM_COLUMNS),
        (capacity.chunk_ids,),
        (rows, 2),
        (rows + 1,),
        (capacity.slots,),
        (rows,),
    )
    views, start = [], 0
    for shape in shapes:
        size = int(np.prod(shape))
        views.append(buffer[start : start + size].reshape(shape))
        start += size
    return AttentionPlan(capacity, buffer, *views)


@dataclass(frozen=True, slots=True)
class Packing:
    """Per-device parameters of the planner's cost model (data in ``configs/hardware/*.yaml``).

    Attributes:
        rows_per_item: largest number of query rows in an item of tile class 0 (shared runs,
            slices).
        small_rows_per_item: items with at most this many rows are tile class 1; 0 means one class
            only.
        min_run_chunks: runs are never cut shorter than this many chunks.
        target_units: wanted number of (item, kv head) units in a plan; long runs are split until it
            is reached.
        num_kv_heads: kv heads per item (units = items x num_kv_heads).
        split_private: whether runs read by one sequence may be split as well.
        chunk_cost_rows: cost of reading a chunk, in rows of computing on it: an item costs chunks x
            (this + rows).
        spare_chunks: chunks the scheduler should keep reserved beyond a tail so that a decode plan
            lives longer.
        fixed_runs: runs begin and end at the same chunks in every plan (``FIXED_CUTS``), so that
            the partials of a row depend on its position alone; what is shared behind the last cut
            before a branch is read by each sequence for itself.
    """

    rows_per_item: int = 64
    small_rows_per_item: int = 0
    min_run_chunks: int = 8
    target_units: int = 8
    num_kv_heads: int = 1
    split_private: bool = False
    chunk_cost_rows: int = 32
    spare_chunks: int = 1
    fixed_runs: bool = False
