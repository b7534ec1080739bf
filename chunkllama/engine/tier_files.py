"""The cache tier: threads write and read chunks, the step loop copies those of the pool.

    step loop   copy an evicted chunk ──►              insert, copy to the pool ──► next step
    writer                       quantize, write             ▲
    reader                                                   └── read, check, widen

What is kept of a chunk is its bytes as they are in this process's pool, or its K/V in a few bits
(``backends/kivi.py``), in memory or in a file (``tier_media.py``). The first chunk of a prompt is
never rounded: every token attends to the first ones, whose keys are unlike all others (attention
sinks, arXiv 2309.17453).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import torch

from chunkllama.backends.kivi import Bits, KiviCodec
from chunkllama.cache.imports import promote_next
from chunkllama.cache.manager import CacheManager
from chunkllama.cache.tier import Tier
from chunkllama.cache.tier_entry import Form, Promotion, TierEntry
from chunkllama.engine.chunk_io import ChunkIO
from chunkllama.engine.tier_media import Data, Folder, Medium, Memory, MemoryThenFiles
from chunkllama.errors import ConfigError
from chunkllama.logger import init_logger

logger = init_logger(__name__)

_STAGED_BYTES: Final = 64 << 20  # copied and not written yet; as much is read ahead
_STEP_BYTES: Final = 32 << 20  # inserted between two steps of a busy loop


@dataclass(frozen=True, slots=True)
class TierSettings:
    """What a tier may hold.

    Attributes:
        memory_bytes: in memory; 0: nothing.
        directory: where a folder for files is made; None: none are written.
        file_bytes: in files.
        bits: of a value; None: as the pool has it.
    """

    memory_bytes: int
    directory: Path | None
    file_bytes: int
    bits: Bits | None = None


class _Packing(Protocol):
    """What of a chunk is kept; both methods run in threads."""

    form: Form

    def pack(self, copied: torch.Tensor) -> Data | None:
        """Return the bytes of a chunk in the pool's layout; None: it cannot be kept."""
        ...

    def unpack(self, data: Data) -> torch.Tensor:
        """Return the chunk in the pool's layout."""
        ...


class _AsItLies:
    def __init__(self, chunk_io: ChunkIO) -> None:
        self.form = Form(chunk_io.stored_bytes)
        self._io = chunk_io

    def pack(self, copied: torch.Tensor) -> Data:
        data: memoryview = copied.view(torch.uint8).numpy().reshape(-1).data
        return data

    def unpack(self, data: Data) -> torch.Tensor:
        return self._io.from_stored(data)


class _InFewBits:
    def __init__(self, chunk_io: ChunkIO, bits: Bits) -> None:
        self._io = chunk_io
        self._codec = KiviCodec(bits, chunk_io.shape, chunk_io.dtype)
        self.form = Form(self._codec.num_bytes, bits)

    def pack(self, copied: torch.Tensor) -> Data | None:
        return self._codec.encode(self._io.canonical(copied))

    def unpack(self, data: Data) -> torch.Tensor:
        return self._io.widened(self._codec, data)


@dataclass(frozen=True, slots=True)
class _Read:
    """One chunk that is being read."""

    promotion: Promotion
    entry: TierEntry
    file: int
    chunk: Future[torch.Tensor | None]


