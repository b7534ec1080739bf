"""The attention plan: which query rows read which runs of KV chunks.

numpy only; knows no tree, no request, no tensor. One format for every backend (reference, C++,
CUDA, emulator).

Rows stand in depth-first order of the prefix tree, so the rows below a tree node are one interval
and the node's chunks are one *run* that all of them read: the chunk-first phase of ChunkAttention
(arXiv 2402.15220, section 3.3). What only one slice reads is its *private* run: the sequence-first
phase. Both are the same kind of item here; the merge joins a row's partials by log-sum-exp.

    chunk    0   1   2   3   4        runs
    slice 0  a   b   c   d            a b   shared by slices 0..2
    slice 1  a   b   c   e   f        c     shared by slices 0..1
    slice 2  a   b   g                d | e f | g   private
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from chunkllama.attention.plan_blocks import (
    BLOCK_END,
    FIXED_CUTS,
    SHORTEST_FIXED,
    WHOLE,
    Block,
    Int64Array,
    cut_rows,
    nth,
    within_window,
)
from chunkllama.attention.plan_format import (
    CHUNK_OFFSET,
    FIRST_POSITION,
    FLAGS,
    HEADER_NUM_CLASS0_ITEMS,
    HEADER_NUM_ITEMS,
    HEADER_NUM_ROWS,
    HEADER_NUM_SLOTS,
    HEADER_VERSION,
    HEADER_WINDOW,
    ITEM_COLUMNS,
    ITEM_MASK,
    ITEM_WINDOW,
    NUM_ROWS,
    NUM_TOKENS,
    PARTIAL_BASE,
    ROW_BEGIN,
    TILE_CLASS,
    AttentionPlan,
    Int32Array,
    Packing,
    PlanCapacity,
    allocate_plan,
)


@dataclass(frozen=True, slots=True)
class _Slices:
    """The planner's input as arrays; ``shared`` has a zero on either side of the S - 1 common
    prefixes.
    """

    first: Int64Array  # [S] position of the first token
    rows: Int64Array  # [S] tokens
    row_start: Int64Array  # [S + 1]
    shared: Int64Array  # [S + 1]
    chunk_ids: Sequence[Int32Array]
    reusable: bool  # the plan outlives the step: tails keep their spares, positions grow

    def first_keys(self, window: int) -> Int64Array:
        """[R] position of the first key in each row's window."""
        position = np.repeat(self.first, self.rows) + nth(self.rows)
        first: Int64Array = np.maximum(position + 1 - window, 0)
        return first


