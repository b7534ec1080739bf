"""Files and batch jobs on disk, for each tenant within its budget.

    <folder>/lock
    <folder>/<hash of the tenant>/file-<id>.json, file-<id>.data
    <folder>/<hash of the tenant>/batch_<id>.json, batch_<id>.results

Folders have mode 0700, files 0600. A file's or a job's record is replaced as a whole; results are
appended, one line each, so that a process that ends in the middle of a line loses that line alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import msgspec

from chunkllama.logger import init_logger
from chunkllama_server.api.schema.batch import BatchObject, FileObject, LineResult
from chunkllama_server.transport.errors import ApiError, unavailable

logger = init_logger(__name__)

ENDED = frozenset(("failed", "completed", "expired", "cancelled"))
Purpose = Literal["batch", "batch_output"]
_RECORD_BYTES = 1024  # counted for the record of a file or job
_BLOCK = 1 << 20


class StoredFile(msgspec.Struct):
    """A file's record."""

    tenant: str
    value: FileObject

    @property
    def id(self) -> str:
        return self.value["id"]


class StoredBatch(msgspec.Struct):
    """A job's record.

    Attributes:
        output_seconds: lifetime of the files of results; None is the store's.
    """

    tenant: str
    value: BatchObject
    output_seconds: int | None = None

    @property
    def id(self) -> str:
        return self.value["id"]


class GatheredResult(NamedTuple):
    """The result of a line, and where it lies among the results of its job, in bytes."""

    number: int
    start: int
    size: int
    result: LineResult


Record = TypeVar("Record", StoredFile, StoredBatch)


class _Table(Generic[Record]):
    """Records of one kind by id, oldest first."""

    def __init__(self) -> None:
        self._records: dict[str, Record] = {}

    def __iter__(self) -> Iterator[Record]:
        return iter(list(self._records.values()))

    def put(self, record: Record) -> None:
        self._records[record.id] = record

    def pop(self, record_id: str) -> None:
        self._records.pop(record_id, None)

    def get(self, record_id: str, tenant: str) -> Record | None:
        found = self._records.get(record_id)
        return found if found is not None and found.tenant == tenant else None

    def of(self, tenant: str) -> list[Record]:
        """The tenant's records, newest first."""
        return [record for record in self._records.values() if record.tenant == tenant][::-1]


