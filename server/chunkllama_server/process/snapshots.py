"""The folder in which a server keeps a snapshot of its cache, and the secret of its namespaces.

A snapshot has each chunk's namespace as it was in the tree: a keyed hash of tenant and salt. With
the same key after a restart, a tenant finds its own chunks again and no other's.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from chunkllama.cache_messages import KeepSnapshot
from chunkllama.engine.client import MessageClient
from chunkllama.errors import ConfigError, EngineDeadError
from chunkllama.logger import init_logger
from chunkllama.packs.file import Pack, loading_mark
from chunkllama_server.config.files import lock_folder
from chunkllama_server.config.settings import Settings
from chunkllama_server.transport.auth import Tenants, keyed_namespace

logger = init_logger(__name__)

_FILE, _SECRET = "snapshot.ckpack", "namespace.key"
_SECRET_BYTES = 32
_GRACE_SECONDS = 5.0  # beyond the time for writing: flushing it to the disk


class Snapshots:
    """A folder that can be written.

    Args:
        lock: descriptor that keeps the folder locked for as long as the process lives.

    Attributes:
        secret: key of the namespaces.
    """

    def __init__(self, folder: Path, lock: int, secret: bytes, settings: Settings) -> None:
        self.secret = secret
        self._lock = lock
        self._path = folder / _FILE
        self._settings = settings

    def begin(self, engine: MessageClient, tenants: Tenants, template: str) -> None:
        """Load the last snapshot in the background, and write others from now on."""
        engine.use_file(
            KeepSnapshot(
                path=str(self._path.absolute()),
                tenants=["", *tenants.keys],
                template=template,
                realm=_realm(self.secret, are_isolated=tenants.are_isolated),
                max_bytes=self._settings.snapshot_bytes,
                seconds=self._settings.snapshot_seconds,
            )
        )

    async def end(self, engine: MessageClient) -> None:
        """Write a snapshot of what is cached at the end."""
        seconds = self._settings.snapshot_drain_seconds
        if not seconds:
            return
        try:
            async with asyncio.timeout(seconds + _GRACE_SECONDS):
                is_written = await engine.write_snapshot(seconds)
        except (EngineDeadError, TimeoutError) as error:
            logger.warning("no snapshot was written at the end: %s", error or "it took too long")
            return
        if is_written:
            logger.info("the snapshot of the cache is in %s", self._path)


def open_snapshots(settings: Settings, secret: bytes | None) -> Snapshots | None:
    """Prepare the folder of the settings; None without one, or, with a warning, if it cannot be
    used.

    Args:
        secret: key of the namespaces; None: the folder's own.
    """
    folder = settings.snapshot_dir
    if folder is None:
        return None
    try:
        with contextlib.ExitStack() as undone:
            lock = lock_folder(folder)
            undone.callback(os.close, lock)
            # The former server was killed with its engine, perhaps: no fault of the file.
            loading_mark(folder / _FILE).unlink(missing_ok=True)
            secret = secret or _secret(folder / _SECRET)
            undone.pop_all()
        return Snapshots(folder, lock, secret, settings)
    except BlockingIOError:
        logger.warning("snapshots are off: another server uses %s", folder)
        return None
    except OSError as error:
        logger.warning("snapshots are off: %s: %s", folder, error.strerror)
        return None


def open_hot_snapshot(settings: Settings, tenants: Sequence[str]) -> tuple[Pack, dict[str, str]]:
    """Open the last snapshot of a server with these settings, which may run.

    Args:
        tenants: whose chunks are wanted beside everyone's.

    Returns:
        The snapshot, and the tenants by their namespace in it.

    Raises:
        ConfigError: there is none, the key of its namespaces is another one, or its server had one
            cache for all who used it and ``isolation`` is not off here.
    """
    folder = settings.snapshot_dir
    if folder is None:
        raise ConfigError("prefixes: give a file of prompts, or the snapshot_dir of a server")
    secret = settings.namespace_secret()
    try:
        secret = secret or (folder / _SECRET).read_bytes()
        snapshot = Pack(folder / _FILE)
    except OSError as error:
        raise ConfigError(
            f"snapshot_dir: {error.filename} cannot be read: {error.strerror}"
        ) from None
    realm = snapshot.document.realm
    is_shared = realm == _realm(secret, are_isolated=False)
    if is_shared and settings.isolation != "off":
        snapshot.close()
        raise ConfigError(
            "isolation: the server had one cache for all, so the pack has the prompts of all and "
            "gives them to everyone; to build it, set isolation off"
        )
    if not is_shared and realm != _realm(secret, are_isolated=True):
        snapshot.close()
        raise ConfigError(
            "namespace_secret_file: the snapshot was written with another key; give the server's"
        )
    return snapshot, {"": ""} | {keyed_namespace(secret, name, ""): name for name in tenants}


def _realm(secret: bytes, *, are_isolated: bool) -> str:
    """Where namespaces mean something: without isolation everyone's chunks are in one, with it that
    one is public.
    """
    mode = b"isolated" if are_isolated else b"shared"
    return hmac.new(secret, mode, hashlib.sha256).hexdigest()


def _secret(path: Path) -> bytes:
    """Read the key of the namespaces, or make one; a file that is none is replaced."""
    with contextlib.suppress(FileNotFoundError):
        found = path.read_bytes()
        if len(found) == _SECRET_BYTES:
            return found
    secret = secrets.token_bytes(_SECRET_BYTES)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secret)
        os.fsync(file.fileno())
    temporary.replace(path)
    return secret
