"""Messages about the cache between an engine client and the engine loop: commands and events."""

from __future__ import annotations

from typing import Literal

import msgspec

CacheAction = Literal["pins", "tree", "drop_pin", "drop_branch", "drop_tenant"]


class CacheCommand(msgspec.Struct, kw_only=True, tag="cache_command"):
    """An operator's command: list pins or chunks, or drop what ``chunk_id`` or ``tenant`` name."""

    command_id: int
    action: CacheAction
    chunk_id: int = -1
    tenant: str = ""


class PinInfo(msgspec.Struct, kw_only=True):
    """A pin: the chunk it ends at, whose it is, what it covers from the root, and its time left."""

    chunk_id: int
    tenant: str
    num_tokens: int
    num_chunks: int
    seconds_left: float


class OwnedNode(msgspec.Struct, kw_only=True):
    """One chunk of the tree for an operator, with the tenant that added it; never its tokens."""

    chunk_id: int
    parent_chunk_id: int
    depth: int
    num_tokens: int
    num_sequences: int
    num_pins: int
    state: str
    tenant: str
    is_public: bool


class EndedPin(msgspec.Struct, kw_only=True):
    """A pin that a command has ended.

    Attributes:
        namespace: of the chunk the pin ended at.
        token_ids: tokens from the root to that chunk's end.
        lengths: lengths of the prompts that were pinned there, in tokens.
        adapter_number: of the adapter at the last token; 0 is none.
        adapter: its name.
    """

    namespace: str
    tenant: str
    token_ids: list[int]
    lengths: list[int]
    adapter_number: int = 0
    adapter: str = ""


class ChunkStored(msgspec.Struct, kw_only=True, tag="stored"):
    """A whole chunk can be matched from now on. It holds no token.

    Attributes:
        hash: first 16 bytes of SHA-256 over the parent's 16 bytes (none at depth 0) and the
            chunk's token ids as four bytes each, big-endian; in hexadecimal. Ids of tokens under
            an adapter are larger: the upper 12 bits are its number in this engine process.
        parent_hash: of the chunk before it; None at depth 0.
        depth: index of the chunk in its prompt.
        tenant: whose chunk it is; "" is the operator's, or that of a server with one tenant.
        is_public: every tenant can match it, not only its own.
    """

    chunk_id: int
    hash: str
    parent_hash: str | None
    depth: int
    tenant: str
    is_public: bool


class ChunkRemoved(msgspec.Struct, kw_only=True, tag="removed"):
    """A chunk that was ``stored`` cannot be matched any more; its id may be used again."""

    chunk_id: int
    hash: str


CacheEvent = ChunkStored | ChunkRemoved


class WatchCache(msgspec.Struct, kw_only=True, tag="watch_cache"):
    """Ask for all chunks stored now and for each later change; ``watch_id`` 0 ends all changes."""

    watch_id: int


class CacheEvents(msgspec.Struct, kw_only=True, tag="cache_events"):
    """Changes of the cache, in order.

    Attributes:
        watch_id: 0: changes, for all that watch; else everything stored, parents first, for the
            one that has asked with this id.
    """

    watch_id: int
    events: list[CacheEvent]
