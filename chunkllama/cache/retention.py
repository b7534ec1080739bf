"""What a sequence keeps in the cache: its chunks, and at its end its tail as a partial leaf."""

from __future__ import annotations

from chunkllama.cache.node import TOKEN_BYTES, Node
from chunkllama.cache.prefix_tree import PrefixTree
from chunkllama.cache.sequence_chunks import SequenceChunks


def find_duplicate(tree: PrefixTree, parent: Node, namespace: str, key: bytes) -> Node | None:
    """Find the visible child that equals a chunk which has been computed.

    An idle leaf of the namespace that the tier has rounded is removed instead: the computed chunk
    takes its place. One above others stays, since their K/V depend on what was rounded.
    """
    node = tree.find(parent, namespace, key)
    if node is None or not node.bits or node.namespace != namespace or not node.is_evictable_leaf:
        return node
    tree.remove(node)
    return None


def keep_tail(tree: PrefixTree, root: Node, chunks: SequenceChunks, key: bytes) -> Node | None:
    """The node of the computed tail ``key``: the live tail node, grown, or a new one.

    None where nothing is kept: a sibling covers the tail already, or it was abandoned before the
    prompt's part of it was computed.
    """
    depth = chunks.num_whole
    parent = chunks.path[depth - 1] if depth else root
    own = chunks.path[depth] if len(chunks.path) > depth else None
    if own is not None and len(key) <= len(own.key):
        return own if own.filled == own.num_tokens else None
    if tree.find_extending(parent, chunks.namespace, key) is not None:
        return own
    if own is None:
        chunk_id, tokens = int(chunks.ids[depth]), len(key) // TOKEN_BYTES
        own = tree.insert(parent, chunks.namespace, key, chunk_id, tokens, chunks.tenant)
    else:
        tree.rekey(own, key)
        own.filled = own.scheduled = own.num_tokens
    tree.events.stored(own)  # whole where an equal sibling has gone since the last look
    return own


def release_path(tree: PrefixTree, path: list[Node]) -> float:
    """Drop references; what was never computed, the end of the path, leaves the tree at once.

    Returns the sum of the edges' ``shared_seconds``.
    """
    seconds = tree.release_path(path)
    for node in reversed(path):
        if node.filled == node.num_tokens:
            break
        if not node.is_used:
            _cut(tree, node)
    return seconds


def drop_covered(tree: PrefixTree, tail: Node) -> None:
    """Of an idle partial leaf and a sibling whose tokens start with it, one is enough."""
    assert tail.parent is not None
    for node in tail.parent.children[tail.namespace].neighbours(tail.key):
        if node is not tail and tail.key.startswith(node.key) and _is_idle_leaf(node):
            tree.remove(node)
    if _is_idle_leaf(tail) and _is_covered(tail, tail.key):
        tree.remove(tail)


def _cut(tree: PrefixTree, node: Node) -> None:
    """Keep of an abandoned node only the tokens whose K/V is there."""
    assert not node.children and node.num_pins == 0
    key = node.key[: node.filled * TOKEN_BYTES]
    if node.filled == 0 or _is_covered(node, key):
        tree.remove(node)
    else:
        tree.rekey(node, key)
        node.scheduled = node.filled


def _is_idle_leaf(node: Node) -> bool:
    return node.is_evictable and not node.children


def _is_covered(node: Node, key: bytes) -> bool:
    """A sibling that the same sequences may see has these tokens too."""
    assert node.parent is not None
    return any(
        sibling is not node and sibling.key.startswith(key)
        for children in node.parent.visible_children(node.namespace)
        for sibling in children.around(key)
    )
