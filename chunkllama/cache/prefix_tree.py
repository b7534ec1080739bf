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

from collections.abc import Callable, Iterator
from typing import NamedTuple

from chunkllama.cache.chunk_pool import ChunkPool, ChunkState
from chunkllama.cache.events import CacheEventLog
from chunkllama.cache.eviction import EvictionOrder
from chunkllama.cache.node import PUBLIC, TOKEN_BYTES, Children, Node, common_prefix
from chunkllama.cache.usage import ChunkUsage
from chunkllama.cache_messages import TreeNodeInfo


class Match(NamedTuple):
    """What the tree has of a token list, at token granularity.

    Attributes:
        nodes: whole chunks to share; each is filled, or will be by the step being put together.
        copy_source: a node whose first ``num_copied`` tokens continue the match, to be copied.
        num_tokens: tokens that need no computing, ``len(nodes) * C + num_copied``.
        num_later_tokens: what the same match would give once every node seen is filled.
        pending: (node, tokens) to watch when waiting for ``num_later_tokens``.
    """

    nodes: list[Node]
    copy_source: Node | None
    num_copied: int
    num_tokens: int
    num_later_tokens: int
    pending: tuple[Node, int] | None

    @property
    def num_public_tokens(self) -> int:
        """Those of ``num_tokens`` that everyone may match; they come first."""
        count = sum(node.num_tokens for node in self.nodes if node.namespace == PUBLIC)
        copies_public = self.copy_source is not None and self.copy_source.namespace == PUBLIC
        return count + (self.num_copied if copies_public else 0)


