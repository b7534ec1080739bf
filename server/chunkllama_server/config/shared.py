"""Settings of what several servers of one model share."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from chunkllama.config import ConfigGroup
from chunkllama_server.config.files import read_secret


class SharedConfig(ConfigGroup):
    """What several servers of one model share."""

    namespace_secret_file: Path | None = Field(
        default=None,
        description="File with the key of the tenants' cache namespaces, at least 32 bytes, not "
        "readable by other users; servers with the same key agree on the namespaces. Default: a "
        "random key for each start, or that of snapshot_dir.",
    )

    def namespace_secret(self) -> bytes | None:
        """Return the key of the namespaces, None without a file.

        Raises:
            ConfigError: the file cannot be used.
        """
        if self.namespace_secret_file is None:
            return None
        return read_secret(self.namespace_secret_file, "namespace_secret_file")
