"""A cache tier without files, under a virtual clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from chunkllama.cache.imports import promote_next
from chunkllama.cache.manager import CacheManager
from chunkllama.cache.tier import Tier
from chunkllama.cache.tier_entry import Form, Promotion, TierEntry
from chunkllama.engine.tier_media import Data, Medium, Memory


class SimulatedTier:
    """The store of a cache's tier: one chunk after another is read in ``seconds_per_chunk``.

    Args:
        cache: gets the tier.
        capacity: chunks that it holds.
        seconds_per_chunk: from the begin of a read to its end.
        copy: returns what a chunk of the pool holds.
        paste: stores that in a chunk.
        medium: keeps them.
        first: how the first chunk of a prompt is kept, where one below it takes a unit of
            ``capacity``.
        bits: that the others are rounded to in name; 0: none.

    Attributes:
        tier: of the cache.
        damaged: numbers of files whose reads fail.
        is_full: nothing is accepted.
    """

    def __init__(
        self,
        cache: CacheManager,
        capacity: int,
        seconds_per_chunk: float,
        copy: Callable[[int], Data] = lambda chunk_id: b"",
        paste: Callable[[int, Data], None] = lambda chunk_id, data: None,
        *,
        medium: Medium | None = None,
        first: int = 1,
        bits: int = 0,
    ) -> None:
        self._forms = Form(first), Form(1, bits)
        self.tier = cache.tier = Tier(capacity, cache.chunk_size, self)
        self.damaged: set[int] = set()
        self.is_full = False
        self._cache = cache
        self._seconds = seconds_per_chunk
        self._copy = copy
        self._paste = paste
        self._medium = Memory() if medium is None else medium
        self._unwritten: list[int] = []
        self._reads: deque[tuple[Promotion, int]] = deque()  # with the number of the file
        self._began: dict[Promotion, float] = {}
        self._next = 0.0  # when the first of the reads ends

    @property
    def next_at(self) -> float | None:
        """When ``turn`` has the next chunk; None while nothing is read."""
        return self._next if self._reads else None

    def turn(self, now: float) -> None:
        """Insert what has been read by now; call it between two steps."""
        for file in self._unwritten:
            self.tier.written(file)
        self._unwritten.clear()
        while self._reads and self._next <= now:
            self._end_read(*self._reads.popleft(), self._next)
            self._next += self._seconds

    def form(self, depth: int) -> Form:
        """How a chunk with so many above it is kept."""
        return self._forms[depth > 0]

    def residences(self) -> tuple[int, int]:
        """Bytes in memory and in files."""
        return self._medium.memory_bytes, self._medium.file_bytes

    def accepts(self) -> bool:
        """Whether another chunk can be written."""
        return not self.is_full

    def write(self, entry: TierEntry, chunk_id: int) -> None:
        """Write a chunk, which can be read after the next ``turn``."""
        self._medium.write(entry.file, self._copy(chunk_id))
        self._unwritten.append(entry.file)

    def read(self, promotion: Promotion) -> None:
        """Begin to read after what is being read."""
        now = self._cache.usage.now()
        if not self._reads:
            self._next = now + self._seconds
        self._began[promotion] = now
        self._reads.extend((promotion, entry.file) for entry in promotion.entries)

    def remove(self, file: int) -> None:
        """Remove a file."""
        self._medium.remove(file)

    def _end_read(self, promotion: Promotion, file: int, now: float) -> None:
        if promotion.is_done:
            return
        chunk_id = None
        if file in self.damaged:
            self.tier.damaged(file)
        else:
            chunk_id = promote_next(self._cache, promotion, file)
        if chunk_id is not None and chunk_id >= 0:
            data = self._medium.read(file)
            assert data is not None, "a chunk was lost"
            self._paste(chunk_id, data)
        if chunk_id is None or promotion.num_added == len(promotion.entries):
            if promotion.num_added:
                self.tier.price.add((now - self._began[promotion]) / promotion.num_added)
            del self._began[promotion]
            self.tier.end(promotion)
