"""Read API keys, quotas, public prefixes and log level again at SIGHUP; streams continue."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Gauge

from chunkllama.engine.client import EngineClient
from chunkllama.errors import ChunkLlamaError, ConfigError
from chunkllama.logger import configure_logging, init_logger
from chunkllama.text.chat_template import ChatTemplate
from chunkllama_server.config.settings import Settings
from chunkllama_server.config.tenants import TenantQuotas, engine_message, load_quotas
from chunkllama_server.process.lifecycle import notify_supervisor
from chunkllama_server.process.public_prefixes import load_public_prefixes, register_public_prefixes
from chunkllama_server.transport.auth import Tenants

logger = init_logger(__name__)

RELOADED = frozenset({"api_key", "api_key_file", "tenants_file", "public_prefixes", "log_level"})


class Reloader:
    """Applies what may change while serving; all of it, or after an error nothing.

    Args:
        settings: those the server was started with.
        read_settings: reads them again from where they came.
        tenants: gets the keys and quotas.
        template, engine: for the public prefixes.
        registry: gets gauges of the last reload.
    """

    def __init__(
        self,
        settings: Settings,
        read_settings: Callable[[], Settings],
        tenants: Tenants,
        template: ChatTemplate | None,
        engine: EngineClient,
        registry: CollectorRegistry,
    ) -> None:
        self._settings = settings
        self._read_settings = read_settings
        self._tenants = tenants
        self._template = template
        self._engine = engine
        self._hangup = asyncio.Event()
        self._is_good = Gauge(
            "chunkllama_config_last_reload_successful",
            "Whether the configuration that was read last is in use.",
            registry=registry,
        )
        self._read_at = Gauge(
            "chunkllama_config_last_reload_timestamp_seconds",
            "When the configuration was last read.",
            registry=registry,
        )
        self._note_read(is_good=True)

    def start(self) -> asyncio.Task[None]:
        """Reload at each SIGHUP from now on, until the task is cancelled."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._hangup.set)
        return asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            await self._hangup.wait()
            self._hangup.clear()
            notify_supervisor(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
            try:
                await self._reload()
                self._note_read(is_good=True)
            except ChunkLlamaError as error:
                logger.error("nothing reloaded: %s", error)
                self._note_read(is_good=False)
            except Exception as error:  # a bug; the next reload may work
                reason = " ".join(repr(error).split())[:200]
                logger.error("reload failed: %s; reload again, or restart", reason)
                self._note_read(is_good=False)
            notify_supervisor("READY=1")

    def _note_read(self, *, is_good: bool) -> None:
        self._is_good.set(is_good)
        self._read_at.set_to_current_time()

    async def _reload(self) -> None:
        """Read everything, then apply it.

        Raises:
            ConfigError: a file is bad or a prefix does not fit; keys, quotas and log level are as
                before.
        """
        # In a thread: long prefixes take a while to tokenize, and streams go on meanwhile.
        settings, keys, quotas, prefixes = await asyncio.to_thread(self._read)
        await register_public_prefixes(self._engine, prefixes)
        gone = ", ".join(sorted(self._tenants.keys.keys() - keys)) or "none"
        self._tenants.set_keys(keys)
        self._tenants.set_quotas(quotas)
        self._engine.set_tenants(engine_message(quotas))
        configure_logging(settings.log_level, self._settings.log_format)
        level = settings.log_level
        logger.info("reloaded: %d keys, removed: %s, log level %s", len(keys), gone, level)
        late = [
            key
            for key in Settings.model_fields
            if key not in RELOADED and getattr(settings, key) != getattr(self._settings, key)
        ]
        if late:
            logger.warning("changed, but used from the next start on: %s", ", ".join(late))

    def _read(
        self,
    ) -> tuple[Settings, dict[str, str], dict[str, TenantQuotas], list[list[int]]]:
        settings = self._read_settings()
        keys = settings.keys_by_tenant()
        if bool(keys) != bool(self._tenants.keys):
            raise ConfigError("api_key_file: keys cannot be turned on or off while serving")
        prefixes = load_public_prefixes(settings.public_prefixes, self._template)
        return settings, keys, load_quotas(settings), prefixes
