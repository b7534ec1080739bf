"""Messages about adapters between an engine client and the engine loop."""

from __future__ import annotations

import msgspec


class LoadAdapter(msgspec.Struct, kw_only=True, tag="load_adapter"):
    """Read an adapter's folder and serve it by ``name``; the reply says what it is."""

    command_id: int
    name: str
    folder: str


class UnloadAdapter(msgspec.Struct, kw_only=True, tag="unload_adapter"):
    """Forget an adapter that no request uses, with all that is cached under it."""

    command_id: int
    name: str


class AdapterInfo(msgspec.Struct, kw_only=True):
    """A loaded adapter.

    Attributes:
        folder: where its files lie.
        rank: the largest of its modules.
        num_bytes: of its weights in memory.
        is_activated: active only from its invocation tokens on.
        digest: SHA-256 of its files, in hexadecimal.
    """

    name: str
    folder: str
    rank: int
    num_bytes: int
    is_activated: bool
    digest: str
