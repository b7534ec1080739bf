"""Load the adapters of the settings; refuse them before any weight of the model is read."""

from __future__ import annotations

from pathlib import Path

from chunkllama.engine.client import EngineClient
from chunkllama.errors import ConfigError
from chunkllama.model_spec import ModelSpec
from chunkllama.models.loading.adapter_file import read_adapter
from chunkllama_server.config.settings import Settings


def check_adapters(settings: Settings, spec: ModelSpec) -> None:
    """Check each adapter against the model.

    Raises:
        ConfigError: an adapter cannot be used, or has the name of the model.
    """
    if settings.lora and settings.tensor_parallel_size > 1:
        raise ConfigError("lora: adapters need tensor_parallel_size 1")
    for name, folder in settings.adapter_folders.items():
        if name in settings.model_names:
            raise ConfigError(f"lora: {name} is the name of the model; use another one")
        try:
            read_adapter(Path(folder), spec)
        except ConfigError as error:
            raise ConfigError(f"lora: {name}: {error}") from None


async def load_adapters(engine: EngineClient, settings: Settings) -> None:
    """Load each adapter.

    Raises:
        ConfigError: an adapter does not fit the memory of adapters, or its files have changed.
    """
    for name, folder in settings.adapter_folders.items():
        try:
            await engine.load_adapter(name, str(Path(folder).absolute()))
        except ConfigError as error:
            raise ConfigError(f"lora: {name}: {error}") from None
