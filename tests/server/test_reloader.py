"""The task that reloads settings, in this process: what no reload may end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal

from prometheus_client import CollectorRegistry

from chunkllama.errors import ConfigError
from chunkllama_server.config.settings import Settings
from chunkllama_server.process.reload import Reloader
from chunkllama_server.transport.auth import Tenants

GOOD = "chunkllama_config_last_reload_successful"


class Engine:
    def set_tenants(self, _: object) -> None:
        pass


def test_a_reload_that_fails_ends_no_later_one(caplog, monkeypatch) -> None:
    """Also where it fails by an error that only a bug causes."""
    caplog.set_level(logging.INFO, logger="chunkllama")
    # It would replace the handler that these lines are read from.
    monkeypatch.setattr("chunkllama_server.process.reload.configure_logging", lambda *_: None)
    settings = Settings(api_key=("a:k",))
    outcomes = iter([OverflowError("too\nlarge"), ConfigError("config: bad"), None])
    registry, tenants = CollectorRegistry(), Tenants({"a": "k"})

    def read_settings() -> Settings:
        error = next(outcomes)
        if error is not None:
            raise error
        return Settings(api_key=("b:k",))

    async def reload_thrice() -> list[float | None]:
        reloader = Reloader(settings, read_settings, tenants, None, Engine(), registry)
        task = reloader.start()
        values = []
        for text in ("reload failed", "nothing reloaded", "reloaded: 1 keys"):
            os.kill(os.getpid(), signal.SIGHUP)
            async with asyncio.timeout(60):
                while text not in caplog.text:
                    assert not task.done()
                    await asyncio.sleep(0.01)
            values.append(registry.get_sample_value(GOOD))
        task.cancel()
        asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)
        return values

    values = asyncio.run(reload_thrice())
    assert values[:2] == [0, 0] and dict(tenants.keys) == {"b": "k"}
    (failed,) = [r.getMessage() for r in caplog.records if "reload failed" in r.message]
    assert "OverflowError" in failed and "\n" not in failed
