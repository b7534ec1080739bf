"""The chunks of one live sequence, as the scheduler may see them: an array of ids."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from chunkllama.cache.edge import edges_of
from chunkllama.cache.node import Node

NEVER = 2**62
DROPPED = -1  # in place of the id of a chunk that is no longer read


class SequenceChunks:
    """Chunks for positions 0, C, 2C, ... of one sequence.

        path, whole nodes      live tail    private         spare
        [shared][shared][own]  [own, part]  [tail][unpubl.] [      ]
        `num_whole` nodes      0 or 1 node  chunks of this sequence

    One that has lost chunks behind its windows (out_of_sight.py) has ``num_dropped`` places
    without a chunk between its path and its private chunks.

    The cache writes it; the scheduler reads ``ids``, ``num_shared`` and ``next_publish``, and takes
    ``copies``.

    Attributes:
        path: the sequence's tree nodes from depth 0 on; the last one may be partial: the prompt's
            tail, which this sequence alone appends to while others copy from its first tokens.
        num_whole: leading nodes of ``path`` that are whole chunks.
        num_shared: nodes that were there when the sequence was admitted.
        insert_limit: tokens of this sequence that may be shown to others.
        tenant: owner of the nodes that it adds.
        next_publish: number of computed tokens at which a chunk may become a node.
        num_dropped: places behind the path whose chunks were freed; their ids are ``DROPPED``.
        copies: (source, destination, tokens) to be done before the sequence's next slice.
        unrecorded: its prompt, encoded, and how many tokens of it may be stored, until the tenant's
            record has it.
        meter: chunk-seconds of the chunks it no longer has, less, for each that it has, the clock
            (of a node: its edge's integral) when it got it; see ``usage.py``.
    """

    __slots__ = (
        "_buffer",
        "copies",
        "ids",
        "insert_limit",
        "meter",
        "namespace",
        "next_publish",
        "num_dropped",
        "num_shared",
        "num_whole",
        "path",
        "tenant",
        "unrecorded",
    )

    def __init__(
        self,
        namespace: str,
        insert_limit: int,
        path: list[Node],
        tenant: str = "",
        meter: float = 0.0,
    ) -> None:
        self.namespace = namespace
        self.tenant = tenant
        self.insert_limit = insert_limit
        self.path = path
        self.num_whole = len(path)
        self.num_shared = len(path)
        self.next_publish = NEVER
        self.num_dropped = 0
        self.copies: list[tuple[int, int, int]] = []
        self.unrecorded: tuple[bytes, int] | None = None
        self.meter = meter
        self._buffer = np.empty(max(16, 2 * len(path)), np.int32)
        at = 0
        for edge in edges_of(path):
            end = at + len(edge.nodes)
            self._buffer[at:end] = edge.ids
            at = end
        self.ids: NDArray[np.int32] = self._buffer[:at]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_private(self) -> int:
        """Chunks that this sequence alone has, outside the tree."""
        return len(self.ids) - len(self.path) - self.num_dropped

    @property
    def num_own(self) -> int:
        """Chunks that it has and that were not there when it was admitted."""
        return len(self.ids) - self.num_shared - self.num_dropped

    @property
    def private_ids(self) -> list[int]:
        """Ids of the chunks that this sequence alone has, outside the tree."""
        ids: list[int] = self.ids[len(self.path) + self.num_dropped :].tolist()
        return ids

    def extend(self, chunk_ids: list[int], now: float) -> None:
        """Append private chunks at ``now``; the array grows in place while its capacity lasts."""
        self.meter -= len(chunk_ids) * now
        start, end = len(self.ids), len(self.ids) + len(chunk_ids)
        if end > len(self._buffer):
            grown = np.empty(2 * end, np.int32)
            grown[:start] = self.ids
            self._buffer = grown
        self._buffer[start:end] = chunk_ids
        self.ids = self._buffer[:end]

    def set_next_publish(self, chunk_size: int) -> None:
        """The next chunk to show is the one after the whole nodes, if it may be shown at all."""
        end = (self.num_whole + 1) * chunk_size
        self.next_publish = end if end <= self.insert_limit else NEVER
