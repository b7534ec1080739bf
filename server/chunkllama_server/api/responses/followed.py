"""What a request continues and refers to: a stored response, and items of stored responses.

A client may refer to as much as it could send: what is followed is bounded before it is decoded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from chunkllama_server.api.common.context import ServerContext
from chunkllama_server.api.common.response_store import PackedResponse
from chunkllama_server.api.schema.chat import ChatMessage
from chunkllama_server.api.schema.responses import InputItem, ResponseRequest
from chunkllama_server.transport.errors import ApiError, invalid

# Bodies' sizes that are looked through for items: a response has more than those referred to.
_SEARCHED_BODIES = 32


@dataclass(frozen=True, slots=True)
class Followed:
    """What a request continues and refers to, not decoded yet.

    Attributes:
        holders: responses that items are in, each with the items' ids.
        references: how often the request refers to each item.
        max_bytes: of the items together, each as often as it is referred to.
    """

    previous: PackedResponse | None
    holders: Sequence[tuple[PackedResponse, Sequence[str]]]
    references: Counter[str]
    max_bytes: int

    @property
    def num_bytes(self) -> int:
        """Bytes that are decoded."""
        held = sum(packed.items_bytes for packed, _ in self.holders)
        return held + (0 if self.previous is None else self.previous.conversation_bytes)

    def messages(self) -> list[ChatMessage]:
        """The conversation of the response that is continued."""
        messages = [] if self.previous is None else self.previous.load_messages()
        return [message.from_path("previous_response_id") for message in messages]

    def tools(self) -> list[dict[str, Any]]:
        """What items of that conversation offer."""
        return [] if self.previous is None else self.previous.load_tools()

    def items(self) -> StoredItems:
        """Read the items, of one response after the other.

        Raises:
            ApiError: 413 for more than ``max_bytes``.
        """
        texts: dict[str, bytes] = {}
        left = self.max_bytes
        for packed, ids in self.holders:
            found = packed.find_items(ids)
            left -= sum(len(text) * self.references[each] for each, text in found.items())
            if left < 0:
                raise _too_large("input", self.max_bytes)
            texts |= found
        return StoredItems(texts)


@dataclass(frozen=True, slots=True)
class StoredItems:
    """Items that a request refers to, as texts until each is read."""

    texts: Mapping[str, bytes]

    def find(self, item_id: str) -> dict[str, Any] | None:
        """Return an item; None for one that is not stored."""
        text = self.texts.get(item_id)
        return None if text is None else msgspec.json.decode(text)


async def followed(body: ResponseRequest, context: ServerContext, tenant: str) -> Followed:
    """Find what a request continues and refers to.

    Raises:
        ApiError: 404 when the previous response is not, or no longer, stored; 400 while it is
            running; 413 for more than a request may have.
    """
    most = context.settings.max_body_bytes
    previous = await _previous_response(body, context, tenant)
    if previous is not None and previous.conversation_bytes > most:
        raise _too_large("previous_response_id", most)
    items = body.input if isinstance(body.input, list) else []
    references = Counter(map(_reference, items))
    references.pop("", None)
    holders = await context.responses.holders(tenant, references, _SEARCHED_BODIES * most)
    if holders is None:
        raise _too_large("input", most)
    return Followed(previous, holders, references, most)


def _reference(item: InputItem) -> str:
    """The id of the item that an item refers to; "" for one that refers to none."""
    return item.id or "" if item.type == "item_reference" else ""


def _too_large(param: str, most: int) -> ApiError:
    return ApiError(
        413,
        f"What the request follows is larger than a body of {most} bytes may be; send what matters "
        "of it, or compact the conversation",
        param,
        "request_too_large",
    )


async def _previous_response(
    body: ResponseRequest, context: ServerContext, tenant: str
) -> PackedResponse | None:
    previous = body.previous_response_id
    if not previous:
        return None
    if context.background.get(tenant, previous) is not None:
        raise invalid(
            f"Response {previous!r} is still running", "previous_response_id", "response_running"
        )
    stored = await context.responses.get(tenant, previous)
    if stored is None:
        raise ApiError(
            404,
            f"Response {previous!r} is not stored (any more)",
            "previous_response_id",
            "response_not_found",
        )
    return stored
