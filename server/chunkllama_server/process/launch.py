"""``chunkllama serve``: check everything that is cheap, start the engine, answer HTTP, drain, stop.

The order makes failures quick and quiet, and the start short: settings, sockets and the model's
files come first, so they are refused before any weight is read; then the engine process loads while
this one imports the HTTP layer and reads the tokenizer.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from chunkllama.config import EngineConfig
from chunkllama.engine.faults import VARIABLE as FAULTS
from chunkllama.engine.faults import faults_from
from chunkllama.engine.size import check_memory, may_have_gpu, plan_size
from chunkllama.errors import ConfigError
from chunkllama.logger import configure_logging, init_logger
from chunkllama.model_spec import ModelSpec
from chunkllama.models.config import read_spec
from chunkllama.models.loading.hub import resolve_model
from chunkllama.models.loading.shapes import open_checkpoint
from chunkllama_server.config.extras import check_extras
from chunkllama_server.config.settings import Settings
from chunkllama_server.config.tenants import load_quotas
from chunkllama_server.process import start_signals
from chunkllama_server.process.adapters import check_adapters
from chunkllama_server.process.engines import check_cluster, start_engine

if TYPE_CHECKING:
    from chunkllama_server.process.engines import ServedEngine
    from chunkllama_server.process.http_server import Application

logger = init_logger(__name__)


def serve_forever(settings: Settings, read_settings: Callable[[], Settings]) -> int:
    """Serve until a signal; returns the process's exit code.

    Args:
        read_settings: reads the settings again from where they came, at SIGHUP.

    Raises:
        ConfigError: anything that keeps the server from starting; one line names the fix.
    """
    started = time.monotonic()
    start_signals.install()  # the entry point has done so, except in a caller's own process
    configure_logging(settings.log_level, settings.log_format)
    if faults_from() is not None:
        logger.warning("faults are planted: %s", os.environ[FAULTS])
    keys, quotas = settings.keys_by_tenant(), load_quotas(settings)
    check_tls(settings)
    settings.check_packs()
    secret = settings.namespace_secret()
    check_extras(settings)
    check_cluster(settings)
    with contextlib.ExitStack() as sockets:
        main = sockets.enter_context(bind(settings.host, settings.port, "port"))
        admin = None
        if settings.admin_port is not None:
            admin = sockets.enter_context(
                bind(settings.admin_host, settings.admin_port, "admin_port")
            )
        with start_signals.unwinding():  # a download's temporary files
            path, spec = check_model(settings.engine(), is_served_here=settings.cluster is None)
            check_adapters(settings, spec)
        logger.info("loading %s", path)

        def make_application() -> Application:
            from chunkllama_server.process.text_files import read_text_files

            files = read_text_files(settings, path, spec)
            from chunkllama_server.process.http_server import (
                Application,  # fastapi and all that it brings
            )

            return Application(settings, read_settings, keys, quotas, secret, files, path, spec)

        async def run() -> int:
            async with contextlib.AsyncExitStack() as stack:
                starting = asyncio.create_task(start_engine(settings))
                stack.push_async_callback(_end, starting)
                await asyncio.sleep(0)  # the engine process is spawned here
                application = make_application()
                return await application.serve(await starting, main, admin, started)

        return asyncio.run(run())


async def _end(starting: asyncio.Task[ServedEngine]) -> None:
    """End the engine, ready or not."""
    starting.cancel()
    with contextlib.suppress(asyncio.CancelledError, ConfigError):
        await (await starting).close()


def bind(host: str, port: int, key: str) -> socket.socket:
    """A bound socket, not yet listening: the port is reserved, and no client can connect yet.

    Raises:
        ConfigError: the port is taken or privileged, or the host is not of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        fix = "give an address of this machine, such as 127.0.0.1 or 0.0.0.0"
        if "/" in host or host.count(":") == 1:
            fix = f"give the address alone, such as 127.0.0.1, and the port as --{_flag(key)}"
        raise ConfigError(
            f"{key.replace('port', 'host')}: {host} cannot be resolved: {error}; {fix}"
        ) from None
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"{key}: cannot listen on {host}:{port}: {error.strerror}; choose another "
            f"--{_flag(key)}"
        ) from None
    return sock


def _flag(key: str) -> str:
    return key.replace("_", "-")


def check_tls(settings: Settings) -> None:
    """Load the certificate as uvicorn will.

    Raises:
        ConfigError: a file is missing or the two do not belong together.
    """
    if settings.ssl_certfile is None:
        return
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
            # An encrypted key is an error then, and no question on the terminal.
            settings.ssl_certfile,
            settings.ssl_keyfile,
            password="",
        )
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(
            f"ssl_certfile, ssl_keyfile: cannot be used: {error}; they must belong together, and "
            "the key must not be encrypted"
        ) from None


def check_model(config: EngineConfig, *, is_served_here: bool) -> tuple[Path, ModelSpec]:
    """A model's folder, fetched if need be, and its numbers; loads no weights.

    The weights' headers are checked, and the engine's settings against the model and this machine.
    Where there may be a GPU, only the engine process can check what depends on the device.

    Args:
        is_served_here: whether the engine runs on this machine; the replicas of a cluster check the
            settings against theirs.

    Raises:
        ConfigError: a file is missing, damaged or of the wrong shape, or a setting does not fit.
    """
    path = resolve_model(config.model.model)
    spec = read_spec(path)
    checkpoint = open_checkpoint(path, spec, config.model.load_format)
    if is_served_here and (config.model.device == "cpu" or not may_have_gpu()):
        check_memory(config, plan_size(config, path, spec, checkpoint))
    return path, spec
