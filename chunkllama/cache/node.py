"""A node of the prefix tree and its sorted children."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from chunkllama.cache.edge import Edge

if TYPE_CHECKING:
    from chunkllama.cache.tier_entry import TierEntry

TOKEN_BYTES = 4
PUBLIC = ""
_FEW_BYTES = 128  # of that length keys are compared as integers


def encode_tokens(tokens: NDArray[np.int32]) -> bytes:
    """Token ids as big-endian bytes: byte order of keys is then the order of their token ids."""
    return tokens.astype(">u4").tobytes()


def decode_tokens(key: bytes) -> list[int]:
    """Token ids of a key."""
    tokens: list[int] = np.frombuffer(key, ">u4").tolist()
    return tokens


def common_prefix(a: bytes, b: bytes) -> int:
    """Number of leading tokens two keys have in common."""
    if a == b:
        return len(a) // TOKEN_BYTES
    if a[:TOKEN_BYTES] != b[:TOKEN_BYTES]:  # as most neighbours in the tree
        return 0
    same, end = 0, min(len(a), len(b))
    while end - same > _FEW_BYTES:
        middle = (same + end) // (2 * TOKEN_BYTES) * TOKEN_BYTES
        if a.startswith(b[same:middle], same):
            same = middle
        else:
            end = middle
    differing = int.from_bytes(a[same:end], "big") ^ int.from_bytes(b[same:end], "big")
    return (end - (differing.bit_length() + 7) // 8) // TOKEN_BYTES


class Children:
    """Children of a node in one namespace, sorted by token ids.

    The child with the longest common prefix is a neighbour of the bisect position.
    """

    __slots__ = ("_keys", "_nodes")

    def __init__(self) -> None:
        self._keys: list[bytes] = []
        self._nodes: list[Node] = []

    def __len__(self) -> int:
        return len(self._nodes)

    def __iter__(self) -> Iterator[Node]:
        return iter(self._nodes)

    def find(self, key: bytes) -> Node | None:
        """The child with exactly these tokens."""
        i = bisect_left(self._keys, key)
        if i < len(self._keys) and self._keys[i] == key:
            return self._nodes[i]
        return None

    def neighbours(self, key: bytes) -> list[Node]:
        """The children just before and at (or after) where ``key`` stands in the order."""
        i = bisect_left(self._keys, key)
        return self._nodes[max(i - 1, 0) : i + 1]

    def around(self, key: bytes) -> list[Node]:
        """``neighbours`` and one more on the right: past an exact match, the next longer one."""
        i = bisect_left(self._keys, key)
        return self._nodes[max(i - 1, 0) : i + 2]

    def add(self, node: Node) -> None:
        i = bisect_left(self._keys, node.key)
        assert i == len(self._keys) or self._keys[i] != node.key, "two equal siblings"
        self._keys.insert(i, node.key)
        self._nodes.insert(i, node)

    def remove(self, node: Node) -> None:
        i = bisect_left(self._keys, node.key)
        assert self._nodes[i] is node
        del self._keys[i], self._nodes[i]


class Node:
    """One chunk of the tree: positions [depth * C, depth * C + num_tokens).

    Attributes:
        key: its token ids, encoded; fewer than C of them make a *partial* node, always a leaf.
        chunk_id: where the K/V lies; -1 once the node has left the tree.
        edge: the run of nodes it belongs to; use is counted there.
        digest: of the tokens from the root to the node's end, once events.py has needed it.
        owner: tenant that the chunk counts for in eviction: the one that added it.
        filled: leading tokens whose K/V is computed.
        scheduled: leading tokens whose K/V will be computed when the step being put together
            has run; rows of that same step may read them.
        copy_refs: copies of the step in flight that read the chunk.
        fingerprint: hash of the tokens from the root to the node's end, for records of what was
            here; a match never relies on it.
        num_pins: pins at or below the node.
        touched: tick of the last use other than a release by a sequence.
        copied_from: while the node is being filled by a copy: (source node, tokens).
        tier_entry: of the same tokens, as far as the tier has looked it up.
        bits: that the tier has rounded each value of the K/V to; 0: they are as computed.
    """

    __slots__ = (
        "bits",
        "children",
        "chunk_id",
        "copied_from",
        "copy_refs",
        "depth",
        "digest",
        "edge",
        "filled",
        "fingerprint",
        "key",
        "namespace",
        "num_pins",
        "owner",
        "parent",
        "scheduled",
        "tier_entry",
        "touched",
    )

    def __init__(
        self,
        parent: Node | None,
        namespace: str,
        key: bytes,
        chunk_id: int,
        filled: int,
        owner: str = "",
        edge: Edge | None = None,
    ) -> None:
        self.parent = parent
        self.namespace = namespace
        self.owner = owner
        self.set_key(key)
        self.chunk_id = chunk_id
        self.depth: int = -1 if parent is None else parent.depth + 1
        self.filled = filled
        self.scheduled = filled
        self.children: dict[str, Children] = {}
        self.copy_refs = 0
        self.num_pins = 0
        self.touched = 0
        self.copied_from: tuple[Node, int] | None = None
        self.edge = Edge([self]) if edge is None else edge
        self.bits = 0

    def set_key(self, key: bytes) -> None:
        """Give the node its tokens."""
        self.key = key
        self.digest = b""
        self.tier_entry: TierEntry | None = None
        self.fingerprint: int = 0 if self.parent is None else hash((self.parent.fingerprint, key))

    @property
    def num_tokens(self) -> int:
        return len(self.key) // TOKEN_BYTES

    @property
    def num_sequences(self) -> int:
        """Live sequences whose path goes through the node."""
        return self.edge.num_sequences

    @property
    def last_use(self) -> int:
        """Tick of the last use, the age for eviction."""
        return max(self.touched, self.edge.released_at - self.depth)

    @property
    def is_used(self) -> bool:
        """A sequence or a copy in flight reads the chunk."""
        return self.edge.num_sequences > 0 or self.copy_refs > 0

    @property
    def is_evictable(self) -> bool:
        """The chunk is unused and unpinned (its children are too, and are evicted first)."""
        return self.edge.num_sequences == 0 and self.copy_refs == 0 and self.num_pins == 0

    @property
    def is_evictable_leaf(self) -> bool:
        """It has a chunk that can be evicted now."""
        return self.chunk_id >= 0 and self.is_evictable and not self.children

    def visible_children(self, namespace: str) -> list[Children]:
        """Children that a sequence of ``namespace`` may see: public ones and its own."""
        children = self.children
        if namespace == PUBLIC or PUBLIC not in children:
            return [children[namespace]] if namespace in children else []
        return [children[name] for name in (PUBLIC, namespace) if name in children]

    def upward(self) -> Iterator[Node]:
        """The node and its ancestors, without the root."""
        step: Node | None = self
        while step is not None and step.parent is not None:
            yield step
            step = step.parent

    def descendants(self) -> Iterator[Node]:
        """Every node below this one, parents before children."""
        stack = [self]
        while stack:
            node = stack.pop()
            for children in node.children.values():
                for child in children:
                    yield child
                    stack.append(child)
