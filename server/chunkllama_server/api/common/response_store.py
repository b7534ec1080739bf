"""Store finished responses for previous_response_id, bounded by count, bytes and age."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
from pydantic import TypeAdapter

from chunkllama_server.api.schema.chat import ChatMessage
from chunkllama_server.api.schema.response_object import OutputItem, Response


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response and the conversation that ends with it (without instructions)."""

    response: Response
    messages: list[ChatMessage]


_MESSAGES = TypeAdapter(list[ChatMessage])
# Of an entry beside its text: key, tuple, node of the ordered dictionary.
_OVERHEAD_BYTES = 512


@dataclass(frozen=True, slots=True)
class _Entry:
    """A response as JSON text: as objects it would take many times the bytes that are counted."""

    response: bytes
    messages: bytes
    item_ids: tuple[str, ...]
    num_bytes: int
    expires: float

    def load(self) -> StoredResponse:
        return StoredResponse(
            msgspec.json.decode(self.response), _MESSAGES.validate_json(self.messages)
        )


class ResponseStore:
    """Evict the least recently used responses first; a tenant sees only its own.

    Args:
        max_items, max_bytes: bounds of the whole store; bytes are those of the JSON text.
        ttl_seconds: age at which a response expires.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        max_items: int,
        max_bytes: int,
        ttl_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._ttl_seconds = ttl_seconds
        self._clock = clock
        self._entries: OrderedDict[tuple[str, str], _Entry] = OrderedDict()
        self._items: dict[tuple[str, str], str] = {}  # to the response's id
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, tenant: str, stored: StoredResponse) -> None:
        """Store a response, unless it is larger than the whole store."""
        response = msgspec.json.encode(stored.response)
        messages = _MESSAGES.dump_json(stored.messages, by_alias=True, exclude_unset=True)
        num_bytes = len(response) + len(messages) + _OVERHEAD_BYTES
        self._drop_expired()
        if num_bytes > self._max_bytes:
            return
        self._remove((tenant, stored.response["id"]))
        self._entries[tenant, stored.response["id"]] = _Entry(
            response,
            messages,
            tuple(item["id"] for item in stored.response["output"]),
            num_bytes,
            self._clock() + self._ttl_seconds,
        )
        for item in stored.response["output"]:
            self._items[tenant, item["id"]] = stored.response["id"]
        self.num_bytes += num_bytes
        while len(self._entries) > self._max_items or self.num_bytes > self._max_bytes:
            self._remove(next(iter(self._entries)))

    def get(self, tenant: str, response_id: str) -> StoredResponse | None:
        """Return a stored response of this tenant."""
        self._drop_expired()
        entry = self._entries.get((tenant, response_id))
        if entry is None:
            return None
        self._entries.move_to_end((tenant, response_id))
        return entry.load()

    def find_item(self, tenant: str, item_id: str) -> OutputItem | None:
        """Return an output item of a stored response of this tenant."""
        self._drop_expired()
        entry = self._entries.get((tenant, self._items.get((tenant, item_id), "")))
        output = [] if entry is None else entry.load().response["output"]
        return next((item for item in output if item["id"] == item_id), None)

    def delete(self, tenant: str, response_id: str) -> bool:
        """Delete a response; returns False when there is none."""
        self._drop_expired()
        return self._remove((tenant, response_id))

    def _remove(self, key: tuple[str, str]) -> bool:
        entry = self._entries.pop(key, None)
        if entry is None:
            return False
        for item_id in entry.item_ids:
            self._items.pop((key[0], item_id), None)
        self.num_bytes -= entry.num_bytes
        return True

    def _drop_expired(self) -> None:
        now = self._clock()
        expired = [key for key, entry in self._entries.items() if entry.expires <= now]
        for key in expired:
            self._remove(key)
