"""Messages about the cache between an engine client and the engine loop: commands and events."""

from __future__ import annotations

from typing import Literal

import msgspec

CacheAction = Literal[
    "pins", "tree", "drop_pin", "drop_branch", "drop_tenant", "packs", "forget_prompts"
]
PackState = Literal["loading", "loaded", "refused"]


class CacheCommand(msgspec.Struct, kw_only=True, tag="cache_command"):
    """An operator's command: list pins or chunks, or drop what ``chunk_id`` or ``tenant`` name.

    ``forget_prompts`` is none: other processes have seen prompts, which are therefore ``unknown``.
    """

    command_id: int
    action: CacheAction
    chunk_id: int = -1
    tenant: str = ""


class TreeNodeInfo(msgspec.Struct, kw_only=True):
    """One chunk of the prefix tree, for the dashboard: ids and counts, never tokens.

    Attributes:
        bits: that the cache tier has rounded each value to; 0: it has not.
    """

    chunk_id: int
    parent_chunk_id: int
    depth: int
    num_tokens: int
    filled: int
    num_sequences: int
    state: str
    namespace: str
    bits: int = 0


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
        askers: of each prompt that was pinned there, its length in tokens and the adapter of its
            request. The chunk tells no adapter: an activated one shares the base model's chunks.
    """

    namespace: str
    tenant: str
    token_ids: list[int]
    askers: list[tuple[int, str]]


class LoadPack(msgspec.Struct, kw_only=True, tag="load_pack"):
    """Load the chunks of a pack file in the background; has no reply.

    Attributes:
        namespaces: of each tenant whose chunks may be loaded, by name; "" is in it for everyone's.
        template: SHA-256 of the server's chat template.
        public_key: Ed25519 key that must have signed the pack; empty: any pack is taken.
        realm: that the file must have: "" is a pack's, any other that of a snapshot, whose chunks
            are in the namespaces that it says.
    """

    path: str
    namespaces: dict[str, str]
    template: str
    public_key: bytes = b""
    realm: str = ""


class KeepSnapshot(msgspec.Struct, kw_only=True, tag="keep_snapshot"):
    """Load the snapshot of an earlier process, then write one at times; has no reply.

    Attributes:
        path: of the file.
        tenants: whose chunks may be loaded; "" is the operator's.
        template, realm: as in ``LoadPack``.
        max_bytes: of K/V in a snapshot.
        seconds: between the end of a snapshot and the next; 0: only ``WriteSnapshot`` makes one.
    """

    path: str
    tenants: list[str]
    template: str
    realm: str
    max_bytes: int
    seconds: float


class WriteSnapshot(msgspec.Struct, kw_only=True, tag="write_snapshot"):
    """Write a snapshot now; the reply comes when it is there, or when that has failed.

    Attributes:
        seconds: after which what has been written is enough.
    """

    command_id: int
    seconds: float


class PackInfo(msgspec.Struct, kw_only=True):
    """How far a pack has been loaded.

    Attributes:
        name: of the file.
        state: "loaded" is the end of loading, even if some were left out.
        reason: why it was refused.
        is_signed: its signature was checked.
        prefixes: names of the prompts that it holds.
        chunks: that it holds.
        chunks_loaded: added to the tree.
        chunks_present: that the tree had already.
        chunks_damaged: whose checksum is wrong.
        chunks_left_out: of tenants that the server does not have, for which there was no room, or
            below one that was left out.
        num_bytes: of K/V.
        seconds: from the begin of loading to its end.
    """

    name: str
    state: PackState = "loading"
    reason: str = ""
    is_signed: bool = False
    prefixes: list[str] = []
    chunks: int = 0
    chunks_loaded: int = 0
    chunks_present: int = 0
    chunks_damaged: int = 0
    chunks_left_out: int = 0
    num_bytes: int = 0
    seconds: float = 0.0


class ChunkContents(msgspec.Struct, kw_only=True):
    """What a stored chunk holds, for readers that may know it.

    Attributes:
        token_ids: of the chunk; under an adapter with its number in the upper 12 bits.
        namespace: that can match it; "" is everyone.
        parent_namespace: of the chunk before it; "" at depth 0.
    """

    token_ids: list[int]
    namespace: str
    parent_namespace: str


class ChunkStored(msgspec.Struct, kw_only=True, tag="stored", omit_defaults=True):
    """A whole chunk can be matched from now on.

    Attributes:
        hash: first 16 bytes of SHA-256 over the parent's 16 bytes (none at depth 0) and the
            chunk's token ids as four bytes each, big-endian; in hexadecimal. Ids of tokens under
            an adapter are larger: the upper 12 bits are its number in this engine process.
        parent_hash: of the chunk before it; None at depth 0.
        depth: index of the chunk in its prompt.
        tenant: whose chunk it is; "" is the operator's, or that of a server with one tenant.
        is_public: every tenant can match it, not only its own.
        contents: None unless the reader asked for it.
    """

    chunk_id: int
    hash: str
    parent_hash: str | None
    depth: int
    tenant: str
    is_public: bool
    contents: ChunkContents | None = None


class ChunkRemoved(msgspec.Struct, kw_only=True, tag="removed"):
    """A chunk that was ``stored`` cannot be matched any more; its id may be used again."""

    chunk_id: int
    hash: str


CacheEvent = ChunkStored | ChunkRemoved


class WatchCache(msgspec.Struct, kw_only=True, tag="watch_cache"):
    """Ask for all chunks stored now and for each later change.

    Attributes:
        watch_id: 0 ends all changes.
        with_contents: stored chunks come with their tokens, these and those of other readers.
    """

    watch_id: int
    with_contents: bool = False


class CacheEvents(msgspec.Struct, kw_only=True, tag="cache_events"):
    """Changes of the cache, in order.

    Attributes:
        watch_id: 0: changes, for all that watch; else everything stored, parents first, for the
            one that has asked with this id.
    """

    watch_id: int
    events: list[CacheEvent]


class DigestRequest(msgspec.Struct, kw_only=True, tag="digest"):
    """Ask for a CacheDigest of at most so many keys; there is no answer while one is too costly."""

    max_keys: int


class CacheDigest(msgspec.Struct, kw_only=True, tag="cache_digest"):
    """What is cached, as a router of requests knows prompts.

    Attributes:
        levels: keys of prefixes by depth, see ``cluster/prefix_keys.py``.
    """

    levels: list[list[int]]


CacheWatch = WatchCache | DigestRequest
CacheReport = CacheEvents | CacheDigest
