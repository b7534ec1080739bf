"""One tree of K/V chunks for the whole engine: match, insert, reference, evict.

    root(variant)
      +-- [sys0] public ---- [sys1] public --+-- [a..] tenant A
      |                                      +-- [b..] tenant B
      +-- [c..] tenant A -- [d..] tenant A

Roots are keyed by K/V variant (model fingerprint, adapter, K/V dtype, RoPE), so equal tokens whose
K/V differ never meet. A tenant's nodes are descendants of public ones or its own; no node is
reachable from two private namespaces. Token ids are compared exactly; nothing is proven by a hash.

After Ye et al., "ChunkAttention" (arXiv 2402.15220), section 3.1, with token-granular matching.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator

from chunkllama.cache.chunk_pool import ChunkPool, ChunkState
from chunkllama.cache.edge import Edge, cut, end_after, join_below
from chunkllama.cache.events import CacheEventLog
from chunkllama.cache.eviction import EvictionOrder
from chunkllama.cache.node import PUBLIC, Children, Node
from chunkllama.cache.usage import ChunkUsage
from chunkllama.cache_messages import TreeNodeInfo


class PrefixTree:
    """Nodes over a ChunkPool. The tree owns the chunk of every node in it.

    Args:
        pool: chunks of the nodes.
        usage: counts what each tenant has in the tree.

    Attributes:
        tick: counts uses of nodes; it stands still while nothing changes.
        awaited: nodes of which progress is to be reported.
        progress: those of them that have been computed further, or are no longer.
    """

    def __init__(self, pool: ChunkPool, usage: ChunkUsage) -> None:
        self.pool = pool
        self.usage = usage
        self.num_evictable = 0
        self.num_nodes = 0
        self.evicted_chunks_total = 0
        self.events = CacheEventLog(pool.chunk_size)
        self.on_evicted: Callable[[Node], None] = lambda node: None  # told before it leaves
        self._roots: dict[str, Node] = {}
        self.order: EvictionOrder[Node] = EvictionOrder(pool.num_chunks)
        self.tick = 0
        self.awaited: set[Node] = set()
        self.progress: dict[Node, None] = {}
        self._copied: dict[Node, None] = {}  # nodes with ``copy_refs``

    def root(self, variant: str) -> Node:
        """Root of one K/V variant, created on first use; it holds no chunk."""
        if variant not in self._roots:
            self._roots[variant] = Node(None, PUBLIC, b"", -1, 0)
        return self._roots[variant]

    def nodes(self) -> Iterator[Node]:
        """Every node, parents before children."""
        for root in self._roots.values():
            yield from root.descendants()

    def describe(self) -> list[TreeNodeInfo]:
        """Every node for the dashboard, parents before children."""
        return [
            TreeNodeInfo(
                chunk_id=node.chunk_id,
                parent_chunk_id=node.parent.chunk_id if node.parent else -1,
                depth=node.depth,
                num_tokens=node.num_tokens,
                filled=node.filled,
                num_sequences=node.num_sequences,
                state=self.pool.state(node.chunk_id).name.lower(),
                namespace=node.namespace,
                bits=node.bits,
            )
            for node in self.nodes()
        ]

    # -- structure --------------------------------------------------------------------------

    def find(self, parent: Node, namespace: str, key: bytes) -> Node | None:
        """The visible child with exactly these tokens."""
        for children in parent.visible_children(namespace):
            node = children.find(key)
            if node is not None:
                return node
        return None

    def find_extending(self, parent: Node, namespace: str, key: bytes) -> Node | None:
        """A visible child whose tokens start with ``key``."""
        for children in parent.visible_children(namespace):
            for node in children.neighbours(key):
                if node.key.startswith(key):
                    return node
        return None

    def insert(
        self,
        parent: Node,
        namespace: str,
        key: bytes,
        chunk_id: int,
        filled: int,
        owner: str = "",
    ) -> Node:
        """Add an unused child; the tree becomes the owner of its chunk."""
        assert parent.namespace in (PUBLIC, namespace), "a node below another tenant's"
        end_after(parent)
        node = Node(parent, namespace, key, chunk_id, filled, owner)
        parent.children.setdefault(namespace, Children()).add(node)
        self.num_nodes += 1
        self.order.add(owner)
        self.usage.add_cached(owner, 1)
        self.num_evictable += 1
        self.pool.set_state(chunk_id, ChunkState.CACHED)
        self.touch(node)
        join_below(parent)
        return node

    def insert_path(
        self, parent: Node, namespace: str, keys: list[bytes], chunk_ids: list[int], owner: str
    ) -> list[Node]:
        """Add nodes, each below the one before, that a sequence uses and is about to compute.

        The same as ``insert`` and ``acquire`` of each, at less cost for a long prompt.
        """
        assert parent.namespace in (PUBLIC, namespace), "a node below another tenant's"
        end_after(parent)
        edge = Edge([])
        for key, chunk_id in zip(keys, chunk_ids, strict=True):
            node = Node(parent, namespace, key, chunk_id, 0, owner, edge)
            siblings = parent.children.get(namespace)
            if siblings is None:
                siblings = parent.children[namespace] = Children()
            siblings.add(node)
            edge.nodes.append(node)
            parent = node
        edge.num_sequences, edge.shares_since = 1, self.usage.now()
        path = edge.nodes.copy()
        if len(path) > 1 and len(path[-1].key) < len(path[0].key):
            edge.split(len(path) - 1)
        self.num_nodes += len(path)
        self.order.add(owner, len(path))
        self.pool.show(chunk_ids)
        return path

    def rekey(self, node: Node, key: bytes) -> None:
        """Give a leaf other tokens: a tail that grew, a partial leaf that was cut or reused."""
        assert node.parent is not None and not node.children
        siblings = node.parent.children[node.namespace]
        siblings.remove(node)
        cut([node])
        node.set_key(key)
        node.edge.changed()
        siblings.add(node)
        join_below(node.parent)

    def remove(self, node: Node) -> None:
        """Take an unused leaf out of the tree and free its chunk."""
        self.pool.free(self._take_out(node))

    def detach(self, node: Node) -> int:
        """Take an unused leaf out of the tree; its chunk, now PRIVATE, is the caller's."""
        chunk_id = self._take_out(node)
        self.pool.set_state(chunk_id, ChunkState.PRIVATE)
        return chunk_id

    def _take_out(self, node: Node) -> int:
        parent, chunk_id = node.parent, node.chunk_id
        assert parent is not None and node.is_evictable and not node.children
        self.events.removed(node)
        siblings = parent.children[node.namespace]
        siblings.remove(node)
        if not siblings:
            del parent.children[node.namespace]
        node.chunk_id = -1
        node.edge.nodes.pop()
        node.edge.changed()
        node.edge = Edge([node])
        join_below(parent)
        self.num_nodes -= 1
        self.order.remove(node.owner)
        self.usage.add_cached(node.owner, -1)
        self.num_evictable -= 1
        self._push_if_leaf(parent)
        return chunk_id

    def withdraw(self, path: list[Node], num_freed: int, tenant: str) -> float:
        """Take the end of a path out of the tree, which one sequence alone uses; its chunks, now
        PRIVATE, are the caller's.

        Args:
            num_freed: nodes at its start that count as evicted: the caller frees their chunks.
            tenant: who needs them.

        Returns:
            The sum of the edges' ``shared_seconds``.
        """
        seconds = self.release_path(path)
        for node in path:  # where not all are kept, those below are of no use without those above
            self.on_evicted(node)
        for node in path[:num_freed]:
            self.usage.add_eviction(node, tenant)
        for node in reversed(path):
            self.detach(node)
        self.evicted_chunks_total += num_freed
        return seconds

    # -- use --------------------------------------------------------------------------------

    def acquire_path(self, path: list[Node]) -> float:
        """Count one more live sequence through a part of a path.

        Returns the sum of the edges' ``shared_seconds``.
        """
        now, seconds = self.usage.now(), 0.0
        for edge in cut(path):
            seconds += edge.shared_seconds(now)
            if edge.num_sequences == 0:
                self._change_use(edge, -1, ChunkState.CACHED, ChunkState.REFERENCED)
            edge.num_sequences += 1
        if path and path[0].parent is not None:
            join_below(path[0].parent)
        return seconds

    def release_path(self, path: list[Node]) -> float:
        """Count one live sequence fewer; nodes without any are cached, most recently used.

        Returns the sum of the edges' ``shared_seconds``.
        """
        now, seconds = self.usage.now(), 0.0
        for edge in reversed(cut(path)):
            seconds += edge.shared_seconds(now)
            edge.num_sequences -= 1
            assert edge.num_sequences >= 0
            last = edge.nodes[-1]
            if edge.num_sequences == 0:
                self._change_use(edge, 1, ChunkState.REFERENCED, ChunkState.CACHED)
                self.tick += len(edge.nodes)
                edge.released_at = self.tick + edge.nodes[0].depth
                if self.awaited:  # in the order of the path: a run is to be repeatable
                    self.progress.update(
                        dict.fromkeys(node for node in edge.nodes if node in self.awaited)
                    )
                self._push_if_leaf(last)
            join_below(last)
        return seconds

    def _change_use(self, edge: Edge, count: int, before: ChunkState, after: ChunkState) -> None:
        """Count an edge that no sequence uses yet, or any more, as cached (1) or not (-1)."""
        self.usage.add_cached(edge.nodes[0].owner, count * len(edge.nodes))
        self.num_evictable += count * self.num_evictable_of(edge.nodes)
        ids = edge.ids.tolist()
        if self._copied:
            ids = [node.chunk_id for node in edge.nodes if node.copy_refs == 0]
        self.pool.move(ids, before, after)

    def num_evictable_of(self, path: list[Node]) -> int:
        """Nodes of a part of a path that are unused and unpinned: of most paths the end."""
        if not path or path[-1].edge.num_sequences or path[-1].num_pins:
            return 0
        first = bisect_left(
            path, True, key=lambda node: node.edge.num_sequences == 0 and node.num_pins == 0
        )
        count = len(path) - first
        if self._copied and count:
            least = path[first].depth
            for node in self._copied:
                at = node.depth - least
                count -= 0 <= at < len(path) - first and path[first + at] is node
        return count

    def progressed(self, node: Node) -> None:
        """Note that a node is computed further, or by no sequence any more."""
        if node in self.awaited:
            self.progress[node] = None

    def add_ref(self, node: Node) -> None:
        """A copy of the step being put together reads the node."""
        if not node.is_used:
            self.num_evictable -= node.num_pins == 0
            self.pool.set_state(node.chunk_id, ChunkState.REFERENCED)
        node.copy_refs += 1
        self._copied[node] = None

    def drop_ref(self, node: Node) -> None:
        node.copy_refs -= 1
        assert node.copy_refs >= 0
        if node.copy_refs == 0:
            del self._copied[node]
        if not node.is_used:
            self.num_evictable += node.num_pins == 0
            self.pool.set_state(node.chunk_id, ChunkState.CACHED)
            self.touch(node)

    def pin(self, node: Node) -> None:
        """Protect a node and its ancestors from eviction."""
        self._add_pins(node, 1)

    def unpin(self, node: Node) -> None:
        self._add_pins(node, -1)

    def num_unpinned(self, node: Node) -> int:
        """Nodes from here to the root that no pin holds yet: the price of a pin."""
        count = 0
        step: Node | None = node
        while step is not None and step.parent is not None:
            count += step.num_pins == 0
            step = step.parent
        return count

    def _add_pins(self, node: Node, count: int) -> None:
        step: Node | None = node
        while step is not None and step.parent is not None:
            before = step.is_evictable
            step.num_pins += count
            assert step.num_pins >= 0
            self.num_evictable += step.is_evictable - before
            self._push_if_leaf(step)
            step = step.parent

    # -- eviction ---------------------------------------------------------------------------

    def evict(self, count: int, tenant: str = "") -> int:
        """Free up to ``count`` chunks in the order of ``eviction.py``; returns how many.

        Args:
            tenant: who needs them.
        """
        evicted = 0
        while evicted < count and (node := self.order.pop(self.tick)) is not None:
            self.on_evicted(node)
            self.usage.add_eviction(node, tenant)
            self.remove(node)
            evicted += 1
        self.evicted_chunks_total += evicted
        return evicted

    def touch(self, node: Node) -> None:
        """Make an unused node the one used last."""
        self.tick += 1
        node.touched = self.tick
        self._push_if_leaf(node)

    def _push_if_leaf(self, node: Node) -> None:
        if node.parent is not None and node.is_evictable_leaf:
            self.order.push(node)
