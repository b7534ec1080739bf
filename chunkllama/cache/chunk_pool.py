"""The pool of K/V chunks: ids, states and counts; the tree knows what a chunk holds."""

from __future__ import annotations

from enum import IntEnum

from chunkllama.errors import ConfigError


class ChunkState(IntEnum):
    """Who holds a chunk.

    FREE: unallocated. CACHED: a tree node that no sequence uses. REFERENCED: a tree node in use.
    PRIVATE: one sequence alone, not in the tree (its decode tail, its spare chunks).
    """

    FREE = 0
    CACHED = 1
    REFERENCED = 2
    PRIVATE = 3


_FREE, _CACHED, _REFERENCED, _PRIVATE = map(int, ChunkState)  # plain numbers cost less


class ChunkPool:
    """``num_chunks`` chunks of ``chunk_size`` tokens, for all layers at once.

    A chunk id is valid in every layer's K/V tensor. The free list is a stack, so that a fresh
    pool gives 0, 1, 2, ... and the chunk freed last, whose lines are warm, is used next.
    """

    def __init__(self, num_chunks: int, chunk_size: int) -> None:
        if num_chunks < 1 or chunk_size < 1:
            raise ConfigError(
                f"a pool needs at least one chunk of one token, got num_chunks {num_chunks}, "
                f"chunk_size {chunk_size}"
            )
        self.num_chunks = num_chunks
        self.chunk_size = chunk_size
        self.peak = 0
        self._free = list(range(num_chunks - 1, -1, -1))
        self._states = bytearray(num_chunks)
        self._counts = [num_chunks, 0, 0, 0]

    @property
    def num_free(self) -> int:
        return len(self._free)

    def count(self, state: ChunkState) -> int:
        """How many chunks are in that state, without walking them."""
        return self._counts[state]

    def state(self, chunk_id: int) -> ChunkState:
        return ChunkState(self._states[chunk_id])

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` free chunks; they become PRIVATE."""
        assert count <= len(self._free), f"{count} chunks wanted, {len(self._free)} free"
        taken = [self._free.pop() for _ in range(count)]
        for chunk_id in taken:
            self._states[chunk_id] = _PRIVATE
        self._counts[_FREE] -= count
        self._counts[_PRIVATE] += count
        self._note_peak()
        return taken

    def show(self, chunk_ids: list[int]) -> None:
        """Move private chunks to the tree, in use."""
        for chunk_id in chunk_ids:
            assert self._states[chunk_id] == _PRIVATE, f"chunk {chunk_id} is not private"
            self._states[chunk_id] = _REFERENCED
        self._counts[_PRIVATE] -= len(chunk_ids)
        self._counts[_REFERENCED] += len(chunk_ids)

    def set_state(self, chunk_id: int, state: ChunkState) -> None:
        """Move an allocated chunk to another state; FREE gives it back."""
        before = self._states[chunk_id]
        assert before != _FREE, f"chunk {chunk_id} is free already"
        if before == state:
            return
        self._states[chunk_id] = state
        self._counts[before] -= 1
        self._counts[state] += 1
        if state == _FREE:
            self._free.append(chunk_id)
        elif before == _CACHED:
            self._note_peak()

    def move(self, chunk_ids: list[int], before: ChunkState, after: ChunkState) -> None:
        """Move chunks between two states of the tree: CACHED and REFERENCED."""
        states, old, new = self._states, int(before), int(after)
        for chunk_id in chunk_ids:
            assert states[chunk_id] == old, f"chunk {chunk_id} is not {before.name.lower()}"
            states[chunk_id] = new
        self._counts[old] -= len(chunk_ids)
        self._counts[new] += len(chunk_ids)
        self._note_peak()

    def free(self, chunk_id: int) -> None:
        self.set_state(chunk_id, ChunkState.FREE)

    def check_invariants(self) -> None:
        """free + cached + referenced + private == total, and the counts are the true ones."""
        counted = [self._states.count(state) for state in ChunkState]
        assert counted == self._counts, f"chunk states {counted}, counters {self._counts}"
        assert sum(counted) == self.num_chunks
        assert len(set(self._free)) == len(self._free) == counted[ChunkState.FREE]
        assert all(self._states[chunk_id] == ChunkState.FREE for chunk_id in self._free)

    def _note_peak(self) -> None:
        in_use = self._counts[_REFERENCED] + self._counts[_PRIVATE]
        if in_use > self.peak:
            self.peak = in_use