class PrefixTree:
    """Nodes over a ChunkPool. The tree owns the chunk of every node in it.

    Args:
        pool: chunks of the nodes.
        usage: counts what each tenant has in the tree.

    Attributes:
        tick: counts uses of nodes; it stands still while nothing changes.
        progress: nodes with ``is_awaited`` that have been computed further, or are no longer.
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
        self.progress: dict[Node, None] = {}

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

    # -- match ------------------------------------------------------------------------------

    def match(self, root: Node, key: bytes, limit: int, namespace: str) -> Match:
        """The longest usable prefix of ``key``, at most ``limit`` tokens; changes nothing.

        A tenant's path leaves the public part at one node. Which one is not known from above
        (both sides may hold equal chunks), so each exit of the public path is followed.
        """
        public = self._chain(root, key, limit, PUBLIC)
        chains = []
        if namespace != PUBLIC:
            for i, node in enumerate([root, *public]):
                own = self._chain(node, key, limit, namespace)
                if own:
                    chains.append(public[:i] + own)
        # a tenant's chunks below the last public one give at least what the public path alone gives
        if not chains or chains[-1][: len(public)] != public:
            chains.insert(0, public)
        matches = [self._usable(root, chain, key, limit, namespace) for chain in chains]
        if len(matches) == 1:
            return matches[0]
        # from the public path a tenant's whole chunk looks like one to copy: sharing it comes first
        best = max(matches, key=lambda match: (match.num_tokens, len(match.nodes)))
        later = max(matches, key=lambda match: match.num_later_tokens)
        if later.num_later_tokens <= best.num_later_tokens:
            return best
        return best._replace(num_later_tokens=later.num_later_tokens, pending=later.pending)

    def _chain(self, node: Node, key: bytes, limit: int, namespace: str) -> list[Node]:
        """Whole chunks of one namespace below ``node`` that equal ``key``, filled or not."""
        width = self.pool.chunk_size * TOKEN_BYTES
        chain: list[Node] = []
        end = limit // self.pool.chunk_size * width
        for start in range((node.depth + 1) * width, end, width):
            children = node.children.get(namespace)
            child = None if children is None else children.find(key[start : start + width])
            if child is None:
                break
            chain.append(child)
            node = child
        return chain

    def _usable(
        self, root: Node, chain: list[Node], key: bytes, limit: int, namespace: str
    ) -> Match:
        size = self.pool.chunk_size
        ready = next((i for i, node in enumerate(chain) if node.scheduled < size), len(chain))
        nodes = chain[:ready]
        end = chain[-1] if chain else root
        overlaps = copyable = self._overlaps(end, key, limit, namespace)
        if ready < len(chain):
            parent = nodes[-1] if nodes else root
            copyable = self._overlaps(parent, key, limit, namespace)
        source, copied = None, 0
        for node, tokens in _copyable(copyable):
            if tokens > copied:
                source, copied = node, tokens
        later, pending = len(chain) * size, None
        if ready < len(chain):
            pending = (chain[-1], size)
        best_overlap = 0
        for node, overlap in overlaps:
            if overlap > best_overlap:
                best_overlap = overlap
                if ready == len(chain):
                    pending = (node, overlap)
        num_tokens = ready * size + copied
        later = max(later + best_overlap, num_tokens)
        return Match(nodes, source, copied, num_tokens, later, pending)

    def _overlaps(
        self, parent: Node, key: bytes, limit: int, namespace: str
    ) -> list[tuple[Node, int]]:
        """Children of ``parent`` next to ``key`` and how many tokens they share with it."""
        start = (parent.depth + 1) * self.pool.chunk_size
        end = min(start + self.pool.chunk_size, limit)
        if end <= start or not parent.children:
            return []
        rest = key[start * TOKEN_BYTES : end * TOKEN_BYTES]
        return [
            (node, common_prefix(node.key, rest))
            for children in parent.visible_children(namespace)
            for node in children.neighbours(rest)
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
        node = Node(parent, namespace, key, chunk_id, filled, owner)
        parent.children.setdefault(namespace, Children()).add(node)
        self.num_nodes += 1
        self.order.add(owner)
        self.usage.add_cached(owner, 1)
        self.num_evictable += 1
        self.pool.set_state(chunk_id, ChunkState.CACHED)
        self.touch(node)
        return node

    def insert_path(
        self, parent: Node, namespace: str, keys: list[bytes], chunk_ids: list[int], owner: str
    ) -> list[Node]:
        """Add nodes, each below the one before, that a sequence uses and is about to compute.

        The same as ``insert`` and ``acquire`` of each, at less cost for a long prompt.
        """
        assert parent.namespace in (PUBLIC, namespace), "a node below another tenant's"
        now, path = self.usage.now(), []
        for key, chunk_id in zip(keys, chunk_ids, strict=True):
            node = Node(parent, namespace, key, chunk_id, 0, owner)
            node.num_sequences, node.shares_since = 1, now
            siblings = parent.children.get(namespace)
            if siblings is None:
                siblings = parent.children[namespace] = Children()
            siblings.add(node)
            path.append(node)
            parent = node
        self.num_nodes += len(path)
        self.order.add(owner, len(path))
        self.pool.show(chunk_ids)
        return path

    def rekey(self, node: Node, key: bytes) -> None:
        """Give a leaf other tokens: a tail that grew, a partial leaf that was cut or reused."""
        assert node.parent is not None and not node.children
        siblings = node.parent.children[node.namespace]
        siblings.remove(node)
        node.set_key(key)
        siblings.add(node)

    def remove(self, node: Node) -> None:
        """Take an unused leaf out of the tree and free its chunk."""
        self.pool.free(self.detach(node))

    def detach(self, node: Node) -> int:
        """Take an unused leaf out of the tree; its chunk, now PRIVATE, is the caller's."""
        parent, chunk_id = node.parent, node.chunk_id
        assert parent is not None and node.is_evictable and not node.children
        self.events.removed(node)
        siblings = parent.children[node.namespace]
        siblings.remove(node)
        if not siblings:
            del parent.children[node.namespace]
        self.pool.set_state(chunk_id, ChunkState.PRIVATE)
        node.chunk_id = -1
        self.num_nodes -= 1
        self.order.remove(node.owner)
        self.usage.add_cached(node.owner, -1)
        self.num_evictable -= 1
        self._push_if_leaf(parent)
        return chunk_id

    # -- use --------------------------------------------------------------------------------

    def acquire(self, node: Node) -> float:
        """Count one more live sequence through the node; returns its ``shared_seconds``."""
        seconds = node.shared_seconds(self.usage.now())
        node.num_sequences += 1
        if node.num_sequences == 1:
            self.usage.add_cached(node.owner, -1)
            self._started_use(node)
        return seconds

    def release(self, node: Node) -> float:
        """Count one live sequence fewer; after the last the node is cached, most recently used.

        Returns its ``shared_seconds``.
        """
        seconds = node.shared_seconds(self.usage.now())
        node.num_sequences -= 1
        assert node.num_sequences >= 0
        if node.num_sequences == 0:
            self.usage.add_cached(node.owner, 1)
            self.progressed(node)
        self._ended_use(node)
        return seconds

    def progressed(self, node: Node) -> None:
        """Note that a node is computed further, or by no sequence any more."""
        if node.is_awaited:
            self.progress[node] = None

    def add_ref(self, node: Node) -> None:
        """A copy of the step being put together reads the node."""
        node.copy_refs += 1
        self._started_use(node)

    def drop_ref(self, node: Node) -> None:
        node.copy_refs -= 1
        assert node.copy_refs >= 0
        self._ended_use(node)

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

    def _started_use(self, node: Node) -> None:
        if node.num_sequences + node.copy_refs == 1:
            self.num_evictable -= node.num_pins == 0
            self.pool.set_state(node.chunk_id, ChunkState.REFERENCED)

    def _ended_use(self, node: Node) -> None:
        if not node.is_used:
            self.num_evictable += node.num_pins == 0
            self.pool.set_state(node.chunk_id, ChunkState.CACHED)
            self.touch(node)

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
        node.last_use = self.tick
        self._push_if_leaf(node)

    def _push_if_leaf(self, node: Node) -> None:
        if node.parent is not None and node.is_evictable_leaf:
            self.order.push(node)


def _copyable(overlaps: list[tuple[Node, int]]) -> Iterator[tuple[Node, int]]:
    """Filled nodes and how many tokens may be copied from each in this step.

    A node that a copy of this step fills is not filled yet, but its source is.
    """
    for node, overlap in overlaps:
        if node.bits:  # rounded: the copy would count as computed
            continue
        yield node, min(overlap, node.filled)
        if node.copied_from is not None:
            source, tokens = node.copied_from
            yield source, min(overlap, tokens)
