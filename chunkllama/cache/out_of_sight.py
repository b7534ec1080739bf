"""Chunks of running sequences that no layer reads again, where every layer has a sliding window.

They are freed when the pool is full, before a sequence is preempted. A sequence that loses a node
which it alone uses leaves the tree there: the chunks below become its own, PRIVATE. Every node that
stays in the tree has its chunk, so a match gives what it gives without windows.
"""

from __future__ import annotations

from bisect import bisect_left

from chunkllama.cache.manager import CacheManager
from chunkllama.cache.node import PUBLIC
from chunkllama.cache.sequence_chunks import DROPPED, SequenceChunks


def num_out_of_sight(cache: CacheManager, chunks: SequenceChunks, num_computed: int) -> int:
    """Count the chunks that ``drop_out_of_sight`` would free."""
    first, end = _range(cache, chunks, num_computed)
    return max(end - first - chunks.num_dropped, 0)


def drop_out_of_sight(
    cache: CacheManager, chunks: SequenceChunks, num_computed: int, tenant: str
) -> None:
    """Free what a sequence with ``num_computed`` tokens no longer reads and no other one uses, for
    a tenant that needs memory.

    Not while a step is in flight or something idle can be evicted; some chunk must be out of sight.
    The order of running sequences follows their chunks and is to be repaired.
    """
    first, end = _range(cache, chunks, num_computed)
    size, now, held = cache.chunk_size, cache.usage.now(), len(chunks.path)
    # The record notes the removal of what it has.
    cache.record_prompt(chunks, b"".join(node.key for node in chunks.path))
    own, num_freed = chunks.path[first:], max(min(held, end) - first, 0)
    chunks.meter += cache.tree.withdraw(own, num_freed, tenant) - len(own) * now
    del chunks.path[first:]
    chunks.num_whole = min(chunks.num_whole, first)
    chunks.num_shared = min(chunks.num_shared, first)
    chunks.insert_limit = min(chunks.insert_limit, first * size)
    chunks.set_next_publish(size)
    freed = chunks.ids[first : min(held, end)].tolist()
    freed += chunks.ids[held + chunks.num_dropped : end].tolist()
    for chunk_id in freed:
        cache.pool.free(chunk_id)
    chunks.meter += len(freed) * now
    chunks.ids[first:end] = DROPPED
    chunks.num_dropped = end - first


def _range(cache: CacheManager, chunks: SequenceChunks, num_computed: int) -> tuple[int, int]:
    """The first chunk that the sequence may give up, and the first that it still reads.

    What it found in the tree stays there if it is public or another tenant's.
    """
    if cache.reach is None:
        return 0, 0
    # Uses and pins do not increase along a path.
    first = bisect_left(
        chunks.path, True, key=lambda node: node.num_sequences == 1 and node.num_pins == 0
    )
    at = min(chunks.num_shared, len(chunks.path))
    while at > first:
        node = chunks.path[at - 1]
        if node.namespace == PUBLIC or node.owner != chunks.tenant:
            first = at
        at = node.edge.nodes[0].depth  # an edge has one owner
    return first, max(num_computed + 1 - cache.reach, 0) // cache.chunk_size
