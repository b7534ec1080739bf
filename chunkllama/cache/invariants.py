"""The cache's invariants, checked after every step in tests and at idle in production."""

from __future__ import annotations

from collections import Counter

from chunkllama.cache.adapter_tags import adapter_of
from chunkllama.cache.chunk_pool import ChunkState
from chunkllama.cache.node import PUBLIC, Node
from chunkllama.cache.pins import Pins
from chunkllama.cache.prefix_tree import PrefixTree
from chunkllama.cache.sequence_chunks import DROPPED, SequenceChunks


def check_cache(tree: PrefixTree, pins: Pins, live: list[SequenceChunks], *, in_step: bool) -> None:
    """Raise AssertionError at the first violation.

    Conservation: free + cached + referenced + private == total, and every chunk is in the state
    its owner implies.
    Reference counts: a node's count is the number of live sequences through it.
    Edges: each node is in one, which branches nowhere but at its end.
    Isolation: no node is reachable from two private namespaces, or below chunks of two adapters.
    Between steps: an unfilled node belongs to exactly one live sequence, no copy holds a node.
    """
    tree.pool.check_invariants()
    pins.check_invariants()
    uses = Counter(node for chunks in live for node in chunks.path)
    seen: set[int] = set()
    num_nodes = num_evictable = 0
    for node in tree.nodes():
        _check_node(tree, node, uses[node], in_step=in_step)
        _check_edge(node)
        assert node.chunk_id not in seen, f"chunk {node.chunk_id} is in two nodes"
        seen.add(node.chunk_id)
        num_nodes += 1
        num_evictable += node.is_evictable
    assert num_nodes == tree.num_nodes
    owned = Counter(node.owner for node in tree.nodes())
    assert all(tree.order.num_nodes(owner) == count for owner, count in owned.items())
    assert num_evictable == tree.num_evictable
    assert len(seen) == num_nodes
    num_private = sum(_check_sequence(tree, chunks, seen) for chunks in live)
    assert num_private == tree.pool.count(ChunkState.PRIVATE), "private chunks leaked"


def _check_node(tree: PrefixTree, node: Node, uses: int, *, in_step: bool) -> None:
    parent = node.parent
    assert parent is not None and node.depth == parent.depth + 1
    assert parent.namespace in (PUBLIC, node.namespace), "reachable from two namespaces"
    assert adapter_of(parent.key) in (0, adapter_of(node.key)), "below another adapter's chunk"
    assert node.num_sequences == uses, (
        f"chunk {node.chunk_id}: {node.num_sequences} counted, {uses} live"
    )
    state = tree.pool.state(node.chunk_id)
    assert state == (ChunkState.REFERENCED if node.is_used else ChunkState.CACHED)
    assert 0 < node.num_tokens <= tree.pool.chunk_size
    assert node.num_tokens == tree.pool.chunk_size or not node.children
    assert 0 <= node.filled <= node.scheduled <= node.num_tokens
    if not in_step:
        assert node.copy_refs == 0 and node.copied_from is None and node.scheduled == node.filled
        assert node.filled == node.num_tokens or node.num_sequences == 1, "unfilled and shared"
    if parent.depth >= 0:
        assert node.num_sequences <= parent.num_sequences
        assert node.filled == 0 or parent.filled == parent.num_tokens or in_step


def _check_edge(node: Node) -> None:
    """Check a node's place in its edge, and the whole edge at its first node."""
    edge = node.edge
    first, last = edge.nodes[0], edge.nodes[-1]
    assert edge.nodes[node.depth - first.depth] is node, "a node outside its edge"
    if node is not last:
        assert sum(map(len, node.children.values())) == 1, "a branch inside an edge"
        below = edge.nodes[node.depth - first.depth + 1]
        assert below.parent is node and below.num_tokens == node.num_tokens
        assert (below.namespace, below.owner) == (node.namespace, node.owner)
    if node is first:
        edge.check_copies()


def _check_sequence(tree: PrefixTree, chunks: SequenceChunks, seen: set[int]) -> int:
    """Number of private chunks of one sequence."""
    for depth, node in enumerate(chunks.path):
        assert node.depth == depth and node.chunk_id == chunks.ids[depth]
        assert node.namespace in (PUBLIC, chunks.namespace), "another tenant's node in a path"
        whole = node.num_tokens == tree.pool.chunk_size
        assert whole == (depth < chunks.num_whole)
    dropped = chunks.ids[len(chunks.path) : len(chunks.path) + chunks.num_dropped]
    assert (dropped == DROPPED).all()
    private = chunks.private_ids
    assert len(private) == chunks.num_private
    for chunk_id in private:
        assert chunk_id not in seen, f"chunk {chunk_id} has two holders"
        assert tree.pool.state(chunk_id) == ChunkState.PRIVATE
        seen.add(chunk_id)
    return len(private)
