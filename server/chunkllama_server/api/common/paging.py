"""Lists in pages, as OpenAI's API has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from chunkllama_server.transport.errors import invalid

Item = TypeVar("Item")


def page_of(
    items: Sequence[Item], limit: int, after: str | None, name: Callable[[Item], str]
) -> tuple[Sequence[Item], bool]:
    """Items behind the one with the id ``after``, at most ``limit``; whether more follow.

    Args:
        name: returns an item's id.

    Raises:
        ApiError: 400, there is none with that id.
    """
    if after is not None:
        ids = [name(item) for item in items]
        if after not in ids:
            raise invalid(f"Nothing with the id {after[:100]!r} is listed", "after")
        items = items[ids.index(after) + 1 :]
    return items[:limit], len(items) > limit
