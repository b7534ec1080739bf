"""Settings of prefix packs and of snapshots of the cache."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from chunkllama.config import Bytes, ConfigGroup, limit
from chunkllama.errors import ConfigError
from chunkllama.packs.signature import load_public_key


class PackConfig(ConfigGroup):
    """Files with K/V: packs of prompts that were computed before, and snapshots of the cache."""

    packs: Path | None = Field(
        default=None,
        description="Folder of packs (.ckpack, from chunkllama pack build) to load into the chunk "
        "pool in the background.",
    )
    pack_public_key: Path | None = Field(
        default=None,
        description="PEM file with an Ed25519 public key; packs that its owner has not signed are "
        "refused. Needs the extra chunkllama[packs].",
    )
    snapshot_dir: Path | None = Field(
        default=None,
        description="Folder of this server alone for a snapshot of its cache, which the next start "
        "loads; mode 0700. Default: no snapshots.",
    )
    snapshot_bytes: Bytes = Field(
        default=1 << 30,
        description="K/V in a snapshot, the most recently used first; while one is written, there "
        "are two files.",
    )
    snapshot_seconds: float = Field(
        default=300.0,
        ge=0,
        description="Time from one snapshot to the next, which is written beside the steps if the "
        "cache has changed; 0 writes one at the end only.",
    )
    snapshot_drain_seconds: float = limit(
        5.0, "seconds", "operator", "left out",
        "Time for the snapshot that is written at SIGTERM, after live requests have ended.", ge=0,
    )  # fmt: skip

    def check_packs(self) -> bytes:
        """Return the public key, empty without one.

        Raises:
            ConfigError: the folder or the key cannot be used.
        """
        if self.packs is not None and not self.packs.is_dir():
            raise ConfigError(f"packs: {self.packs} is not a folder")
        if self.pack_public_key is None:
            return b""
        return load_public_key(self.pack_public_key, "pack_public_key")
