"""The cache tier on disk: threads write and read files, the step loop copies chunks of the pool.

    step loop   copy an evicted chunk ──►              insert, copy to the pool ──► next step
    writer                                write, SHA-256     ▲
    reader                                                   └── read, compare the SHA-256

A file is the bytes of one chunk as it lies in this process's pool. Its checksum is kept in memory
alone: no file that another process has left, and none that was changed, is ever used. Each process
has a folder of its own, of mode 0700, which the next one removes if this one was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from chunkllama.cache.imports import promote_next
from chunkllama.cache.manager import CacheManager
from chunkllama.cache.tier import Tier
from chunkllama.cache.tier_entry import Promotion, TierEntry
from chunkllama.engine.chunk_io import ChunkIO
from chunkllama.errors import ConfigError
from chunkllama.logger import init_logger

logger = init_logger(__name__)

_STAGED_BYTES: Final = 64 << 20  # copied and not written yet; as much is read ahead
_STEP_BYTES: Final = 32 << 20  # inserted between two steps of a busy loop
_PREFIX, _SUFFIX = "engine-", ".chunk"
_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe in place of a file blocks no thread


@dataclass(frozen=True, slots=True)
class _Read:
    """One chunk that is being read."""

    promotion: Promotion
    entry: TierEntry
    file: int
    data: Future[bytearray | None]


class TierFiles:
    """The store of a cache's tier.

    Args:
        cache: gets the tier.
        chunk_io: reads and writes its pool.
        directory: where the folder of this process is made.
        max_bytes: of its files.
        clock: monotonic seconds.

    Raises:
        ConfigError: the tier is too small for a chunk.
    """

    def __init__(
        self,
        cache: CacheManager,
        chunk_io: ChunkIO,
        directory: Path,
        max_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._size = chunk_io.stored_bytes
        if max_bytes < self._size:
            raise ConfigError(
                f"cache_tier_bytes: {max_bytes} bytes hold no chunk of {self._size}; give more"
            )
        self._cache = cache
        self._io = chunk_io
        self._clock = clock
        self._most_staged = max(_STAGED_BYTES // self._size, 2)
        self._checksums: dict[int, bytes] = {}
        self._writes: deque[tuple[int, Future[bytes]]] = deque()
        self._removals: deque[Future[None]] = deque()
        self._reads: deque[_Read] = deque()
        self._unread: deque[tuple[Promotion, TierEntry]] = deque()
        self._began: dict[Promotion, float] = {}
        self._writer = ThreadPoolExecutor(1, "write-tier")
        self._reader = ThreadPoolExecutor(1, "read-tier")
        self._folder: Path | None = None
        self._former: Path | None = None  # of a tier that was turned off
        self._lock = -1
        self._tier = cache.tier = Tier(max_bytes // self._size, cache.chunk_size, self)
        try:
            self._folder, self._lock = _make_folder(directory)
        except OSError as error:
            self._turn_off(f"{directory}: {error.strerror}")

    @property
    def is_moving(self) -> bool:
        """``turn`` has work, now or soon."""
        return bool(self._writes or self._removals or self._began)

    def futures(self) -> list[Future[bytearray | None]]:
        """Reads that are in progress."""
        return [read.data for read in self._reads]

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
        budget = max(_STEP_BYTES, self._size)
        while self._reads and self._reads[0].data.done() and budget >= self._size:
            self._end_read(self._reads.popleft())
            self._read_ahead()
            budget -= self._size

    def close(self) -> None:
        """End the threads and remove the files."""
        self._reader.shutdown(cancel_futures=True)
        self._writer.shutdown(cancel_futures=True)
        for folder in (self._folder, self._former):
            if folder is not None:
                _remove_folder(folder)
        if self._folder is not None:
            os.close(self._lock)
        self._folder = self._former = None

    def _turn_off(self, reason: str) -> None:
        """Keep nothing any more; what is being read is computed."""
        logger.warning("the cache tier is off until the next start: %s", reason)
        self._tier.close()
        self._unread.clear()
        self._began.clear()
        if self._folder is not None:
            self._writer.submit(_remove_folder, self._folder)
            os.close(self._lock)
            self._folder, self._former = None, self._folder

    # -- the store of the tier ----------------------------------------------------------------

    def accepts(self) -> bool:
        """Whether another chunk can be copied: the disk may be slower than eviction."""
        return self._folder is not None and len(self._writes) < self._most_staged

    def write(self, file: int, chunk_id: int) -> None:
        """Copy a chunk, and have it written."""
        copied = self._io.copy(chunk_id).contiguous()
        self._writes.append((file, self._writer.submit(_write, self._path(file), copied)))

    def read(self, promotion: Promotion) -> None:
        """Begin to read the chunks of a promotion."""
        self._began[promotion] = self._clock()
        self._unread.extend((promotion, entry) for entry in promotion.entries)
        self._read_ahead()

    def remove(self, file: int) -> None:
        """Remove a file once what was to be written before is written."""
        self._checksums.pop(file, None)
        if self._folder is not None:
            self._removals.append(self._writer.submit(_unlink, self._path(file)))

    # -- the step loop ------------------------------------------------------------------------

    def _path(self, file: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{file:016x}{_SUFFIX}"

    def _end_write(self, file: int, write: Future[bytes]) -> None:
        if self._folder is None:
            return
        try:
            checksum = write.result()
        except OSError as error:
            self._turn_off(f"{self._folder}: {error.strerror}")
            return
        if self._tier.written(file):
            self._checksums[file] = checksum

    def _read_ahead(self) -> None:
        while self._unread and len(self._reads) < self._most_staged:
            promotion, entry = self._unread.popleft()
            checksum = self._checksums.get(entry.file)
            if promotion.is_done:
                continue
            if checksum is None:  # it was dropped
                self._end(promotion)
                continue
            data = self._reader.submit(_read, self._path(entry.file), self._size, checksum)
            self._reads.append(_Read(promotion, entry, entry.file, data))

    def _end_read(self, read: _Read) -> None:
        promotion, data = read.promotion, read.data.result()
        if promotion.is_done:
            return
        if data is None:
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
            self._io.write(chunk_id, self._io.from_stored(data))
        if promotion.num_added == len(promotion.entries):
            self._end(promotion)

    def _end(self, promotion: Promotion) -> None:
        seconds = self._clock() - self._began.pop(promotion)
        if promotion.num_added:
            self._tier.price.add(seconds / promotion.num_added)
        self._tier.end(promotion)


def _make_folder(directory: Path) -> tuple[Path, int]:
    """Make a folder for this process, and remove those of processes that have ended.

    Returns:
        The folder, and the descriptor that keeps it locked until this process has ended.

    Raises:
        OSError: it cannot be made.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        whole = _open_folder(directory)
        stack.callback(os.close, whole)
        fcntl.flock(whole, fcntl.LOCK_EX)  # others see no folder that is not locked yet
        for left in directory.glob(f"{_PREFIX}*"):
            _remove_if_left(left)
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=directory.absolute()))
        lock = _open_folder(folder)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return folder, lock


def _open_folder(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _remove_if_left(folder: Path) -> None:
    """Remove a folder whose process has ended."""
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        lock = _open_folder(folder)
        stack.callback(os.close, lock)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove_folder(folder)


def _remove_folder(folder: Path) -> None:
    """Remove the files of a tier, and their folder unless it holds others."""
    for path in folder.glob(f"*{_SUFFIX}"):
        _unlink(path)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _write(path: Path, chunk: torch.Tensor) -> bytes:
    """Write a chunk's bytes; returns their SHA-256.

    Raises:
        OSError: it cannot be written.
    """
    data = chunk.view(torch.uint8).numpy().reshape(-1).data
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    return hashlib.sha256(data).digest()


def _read(path: Path, size: int, checksum: bytes) -> bytearray | None:
    """Read a chunk's bytes; None if they are not those of the checksum."""
    data = bytearray(size)
    view, done = memoryview(data), 0
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | _FLAGS), "rb", buffering=0) as file:
            while done < size and (count := file.readinto(view[done:])):
                done += count
    except OSError:
        return None
    is_whole = done == size and hashlib.sha256(data).digest() == checksum
    return data if is_whole else None
