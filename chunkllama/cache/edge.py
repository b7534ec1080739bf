"""Edges of the prefix tree: runs of nodes that sequences join, leave and match as one.

A path of 8,192 chunks that only branches at its end is one edge, so that to join it costs a few
operations and copies of memory, but no work for each node.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from chunkllama.cache.node import Node


class Edge:
    """Nodes of one path, each the only child of the one before, that the same sequences use.

    They have one namespace and one owner. A partial node is alone in its edge.

    Attributes:
        nodes: at least one, parents first.
        num_sequences: live sequences whose path goes through the nodes.
        shares_since: when ``num_sequences`` changed last, in seconds.
        released_at: the node at depth d was last released at tick ``released_at - d``.
    """

    __slots__ = (
        "_ids",
        "_key",
        "nodes",
        "num_sequences",
        "released_at",
        "shares_since",
        "summed_seconds",
    )

    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = nodes
        self.num_sequences = 0
        self.shares_since = 0.0
        self.summed_seconds = 0.0
        self.released_at = 0
        self._key: bytes | None = None
        self._ids: NDArray[np.int32] | None = None

    @property
    def key(self) -> bytes:
        """Token ids of all nodes, encoded."""
        if self._key is None:
            self._key = b"".join([node.key for node in self.nodes])
        return self._key

    @property
    def ids(self) -> NDArray[np.int32]:
        """Chunk ids of all nodes."""
        if self._ids is None:
            self._ids = np.array([node.chunk_id for node in self.nodes], np.int32)
        return self._ids

    def check_copies(self) -> None:
        """Check the key and the ids that were put together before."""
        if self._key is not None:
            assert self._key == b"".join([node.key for node in self.nodes])
        if self._ids is not None:
            assert self._ids.tolist() == [node.chunk_id for node in self.nodes]

    def changed(self) -> None:
        """Note that ``nodes``, or a key of theirs, is another one."""
        self._key = self._ids = None

    def shared_seconds(self, now: float) -> float:
        """Return the integral of 1 / ``num_sequences`` over the time of use, for all nodes."""
        if self.num_sequences:
            self.summed_seconds += (now - self.shares_since) / self.num_sequences
        self.shares_since = now
        return self.summed_seconds * len(self.nodes)

    def split(self, at: int) -> None:
        """Make two edges, the second one of ``nodes[at:]``; the longer part keeps this object."""
        nodes, num_nodes = self.nodes, len(self.nodes)
        if 2 * at >= num_nodes:
            part = Edge(nodes[at:])
            del nodes[at:]
        else:
            part = Edge(nodes[:at])
            del nodes[:at]
        part.num_sequences = self.num_sequences
        part.shares_since, part.summed_seconds = self.shares_since, self.summed_seconds
        part.released_at = self.released_at
        for node in part.nodes:
            node.edge = part
        self._ids = None
        if self._key is None:
            return
        whole, width = self._key, len(self._key) // num_nodes
        first, second = (self, part) if 2 * at >= num_nodes else (part, self)
        first._key, second._key = whole[: at * width], whole[at * width :]

    def may_join(self, below: Edge) -> bool:
        """Tell whether this edge and the one below its last node may be one.

        The sequences through the lower one use the upper one, too: equal numbers are the same.
        """
        last, first = self.nodes[-1], below.nodes[0]
        return (
            self.num_sequences == below.num_sequences
            and (self.num_sequences > 0 or self.released_at == below.released_at)
            and last.namespace == first.namespace
            and last.owner == first.owner
            and len(last.key) == len(first.key)
        )

    def join(self, below: Edge) -> None:
        """Make one edge of this one and the next; the longer one keeps its object.

        ``shared_seconds`` of both together stays what it is: live sequences note that sum.
        """
        if self.num_sequences:
            elapsed = self.shares_since - below.shares_since
            below.summed_seconds += elapsed / self.num_sequences
        total = self.summed_seconds * len(self.nodes) + below.summed_seconds * len(below.nodes)
        long, short = (self, below) if len(self.nodes) >= len(below.nodes) else (below, self)
        for node in short.nodes:
            node.edge = long
        if long is self:
            long.nodes += short.nodes
        else:
            long.nodes[:0] = short.nodes
        long.summed_seconds = total / len(long.nodes)
        long.shares_since, long.released_at = self.shares_since, self.released_at
        long.changed()


def edges_of(path: list[Node]) -> Iterator[Edge]:
    """Edges of a path, or of a part of one, that begins and ends with whole edges."""
    at = 0
    while at < len(path):
        edge = path[at].edge
        yield edge
        at += len(edge.nodes)


def cut(path: list[Node]) -> list[Edge]:
    """Edges of any part of a path, split where it begins or ends inside one."""
    if not path:
        return []
    first = path[0]
    before = first.depth - first.edge.nodes[0].depth
    if before:
        first.edge.split(before)
    end_after(path[-1])
    return list(edges_of(path))


def end_after(node: Node) -> None:
    """Split a node's edge below the node, if it continues there."""
    edge = node.edge
    if edge.nodes[-1] is not node:
        edge.split(node.depth - edge.nodes[0].depth + 1)


def join_below(node: Node) -> None:
    """Join a node's edge with that of its only child, if the same sequences use both."""
    if node.parent is None or len(node.children) != 1:
        return
    (children,) = node.children.values()
    if len(children) == 1:
        (child,) = children
        if child.edge is not node.edge and node.edge.may_join(child.edge):
            node.edge.join(child.edge)
