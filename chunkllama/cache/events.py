"""Changes of what can be matched: whole chunks that were stored or removed.

Partly filled leaves have no events: they can be matched, but change with every request.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from chunkllama.cache.node import PUBLIC, Node
from chunkllama.cache_messages import CacheEvent, ChunkRemoved, ChunkStored

DIGEST_BYTES = 16


class CacheEventLog:
    """Records changes while someone watches, until ``take``.

    Args:
        chunk_size: tokens of a whole chunk.

    Attributes:
        is_on: whether changes are recorded.
    """

    def __init__(self, chunk_size: int) -> None:
        self.is_on = False
        self._chunk_size = chunk_size
        self._events: list[CacheEvent] = []

    def stored(self, node: Node) -> None:
        """Note that K/V of more of the node's tokens is there."""
        if self.is_on and self._is_whole(node):
            self._events.append(_stored(node))

    def removed(self, node: Node) -> None:
        """Note that a node leaves the tree; it still has its chunk."""
        if self.is_on and self._is_whole(node):
            self._events.append(ChunkRemoved(chunk_id=node.chunk_id, hash=digest(node).hex()))

    def take(self) -> list[CacheEvent]:
        """Return the events since the last call, in order."""
        events, self._events = self._events, []
        return events

    def snapshot(self, nodes: Iterable[Node]) -> list[CacheEvent]:
        """Return an event for each whole chunk of ``nodes``, in their order."""
        return [_stored(node) for node in nodes if self._is_whole(node)]

    def _is_whole(self, node: Node) -> bool:
        return node.filled == self._chunk_size


def _stored(node: Node) -> ChunkStored:
    parent = node.parent
    has_parent = parent is not None and parent.parent is not None
    return ChunkStored(
        chunk_id=node.chunk_id,
        hash=digest(node).hex(),
        parent_hash=digest(parent).hex() if parent is not None and has_parent else None,
        depth=node.depth,
        tenant=node.owner,
        is_public=node.namespace == PUBLIC,
    )


def digest(node: Node) -> bytes:
    """Hash of the tokens from the root to the node's end; see ``ChunkStored.hash``.

    Unlike ``Node.fingerprint`` it is the same in every process.
    """
    missing: list[Node] = []
    above = b""
    for step in node.upward():
        if step.digest:
            above = step.digest
            break
        missing.append(step)
    for step in reversed(missing):
        above = step.digest = extended(above, step.key)
    return above


def extended(above: bytes, key: bytes) -> bytes:
    """Return the digest of a prompt that goes on with a chunk, from that of what is before it."""
    return hashlib.sha256(above + key).digest()[:DIGEST_BYTES]
