"""Store finished responses for previous_response_id, bounded by count, bytes and age."""

from __future__ import annotations

import math
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
from pydantic import TypeAdapter

from chunkllama_server.api.schema.chat import ChatMessage
from chunkllama_server.api.schema.response_object import Response


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response and the conversation that ends with it (without instructions).

    Attributes:
        input_items: what the request sent, as items with ids, oldest first.
        tools: that items of the conversation offer, as the request's reader keeps them.
        events: the server-sent events of its stream, as ``EventRecorder`` packs them; left out
            of what the store returns.
    """

    response: Response
    messages: list[ChatMessage]
    input_items: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    events: bytes = b""

    def item_ids(self) -> Iterator[str]:
        """Ids of the items that references may lead to, but for those that name the response."""
        items: list[Any] = [*self.input_items, *self.response["output"]]
        for item in items:
            if item["type"] != _REFERENCE and response_of(item["id"]) != self.response["id"]:
                yield item["id"]


def item_id_in(response_id: str, prefix: str, index: int) -> str:
    """Return the id of an input item that came without one: it names the response."""
    return f"{prefix}_{response_id.removeprefix(_RESPONSE)}{index:0{_INDEX_DIGITS}}"


def response_of(item_id: str) -> str | None:
    """Return the id of the response that an item's id may name."""
    name = item_id.partition("_")[2]
    return f"{_RESPONSE}{name[:-_INDEX_DIGITS]}" if len(name) > _INDEX_DIGITS else None


class _Output(msgspec.Struct):
    """The part of a response that item references lead to; the rest is not decoded."""

    output: list[msgspec.Raw]


class _Head(msgspec.Struct):
    """The members of an item by which it is found."""

    id: str
    type: str


_MESSAGES = TypeAdapter(list[ChatMessage])
# Of an entry beside its text: key, tuple, node of the ordered dictionary.
_OVERHEAD_BYTES = 512
_ITEM_BYTES = 192  # of an item's id that leads to the entry
_REFERENCE = "item_reference"
_RESPONSE = "resp_"
_INDEX_DIGITS = 6
_SIZE_BYTES = 8
_EVENT_END = b"\n\n"
_UNPACKED_BYTES = 1 << 16  # at a time
_decode_output = msgspec.json.Decoder(_Output).decode
_decode_items = msgspec.json.Decoder(list[msgspec.Raw]).decode
_decode_head = msgspec.json.Decoder(_Head).decode


class EventRecorder:
    """Compresses the events of a response one by one, so that its end costs no more than they."""

    def __init__(self) -> None:
        # A window of 8 KiB: a quarter of the memory for each response that runs.
        self._compressor = zlib.compressobj(1, zlib.DEFLATED, 13, 6)
        self._packed = bytearray()

    def add(self, events: list[bytes]) -> None:
        for event in events:
            self._packed += self._compressor.compress(event)

    def packed(self) -> bytes:
        """The events so far; more may follow."""
        return bytes(self._packed) + self._compressor.copy().flush()


def _packed(text: bytes) -> bytes:
    """Compress a text that repeats most of its members; its size comes first."""
    return len(text).to_bytes(_SIZE_BYTES, "little") + zlib.compress(text, 1)


def _unpacked(packed: bytes) -> bytes:
    return zlib.decompress(packed[_SIZE_BYTES:])


def _size(packed: bytes) -> int:
    return int.from_bytes(packed[:_SIZE_BYTES], "little")


@dataclass(frozen=True, slots=True)
class PackedResponse:
    """A response as JSON text: as objects it would take many times the bytes that are counted."""

    response: bytes
    messages: bytes  # this and what follows is compressed
    input_items: bytes
    tools: bytes
    events: bytes

    @classmethod
    def of(cls, stored: StoredResponse) -> PackedResponse:
        """Encode a response."""
        return cls(
            msgspec.json.encode(stored.response),
            _packed(_MESSAGES.dump_json(stored.messages, by_alias=True, exclude_unset=True)),
            _packed(msgspec.json.encode(stored.input_items)),
            _packed(msgspec.json.encode(stored.tools)),
            stored.events,
        )

    @property
    def text_bytes(self) -> int:
        """Bytes of all that is decoded of it."""
        return self.items_bytes + self.conversation_bytes

    @property
    def items_bytes(self) -> int:
        """Bytes that are decoded to find an item of its input or output."""
        return len(self.response) + _size(self.input_items)

    @property
    def conversation_bytes(self) -> int:
        """Bytes that are decoded to continue its conversation."""
        return _size(self.messages) + _size(self.tools)

    @property
    def num_bytes(self) -> int:
        parts = (self.response, self.messages, self.input_items, self.tools, self.events)
        return sum(map(len, parts))

    def load(self) -> StoredResponse:
        return StoredResponse(
            msgspec.json.decode(self.response),
            self.load_messages(),
            self.load_input_items(),
            self.load_tools(),
        )

    def load_messages(self) -> list[ChatMessage]:
        return _MESSAGES.validate_json(_unpacked(self.messages))

    def load_tools(self) -> list[dict[str, Any]]:
        tools: list[dict[str, Any]] = msgspec.json.decode(_unpacked(self.tools))
        return tools

    def find_items(self, item_ids: Collection[str]) -> dict[str, bytes]:
        """Return the JSON texts of items by their ids; the input is read for what no output is."""
        found = _found(_decode_output(self.response).output, item_ids)
        if len(found) < len(item_ids):
            found = _found(_decode_items(_unpacked(self.input_items)), item_ids) | found
        return found

    def load_response(self) -> Response:
        response: Response = msgspec.json.decode(self.response)
        return response

    def load_input_items(self) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = msgspec.json.decode(_unpacked(self.input_items))
        return items

    def unpack_events(self) -> Iterator[bytes]:
        """Yield the events as they are unpacked: together they may take many times the bytes."""
        unpacker, text, looked = zlib.decompressobj(), bytearray(), 0
        packed = self.events
        while packed:
            text += unpacker.decompress(packed, _UNPACKED_BYTES)
            packed = unpacker.unconsumed_tail
            if not packed:
                text += unpacker.flush()
            while (found := text.find(_EVENT_END, looked)) >= 0:
                end = found + len(_EVENT_END)
                yield bytes(text[:end])
                del text[:end]
                looked = 0
            looked = max(len(text) - len(_EVENT_END) + 1, 0)


