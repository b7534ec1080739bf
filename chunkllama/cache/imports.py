"""Insert chunks whose K/V come from elsewhere: from a pack file, a snapshot or the tier.

An import takes a free chunk, else it evicts as a request of the owner would. The node that it adds
is unused and evictable at once, so it changes nothing for admission.
"""

from __future__ import annotations

from typing import Literal

from chunkllama.cache import retention
from chunkllama.cache.manager import CacheManager
from chunkllama.cache.node import Node
from chunkllama.cache.tier_entry import Promotion

# "lost": its parent was left out or evicted; "pending": a running request is computing it.
Outcome = Literal["new", "present", "lost", "pending", "no room"]


class ChunkImport:
    """Whole chunks of one file, inserted in its order, parents before children.

    Steps may run between two calls of ``add``, not during one.
    """

    def __init__(self, cache: CacheManager) -> None:
        self._cache = cache
        self._nodes: list[Node | None] = []

    def leave_out(self) -> None:
        """Pass over the next chunk, and with it over those below it."""
        self._nodes.append(None)

    def add(self, parent: int, namespace: str, key: bytes, owner: str) -> tuple[int, Outcome]:
        """Insert the next chunk as if its K/V were there already.

        Args:
            parent: index in the file; -1: the chunk is a prompt's first.
            key: its token ids, encoded.

        Returns:
            Its id in the pool, -1 if it has none, and what was done. The K/V of a "new" one must be
            written before the next step.
        """
        above = self._cache.root if parent < 0 else self._nodes[parent]
        node: Node | None = None
        outcome: Outcome = "lost"
        if above is not None and (parent < 0 or above.chunk_id >= 0):
            node, outcome = _add(self._cache, above, namespace, key, owner)
        self._nodes.append(node)
        return (-1 if node is None else node.chunk_id), outcome


def promote_next(cache: CacheManager, promotion: Promotion, file: int) -> int | None:
    """Insert the next chunk of a promotion as if its K/V were there already.

    Args:
        file: number of the file that was read.

    Returns:
        Its id in the pool, whose K/V must be written before the next step; -1 if they are there;
        None if it cannot be inserted, and with it those after it.
    """
    entry, above = promotion.entries[promotion.num_added], promotion.above
    # A step in flight may have been about to compute it, and have failed.
    is_whole = above is cache.root or (above.chunk_id >= 0 and above.filled == cache.chunk_size)
    if not is_whole or entry.file != file:
        return None
    node, outcome = _add(cache, above, entry.namespace, entry.key, entry.owner)
    if node is None:
        return None
    promotion.above = node
    promotion.num_added += 1
    if outcome != "new":
        return -1
    node.bits = entry.form.bits
    return node.chunk_id


def _add(
    cache: CacheManager, above: Node, namespace: str, key: bytes, owner: str
) -> tuple[Node | None, Outcome]:
    found = cache.tree.find(above, namespace, key)
    if found is not None:
        return (found, "present") if found.filled == found.num_tokens else (None, "pending")
    pool, tree, peak = cache.pool, cache.tree, cache.pool.peak
    if above is not cache.root:
        tree.add_ref(above)  # it must not be evicted for its child
    has_room = pool.num_free > 0 or tree.evict(1, owner) == 1
    node = None
    if has_room:
        (chunk_id,) = pool.allocate(1)
        node = tree.insert(above, namespace, key, chunk_id, cache.chunk_size, owner)
    if above is not cache.root:
        tree.drop_ref(above)
    pool.peak = peak  # of what requests use
    if node is None:
        return None, "no room"
    tree.events.stored(node)
    retention.drop_covered(tree, node)
    return node, "new"
