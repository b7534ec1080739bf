"""Insert chunks whose K/V come from elsewhere: from a pack file or a snapshot.

An import takes a free chunk, else it evicts as a request of the owner would. The node that it adds
is unused and evictable at once, so it changes nothing for admission.
"""

from __future__ import annotations

from typing import Final

from chunkllama.cache import retention
from chunkllama.cache.manager import CacheManager
from chunkllama.cache.node import Node

NO_ROOM: Final = "no room"
NOT_COMPUTED: Final = "not computed"


def add_chunk(
    cache: CacheManager, parent: Node | None, namespace: str, key: bytes, owner: str
) -> tuple[Node | None, str]:
    """Insert a whole chunk below ``parent``, as if its K/V were there already.

    Call it between two steps, and write the K/V of a new node before the next one.

    Args:
        parent: a whole chunk; None: the chunk is a prompt's first.
        key: its token ids, encoded.

    Returns:
        The node, and "new", "present", or why there is none: all chunks are in use or pinned
        (``NO_ROOM``), or a running request is still computing it (``NOT_COMPUTED``).
    """
    above = cache.root if parent is None else parent
    assert above.chunk_id >= 0 or above is cache.root, "the parent was evicted"
    found = cache.tree.find(above, namespace, key)
    if found is not None:
        return (found, "present") if found.filled == found.num_tokens else (None, NOT_COMPUTED)
    peak = cache.pool.peak  # of what requests use
    if parent is not None:
        cache.tree.add_ref(parent)  # allocating may evict
    has_room = cache.num_available > 0
    if has_room and not cache.pool.num_free:
        has_room = cache.tree.evict(1, owner) == 1
    node = None
    if has_room:
        (chunk_id,) = cache.pool.allocate(1)
        node = cache.tree.insert(above, namespace, key, chunk_id, cache.chunk_size, owner)
    if parent is not None:
        cache.tree.drop_ref(parent)
    cache.pool.peak = peak
    if node is None:
        return None, NO_ROOM
    cache.tree.events.stored(node)
    retention.drop_covered(cache.tree, node)
    return node, "new"