class Planner:
    """Builds attention plans for one device.

    Args:
        packing: the device's parameters; see ``Packing``.
        chunk_size: tokens per chunk, a power of two.
    """

    def __init__(self, packing: Packing, chunk_size: int) -> None:
        assert chunk_size > 0 and chunk_size & (chunk_size - 1) == 0, chunk_size
        assert packing.rows_per_item >= max(1, packing.small_rows_per_item), packing
        assert packing.min_run_chunks >= 1 and packing.target_units >= 1, packing
        self.packing = packing
        self.chunk_size = chunk_size

    def build(
        self,
        first_positions: Sequence[int],
        num_tokens: Sequence[int],
        chunk_ids: Sequence[Int32Array],
        shared: Sequence[int],
        version: int,
        capacity: PlanCapacity | None = None,
        window: int | None = None,
    ) -> AttentionPlan:
        """Plan the attention of a step; slices in depth-first order, their tokens are the rows in
        that order.

        Args:
            first_positions: [S] position of each slice's first token.
            num_tokens: [S] tokens (rows) of each slice, at least 1.
            chunk_ids: S int32 arrays: chunks of positions 0, chunk_size, ... up to the slice's end,
                then spares.
            shared: [S] leading chunks that a slice has in common with the one before it; 0 for the
                first.
            version: 0 for a plan of this step alone. Otherwise the plan stays valid while positions
                grow inside each slice's ``chunk_ids``, and there is one token per slice.
            capacity: sizes of the arrays, or None: what is needed (with a version rounded up to
                powers of two, so that successive plans fit the same buffers). Runs are lengthened
                where items would not fit.
            window: keys that a row sees, its own included; None: all before it. Chunks that no row
                of an item sees are left out of it.

        Raises:
            ValueError: the plan does not fit ``capacity`` however long its runs.
        """
        slices = self._slices(first_positions, num_tokens, chunk_ids, shared, version != 0)
        blocks, lists, row_tail = self._blocks(slices)
        num_rows, num_chunks = len(row_tail), sum(map(len, lists))
        first_key = None if window is None else slices.first_keys(window)
        slack = 1
        while True:
            items = self._items(blocks, slices.reusable, slack, first_key)
            need = PlanCapacity(num_rows, items.shape[1], num_chunks, int(items[NUM_ROWS].sum()))
            if capacity is None:
                capacity = _rounded_up(need) if slices.reusable else need
            if need.items <= capacity.items and need.slots <= capacity.slots:
                break
            if slack > int(blocks[BLOCK_END].max()):
                break
            slack *= 2
        if not _holds(capacity, need):
            raise ValueError(f"the plan needs {need}, more than the capacity {capacity}")

        plan = allocate_plan(capacity)
        plan.header[HEADER_NUM_ITEMS] = need.items
        plan.header[HEADER_NUM_ROWS] = num_rows
        plan.header[HEADER_NUM_SLOTS] = need.slots
        plan.header[HEADER_VERSION] = version
        plan.header[HEADER_WINDOW] = window or 0
        plan.header[HEADER_NUM_CLASS0_ITEMS] = need.items - np.count_nonzero(items[TILE_CLASS])
        plan.items[: need.items] = items.T
        np.concatenate(lists, out=plan.chunk_ids[:num_chunks])
        plan.row_tail[:num_rows] = row_tail
        _fill_merge(plan, items, num_rows)
        return plan

    def _slices(
        self,
        first_positions: Sequence[int],
        num_tokens: Sequence[int],
        chunk_ids: Sequence[Int32Array],
        shared: Sequence[int],
        reusable: bool,
    ) -> _Slices:
        first = np.asarray(first_positions, np.int64)
        rows = np.asarray(num_tokens, np.int64)
        row_start = np.zeros(len(first) + 1, np.int64)
        np.cumsum(rows, out=row_start[1:])
        common = np.zeros(len(first) + 1, np.int64)
        common[1:-1] = shared[1:]
        if reusable:
            assert row_start[-1] == len(first), "a plan with a version holds one token per slice"
            # The chunk a row writes belongs to its private run, or its tail could grow out of a
            # shared one.
            own = first // self.chunk_size
            np.minimum(common[:-1], own, out=common[:-1])
            np.minimum(common[1:], own, out=common[1:])
        if self.packing.fixed_runs:
            common = FIXED_CUTS[np.searchsorted(FIXED_CUTS, common, side="right") - 1]
        return _Slices(first, rows, row_start, common, chunk_ids, reusable)

    def _blocks(self, s: _Slices) -> tuple[Int64Array, list[Int32Array], Int64Array]:
        """Blocks [7, N], the chunk lists they point into, and [R, 2] where each row's K/V are
        written.
        """
        size = self.chunk_size
        begin = np.maximum(s.shared[:-1], s.shared[1:])
        if s.reusable:
            end = np.fromiter(map(len, s.chunk_ids), np.int64, len(s.chunk_ids))
        else:
            end = (s.first + s.rows - 1) // size + 1
        length = np.maximum(end - begin, 0)
        offset = np.cumsum(length) - length
        skipped = np.maximum(begin * size - s.first, 0)  # rows that stand above the private run
        private = np.stack(
            (
                s.row_start[:-1] + skipped,
                s.rows - skipped,
                begin,
                end,
                offset,
                s.first + skipped,
                np.ones_like(begin),
            )
        )[:, s.rows > skipped]
        bounds = zip(s.chunk_ids, begin.tolist(), end.tolist(), strict=True)
        lists = [ids[low:high] for ids, low, high in bounds if low < high]
        row_tail = np.repeat(np.stack((offset, begin * size), axis=1), s.rows, axis=0)

        # Slices that compute part of a run other slices read in this very step.
        writers = np.flatnonzero(skipped).tolist()
        next_offset = int(length.sum())
        blocks: list[Block] = []
        for low, high, chunk_begin, chunk_end in _shared_runs(s.shared.tolist()):
            lists.append(s.chunk_ids[low][chunk_begin:chunk_end])
            run = (chunk_begin, chunk_end, next_offset)
            next_offset += chunk_end - chunk_begin
            inside = writers[bisect_left(writers, low) : bisect_left(writers, high)]
            self._cover_run(s, (low, high), run, inside, blocks, row_tail)
        if blocks:
            private = np.concatenate((private, np.array(blocks, np.int64).T), axis=1)
        return private, lists, row_tail

    def _cover_run(
        self,
        s: _Slices,
        between: tuple[int, int],
        run: tuple[int, int, int],
        writers: list[int],
        blocks: list[Block],
        row_tail: Int64Array,
    ) -> None:
        """Blocks of a shared run: rows that see it whole are read together, rows inside it each
        with their slice.

        A writer's rows stand, in order, above the run (they see nothing of it), inside it (masked),
        and below it (they see it whole, and stay with their neighbours).
        """
        chunk_begin, chunk_end, offset = run
        first_key, last_key = chunk_begin * self.chunk_size, chunk_end * self.chunk_size - 1
        whole_from = int(s.row_start[between[0]])
        for i in writers:
            row, first, rows = int(s.row_start[i]), int(s.first[i]), int(s.rows[i])
            inside_from = min(rows, max(0, first_key - first))
            inside_to = min(rows, max(0, last_key - first))
            if whole_from < row and inside_to > 0:
                whole = (whole_from, row - whole_from, *run, WHOLE, 0)
                blocks.append(whole)
            if inside_from < inside_to:
                position = first + inside_from
                inside = (row + inside_from, inside_to - inside_from, *run, position, 1)
                blocks.append(inside)
            if inside_to > 0:
                whole_from = row + inside_to
            row_tail[row + inside_from : row + min(rows, max(0, last_key + 1 - first))] = (
                offset,
                first_key,
            )
        row_end = int(s.row_start[between[1]])
        if whole_from < row_end:
            blocks.append((whole_from, row_end - whole_from, *run, WHOLE, 0))

    def _items(
        self, blocks: Int64Array, reusable: bool, slack: int, first_key: Int64Array | None
    ) -> Int64Array:
        """Cut blocks into items [8, I]: rows by ``rows_per_item``, runs so that no unit outweighs
        its share.

        A unit is an item for one kv head. Reading a chunk costs as much as ``chunk_cost_rows`` rows
        of computing on it; a run is cut where its unit would cost more than 1 / ``target_units`` of
        the whole, into the longest pieces that do not, but never below ``min_run_chunks``. Cuts
        fall at multiples of a power of two of chunks from position 0. ``slack`` lengthens the
        pieces. With ``first_key`` [R] a run begins at the first chunk that one of its rows sees.
        With ``fixed_runs`` it is cut at ``FIXED_CUTS`` alone.
        """
        packing, size = self.packing, self.chunk_size
        tiles, largest = cut_rows(blocks, packing.rows_per_item)
        window_end = np.zeros_like(largest)  # from there on every row sees every key
        if first_key is not None:
            unit = SHORTEST_FIXED if packing.fixed_runs else 1
            tiles, seen, window_end = within_window(tiles, first_key, size, unit)
            largest = largest[seen]
            if reusable:
                window_end[:] = WHOLE  # positions grow
        weight = packing.chunk_cost_rows + largest
        _, rows, begin, end, _, position, _ = tiles
        filled = np.minimum(end, (position + rows - 1) // size + 1)  # spare chunks cost nothing yet
        if not reusable:
            tiles[BLOCK_END] = end = filled

        if packing.fixed_runs:
            first = np.searchsorted(FIXED_CUTS, begin, side="right")
            cuts = np.searchsorted(FIXED_CUTS, end) - first
        else:
            cuts, first_cut, run = self._long_runs(tiles, (filled - begin) * weight, weight, slack)
        pieces = cuts + 1
        tile, piece = np.repeat(np.arange(len(cuts)), pieces), nth(pieces)
        last = cuts[tile]
        row, rows, begin, end, offset, position, _ = tiles[:, tile]
        window_end = window_end[tile]
        if packing.fixed_runs:
            before, after = FIXED_CUTS[first[tile] + piece - 1], FIXED_CUTS[first[tile] + piece]
        else:
            after = first_cut[tile] + piece * run[tile]
            before = after - run[tile]
        piece_begin = np.where(piece == 0, begin, before)
        piece_end = np.where(piece == last, end, after)
        items = np.zeros((ITEM_COLUMNS, len(row)), np.int64)
        items[ROW_BEGIN] = row
        items[NUM_ROWS] = rows
        items[CHUNK_OFFSET] = offset + piece_begin - begin
        items[NUM_TOKENS] = (piece_end - piece_begin) * size
        items[FIRST_POSITION] = piece_begin * size
        # Of a run that is not cut by cost, several pieces may lie behind the first row.
        is_masked = (piece == last) | (piece_end * size > position + 1)
        items[FLAGS] = np.where((position < WHOLE) & is_masked, ITEM_MASK, 0)
        items[FLAGS] += np.where(piece_begin * size < window_end, ITEM_WINDOW, 0)
        items[TILE_CLASS] = rows <= packing.small_rows_per_item
        cost = items[NUM_TOKENS] * (packing.chunk_cost_rows + rows)
        by_class_then_cost = np.lexsort((-cost, items[TILE_CLASS]))
        items = items[:, by_class_then_cost]
        items[PARTIAL_BASE] = np.cumsum(items[NUM_ROWS]) - items[NUM_ROWS]
        return items

    def _long_runs(
        self, tiles: Int64Array, cost: Int64Array, weight: Int64Array, slack: int
    ) -> tuple[Int64Array, Int64Array, Int64Array]:
        """The number of cuts of each tile, the first of them, and their distance in chunks."""
        packing = self.packing
        _, _, begin, end, _, position, private = tiles
        share = cost.sum() * packing.num_kv_heads * slack / packing.target_units
        longest = np.maximum(share / weight, packing.min_run_chunks * slack)
        run = np.exp2(np.floor(np.log2(longest))).astype(np.int64)
        run = np.where(run < packing.min_run_chunks, run * 2, run)
        first_cut = -(-(begin + packing.min_run_chunks) // run) * run
        last_cut = np.minimum(end, position // self.chunk_size + 1) - packing.min_run_chunks
        cuts = np.maximum((last_cut - first_cut) // run + 1, 0)
        cuts[(cost <= share) | ((private == 1) & (not packing.split_private))] = 0
        return cuts, first_cut, run


def _shared_runs(shared: list[int]) -> list[tuple[int, int, int, int]]:
    """Runs read by more than one slice: (slice_begin, slice_end, chunk_begin, chunk_end).

    ``shared[i]`` is the common prefix of slices i - 1 and i, zero at both ends. These are the
    intervals of the prefix tree, found with one stack in O(slices) (Abouelhoda et al. 2004,
    "lcp-interval tree").
    """
    runs = []
    stack = [(0, 0)]  # (common prefix, first slice), strictly rising
    for i in range(1, len(shared)):
        common, low = shared[i], i - 1
        while stack[-1][0] > common:
            chunk_end, low = stack.pop()
            runs.append((low, i, max(common, stack[-1][0]), chunk_end))
        if stack[-1][0] < common:
            stack.append((common, low))
    return runs


def _fill_merge(plan: AttentionPlan, items: Int64Array, num_rows: int) -> None:
    """The CSR of partial slots per row, ascending by position. Slots count up over the items."""
    row = np.repeat(items[ROW_BEGIN], items[NUM_ROWS]) + nth(items[NUM_ROWS])
    position = np.repeat(items[FIRST_POSITION], items[NUM_ROWS])
    plan.merge_slots[: len(row)] = np.argsort(row * (1 << 32) + position)
    partials = np.bincount(row, minlength=num_rows)
    plan.merge_indptr[num_rows:] = len(row)
    np.cumsum(partials[:-1], out=plan.merge_indptr[1:num_rows])
    plan.row_flags[:num_rows] = partials == 1


def _rounded_up(need: PlanCapacity) -> PlanCapacity:
    """Powers of two, and no less than what most decode plans of so many rows need."""

    def power_of_two(n: int) -> int:
        return 1 << (n - 1).bit_length()

    rows = power_of_two(need.rows)
    return PlanCapacity(
        rows,
        power_of_two(max(need.items, 2 * rows)),
        power_of_two(max(need.chunk_ids, 64 * rows)),
        power_of_two(max(need.slots, 4 * rows)),
    )


def _holds(capacity: PlanCapacity, need: PlanCapacity) -> bool:
    return (
        need.rows <= capacity.rows
        and need.items <= capacity.items
        and need.chunk_ids <= capacity.chunk_ids
        and need.slots <= capacity.slots
    )
