"""Records of stored files and of batch jobs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

import msgspec

from chunkllama_server.api.schema.batch import BatchObject, FileObject

ENDED = frozenset(("failed", "completed", "expired", "cancelled"))
FILE_RECORD_BYTES = 2048  # of a file's record, at most
_BATCH_GROWTH_BYTES = 8192  # by which a job's record grows, at most


class StoredFile(msgspec.Struct):
    """A file's record.

    Attributes:
        serial: counts records in the order in which they were made.
    """

    tenant: str
    value: FileObject
    serial: int = 0

    @property
    def id(self) -> str:
        return self.value["id"]

    @property
    def most_bytes(self) -> int:
        """What the file and its record take."""
        return self.value["bytes"] + FILE_RECORD_BYTES


class StoredBatch(msgspec.Struct):
    """A job's record.

    Attributes:
        output_seconds: lifetime of the files of results; None is the store's.
        serial: as that of a file.
    """

    tenant: str
    value: BatchObject
    output_seconds: int | None = None
    serial: int = 0

    @property
    def id(self) -> str:
        return self.value["id"]

    @property
    def most_bytes(self) -> int:
        """What the record takes at most: its own fields grow, those of its client do not."""
        return len(msgspec.json.encode(self.value["metadata"])) + _BATCH_GROWTH_BYTES

    @property
    def has_ended(self) -> bool:
        return self.value["status"] in ENDED


Record = TypeVar("Record", StoredFile, StoredBatch)


class Table(Generic[Record]):
    """Records of one kind by tenant and id, oldest first."""

    def __init__(self) -> None:
        self._records: dict[str, dict[str, Record]] = {}

    def __iter__(self) -> Iterator[Record]:
        return iter([each for own in self._records.values() for each in own.values()])

    def put(self, record: Record) -> None:
        self._records.setdefault(record.tenant, {})[record.id] = record

    def pop(self, record: Record) -> None:
        own = self._records[record.tenant]
        del own[record.id]
        if not own:
            del self._records[record.tenant]

    def get(self, record_id: str, tenant: str) -> Record | None:
        return self._records.get(tenant, {}).get(record_id)

    def of(self, tenant: str) -> list[Record]:
        """The tenant's records, newest first."""
        return list(self._records.get(tenant, {}).values())[::-1]

    def count(self, tenant: str) -> int:
        return len(self._records.get(tenant, {}))
