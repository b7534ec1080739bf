"""Packages that a setting needs and a plain installation lacks."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Final

from chunkllama.errors import ConfigError
from chunkllama_server.config.settings import Settings

# By setting: the module, and the extra that installs it. Ray and packs check theirs.
_EXTRAS: Final = {
    "otlp_endpoint": ("opentelemetry.exporter.otlp.proto.http", "otel"),
    "kv_events_endpoint": ("zmq", "kv-events"),
    "response_store": ("valkey", "valkey"),
}


def check_extras(settings: Settings) -> None:
    """Check that the packages which the settings need are installed.

    Of a dotted name the packages above the module are imported, the module itself is not.

    Raises:
        ConfigError: one is missing; the line says how to install it.
    """
    for key, (module, extra) in _EXTRAS.items():
        if getattr(settings, key) is not None and not _is_installed(module):
            raise ConfigError(
                f"{key}: needs a package that is not installed: pip install 'chunkllama[{extra}]'"
            )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that holds it
        return False