class FileStore:
    """Files and jobs of all tenants. One process at a time uses a folder.

    Args:
        folder: made when the first file is stored.
        budget: bytes that a tenant may store.
        lifetime: seconds after which a file expires.
        clock: Unix time.
    """

    def __init__(
        self,
        folder: Path,
        budget: Callable[[str], int],
        lifetime: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.folder = folder
        self.files: _Table[StoredFile] = _Table()
        self.batches: _Table[StoredBatch] = _Table()
        self._budget = budget
        self._lifetime = lifetime
        self._clock = clock
        self._lock: int | None = None
        self._gathered: dict[str, int] = {}  # bytes of results of a job, until they are files

    def now(self) -> int:
        """Unix time in whole seconds."""
        return int(self._clock())

    @property
    def is_open(self) -> bool:
        return self._lock is not None

    def open(self) -> None:
        """Make the folder if it is missing, lock it and read the records.

        Raises:
            ApiError: 503, another process uses the folder or it cannot be written.
        """
        if self._lock is not None:
            return
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.chmod(self.folder, 0o700)
            lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            logger.error("files_dir: cannot be used: %s", error)
            raise unavailable(
                "Files cannot be stored on this server", "files_unavailable"
            ) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            logger.error("files_dir: another server uses the folder; choose another --files-dir")
            raise unavailable(
                "Another server uses this server's folder of files", "files_unavailable"
            ) from None
        self._lock = lock
        self._read()

    def close(self) -> None:
        """Release the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _read(self) -> None:
        for path in sorted(self.folder.glob("*/*.json")):
            try:
                raw = path.read_bytes()
                if path.name.startswith("file-"):
                    self.files.put(msgspec.json.decode(raw, type=StoredFile))
                else:
                    self.batches.put(msgspec.json.decode(raw, type=StoredBatch))
            except (OSError, msgspec.MsgspecError) as error:
                logger.warning("files_dir: %s is left out: %s", path, error)
        for path in self.folder.glob("*/*.new"):
            path.unlink(missing_ok=True)

    # -- files --------------------------------------------------------------------------------

    def add_file(
        self,
        tenant: str,
        filename: str,
        blocks: Iterator[bytes],
        purpose: Purpose,
        seconds: float | None = None,
        file_id: str | None = None,
    ) -> FileObject:
        """Store a file.

        Args:
            blocks: its content in pieces.
            seconds: its lifetime; None is the store's.
            file_id: of a file that replaces one of the same id; None makes a new one.

        Raises:
            ApiError: 413 beyond the tenant's budget.
        """  # fmt: skip
        self.open()
        file_id = file_id or f"file-{uuid.uuid4().hex}"
        path = self._path(tenant, file_id, "data")
        size = 0
        room = self.room(tenant) - _RECORD_BYTES
        partial = path.with_suffix(".new")
        try:
            with _opened(partial) as file:
                for block in blocks:
                    size += len(block)
                    if size > room and purpose == "batch":
                        raise self._over_budget(tenant)
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        now = self.now()
        value: FileObject = {
            "id": file_id,
            "object": "file",
            "bytes": size,
            "created_at": now,
            "expires_at": now + int(self._lifetime if seconds is None else seconds),
            "filename": filename,
            "purpose": purpose,
            "status": "processed",
        }
        record = StoredFile(tenant, value)
        self._write(tenant, file_id, record)
        self.files.put(record)
        return value

    def file_path(self, tenant: str, file_id: str) -> Path | None:
        """Where a tenant's file lies; None for one that is not stored."""
        self._expire()
        if self.files.get(file_id, tenant) is None:
            return None
        return self._path(tenant, file_id, "data")

    def delete_file(self, tenant: str, file_id: str) -> bool:
        """Remove a file; False if there is none."""
        if self.files.get(file_id, tenant) is None:
            return False
        self.files.pop(file_id)
        for suffix in ("json", "data"):
            self._path(tenant, file_id, suffix).unlink(missing_ok=True)
        return True

    def room(self, tenant: str) -> int:
        """Bytes that a tenant may still store."""
        self._expire()
        used = sum(record.value["bytes"] + _RECORD_BYTES for record in self.files.of(tenant))
        for job in self.batches.of(tenant):
            used += _RECORD_BYTES + self._gathered.get(job.id, 0)
        return self._budget(tenant) - used

    def _expire(self) -> None:
        now = self.now()
        for record in self.files:
            ends = record.value["expires_at"]
            if ends is not None and ends <= now:
                self.delete_file(record.tenant, record.id)
        for job in self.batches:
            if job.value["status"] in ENDED and job.value["expires_at"] + self._lifetime <= now:
                self.batches.pop(job.id)
                self._path(job.tenant, job.id, "json").unlink(missing_ok=True)

    def _over_budget(self, tenant: str) -> ApiError:
        return ApiError(
            413,
            f"The files of this API key would exceed {self._budget(tenant)} bytes; delete some",
            "file",
            "file_budget",
        )

    # -- jobs ---------------------------------------------------------------------------------

    def put_batch(self, record: StoredBatch) -> None:
        """Store a job's record.

        Raises:
            ApiError: 413 beyond the tenant's budget, for a new one.
        """
        self.open()
        if self.batches.get(record.id, record.tenant) is None and (
            self.room(record.tenant) < _RECORD_BYTES
        ):
            raise self._over_budget(record.tenant)
        self._write(record.tenant, record.id, record)
        self.batches.put(record)

    def results_path(self, record: StoredBatch) -> Path:
        """Where the results of a job are gathered while it runs."""
        return self._path(record.tenant, record.id, "results")

    def read_results(self, record: StoredBatch) -> Iterator[GatheredResult]:
        """Read the results so far, each line once; a last line that was cut is removed."""
        path, end = self.results_path(record), 0
        seen: set[int] = set()
        if not path.exists():
            return
        with path.open("rb+") as file:
            for line in file:
                try:
                    entry = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    entry = None
                if entry is None:
                    break
                if entry["line"] not in seen:
                    seen.add(entry["line"])
                    yield GatheredResult(entry["line"], end, len(line), entry["result"])
                end += len(line)
            file.truncate(end)
        self._gathered[record.id] = end

    def append_result(self, record: StoredBatch, number: int, result: LineResult) -> None:
        """Add the result of one line.

        Raises:
            OSError: the disk is full; nothing is added.
        """
        line = msgspec.json.encode({"line": number, "result": result}) + b"\n"
        path = self.results_path(record)
        before = path.stat().st_size if path.exists() else 0
        try:
            with _opened(path, os.O_APPEND) as file:
                file.write(line)
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(path, before)
            raise
        self._gathered[record.id] = before + len(line)

    def drop_results(self, record: StoredBatch) -> None:
        """Remove the gathered results, once they are files."""
        self.results_path(record).unlink(missing_ok=True)
        self._gathered.pop(record.id, None)

    # -- disk ---------------------------------------------------------------------------------

    def _path(self, tenant: str, name: str, suffix: str) -> Path:
        folder = self.folder / hashlib.sha256(tenant.encode()).hexdigest()[:32]
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder / f"{name}.{suffix}"

    def _write(self, tenant: str, name: str, record: StoredFile | StoredBatch) -> None:
        path = self._path(tenant, name, "json")
        partial = path.with_suffix(".new")
        with _opened(partial, os.O_TRUNC) as file:
            file.write(msgspec.json.encode(record))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)


@contextlib.contextmanager
def _opened(path: Path, flags: int = 0) -> Iterator[Any]:
    """Open a file for writing that its owner alone may read."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | flags, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        yield file


def blocks_of(path: Path) -> Iterator[bytes]:
    """A file's content in pieces."""
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            yield block
