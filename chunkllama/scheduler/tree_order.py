"""Running sequences in depth-first order of the chunk tree, kept incrementally.

Sorted lexicographically by chunk ids, sequences with a common path are neighbours, for any
meaning of the ids: any such order is a depth-first order of the trie of paths. ``shared[i]`` is
the number of leading chunks that sequence i has in common with sequence i - 1; for any i < j the
chunks that both share are the minimum over shared[i + 1 .. j].

Chunks that follow the same path are ordered by adapter first, so that the rows of an adapter below
a common path are neighbours too.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from chunkllama.scheduler.request import Sequence

Int32Array = NDArray[np.int32]
FEW_CHUNKS: Final = 256  # lists of that length are sorted faster than arrays
FEW_SHARED: Final = 16  # and of that length compared faster


def num_shared_chunks(a: Int32Array, b: Int32Array) -> int:
    """Length of the common prefix of two chunk lists."""
    shorter = min(len(a), len(b))
    if shorter == 0:
        return 0
    if shorter <= FEW_SHARED:
        mine, others = a.tolist(), b.tolist()
        for i in range(shorter):
            if mine[i] != others[i]:
                return i
        return shorter
    differ = a[:shorter] != b[:shorter]
    first = int(differ.argmax())
    return first if differ[first] else shorter


class TreeOrder:
    """``sequences`` in depth-first order, ``shared`` beside it.

    ``version`` changes whenever a plan made from the order's chunk lists would be out of date.

    Args:
        chunk_size: tokens of a chunk.
    """

    def __init__(self, chunk_size: int) -> None:
        self._chunk_size = chunk_size
        self.sequences: list[Sequence] = []
        self.shared: list[int] = []
        self.version = 1

    def insert(self, sequence: Sequence) -> None:
        """A sequence joins; two neighbours are compared, the others stay as they are."""
        ids = _ids(sequence)
        known = ids.tolist() if len(ids) <= FEW_CHUNKS else None
        low, high = 0, len(self.sequences)
        while low < high:
            middle = (low + high) // 2
            if self._comes_before(self.sequences[middle], sequence, known):
                low = middle + 1
            else:
                high = middle
        before = num_shared_chunks(_ids(self.sequences[low - 1]), ids) if low else 0
        self.sequences.insert(low, sequence)
        self.shared.insert(low, before)
        if low + 1 < len(self.sequences):
            self.shared[low + 1] = num_shared_chunks(ids, _ids(self.sequences[low + 1]))
        self.version += 1

    def remove(self, sequence: Sequence) -> None:
        """A sequence leaves; its successor shares with its predecessor what both shared with it."""
        at = self.sequences.index(sequence)
        del self.sequences[at]
        before = self.shared.pop(at)
        if at < len(self.shared):
            self.shared[at] = min(before, self.shared[at])
        self.version += 1

    def move(self, sequence: Sequence) -> None:
        """A chunk in the middle of the sequence's list was replaced."""
        self.remove(sequence)
        self.insert(sequence)

    def extended(self, sequence: Sequence, old_length: int) -> None:
        """Chunks were appended to the sequence's list.

        That can only change the order where a neighbour continued the whole old list.
        """
        at = self.sequences.index(sequence)
        if at + 1 < len(self.shared) and self.shared[at + 1] >= old_length:
            self.move(sequence)
        self.version += 1

    def check_invariants(self) -> None:
        assert len(self.shared) == len(self.sequences)
        for i, sequence in enumerate(self.sequences):
            if i == 0:
                assert self.shared[0] == 0
                continue
            before, ids = _ids(self.sequences[i - 1]), _ids(sequence)
            is_first = self._comes_before(sequence, self.sequences[i - 1])
            assert not is_first, "sequences out of tree order"
            assert self.shared[i] == num_shared_chunks(before, ids)

    def _comes_before(self, a: Sequence, b: Sequence, known: list[int] | None = None) -> bool:
        """Whether a precedes b, whose chunks may be ``known`` as a list."""
        assert a.chunks is not None and b.chunks is not None
        a_ids, b_ids = a.chunks.ids, b.chunks.ids
        has_adapter = a.group.adapter is not None or b.group.adapter is not None
        if not has_adapter and len(a_ids) + len(b_ids) <= FEW_CHUNKS:
            before: bool = a_ids.tolist() < (b_ids.tolist() if known is None else known)
            return before
        shared = num_shared_chunks(a_ids, b_ids)
        if shared == len(a_ids):
            return len(a_ids) < len(b_ids)
        return shared < len(b_ids) and self._place(a, shared) < self._place(b, shared)

    def _place(self, sequence: Sequence, chunk: int) -> tuple[int, int]:
        """Place of a chunk among those that follow the same path: by the adapter at its end."""
        last = (chunk + 1) * self._chunk_size - 1
        return sequence.adapter_at(last), int(_ids(sequence)[chunk])


def _ids(sequence: Sequence) -> Int32Array:
    assert sequence.chunks is not None
    return sequence.chunks.ids
