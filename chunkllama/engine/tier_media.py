"""Where the tier's threads keep the bytes of chunks: in files, in memory, or in both."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
import threading
from pathlib import Path
from typing import Final, Protocol

Data = bytes | bytearray | memoryview
_PREFIX, _SUFFIX = "engine-", ".chunk"
_FLAGS: Final = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe blocks no thread


class Medium(Protocol):
    """Bytes of chunks by number. Two threads may call it at once: one that writes and removes, and
    one that reads.

    Attributes:
        memory_bytes, file_bytes: of the chunks in memory and in files.
    """

    @property
    def memory_bytes(self) -> int: ...

    @property
    def file_bytes(self) -> int: ...

    def write(self, number: int, data: Data) -> None:
        """Keep a chunk.

        Raises:
            OSError: it cannot be written.
        """
        ...

    def read(self, number: int) -> Data | None:
        """Return a chunk; None if it is not what was written, or was removed."""
        ...

    def remove(self, number: int) -> None:
        """Forget a chunk, unless it is forgotten already."""
        ...

    def close(self) -> None:
        """Forget all, from the thread that writes."""
        ...


class Memory:
    """Chunks in this process's memory."""

    file_bytes = 0

    def __init__(self) -> None:
        self.memory_bytes = 0
        self._chunks: dict[int, Data] = {}

    def write(self, number: int, data: Data) -> None:
        self._chunks[number] = data
        self.memory_bytes += len(data)

    def read(self, number: int) -> Data | None:
        return self._chunks.get(number)

    def remove(self, number: int) -> None:
        if (data := self._chunks.pop(number, None)) is not None:
            self.memory_bytes -= len(data)

    def close(self) -> None:
        self._chunks.clear()
        self.memory_bytes = 0


class Folder:
    """Chunks in files of mode 0600, in a folder of this process's own of mode 0700.

    Their checksums are in memory alone: no file that another process has left, and none that was
    changed, is ever used. A folder whose process was killed is removed by the next one.

    Args:
        directory: where the folder is made.

    Raises:
        OSError: it cannot be made.
    """

    memory_bytes = 0

    def __init__(self, directory: Path) -> None:
        self.file_bytes = 0
        self._folder, self._lock = _make_folder(directory)
        self._checksums: dict[int, tuple[int, bytes]] = {}

    def write(self, number: int, data: Data) -> None:
        descriptor = os.open(
            self._path(number), os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS, 0o600
        )
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
        except OSError:
            _unlink(self._path(number))
            raise
        self._checksums[number] = len(data), hashlib.sha256(data).digest()
        self.file_bytes += len(data)

    def read(self, number: int) -> Data | None:
        size, checksum = self._checksums.get(number, (0, b""))
        data = bytearray(size)
        view, done = memoryview(data), 0
        try:
            descriptor = os.open(self._path(number), os.O_RDONLY | _FLAGS)
            with os.fdopen(descriptor, "rb", buffering=0) as file:
                while done < size and (count := file.readinto(view[done:])):
                    done += count
        except OSError:
            return None
        is_whole = done == size and hashlib.sha256(data).digest() == checksum
        return data if is_whole else None

    def remove(self, number: int) -> None:
        self.file_bytes -= self._checksums.pop(number, (0, b""))[0]
        _unlink(self._path(number))

    def close(self) -> None:
        if self._lock < 0:
            return
        _remove_folder(self._folder)
        os.close(self._lock)
        self._lock = -1
        self.file_bytes = 0

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:016x}{_SUFFIX}"


class MemoryThenFiles:
    """Chunks in memory; when it is full, the one written or read there longest ago moves to a file.

    It stays in its file, also when it is read: the pool has it now. After a file that cannot be
    written none is: what is in memory then stays there, beyond the budget until some is removed.

    Args:
        budget: bytes in memory.
        files: of the others.
    """

    def __init__(self, budget: int, files: Medium) -> None:
        self.memory_bytes = 0
        self._has_failed = False
        self._budget = budget
        self._files = files
        self._chunks: dict[int, Data] = {}  # the one written or read last at the end
        self._lock = threading.Lock()

    @property
    def file_bytes(self) -> int:
        return self._files.file_bytes

    def write(self, number: int, data: Data) -> None:
        with self._lock:
            self._chunks[number] = data
            self.memory_bytes += len(data)
        while self.memory_bytes > self._budget and not self._has_failed:
            with self._lock:
                oldest = next(iter(self._chunks))
                data = self._chunks[oldest]
            try:
                self._files.write(oldest, data)  # a reader finds it in one of the two
            except OSError:
                self._has_failed = True
                raise
            self._forget(oldest)

    def in_memory(self) -> set[int]:
        """Return the numbers of the chunks in memory, once a file has failed and none moves."""
        assert self._has_failed
        with self._lock:
            return set(self._chunks)

    def read(self, number: int) -> Data | None:
        with self._lock:
            if (data := self._chunks.pop(number, None)) is not None:
                self._chunks[number] = data
                return data
        return self._files.read(number)

    def remove(self, number: int) -> None:
        self._forget(number)
        self._files.remove(number)

    def _forget(self, number: int) -> None:
        with self._lock:
            if (data := self._chunks.pop(number, None)) is not None:
                self.memory_bytes -= len(data)

    def close(self) -> None:
        with self._lock:
            self._chunks.clear()
            self.memory_bytes = 0
        self._files.close()


def _make_folder(directory: Path) -> tuple[Path, int]:
    """Make a folder for this process, and remove those of processes that have ended.

    Returns:
        The folder, and the descriptor that keeps it locked until this process has ended.
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
