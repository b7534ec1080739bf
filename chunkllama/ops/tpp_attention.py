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

from chunkllama.ops.op_set import KVCache
from chunkllama.ops.plan_format import (
    CHUNK_OFFSET,
    FIRST_POSITION,
    FLAGS,
    ITEM_MASK,
    NUM_ROWS,
    NUM_TOKENS,
    PARTIAL_BASE,
    ROW_BEGIN,
    TILE_CLASS,
    AttentionPlan,
    Int32Array,
)

# Float32 elements of the largest intermediate tensor: bounds the workspace whatever the plan.
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
    all_visible: bool  # no item is masked or padded
    chunks_per_block: int


@dataclass(frozen=True, slots=True)
class AttentionTables:
    """A plan as gathers: batches of items, and each row's partial slots padded to P of them.

    The K and V of a block of keys are gathered into ``block``, then widened into ``wide_block``:
    fresh memory for every block would cost more in page faults than the attention itself.
    """

    batches: list[ItemBatch]
    merge_slots: torch.Tensor  # [R, P] int64, padded with the spare slot
    num_slots: int
    block: torch.Tensor  # flat, in the pool's dtype
    wide_block: torch.Tensor  # flat, float32

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
        tiles = max(
            b.tiles[..., 0].numel() * min(b.chunks_per_block, b.tiles.shape[3]) for b in batches
        )
        block = torch.empty(
            tiles * kv.chunk_size * kv.head_dim, dtype=kv.layers[0].dtype, device=device
        )
        wide_block = torch.empty(len(block), dtype=torch.float32, device=device)
        merge_slots = torch.as_tensor(slots, device=device).long()
        return cls(batches, merge_slots, plan.num_slots, block, wide_block)


