"""Load a server's settings from the command line, the environment, a YAML file and defaults.

Keys are flat and the same everywhere: ``--num-chunks``, ``CHUNKLLAMA_NUM_CHUNKS``, ``num_chunks:``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ValidationError

from chunkllama.config import (
    CacheConfig,
    ConfigGroup,
    EngineConfig,
    LogConfig,
    ModelConfig,
    SchedulerConfig,
)
from chunkllama.config_errors import check_keys, first_error, rename_keys
from chunkllama.engine.faults import TEST_MODE
from chunkllama.engine.faults import VARIABLE as FAULTS
from chunkllama.errors import ConfigError
from chunkllama.logger import init_logger
from chunkllama.resources import cache_folder
from chunkllama_server.config.adapters import AdapterConfig
from chunkllama_server.config.api_keys import KeyEntry, check_characters, parse_key
from chunkllama_server.config.batches import BatchConfig
from chunkllama_server.config.cluster import ClusterConfig
from chunkllama_server.config.files import lock_folder, read_text, read_yaml
from chunkllama_server.config.kinds import kind_of
from chunkllama_server.config.limits import LimitsConfig
from chunkllama_server.config.packs import PackConfig
from chunkllama_server.config.server import ServerConfig
from chunkllama_server.config.shared import SharedConfig
from chunkllama_server.config.tuning import TuningConfig

logger = init_logger(__name__)

ENV_PREFIX = "CHUNKLLAMA_"
# Read elsewhere, before any configuration: locations of files, and what tests plant.
_OTHER_VARIABLES = frozenset(
    {"CHUNKLLAMA_CACHE", "CHUNKLLAMA_NATIVE_DIR", "CHUNKLLAMA_CONFIG", TEST_MODE, FAULTS}
)

# Settings without effect where another one is not set.
_NEEDS = {
    "admin_host": "admin_port",
    "cache_tier_bytes": "cache_tier_dir",
    "kv_events_topic": "kv_events_endpoint",
    "max_failovers": "cluster",
    "router_index_chunks": "cluster",
    "snapshot_bytes": "snapshot_dir",
    "snapshot_seconds": "snapshot_dir",
    "spill_requests": "cluster",
}
_SERVICE_LINK = re.compile(r"_SERVICE_(HOST|PORT\w*)$|_PORT_[0-9]+_(TCP|UDP|SCTP)")

_ENGINE_GROUPS = (ModelConfig, CacheConfig, SchedulerConfig, LogConfig)
_SERVER_GROUPS = (
    *(ServerConfig, LimitsConfig, BatchConfig, TuningConfig, AdapterConfig, PackConfig),
    *(SharedConfig, ClusterConfig),
)


class Settings(
    ServerConfig,
    LimitsConfig,
    BatchConfig,
    TuningConfig,
    AdapterConfig,
    PackConfig,
    SharedConfig,
    ClusterConfig,
    LogConfig,
    SchedulerConfig,
    CacheConfig,
    ModelConfig,
):
    """All keys of all groups."""

    groups: ClassVar[tuple[type[ConfigGroup], ...]] = (*_ENGINE_GROUPS, *_SERVER_GROUPS)

    @property
    def model_names(self) -> tuple[str, ...]:
        """Return the names that clients may request; the first is the default."""
        path = Path(self.model).resolve()  # an alias or a hub id ends in its name, too
        own_name = path.stem if path.suffix.lower() == ".gguf" else path.name
        return self.served_model_name or (own_name,)

    @property
    def files_folder(self) -> Path:
        """Return where files and batches are stored: by default the servers of a machine, each
        with a port of its own, share no folder."""
        return self.files_dir or cache_folder() / f"files-{self.port}"

    def take_over_files(self) -> None:
        """Rename the folder of a version in which all ports had one, where this server has none.

        The folder is locked meanwhile, so that no server that uses it loses it.
        """
        earlier, folder = cache_folder() / "files", self.files_folder
        if self.files_dir is not None or not self.port or folder.exists() or not earlier.is_dir():
            return
        try:
            lock = lock_folder(earlier)
        except OSError as error:
            logger.warning("files_dir: %s of an earlier version is left: %s", earlier, error)
            return
        try:
            earlier.rename(folder)
            logger.warning("files_dir: %s of an earlier version is now %s", earlier, folder)
        except OSError as error:
            logger.warning("files_dir: %s of an earlier version is left: %s", earlier, error)
        finally:
            os.close(lock)

    def engine(self) -> EngineConfig:
        """Return the engine's part."""
        keys = [key for group in _ENGINE_GROUPS for key in group.model_fields]
        return EngineConfig.from_flat(**{key: getattr(self, key) for key in keys})

    def key_entries(self) -> list[KeyEntry]:
        """Return the API keys of the flags and the file with the quotas behind them.

        A key without a name is named by its hash, which does not depend on other keys.

        Raises:
            ConfigError: the file cannot be read or a line is malformed.
        """
        entries = [secret.get_secret_value() for secret in self.api_key]
        if self.api_key_file is not None:
            lines = read_text(self.api_key_file, "api_key_file").splitlines()
            entries += [line.strip() for line in lines if line.strip() and line.strip()[0] != "#"]
            if not entries:
                raise ConfigError(f"api_key_file: {self.api_key_file} holds no key")
        return [parse_key(entry, number) for number, entry in enumerate(entries, start=1)]

    def keys_by_tenant(self) -> dict[str, str]:
        """Return API keys by tenant name.

        Raises:
            ConfigError: see ``key_entries``; a name or key occurs twice, or an operator key is
                malformed.
        """
        keys: dict[str, str] = {}
        known = set[str]()
        for number, (name, key, _) in enumerate(self.key_entries(), start=1):
            if name in keys or key in known:
                raise ConfigError(f"api_key: entry {number} ({name}) repeats a name or a key")
            keys[name] = key
            known.add(key)
        operators = [secret.get_secret_value() for secret in self.operator_key]
        if operators and not keys and self.admin_port is None:
            raise ConfigError(
                "operator_key: needs api_key or admin_port; without keys anyone reads everything"
            )
        if not all(operators) or not known.isdisjoint(operators):
            raise ConfigError("operator_key: empty, or the same as a tenant's key")
        for number, key in enumerate(operators, start=1):
            check_characters(key, f"operator_key: entry {number}")
        return keys