def _found(items: list[msgspec.Raw], item_ids: Collection[str]) -> dict[str, bytes]:
    """The items with these ids, copied: each is a view of the text of all."""
    heads = ((item, _decode_head(item)) for item in items)
    return {
        head.id: bytes(item)
        for item, head in heads
        if head.id in item_ids and head.type != _REFERENCE
    }


@dataclass(frozen=True, slots=True)
class _Entry:
    """One stored response; ``num_bytes`` is what it takes."""

    packed: PackedResponse
    item_ids: tuple[str, ...]
    num_bytes: int
    expires: float


class _TenantEntries:
    """One tenant's responses by id, the least recently used first; ``items`` leads to them."""

    def __init__(self) -> None:
        self.entries: OrderedDict[str, _Entry] = OrderedDict()
        self.items: dict[str, str] = {}
        self.num_bytes = 0

    def add(self, response_id: str, entry: _Entry) -> None:
        self.entries[response_id] = entry
        self.num_bytes += entry.num_bytes
        for item_id in entry.item_ids:
            self.items[item_id] = response_id

    def remove(self, response_id: str) -> int:
        """Remove a response; returns its bytes."""
        entry = self.entries.pop(response_id)
        self.num_bytes -= entry.num_bytes
        for item_id in entry.item_ids:
            if self.items.get(item_id) == response_id:
                del self.items[item_id]
        return entry.num_bytes


class ResponseStore:
    """Store responses by tenant; a tenant sees only its own.

    When the store is full, the tenant with most of what is short loses its least recently used
    response.

    Args:
        max_items, max_bytes: bounds of the whole store; bytes are those that it keeps.
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
        self._tenants: dict[str, _TenantEntries] = {}
        self._next_expiry = math.inf
        self.num_bytes = 0

    def __len__(self) -> int:
        return sum(len(own.entries) for own in self._tenants.values())

    def put(
        self,
        tenant: str,
        stored: StoredResponse,
        max_items: int | None = None,
        packed: PackedResponse | None = None,
    ) -> None:
        """Store a response, unless it is larger than the whole store, compressed or not.

        Args:
            max_items: of this tenant; None is no limit of its own.
            packed: the same, if it is encoded already.
        """
        packed = packed or PackedResponse.of(stored)
        item_ids = tuple(stored.item_ids())
        num_bytes = packed.num_bytes + _OVERHEAD_BYTES + _ITEM_BYTES * len(item_ids)
        self._drop_expired()
        if max(num_bytes, packed.text_bytes) > self._max_bytes:
            return
        response_id = stored.response["id"]
        self._remove(tenant, response_id)
        own = self._tenants.setdefault(tenant, _TenantEntries())
        expires = self._clock() + self._ttl_seconds
        self._next_expiry = min(self._next_expiry, expires)
        own.add(response_id, _Entry(packed, item_ids, num_bytes, expires))
        self.num_bytes += num_bytes
        while max_items is not None and len(own.entries) > max_items:
            self._remove(tenant, next(iter(own.entries)))
        while len(self) > self._max_items:
            self._drop_oldest(lambda each: len(each.entries))
        while self.num_bytes > self._max_bytes:
            self._drop_oldest(lambda each: each.num_bytes)

    def get(self, tenant: str, response_id: str) -> PackedResponse | None:
        """Return a stored response of this tenant."""
        self._drop_expired()
        own = self._tenants.get(tenant)
        if own is None or response_id not in own.entries:
            return None
        own.entries.move_to_end(response_id)
        return own.entries[response_id].packed

    def with_item(self, tenant: str, item_id: str) -> str | None:
        """Return the id of the tenant's stored response that has the item."""
        self._drop_expired()
        own = self._tenants.get(tenant)
        if own is None:
            return None
        named = response_of(item_id)
        return own.items.get(item_id) or (named if named in own.entries else None)

    def delete(self, tenant: str, response_id: str) -> bool:
        """Delete a response; returns False when there is none."""
        self._drop_expired()
        return self._remove(tenant, response_id)

    def _drop_oldest(self, size: Callable[[_TenantEntries], int]) -> None:
        """Drop the oldest response of the largest tenant."""
        tenant = max(self._tenants, key=lambda name: size(self._tenants[name]))
        self._remove(tenant, next(iter(self._tenants[tenant].entries)))

    def _remove(self, tenant: str, response_id: str) -> bool:
        own = self._tenants.get(tenant)
        if own is None or response_id not in own.entries:
            return False
        self.num_bytes -= own.remove(response_id)
        if not own.entries:
            del self._tenants[tenant]
        return True

    def _drop_expired(self) -> None:
        now = self._clock()
        if now < self._next_expiry:
            return
        expired = [
            (tenant, response_id)
            for tenant, own in self._tenants.items()
            for response_id, entry in own.entries.items()
            if entry.expires <= now
        ]
        for tenant, response_id in expired:
            self._remove(tenant, response_id)
        left = (entry.expires for own in self._tenants.values() for entry in own.entries.values())
        self._next_expiry = min(left, default=math.inf)
