"""Run other kernels on the same step: torch SDPA, flash-decoding, a block table, FlashInfer.

Each function returns ``step(layer)`` to be timed, or raises ImportError where the peer is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gpu_suite.workload import CHUNK, Step, Tree
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

StepFunction = Callable[[int], Any]
_VARLEN_PAGE = 256  # flash-attention 2 pages K/V in multiples of 256 tokens


def sdpa_per_sequence(step: Step) -> StepFunction:
    """Compute attention without a prefix tree, by the kernel that torch prefers: every sequence has
    K and V of its own.
    """
    w = step.workload
    layers = [step.contiguous(i) for i in range(step.device.layers_beyond_l2(w.unshared_bytes))]
    q = step.q.unsqueeze(2)  # [rows, Hq, 1, D]
    grouped = w.num_qo_heads != w.num_kv_heads

    def run(layer: int) -> torch.Tensor:
        keys, values = layers[layer % len(layers)]
        return scaled_dot_product_attention(q, keys, values, scale=w.scale, enable_gqa=grouped)

    return run


def flash_per_sequence(step: Step) -> StepFunction:
    """Compute the same by flash-decoding, since torch prefers cuDNN on Hopper."""
    sdpa = sdpa_per_sequence(step)

    def run(layer: int) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return sdpa(layer)

    return run


def torch_varlen(step: Step) -> StepFunction:
    """Run torch's flash attention over a block table: one prefix, read once per sequence."""
    from torch.nn.attention.varlen import varlen_attn

    w, device = step.workload, step.device.torch_device
    if isinstance(w, Tree):
        raise ImportError("pages of 256 tokens do not fit the nodes of a tree")
    if w.shared % _VARLEN_PAGE:
        raise ImportError(f"pages of {_VARLEN_PAGE} tokens do not fit ns {w.shared}")
    prefix, own = w.shared // _VARLEN_PAGE, -(-w.private // _VARLEN_PAGE)
    table = np.concatenate(
        (
            np.tile(np.arange(prefix), (w.rows, 1)),
            prefix + np.arange(w.rows * own).reshape(w.rows, own),
        ),
        axis=1,
    )
    block_table = torch.from_numpy(table.astype(np.int32)).to(device)
    shape = (prefix + w.rows * own, _VARLEN_PAGE, w.num_kv_heads, w.head_dim)
    pools = [
        [torch.empty(shape, dtype=step.q.dtype, device=device).normal_() for _ in range(2)]
        for _ in range(step.layers)
    ]
    cu_q = torch.arange(w.rows + 1, dtype=torch.int32, device=device)
    used = torch.full((w.rows,), w.context, dtype=torch.int32, device=device)

    def run(layer: int) -> Any:
        return varlen_attn(
            step.q,
            *pools[layer],
            cu_q,
            None,
            1,
            w.context,
            scale=w.scale,
            enable_gqa=w.num_qo_heads != w.num_kv_heads,
            seqused_k=used,
            block_table=block_table,
        )

    return run


def flashinfer_cascade(step: Step) -> StepFunction:
    """Run FlashInfer's two-level cascade over our own pool, whose layout is its HND pages of 64."""
    import flashinfer

    w, device = step.workload, step.device.torch_device
    if isinstance(w, Tree) or not w.shared or not w.private:
        raise ImportError("a cascade of two levels needs shared and private tokens")

    def ints(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(
        2, torch.empty(256 << 20, dtype=torch.uint8, device=device), "HND"
    )
    ids = w.chunk_ids
    own = [row[w.shared_chunks :].tolist() for row in ids]
    wrapper.plan(
        [ints([0, w.rows]), ints(list(range(w.rows + 1)))],
        [ints([0, w.shared_chunks]), ints([i * w.private_chunks for i in range(w.rows + 1)])],
        [ints(ids[0][: w.shared_chunks].tolist()), ints([c for row in own for c in row])],
        [ints([CHUNK]), ints([(w.private - 1) % CHUNK + 1] * w.rows)],
        w.num_qo_heads,
        w.num_kv_heads,
        w.head_dim,
        CHUNK,
        q_data_type=step.q.dtype,
    )
    return lambda layer: wrapper.run(step.q, step.kv.layers[layer])


def _page_table(step: Step) -> torch.Tensor:
    ids = torch.from_numpy(np.stack(step.workload.chunk_ids).astype(np.int32))
    return ids.to(step.device.torch_device)


def flashinfer_decode(step: Step) -> StepFunction:
    """Run FlashInfer's paged decode over our own pool: shared chunks are stored once, and read by
    each sequence.
    """
    import flashinfer

    w, device = step.workload, step.device.torch_device
    table = _page_table(step)
    rows, pages = table.shape
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(256 << 20, dtype=torch.uint8, device=device), "HND"
    )
    wrapper.plan(
        torch.arange(rows + 1, dtype=torch.int32, device=device) * pages,
        table.flatten(),
        torch.full((rows,), (w.context - 1) % CHUNK + 1, dtype=torch.int32, device=device),
        w.num_qo_heads,
        w.num_kv_heads,
        w.head_dim,
        CHUNK,
        q_data_type=step.q.dtype,
    )
    return lambda layer: wrapper.run(step.q, step.kv.layers[layer])


def flash_attention_3(step: Step) -> StepFunction:
    """Run FlashAttention-3 over a page table: shared chunks are stored once, read by each row."""
    from flash_attn_interface import flash_attn_with_kvcache

    w, device = step.workload, step.device.torch_device
    shape = (w.num_chunks, CHUNK, w.num_kv_heads, w.head_dim)
    pools = [
        [torch.empty(shape, dtype=step.q.dtype, device=device).normal_() for _ in range(2)]
        for _ in range(step.layers)
    ]
    table = _page_table(step)
    lengths = torch.full((w.rows,), w.context, dtype=torch.int32, device=device)

    def run(layer: int) -> Any:
        return flash_attn_with_kvcache(
            step.q.unsqueeze(1),
            *pools[layer],
            cache_seqlens=lengths,
            page_table=table,
            softmax_scale=w.scale,
        )

    return run


PEERS: dict[str, Callable[[Step], StepFunction]] = {
    "sdpa": sdpa_per_sequence,
    "flash": flash_per_sequence,
    "varlen": torch_varlen,
    "flashinfer cascade": flashinfer_cascade,
    "flashinfer decode": flashinfer_decode,
    "fa3": flash_attention_3,
}