class Loaded:
    """Settings and the origin of each value.

    Attributes:
        origins: key to "command line", "environment", a file's path, or "default".
    """

    def __init__(self, settings: Settings, origins: dict[str, str]) -> None:
        self.settings = settings
        self.origins = origins


def load_settings(
    flags: Mapping[str, Any],
    environ: Mapping[str, str] = os.environ,
    config_file: Path | None = None,
) -> Loaded:
    """Merge all sources: command line over environment over file over defaults.

    Raises:
        ConfigError: an unknown key (the nearest is named) or a bad value, with its origin.
    """
    known = list(Settings.model_fields)
    variables = {
        name.removeprefix(ENV_PREFIX).lower(): value
        for name, value in environ.items()
        if name.startswith(ENV_PREFIX)
        and name not in _OTHER_VARIABLES
        and not _is_service_link(name, value)
    }
    variables = rename_keys(variables, "the environment")
    check_keys(variables, known, f"the environment ({ENV_PREFIX}...)")
    config_file = config_file or (
        Path(environ["CHUNKLLAMA_CONFIG"]) if environ.get("CHUNKLLAMA_CONFIG") else None
    )
    document = read_yaml(config_file) if config_file is not None else {}
    if section := next(
        (k for k, v in document.items() if isinstance(v, dict) and k not in known), None
    ):
        raise ConfigError(
            f"{config_file}: {section} holds keys of its own; write every setting at the top level"
        )
    document = rename_keys(document, str(config_file))
    flags = rename_keys(flags, "the command line")
    check_keys(document, known, str(config_file))
    values: dict[str, Any] = {}
    origins = dict.fromkeys(known, "default")
    for origin, source in (
        (str(config_file), document),
        ("environment", variables),
        ("command line", flags),
    ):
        for key, value in source.items():
            values[key], origins[key] = value, origin
    for key, value in values.items():
        if value in ("", [""]) and not _may_be_empty(key):
            raise ConfigError(
                f"{key}: empty (from {origins[key]}); leave it out, or give it a value"
            )
    try:
        settings = Settings(**values)
    except ValidationError as error:
        message = first_error(error, Settings.model_fields)
        origin = origins.get(message.split(":")[0], "")
        raise ConfigError(f"{message} (from {origin})" if origin else message) from None
    if "default" not in (origins["num_chunks"], origins["kv_cache_memory"]):
        logger.warning(
            "kv_cache_memory (from %s) has no effect beside num_chunks (from %s)",
            *(origins["kv_cache_memory"], origins["num_chunks"]),
        )
    for key, needed in _NEEDS.items():
        if origins[key] != "default" and getattr(settings, needed) is None:
            logger.warning("%s (from %s) has no effect without %s", key, origins[key], needed)
    return Loaded(settings, origins)


def _may_be_empty(key: str) -> bool:
    """Tell whether an empty text is a value: of a list without secrets, or of what is empty anyway.

    Keys that a variable of another name should have filled must not open a server, and an empty
    host would listen on every address.
    """
    field = Settings.model_fields[key]
    is_secret = "SecretStr" in str(field.annotation)
    return field.default == "" or (kind_of(key, field) == "list" and not is_secret)


def _is_service_link(name: str, value: str) -> bool:
    """Tell whether Kubernetes set it for a Service whose name begins with chunkllama."""
    return value.startswith("tcp://") or _SERVICE_LINK.search(name) is not None