class TierFiles:
    """The store of a cache's tier.

    Args:
        cache: gets the tier.
        chunk_io: reads and writes its pool.
        settings: what it may hold.
        clock: monotonic seconds.

    Raises:
        ConfigError: a budget is too small for a chunk.
    """

    def __init__(
        self,
        cache: CacheManager,
        chunk_io: ChunkIO,
        settings: TierSettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        bits = settings.bits
        self._whole = _AsItLies(chunk_io)
        self._usual: _Packing = self._whole if bits is None else _InFewBits(chunk_io, bits)
        self._cache = cache
        self._io = chunk_io
        self._clock = clock
        self._chunk_bytes = chunk_io.stored_bytes  # of a copy
        self._most_staged = max(_STAGED_BYTES // self._chunk_bytes, 2)
        self._writes: deque[tuple[int, Future[bool]]] = deque()
        self._removals: deque[Future[None]] = deque()
        self._reads: deque[_Read] = deque()
        self._unread: deque[tuple[Promotion, TierEntry]] = deque()
        self._began: dict[Promotion, float] = {}
        self._writer = ThreadPoolExecutor(1, "write-tier")
        self._reader = ThreadPoolExecutor(1, "read-tier")
        self._memory_bytes = settings.memory_bytes
        self._medium: Medium | None = None
        self._former: Medium | None = None  # of a tier that was turned off
        self._tier = cache.tier = Tier(self._budget(settings), cache.chunk_size, self)
        try:
            self._medium = _medium(settings)
        except OSError as error:
            self._lose_files(f"{settings.directory}: {error.strerror}")

    def _budget(self, settings: TierSettings) -> int:
        memory, files = settings.memory_bytes, settings.file_bytes
        largest = self._whole.form.num_bytes
        has_files = settings.directory is not None
        for setting, budget in (
            ("cache_tier_memory", memory),
            ("cache_tier_bytes", files if has_files else 0),
        ):
            if 0 < budget < largest:
                raise ConfigError(
                    f"{setting}: {budget} bytes hold no chunk of {largest}; give more"
                )
        if not has_files:
            return memory
        # Memory that is not full may leave less than the largest chunk unused.
        return memory + files - (largest if memory else 0)

    @property
    def is_moving(self) -> bool:
        """``turn`` has work, now or soon."""
        return bool(self._writes or self._removals or self._began)

    def futures(self) -> list[Future[torch.Tensor | None]]:
        """Reads that are in progress."""
        return [read.chunk for read in self._reads]

    def turn(self, seconds: float = 0.0) -> None:
        """Take in what the threads have done; call it between two steps.

        Args:
            seconds: that an idle loop may wait for something.
        """
        if seconds:
            awaited: list[Future[Any]] = [write for _, write in self._writes]
            awaited += [*self._removals, *self.futures()]
            wait(awaited, seconds, FIRST_COMPLETED)
        while self._removals and self._removals[0].done():
            self._removals.popleft()
        while self._writes and self._writes[0][1].done():
            self._end_write(*self._writes.popleft())
        budget = max(_STEP_BYTES, self._chunk_bytes)
        while self._reads and self._reads[0].chunk.done() and budget >= self._chunk_bytes:
            self._end_read(self._reads.popleft())
            self._read_ahead()
            budget -= self._chunk_bytes

    def close(self) -> None:
        """End the threads and forget what is kept."""
        self._reader.shutdown(cancel_futures=True)
        self._writer.shutdown(cancel_futures=True)
        for medium in (self._medium, self._former):
            if medium is not None:
                medium.close()
        self._medium = self._former = None

    def _lose_files(self, reason: str) -> None:
        """Keep chunks in memory alone, or nothing if the tier has none."""
        if not self._memory_bytes:
            self._turn_off(reason)
            return
        logger.warning("the cache tier has no files until the next start: %s", reason)
        if isinstance(self._medium, MemoryThenFiles):
            self._tier.shrink(self._memory_bytes, self._medium.in_memory())
        else:
            self._medium = Memory()
            self._tier.shrink(self._memory_bytes, set())

    def _turn_off(self, reason: str) -> None:
        """Keep nothing any more; what is being read is computed."""
        logger.warning("the cache tier is off until the next start: %s", reason)
        self._tier.close()
        self._unread.clear()
        self._began.clear()
        if self._medium is not None:
            self._writer.submit(self._medium.close)
            self._medium, self._former = None, self._medium

    # -- the store of the tier ----------------------------------------------------------------

    def form(self, depth: int) -> Form:
        """How a chunk with so many above it is kept."""
        return (self._usual if depth else self._whole).form

    def residences(self) -> tuple[int, int]:
        """Bytes in memory and in files, without what is being written."""
        medium = self._medium
        return (0, 0) if medium is None else (medium.memory_bytes, medium.file_bytes)

    def accepts(self) -> bool:
        """Whether another chunk can be copied: threads may be slower than eviction."""
        return self._medium is not None and len(self._writes) < self._most_staged

    def write(self, entry: TierEntry, chunk_id: int) -> None:
        """Copy a chunk, and have it written."""
        assert self._medium is not None, "nothing was accepted"
        copied = self._io.copy(chunk_id).contiguous()
        given = self._medium, self._packing(entry), entry.file, copied
        self._writes.append((entry.file, self._writer.submit(_keep, *given)))

    def read(self, promotion: Promotion) -> None:
        """Begin to read the chunks of a promotion."""
        self._began[promotion] = self._clock()
        self._unread.extend((promotion, entry) for entry in promotion.entries)
        self._read_ahead()

    def remove(self, file: int) -> None:
        """Remove a file once what was to be written before is written."""
        if self._medium is not None:
            self._removals.append(self._writer.submit(self._medium.remove, file))

    # -- the step loop ------------------------------------------------------------------------

    def _packing(self, entry: TierEntry) -> _Packing:
        return self._usual if entry.form.bits else self._whole

    def _end_write(self, file: int, write: Future[bool]) -> None:
        if self._medium is None:
            return
        try:
            is_kept = write.result()
        except OSError as error:
            self._lose_files(f"{error.filename or 'a file'}: {error.strerror}")
            return
        if is_kept:
            self._tier.written(file)
        else:
            self._tier.refused(file)

    def _read_ahead(self) -> None:
        while self._unread and len(self._reads) < self._most_staged:
            promotion, entry = self._unread.popleft()
            if promotion.is_done:
                continue
            if not entry.is_written or self._medium is None:  # it was dropped
                self._end(promotion)
                continue
            given = self._medium, self._packing(entry), entry.file
            chunk = self._reader.submit(_fetch, *given)
            self._reads.append(_Read(promotion, entry, entry.file, chunk))

    def _end_read(self, read: _Read) -> None:
        promotion, chunk = read.promotion, read.chunk.result()
        if promotion.is_done:
            return
        if chunk is None:
            if read.entry.file == read.file:  # else it was dropped
                logger.warning("a file of the cache tier is damaged; its chunk is computed again")
                self._tier.damaged(read.file)
            self._end(promotion)
            return
        chunk_id = promote_next(self._cache, promotion, read.file)
        if chunk_id is None:
            self._end(promotion)
            return
        if chunk_id >= 0:
            self._io.write(chunk_id, chunk)
        if promotion.num_added == len(promotion.entries):
            self._end(promotion)

    def _end(self, promotion: Promotion) -> None:
        seconds = self._clock() - self._began.pop(promotion)
        if promotion.num_added:
            self._tier.price.add(seconds / promotion.num_added)
        self._tier.end(promotion)


# -- in the threads -------------------------------------------------------------------------------


def _keep(medium: Medium, packing: _Packing, file: int, copied: torch.Tensor) -> bool:
    data = packing.pack(copied)
    if data is not None:
        medium.write(file, data)
    return data is not None


def _fetch(medium: Medium, packing: _Packing, file: int) -> torch.Tensor | None:
    data = medium.read(file)
    return None if data is None else packing.unpack(data)


def _medium(settings: TierSettings) -> Medium:
    """The medium of a tier.

    Raises:
        OSError: the folder cannot be made.
    """
    if settings.directory is None:
        return Memory()
    folder = Folder(settings.directory)
    return MemoryThenFiles(settings.memory_bytes, folder) if settings.memory_bytes else folder
