"""Two-phase partition attention (ChunkAttention, arXiv 2402.15220, section 3.3) in torch: the
oracle of all backends.

Phase one, the partials: each item of the plan attends its rows to its run of chunks. Phase two, the
merge: a row's partials (o_i, lse_i) join as sum_i 2^(lse_i - m) o_i / sum_i 2^(lse_i - m), m the
largest lse_i.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from chunkllama.attention.plan_format import (
    CHUNK_OFFSET,
    FIRST_POSITION,
    FLAGS,
    ITEM_MASK,
    ITEM_WINDOW,
    NUM_ROWS,
    NUM_TOKENS,
    PARTIAL_BASE,
    ROW_BEGIN,
    TILE_CLASS,
    AttentionPlan,
    Int32Array,
)
from chunkllama.backends.base import KVCache, LayerRows
from chunkllama.backends.int8_kv import dequantize_kv

# Float32 elements of the largest intermediate tensor: bounds the workspace of any plan.
MAX_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True)
class ItemBatch:
    """N items of one tile class, padded to the same number of rows M and of chunks.

    A missing row repeats the item's last one and writes to the spare slot; a missing chunk repeats
    the first one and lies beyond the bound.
    """

    rows: torch.Tensor  # [N, M] int64
    slots: torch.Tensor  # [N M] int64
    tiles: torch.Tensor  # [2, N, Hkv, chunks] int64: the K and the V tile of a chunk and kv head
    first_position: torch.Tensor  # [N, 1] int64
    last_position: torch.Tensor  # [N, 1] int64, of the run
    masked: torch.Tensor  # [N, 1] bool
    window: int | None  # keys that a row sees; None: no item needs a mask for it
    all_visible: bool  # no item is masked or padded
    chunks_per_block: int


@dataclass(frozen=True, slots=True)
class AttentionTables:
    """A plan as gathers: batches of items, and each row's partial slots padded to P of them.

    A block of K and V is gathered into ``tiles`` and widened into ``wide_tiles``: fresh memory for
    every block would cost more in page faults than the attention itself.
    """

    batches: list[ItemBatch]
    merge_slots: torch.Tensor  # [R, P] int64, padded with the spare slot
    num_slots: int
    tiles: torch.Tensor  # [tiles, chunk_size, row_elements] in the pool's dtype
    wide_tiles: torch.Tensor  # [tiles, chunk_size, D] float32
    scores: torch.Tensor  # flat, float32

    @classmethod
    def of(cls, plan: AttentionPlan, kv: KVCache, num_qo_heads: int) -> AttentionTables:
        device = kv.layers[0].device
        batches = [
            _item_batch(plan, items, kv, num_qo_heads)
            for items in _alike(plan.items[: plan.num_items], kv, num_qo_heads)
        ]
        begin, end = plan.merge_indptr[: plan.num_rows], plan.merge_indptr[1 : plan.num_rows + 1]
        entry = begin[:, None] + np.arange((end - begin).max())
        inside = entry < end[:, None]
        slots = np.where(inside, plan.merge_slots[np.where(inside, entry, 0)], plan.num_slots)
        num_tiles = num_scores = 0
        for batch in batches:
            chunks = min(batch.chunks_per_block, batch.tiles.shape[3])
            num_tiles = max(num_tiles, batch.tiles[..., 0].numel() * chunks)
            keys = batch.rows.numel() * chunks * kv.chunk_size
            num_scores = max(num_scores, keys * num_qo_heads)
        pool = kv.layers[0]
        tiles = pool.new_empty(num_tiles, kv.chunk_size, kv.row_elements)
        wide_tiles = pool.new_empty(num_tiles, kv.chunk_size, kv.head_dim, dtype=torch.float32)
        return cls(
            batches=batches,
            merge_slots=torch.as_tensor(slots, device=device).long(),
            num_slots=plan.num_slots,
            tiles=tiles,
            wide_tiles=wide_tiles,
            scores=pool.new_empty(num_scores, dtype=torch.float32),
        )


def _alike(items: Int32Array, kv: KVCache, num_qo_heads: int) -> Iterator[Int32Array]:
    """Groups of items of one class whose rows and lengths differ by less than a factor of two, and
    that fit the workspace.
    """
    doublings = np.frexp(items[:, NUM_ROWS])[1]
    order = np.lexsort((-items[:, NUM_TOKENS], -doublings, items[:, TILE_CLASS]))
    items, doublings = items[order], doublings[order]
    begin = 0
    for i, (item, doubling) in enumerate(zip(items, doublings, strict=True)):
        head = items[begin]
        widest = max(num_qo_heads << int(doubling), kv.chunk_size * kv.num_kv_heads)
        elements = (i - begin + 1) * widest * max(kv.head_dim, kv.chunk_size)
        same = item[TILE_CLASS] == head[TILE_CLASS] and doubling == doublings[begin]
        if not same or 2 * item[NUM_TOKENS] <= head[NUM_TOKENS] or elements > MAX_ELEMENTS:
            if i > begin:
                yield items[begin:i]
            begin = i
    yield items[begin:]


def _item_batch(
    plan: AttentionPlan, items: Int32Array, kv: KVCache, num_qo_heads: int
) -> ItemBatch:
    device = kv.layers[0].device
    wide = items.astype(np.int64)
    num_rows, num_chunks = wide[:, NUM_ROWS, None], wide[:, NUM_TOKENS, None] // kv.chunk_size
    first, tokens = wide[:, FIRST_POSITION, None], wide[:, NUM_TOKENS, None]
    nth_row, nth_chunk = np.arange(num_rows.max()), np.arange(num_chunks.max())
    rows = wide[:, ROW_BEGIN, None] + np.minimum(nth_row, num_rows - 1)
    slots = np.where(nth_row < num_rows, wide[:, PARTIAL_BASE, None] + nth_row, plan.num_slots)
    entry = wide[:, CHUNK_OFFSET, None] + np.where(nth_chunk < num_chunks, nth_chunk, 0)
    key_tiles = plan.chunk_ids[entry].astype(np.int64)[:, None] * 2 * kv.num_kv_heads
    key_tiles = key_tiles + np.arange(kv.num_kv_heads, dtype=np.int64)[:, None]
    tiles = np.stack((key_tiles, key_tiles + kv.num_kv_heads))
    masked = wide[:, FLAGS, None] & ITEM_MASK != 0
    window = plan.window if (wide[:, FLAGS] & ITEM_WINDOW).any() else None
    widest = max(kv.num_kv_heads * kv.head_dim, len(nth_row) * num_qo_heads)
    return ItemBatch(
        rows=torch.as_tensor(rows, device=device),
        slots=torch.as_tensor(slots.ravel(), device=device),
        tiles=torch.as_tensor(tiles, device=device),
        first_position=torch.as_tensor(first, device=device),
        last_position=torch.as_tensor(first + tokens - 1, device=device),
        masked=torch.as_tensor(masked, device=device),
        window=window,
        all_visible=window is None
        and not masked.any()
        and bool((num_chunks == len(nth_chunk)).all()),
        chunks_per_block=max(1, MAX_ELEMENTS // (len(items) * kv.chunk_size * widest)),
    )


def tpp_attention_reference(
    q: torch.Tensor, rows: LayerRows, scale: float, softcap: float | None
) -> torch.Tensor:
    """Implement ``Backend.tpp_attention``; float32 inside."""
    tables = rows.plan.state.attention
    cap = None if softcap is None else softcap * math.log2(math.e)  # as the scores, in base 2
    num_rows, num_heads, head_dim = q.shape
    wide = q.float() * (scale * math.log2(math.e))
    out = wide.new_empty(tables.num_slots + 1, num_heads, head_dim)
    lse = wide.new_empty(tables.num_slots + 1, num_heads)
    for batch in tables.batches:
        partial_out, partial_lse = _partials(wide, rows, batch, tables, cap)
        out[batch.slots] = partial_out
        lse[batch.slots] = partial_lse
    # The spare slot holds what the missing rows wrote: as a merge partner it must weigh nothing.
    out[-1] = 0.0
    lse[-1] = -torch.inf
    return _merge(out, lse, tables.merge_slots).to(q.dtype).view(num_rows, -1)


def _partials(
    q: torch.Tensor,
    at: LayerRows,
    batch: ItemBatch,
    tables: AttentionTables,
    cap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised outputs [N M, Hq, D] and base-2 log-sum-exps [N M, Hq] of a batch, block of keys
    by block.
    """
    kv, positions = at.kv, at.positions
    pool = kv.layers[at.layer]
    num_items, num_rows = batch.rows.shape
    heads, group = kv.num_kv_heads, q.shape[1] // kv.num_kv_heads
    queries = q[batch.rows].view(num_items, num_rows, heads, group, kv.head_dim)
    queries = queries.transpose(1, 2).reshape(num_items * heads, num_rows * group, kv.head_dim)
    last = batch.last_position  # [N, M]: the last key each row sees
    num_chunks = visible_chunks = batch.tiles.shape[3]
    if not batch.all_visible:
        own = positions[batch.rows].long()
        last = torch.where(batch.masked, own.minimum(last), last)
        keys_seen = last - batch.first_position + 1
        # Chunks that no row sees are not worth a read, those that every row sees need no mask.
        num_chunks = -(-int(keys_seen.amax()) // kv.chunk_size)
        visible_chunks = int(keys_seen.amin()) // kv.chunk_size if batch.window is None else 0
    softmax = _Softmax(queries)
    for begin in range(0, num_chunks, batch.chunks_per_block):
        end = min(num_chunks, begin + batch.chunks_per_block)
        index = batch.tiles[..., begin:end].reshape(-1)
        tiles, wide_tiles = tables.tiles[: len(index)], tables.wide_tiles[: len(index)]
        torch.index_select(pool.view(-1, *tiles.shape[1:]), 0, index, out=tiles)
        keys, values = wide_tiles.view(2, num_items * heads, -1, kv.head_dim)
        scores = tables.scores[: queries[..., 0].numel() * keys.shape[1]]
        scores = scores.view(*queries.shape[:2], -1)
        if end <= visible_chunks:
            wide_tiles.copy_(dequantize_kv(tiles) if kv.is_int8 else tiles)
            _multiply(queries, keys, cap, scores)
        else:
            nth = torch.arange(begin * kv.chunk_size, end * kv.chunk_size, device=q.device)
            keys_at = (batch.first_position + nth).unsqueeze(1)
            hidden = keys_at > last.unsqueeze(2)  # [N, M, keys]
            unwritten = hidden[:, -1, None, :, None]
            _zero_rows(tiles.view(2, num_items, heads, -1, kv.row_elements), unwritten)
            if batch.window is not None:
                first = positions[batch.rows].long() + 1 - batch.window
                hidden = hidden | (keys_at < first.unsqueeze(2))
            wide_tiles.copy_(dequantize_kv(tiles) if kv.is_int8 else tiles)
            _multiply(queries, keys, cap, scores)
            bias = torch.where(hidden, -torch.inf, 0.0)[:, None, :, None]
            scores.view(num_items, heads, num_rows, group, -1).add_(bias)
        softmax.add(scores, values)
    shape = (num_items, heads, num_rows, group, -1)
    out, lse = (x.view(shape).transpose(1, 2) for x in softmax.result())
    return out.reshape(num_items * num_rows, -1, kv.head_dim), lse.reshape(-1, heads * group)


def _multiply(
    queries: torch.Tensor, keys: torch.Tensor, cap: float | None, scores: torch.Tensor
) -> None:
    """scores = queries keys^T, or cap * tanh(that / cap)."""
    torch.bmm(queries, keys.transpose(1, 2), out=scores)
    if cap is not None:
        scores.div_(cap).tanh_().mul_(cap)


class _Softmax:
    """Attention over one block of keys after the other (Milakov & Gimelshein 2018, algorithm 3);
    base 2.
    """

    def __init__(self, queries: torch.Tensor) -> None:
        self._out = torch.zeros_like(queries)
        self._high = queries.new_full((*queries.shape[:-1], 1), -torch.inf)
        self._total = torch.zeros_like(self._high)

    def add(self, scores: torch.Tensor, values: torch.Tensor) -> None:
        """scores [B, rows, keys], overwritten, -inf where hidden; values [B, keys, D]."""
        high = torch.maximum(self._high, scores.amax(-1, keepdim=True))
        base = high.clamp_min(torch.finfo(torch.float32).min)  # no key so far: not -inf - -inf
        weights = scores.sub_(base).exp2_()
        decay = torch.exp2(self._high - base)
        self._total.mul_(decay).add_(weights.sum(-1, keepdim=True))
        self._out.mul_(decay).baddbmm_(weights, values)
        self._high = high

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised output [B, rows, D] and log-sum-exp [B, rows, 1], 0 and -inf without keys."""
        tiny = torch.finfo(torch.float32).tiny
        return self._out / self._total.clamp_min(tiny), self._high + self._total.log2()


def _zero_rows(tiles: torch.Tensor, unwritten: torch.Tensor) -> None:
    """Clear what stands behind an item's last row: there -inf + NaN and 0 * NaN would stay NaN.

    By its bits, of any meaning: ten times faster than ``masked_fill_`` on a CPU.
    """
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32}[tiles.element_size()]
    tiles.view(bits).bitwise_and_(torch.where(unwritten, 0, -1).to(bits))


def _merge(out: torch.Tensor, lse: torch.Tensor, merge_slots: torch.Tensor) -> torch.Tensor:
    """Join the partials [S + 1, Hq, D] of each row: [R, Hq, D]."""
    num_rows, num_partials = merge_slots.shape
    merged = out.new_empty(num_rows, *out.shape[1:])
    step = max(1, MAX_ELEMENTS // (num_partials * out[0].numel()))
    for begin in range(0, num_rows, step):
        slots = merge_slots[begin : begin + step]
        weights = torch.softmax(lse[slots] * math.log(2.0), dim=1)  # [rows, P, Hq]
        merged[begin : begin + step] = (weights.unsqueeze(-1) * out[slots]).sum(1)
    return merged
