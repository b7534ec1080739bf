"""Settings of prefix packs."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from chunkllama.config import ConfigGroup
from chunkllama.errors import ConfigError
from chunkllama.packs.signature import load_public_key


class PackConfig(ConfigGroup):
    """Prefix packs: K/V of prompts that were computed before, in files."""

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