def _alike(items: Int32Array, kv: KVCache, num_qo_heads: int) -> Iterator[Int32Array]:
    """Groups of items of one class whose lengths differ by less than a factor of two and that fit
    the workspace.
    """
    order = np.lexsort((-items[:, NUM_ROWS], -items[:, NUM_TOKENS], items[:, TILE_CLASS]))
    items = items[order]
    begin = rows = 0
    for i, item in enumerate(items):
        head = items[begin]
        rows = max(rows, int(item[NUM_ROWS]))
        widest = max(rows * num_qo_heads, kv.chunk_size * kv.num_kv_heads)
        elements = (i - begin + 1) * widest * max(kv.head_dim, kv.chunk_size)
        same = item[TILE_CLASS] == head[TILE_CLASS] and 2 * item[NUM_TOKENS] > head[NUM_TOKENS]
        if not same or (elements > MAX_ELEMENTS and i > begin):
            yield items[begin:i]
            begin, rows = i, int(item[NUM_ROWS])
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
    widest = max(kv.num_kv_heads * kv.head_dim, len(nth_row) * num_qo_heads)
    return ItemBatch(
        rows=torch.as_tensor(rows, device=device),
        slots=torch.as_tensor(slots.ravel(), device=device),
        tiles=torch.as_tensor(tiles, device=device),
        first_position=torch.as_tensor(first, device=device),
        last_position=torch.as_tensor(first + tokens - 1, device=device),
        masked=torch.as_tensor(masked, device=device),
        all_visible=not masked.any() and bool((num_chunks == len(nth_chunk)).all()),
        chunks_per_block=max(1, MAX_ELEMENTS // (len(items) * kv.chunk_size * widest)),
    )


def check_tpp_attention(
    q: torch.Tensor, kv: KVCache, positions: torch.Tensor, num_rows: int
) -> None:
    """Raise ValueError unless q is [num_rows, Hq, head_dim] with Hq a multiple of the kv heads."""
    fits = q.dim() == 3 and q.shape[0] == num_rows and q.shape[2] == kv.head_dim
    if not fits or q.shape[1] % kv.num_kv_heads or positions.shape != (num_rows,):
        raise ValueError(
            f"tpp_attention: q {tuple(q.shape)}, positions {tuple(positions.shape)} do not fit "
            f"{num_rows} rows, {kv.num_kv_heads} kv heads of {kv.head_dim}"
        )


def tpp_attention_reference(
    q: torch.Tensor,
    kv: KVCache,
    layer: int,
    positions: torch.Tensor,
    tables: AttentionTables,
    scale: float,
) -> torch.Tensor:
    """q [T, Hq, D] -> [T, Hq D] in q's dtype; float32 inside."""
    check_tpp_attention(q, kv, positions, len(tables.merge_slots))
    num_rows, num_heads, head_dim = q.shape
    wide = q.float() * (scale * math.log2(math.e))
    out = wide.new_empty(tables.num_slots + 1, num_heads, head_dim)
    lse = wide.new_empty(tables.num_slots + 1, num_heads)
    for batch in tables.batches:
        partial_out, partial_lse = _partials(wide, kv, kv.layers[layer], positions, batch, tables)
        out[batch.slots] = partial_out
        lse[batch.slots] = partial_lse
    # The spare slot holds what the missing rows wrote: as a merge partner it must weigh nothing.
    out[-1] = 0.0
    lse[-1] = -torch.inf
    return _merge(out, lse, tables.merge_slots).to(q.dtype).view(num_rows, -1)


def _partials(
    q: torch.Tensor,
    kv: KVCache,
    pool: torch.Tensor,
    positions: torch.Tensor,
    batch: ItemBatch,
    tables: AttentionTables,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised outputs [N M, Hq, D] and base-2 log-sum-exps [N M, Hq] of a batch, block of keys
    by block.
    """
    num_items, num_rows = batch.rows.shape
    heads, group = kv.num_kv_heads, q.shape[1] // kv.num_kv_heads
    queries = q[batch.rows].view(num_items, num_rows, heads, group, kv.head_dim)
    queries = queries.transpose(1, 2).reshape(num_items * heads, num_rows * group, kv.head_dim)
    last, num_chunks = batch.last_position, batch.tiles.shape[3]
    if not batch.all_visible:
        own = positions[batch.rows].long()  # [N, M]
        last = torch.where(batch.masked, own.minimum(last), last)
        # Spare chunks beyond every row are not worth a read.
        num_chunks = int((last - batch.first_position).amax()) // kv.chunk_size + 1
    high = queries.new_full((num_items * heads, num_rows * group, 1), -torch.inf)
    total = torch.zeros_like(high)
    out = torch.zeros_like(queries)
    for begin in range(0, num_chunks, batch.chunks_per_block):
        tiles = batch.tiles[..., begin : min(num_chunks, begin + batch.chunks_per_block)]
        block = tables.block[: tiles.numel() * kv.chunk_size * kv.head_dim]
        block = block.view(-1, kv.chunk_size, kv.head_dim)
        pool_tiles = pool.view(-1, kv.chunk_size, kv.head_dim)
        torch.index_select(pool_tiles, 0, tiles.reshape(-1), out=block)
        bias = None
        if not batch.all_visible:
            nth = torch.arange(tiles.shape[3] * kv.chunk_size, device=q.device)
            position = batch.first_position + begin * kv.chunk_size + nth
            hidden = position.unsqueeze(1) > last.unsqueeze(2)  # [N, M, keys]
            unwritten = hidden[:, -1, None, :, None]
            _zero_rows(block.view(2, num_items, heads, -1, kv.head_dim), unwritten)
            bias = torch.where(hidden, -torch.inf, 0.0)[:, None, :, None]
        wide = tables.wide_block[: block.numel()].view(block.shape).copy_(block)
        keys, values = wide.view(2, num_items * heads, -1, kv.head_dim)
        scores = queries @ keys.transpose(1, 2)
        if bias is not None:
            scores.view(num_items, heads, num_rows, group, -1).add_(bias)
        new_high = torch.maximum(high, scores.amax(-1, keepdim=True))
        base = new_high.clamp_min(torch.finfo(torch.float32).min)  # no key yet: -inf - -inf
        weights = scores.sub_(base).exp2_()
        decay = torch.exp2(high - base)
        total = total * decay + weights.sum(-1, keepdim=True)
        out = torch.baddbmm(out * decay, weights, values)
        high = new_high
    out = out / total.clamp_min(torch.finfo(torch.float32).tiny)
    lse = high + total.log2()
    shape = (num_items, heads, num_rows, group, -1)
    return (
        out.view(shape).transpose(1, 2).reshape(num_items * num_rows, -1, kv.head_dim),
        lse.view(shape).transpose(1, 2).reshape(num_items * num_rows, -1),
    )


def _zero_rows(block: torch.Tensor, unwritten: torch.Tensor) -> None:
    """Clear what stands behind an item's last row: there -inf + NaN and 0 * NaN would stay NaN.

    By its bits, whatever they mean: ten times faster than ``masked_fill_`` on a CPU.
    """
    bits = {2: torch.int16, 4: torch.int32}[block.element_size()]
    block.view(bits).bitwise_and_(torch.where(unwritten, 0, -1).to(bits))


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
