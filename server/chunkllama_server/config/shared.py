"""Settings of several servers of one model: what they share, and what routers learn of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr

from chunkllama.config import ConfigGroup
from chunkllama_server.config.files import read_secret


def _check_address(url: SecretStr) -> SecretStr:
    """Check the scheme, and that a socket has a path; the message names no password.

    The client checks the rest, and takes localhost and 6379 where host and port are left out.
    """
    parts = urlsplit(url.get_secret_value())
    is_server = parts.scheme in ("valkey", "valkeys", "redis", "rediss")
    if not is_server and not (parts.scheme == "unix" and parts.path.strip("/")):
        raise ValueError(
            "write valkey://[:PASSWORD@]HOST:PORT[/DATABASE], valkeys:// for TLS, or unix:///SOCKET"
        )
    return url


class SharedConfig(ConfigGroup):
    """Several servers of one model: what they share, and what routers learn of them."""

    namespace_secret_file: Path | None = Field(
        default=None,
        description="File with the key of the tenants' cache namespaces, at least 32 bytes, not "
        "readable by other users; servers with the same key agree on the namespaces. Default: a "
        "random key for each start, or that of snapshot_dir.",
    )

    response_store: Annotated[SecretStr, AfterValidator(_check_address)] | None = Field(
        default=None,
        description="Store responses in valkey at valkey://[:PASSWORD@]HOST:PORT[/DATABASE], "
        "valkeys:// for TLS, or unix:///SOCKET, so that every server finds them. Needs the extra "
        "chunkllama[valkey]. Default: this process stores them.",
    )
    kv_events_endpoint: str | None = Field(
        default=None,
        pattern=r"^(tcp://.+:[0-9]+|ipc://.+)$",
        examples=["tcp://127.0.0.1:5557", "ipc:///run/events"],
        description="Publish the cache's events here over ZeroMQ in vLLM's form, such as "
        "tcp://127.0.0.1:5557; they hold the prompts of all tenants and need no key. Needs the "
        "extra chunkllama[kv-events].",
    )
    kv_events_topic: str = Field(
        default="", description="Topic of these events; llm-d reads kv@ADDRESS@MODEL."
    )

    def namespace_secret(self) -> bytes | None:
        """Return the key of the namespaces, None without a file.

        Raises:
            ConfigError: the file cannot be used.
        """
        if self.namespace_secret_file is None:
            return None
        return read_secret(self.namespace_secret_file, "namespace_secret_file")
