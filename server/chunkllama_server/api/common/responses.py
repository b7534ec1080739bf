"""Stored responses as the endpoints use them, wherever they are stored."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Iterator
from itertools import islice
from typing import Any, Protocol

from chunkllama_server.api.common.response_store import (
    PackedResponse,
    ResponseStore,
    StoredResponse,
)
from chunkllama_server.api.schema.response_object import Response


class ResponseBackend(Protocol):
    """Keeps packed responses by tenant and id; a tenant reaches only its own.

    Raises:
        ApiError: 503 from every method but ``put``, when the storage does not answer.
    """

    async def put(self, tenant: str, stored: StoredResponse, max_items: int | None) -> None:
        """Store a response; ``max_items`` bounds this tenant's, None is no bound of its own."""

    async def get(self, tenant: str, response_id: str) -> PackedResponse | None:
        """Return a stored response."""

    async def with_items(self, tenant: str, item_ids: list[str]) -> list[str | None]:
        """Return the id of the stored response that has each item, None for none."""

    async def delete(self, tenant: str, response_id: str) -> bool:
        """Delete a response; returns False when there is none."""

    async def close(self) -> None:
        """Close the connections."""


_REPLAYED_BYTES = 1 << 18  # of events that are unpacked at a time


async def replay(packed: PackedResponse, after: int | None) -> AsyncGenerator[bytes, None]:
    """Yield the events of a response that has ended, unpacked in a thread as they are read.

    Args:
        after: sequence number of the last event that the client has.
    """
    events = islice(packed.unpack_events(), 0 if after is None else after + 1, None)
    while some := await asyncio.to_thread(_next_events, events):
        for event in some:
            yield event


def _next_events(events: Iterator[bytes]) -> list[bytes]:
    found, size = [], 0
    for event in events:
        found.append(event)
        size += len(event)
        if size >= _REPLAYED_BYTES:
            break
    return found


class LocalResponses:
    """The store of this process."""

    def __init__(self, store: ResponseStore) -> None:
        self._store = store

    async def put(self, tenant: str, stored: StoredResponse, max_items: int | None) -> None:
        packed = await asyncio.to_thread(PackedResponse.of, stored)
        self._store.put(tenant, stored, max_items, packed)

    async def get(self, tenant: str, response_id: str) -> PackedResponse | None:
        return self._store.get(tenant, response_id)

    async def with_items(self, tenant: str, item_ids: list[str]) -> list[str | None]:
        return [self._store.with_item(tenant, item_id) for item_id in item_ids]

    async def delete(self, tenant: str, response_id: str) -> bool:
        return self._store.delete(tenant, response_id)

    async def close(self) -> None:
        return


class Responses:
    """Reads the part of a stored response that an endpoint needs.

    Args:
        backend: where they are stored.
    """

    def __init__(self, backend: ResponseBackend) -> None:
        self._backend = backend

    async def put(self, tenant: str, stored: StoredResponse, max_items: int | None = None) -> None:
        """Store a response; see ``ResponseBackend``."""
        await self._backend.put(tenant, stored, max_items)

    async def get(self, tenant: str, response_id: str) -> PackedResponse | None:
        """Return a stored response of this tenant; what it holds is loaded in any thread."""
        return await self._backend.get(tenant, response_id)

    async def response(self, tenant: str, response_id: str) -> Response | None:
        """Return a stored response of this tenant alone; to read its conversation takes longer."""
        packed = await self._backend.get(tenant, response_id)
        return None if packed is None else packed.load_response()

    async def input_items(self, tenant: str, response_id: str) -> list[dict[str, Any]] | None:
        """Return the input of a stored response of this tenant alone."""
        packed = await self._backend.get(tenant, response_id)
        return None if packed is None else packed.load_input_items()

    async def holders(
        self, tenant: str, item_ids: Iterable[str], max_bytes: int
    ) -> list[tuple[PackedResponse, list[str]]] | None:
        """Return the tenant's stored responses that the items are in, each with its items' ids.

        Args:
            max_bytes: that are decoded to find the items; None is returned beyond.
        """
        asked = [*dict.fromkeys(item_ids)]
        if not asked:
            return []
        held: dict[str, list[str]] = {}
        for item_id, each in zip(asked, await self._backend.with_items(tenant, asked), strict=True):
            if each is not None:
                held.setdefault(each, []).append(item_id)
        found = []
        for response_id, ids in held.items():
            packed = await self._backend.get(tenant, response_id)
            if packed is None:
                continue
            max_bytes -= max(packed.items_bytes, packed.num_bytes)
            if max_bytes < 0:
                return None
            found.append((packed, ids))
        return found

    async def delete(self, tenant: str, response_id: str) -> bool:
        """Delete a response; returns False when there is none."""
        return await self._backend.delete(tenant, response_id)

    async def close(self) -> None:
        """Close the connections."""
        await self._backend.close()
