"""Files of the batch store on disk: a locked folder, records, and gathered results.

    <folder>/lock
    <folder>/<hash of the tenant>/file-<id>.json, file-<id>.data
    <folder>/<hash of the tenant>/batch_<id>.json, batch_<id>.results

Folders have mode 0700, files 0600. A record or a file is replaced as a whole; results are appended,
one line each, so that a process that ends in the middle of a line loses that line alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgspec

from chunkllama_server.api.schema.batch import LineResult
from chunkllama_server.config.files import lock_folder

_TENANT = "[0-9a-f]" * 32  # matches the folder of a tenant


class _Entry(msgspec.Struct):
    """One line of gathered results."""

    line: int
    result: LineResult


class GatheredResult(NamedTuple):
    """The result of a line, and where it lies among the results of its job, in bytes."""

    number: int
    start: int
    size: int
    result: LineResult


class Folder:
    """The folder of one server.

    Args:
        path: made when it is first locked.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    def lock(self) -> None:
        """Make the folder if it is missing, and lock it.

        Raises:
            BlockingIOError: another process has locked it.
            OSError: it cannot be written.
        """
        self._lock = lock_folder(self.path)

    def unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def place(self, tenant: str, name: str, suffix: str) -> Path:
        """Where a file of a tenant lies, in a folder that exists."""
        folder = self.path / hashlib.sha256(tenant.encode()).hexdigest()[:32]
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder / f"{name}.{suffix}"

    def write(self, tenant: str, name: str, suffix: str, blocks: Iterator[bytes]) -> int:
        """Replace a file as a whole; returns its size in bytes.

        Raises:
            OSError: the disk is full; the former file stays.
        """
        path = self.place(tenant, name, suffix)
        partial = path.with_suffix(f".{suffix}.new")
        size = 0
        try:
            with _opened(partial, os.O_TRUNC) as file:
                for block in blocks:
                    size += len(block)
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        return size

    def remove(self, tenant: str, name: str, *suffixes: str) -> None:
        for suffix in suffixes:
            self.place(tenant, name, suffix).unlink(missing_ok=True)

    def records(self) -> Iterator[Path]:
        """All records."""
        return self.path.glob(f"{_TENANT}/*.json")

    def clean(self, is_used: Callable[[str, str, bool], bool]) -> None:
        """Remove what an earlier process left unfinished.

        Args:
            is_used: of a name, a suffix and whether there is a record, whether the record stands
                for the file.
        """
        for path in self.path.glob(f"{_TENANT}/*.*"):
            name, _, suffix = path.name.partition(".")
            is_own = name.startswith(("file-", "batch_"))
            has_record = path.with_name(f"{name}.json").exists()
            if is_own and suffix != "json" and not is_used(name, suffix, has_record):
                path.unlink(missing_ok=True)


def read_results(path: Path) -> Iterator[GatheredResult]:
    """Read the results so far, each line once; from a line that was cut or is no result on, they
    are removed."""
    if not path.exists():
        return
    seen: set[int] = set()
    end = 0
    with path.open("rb+") as file:
        for line in file:
            try:
                entry = msgspec.json.decode(line, type=_Entry) if line.endswith(b"\n") else None
            except msgspec.MsgspecError:
                entry = None
            if entry is None:
                break
            if entry.line not in seen:
                seen.add(entry.line)
                yield GatheredResult(entry.line, end, len(line), entry.result)
            end += len(line)
        file.truncate(end)


def encode_result(number: int, result: LineResult) -> bytes:
    """Return what ``read_results`` reads."""
    return msgspec.json.encode(_Entry(number, result)) + b"\n"


def decode_result(line: bytes) -> LineResult:
    """Return the result in a line that ``read_results`` has found."""
    return msgspec.json.decode(line, type=_Entry).result


def append(path: Path, line: bytes) -> None:
    """Add the result of one line.

    Raises:
        OSError: the disk is full; nothing is added.
    """
    before = path.stat().st_size if path.exists() else 0
    try:
        with _opened(path, os.O_APPEND) as file:
            file.write(line)
    except OSError:
        with contextlib.suppress(OSError):
            os.truncate(path, before)
        raise


@contextlib.contextmanager
def _opened(path: Path, flags: int = 0) -> Iterator[BinaryIO]:
    """Open a file for writing that its owner alone may read."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | flags, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        yield file
