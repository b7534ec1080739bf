"""Files and batch jobs, for each tenant within its budget of disk space.

Tables, records and the budget belong to the event loop. Contents are written in threads, after room
for them has been reserved on the loop, so that a tenant's uploads and results never exceed its
budget together. Records are written, and files removed, by one thread in the order of the calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import msgspec

from chunkllama.logger import init_logger
from chunkllama_server.api.batch.clock import steady_clock
from chunkllama_server.api.batch.disk import Folder, append
from chunkllama_server.api.batch.disk_threads import DiskThreads
from chunkllama_server.api.batch.records import FILE_RECORD_BYTES, StoredBatch, StoredFile, Table
from chunkllama_server.api.schema.batch import FileObject
from chunkllama_server.transport.errors import ApiError, storage_full, unavailable

logger = init_logger(__name__)

Purpose = Literal["batch", "batch_output", "fine-tune"]
_MAX_FILES = 10_000
_MAX_ENDED = 1000

P = ParamSpec("P")
T = TypeVar("T")


class FileStore:
    """Files and jobs of all tenants. One process at a time uses a folder.

    Args:
        folder: made when the first file is stored.
        budget: bytes that a tenant may store.
        lifetime: seconds after which a file expires.
        clock: Unix time; None is a ``steady_clock``.
    """

    def __init__(
        self,
        folder: Path,
        budget: Callable[[str], int],
        lifetime: float,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.folder = folder
        self.files: Table[StoredFile] = Table()
        self.batches: Table[StoredBatch] = Table()
        self._disk = Folder(folder)
        self._budget = budget
        self._lifetime = lifetime
        self._clock = clock or steady_clock()
        self._is_open = False
        self._why_not = ""
        self._serial = 0
        self._used: Counter[str] = Counter()  # bytes that a tenant stores or has reserved
        self._charged: dict[str, int] = {}  # of it, by the id of a file or job
        self._held: Counter[str] = Counter()  # reserved for the results of a job
        self.num_arriving: Counter[str] = Counter()  # uploads
        self._next_end = math.inf  # no record ends before
        self._threads = DiskThreads()

    def now(self) -> int:
        """Unix time in whole seconds."""
        return int(self._clock())

    @property
    def is_open(self) -> bool:
        return self._is_open

    def open(self) -> None:
        """Make the folder if it is missing, lock it and read the records; in a thread, and alone.

        Raises:
            ApiError: 503, another process uses the folder or it cannot be written.
        """
        try:
            self._disk.lock()
        except BlockingIOError:
            self.note(f"another server uses {self._disk.path}; choose another --files-dir")
            raise unavailable(
                "Another server uses this server's folder of files", "files_unavailable"
            ) from None
        except OSError as error:
            self.note(f"cannot be used: {error}")
            raise _unusable(error) from None
        try:
            self._read()
        except BaseException as error:
            self._disk.unlock()
            if not isinstance(error, OSError):
                raise
            self.note(f"cannot be read: {error}")
            raise _unusable(error) from None
        self._is_open = True

    def note(self, why: str) -> None:
        """Log once why the folder cannot be used, however often it is tried."""
        if why != self._why_not:
            logger.error("files_dir: %s", why)
            self._why_not = why

    async def close(self) -> None:
        """Release the folder, once no thread writes to it."""
        await self._threads.close()
        self._is_open = False
        self._disk.unlock()

    async def work(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function in a thread; it ends before the folder is released, though its caller is
        cancelled."""
        return await self._threads.begin(partial(function, *args, **kwargs))

    async def _write_record(self, record: StoredFile | StoredBatch) -> None:
        """Write a record as it is now, behind what was written or removed before."""
        content = iter([msgspec.json.encode(record)])
        write = partial(self._disk.write, record.tenant, record.id, "json", content)
        await self._threads.begin(write, in_turn=True)

    def _remove(self, record: StoredFile | StoredBatch, *suffixes: str) -> None:
        """Remove files, behind what was written or removed before."""
        self._threads.leave(partial(self._disk.remove, record.tenant, record.id, *suffixes))

    def _read(self) -> None:
        """Read all records, also those of an earlier try."""
        self.files, self.batches = Table(), Table()
        self._charged.clear()
        self._used.clear()
        self._held.clear()
        found: list[StoredFile | StoredBatch] = []
        for path in self._disk.records():
            kind: Any = StoredFile if path.name.startswith("file-") else StoredBatch
            try:
                found.append(msgspec.json.decode(path.read_bytes(), type=kind))
            except (OSError, msgspec.MsgspecError) as error:
                logger.warning("files_dir: %s is left out, its data is kept: %s", path, error)
        found.sort(key=lambda record: (record.serial, record.value["created_at"], record.id))
        for record in found:
            self._serial = max(self._serial, record.serial)
            self._add(record)
            if isinstance(record, StoredBatch) and not record.has_ended:
                results = self.results_path(record)
                if results.exists():
                    self.grow(record, 2 * results.stat().st_size, at_any_rate=True)
        self._disk.clean(self._stands_for)

    def _stands_for(self, name: str, suffix: str, has_record: bool) -> bool:
        """Whether a record needs the file; one that cannot be read may be read another time."""
        if suffix not in ("data", "results"):
            return False
        if name not in self._charged:
            return has_record
        return suffix == "data" or name in self._held

    # -- room ---------------------------------------------------------------------------------

    def room(self, tenant: str) -> int:
        """Bytes that a tenant may still store."""
        self.expire()
        return self._budget(tenant) - self._used[tenant]

    def reserve(self, tenant: str, num_bytes: int) -> None:
        """Take room that is used later.

        Raises:
            ApiError: 413 beyond the tenant's budget.
        """
        if num_bytes > self.room(tenant):
            raise ApiError(
                413,
                f"The files of this API key would exceed {self._budget(tenant)} bytes; delete some",
                "file",
                "file_budget",
            )
        self._used[tenant] += num_bytes

    def release(self, tenant: str, num_bytes: int) -> None:
        """Give back room that was reserved."""
        self._used[tenant] -= num_bytes

    def charge(self, tenant: str, name: str, num_bytes: int) -> None:
        """Charge a tenant for what lies beside its files; replaces the former charge of the name.

        Args:
            num_bytes: 0 ends the charge.
        """
        self._used[tenant] += num_bytes - self._charged.pop(name, 0)
        if num_bytes:
            self._charged[name] = num_bytes

    def grow(self, record: StoredBatch, num_bytes: int, *, at_any_rate: bool = False) -> bool:
        """Reserve more room for the results of a job; False if there is none.

        Args:
            at_any_rate: the bytes lie on the disk already.
        """
        if not at_any_rate and num_bytes > max(self.room(record.tenant), 0):
            return False
        self._used[record.tenant] += num_bytes
        self._held[record.id] += num_bytes
        return True

    def expire(self) -> None:
        """Drop what has expired."""
        now = self.now()
        if now < self._next_end:
            return
        for record in self.files:
            if self._end(record) <= now:
                self.delete_file(record.tenant, record.id)
        for job in self.batches:
            if job.has_ended and self._end(job) <= now:
                self._drop_batch(job)
        left = min(map(self._end, [*self.files, *self.batches]), default=math.inf)
        self._next_end = max(left, now + 1)  # one that still runs is looked at again

    def _end(self, record: StoredFile | StoredBatch) -> float:
        """When a record is dropped; a job only once it has ended."""
        if isinstance(record, StoredBatch):
            return record.value["expires_at"] + self._lifetime
        ends = record.value["expires_at"]
        return math.inf if ends is None else ends

    # -- files --------------------------------------------------------------------------------

    async def add_file(
        self,
        tenant: str,
        filename: str,
        blocks: Iterator[bytes],
        size: int,
        seconds: float | None = None,
        purpose: Purpose = "batch",
    ) -> FileObject:
        """Store an uploaded file.

        Args:
            blocks: its content in pieces, of ``size`` bytes.
            seconds: its lifetime; None is the store's.

        Raises:
            ApiError: 413 beyond the tenant's budget, 503 where it cannot be written.
        """
        if self.files.count(tenant) >= _MAX_FILES:
            message = f"At most {_MAX_FILES} files of an API key are stored; delete some"
            raise ApiError(413, message, "file", "too_many_files")
        reserved = size + FILE_RECORD_BYTES
        self.reserve(tenant, reserved)
        file_id = f"file-{uuid.uuid4().hex}"

        async def add() -> FileObject:
            try:
                await self.work(self._disk.write, tenant, file_id, "data", blocks)
                return await self.adopt(tenant, file_id, filename, size, purpose, seconds)
            except OSError as error:
                logger.error("files_dir: a file cannot be stored: %s", error)
                with contextlib.suppress(OSError):  # its record may not fit
                    await self.work(self._disk.remove, tenant, file_id, "data")
                raise _unusable(error) from None
            finally:
                self._used[tenant] -= reserved

        # A client that leaves meanwhile does not give back room that a thread still fills.
        return await asyncio.shield(asyncio.ensure_future(add()))

    def write_content(self, tenant: str, file_id: str, blocks: Iterator[bytes]) -> int:
        """Write the content of a file that ``adopt`` makes one; in a thread. Returns its size."""
        return self._disk.write(tenant, file_id, "data", blocks)

    async def adopt(
        self,
        tenant: str,
        file_id: str,
        filename: str,
        size: int,
        purpose: Purpose,
        seconds: float | None,
    ) -> FileObject:
        """Record a file whose content has been written, in the place of one of the same id."""
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
        self._serial += 1
        record = StoredFile(tenant, value, self._serial)
        await self._write_record(record)
        self._add(record)
        return value

    def _add(self, record: StoredFile | StoredBatch) -> None:
        """Put a record in its table and charge its tenant for it."""
        if isinstance(record, StoredFile):
            self.files.put(record)
        else:
            self.batches.put(record)
        self._discharge(record)
        self._charged[record.id] = record.most_bytes
        self._used[record.tenant] += record.most_bytes
        self._next_end = min(self._next_end, self._end(record))

    def _discharge(self, record: StoredFile | StoredBatch) -> None:
        self._used[record.tenant] -= self._charged.pop(record.id, 0)

    def file_path(self, tenant: str, file_id: str) -> Path | None:
        """Where a tenant's file lies; None for one that is not stored."""
        self.expire()
        if self.files.get(file_id, tenant) is None:
            return None
        return self._disk.place(tenant, file_id, "data")

    def delete_file(self, tenant: str, file_id: str) -> bool:
        """Remove a file; False if there is none."""
        record = self.files.get(file_id, tenant)
        if record is None:
            return False
        self.files.pop(record)
        self._discharge(record)
        self._remove(record, "json", "data")
        return True

    # -- jobs ---------------------------------------------------------------------------------

    async def add_batch(self, record: StoredBatch) -> None:
        """Store a new job, and remove the oldest of many that have ended.

        Raises:
            ApiError: 413 beyond the tenant's budget, 503 where it cannot be written.
        """
        for old in [job for job in self.batches.of(record.tenant) if job.has_ended][_MAX_ENDED:]:
            self._drop_batch(old)
        size = record.most_bytes
        self.reserve(record.tenant, size)
        self._used[record.tenant] -= size
        self._serial += 1
        record.serial = self._serial
        self._add(record)  # at once, so that others that are made meanwhile see it
        try:
            await self.write_batch(record)
        except OSError as error:
            self.batches.pop(record)
            self._discharge(record)
            logger.error("files_dir: a batch cannot be stored: %s", error)
            raise _unusable(error) from None

    async def write_batch(self, record: StoredBatch) -> None:
        """Store what a job has become, as it is at the call.

        Raises:
            OSError: it cannot be written.
        """
        await self._write_record(record)

    def _drop_batch(self, record: StoredBatch) -> None:
        self.batches.pop(record)
        self._discharge(record)
        self._remove(record, "json", "results")

    def results_path(self, record: StoredBatch) -> Path:
        """Where the results of a job are gathered while it runs."""
        return self._disk.place(record.tenant, record.id, "results")

    async def append_result(self, record: StoredBatch, line: bytes) -> None:
        """Add the result of one line, for which there is room.

        Raises:
            OSError: the disk is full; nothing is added.
        """
        await self._threads.begin(partial(append, self.results_path(record), line), in_turn=True)

    def drop_results(self, record: StoredBatch) -> None:
        """Remove the gathered results, once they are files."""
        self._remove(record, "results")
        self._used[record.tenant] -= self._held.pop(record.id, 0)


def _unusable(error: OSError) -> ApiError:
    return storage_full(error) or unavailable(
        "Files cannot be stored on this server", "files_unavailable"
    )
