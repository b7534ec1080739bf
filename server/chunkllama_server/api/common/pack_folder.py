"""The folder of packs that a server loads into its engine."""

from __future__ import annotations

from chunkllama.cache_messages import LoadPack
from chunkllama.engine.client import EngineClient
from chunkllama.packs.file import SUFFIX
from chunkllama_server.config.settings import Settings
from chunkllama_server.transport.auth import Tenants


class PackFolder:
    """Files ending in .ckpack of the setting ``packs``; none without it.

    Args:
        template: SHA-256 of the chat template; "": the model has none.
        tenants: may have chunks of their own.

    Raises:
        ConfigError: the folder or the public key cannot be used.
    """

    def __init__(self, settings: Settings, tenants: Tenants, template: str) -> None:
        self.folder = settings.packs
        self._tenants = tenants
        self._template = template
        self._public_key = settings.check_packs()

    def names(self) -> list[str]:
        """Return the names of the files that are there now, sorted."""
        if self.folder is None:
            return []
        return sorted(path.name for path in self.folder.glob(f"*{SUFFIX}") if path.is_file())

    def load(self, name: str, engine: EngineClient) -> None:
        """Begin to load one of ``names``."""
        assert self.folder is not None
        namespaces = {name: self._tenants.namespace(name, None) for name in self._tenants.keys}
        engine.use_file(
            LoadPack(
                path=str((self.folder / name).absolute()),
                namespaces={"": "", **namespaces},
                template=self._template,
                public_key=self._public_key,
            )
        )

    def load_all(self, engine: EngineClient) -> None:
        """Begin to load all that are there."""
        for name in self.names():
            self.load(name, engine)
