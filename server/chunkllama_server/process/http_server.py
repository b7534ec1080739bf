"""The HTTP side of a server process: text, application, uvicorn, admin port."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI

from chunkllama.engine.grammar import GrammarCompiler
from chunkllama.errors import ConfigError, EngineDeadError, InvalidRequestError
from chunkllama.logger import init_logger
from chunkllama.messages import EngineStats
from chunkllama.model_spec import ModelSpec
from chunkllama.models.identity import hash_weights
from chunkllama.resources import freeze_heap
from chunkllama.sampling_params import GrammarSpec
from chunkllama.text.chat_template import REQUEST_RENDER_SECONDS, ChatTemplate
from chunkllama_server.api import dashboard
from chunkllama_server.api.admin_app import create_admin_app
from chunkllama_server.api.app import create_app
from chunkllama_server.api.common.context import ServerContext
from chunkllama_server.api.common.structured_outputs import GrammarChecker
from chunkllama_server.api.common.text_service import TextService
from chunkllama_server.api.common.valkey_responses import ValkeyResponses
from chunkllama_server.config.settings import Settings
from chunkllama_server.config.tenants import TenantQuotas, engine_message
from chunkllama_server.metrics.kv_events import publish_kv_events
from chunkllama_server.metrics.tracing import make_tracing
from chunkllama_server.process.adapters import load_adapters
from chunkllama_server.process.engines import watch_cluster
from chunkllama_server.process.lifecycle import DrainingServer, notify_supervisor
from chunkllama_server.process.public_prefixes import register_public_prefixes
from chunkllama_server.process.reload import Reloader
from chunkllama_server.process.snapshots import open_snapshots
from chunkllama_server.process.text_files import TextFiles
from chunkllama_server.transport.access_log import AccessLog
from chunkllama_server.transport.auth import Tenants
from chunkllama_server.transport.connections import (
    HttpLimits,
    fit_to_descriptors,
    http_limits,
    limit_accept_log,
)
from chunkllama_server.transport.host_check import is_loopback
from chunkllama_server.transport.http_protocol import counting_listener, make_protocol
from chunkllama_server.transport.paths import add_routes

if TYPE_CHECKING:
    from chunkllama_server.process.engines import ServedEngine

logger = init_logger(__name__)

# What is left after the drain limit: error events to write and connections to close.
_GRACE_SECONDS = 5
_BACKLOG = 2048
# Of the admin port, ordinary and as many reserved ones, independent of the main port.
_ADMIN_CONNECTIONS = 32


class Application:
    """Everything but the engine, ready before it.

    Args:
        read_settings: reads ``settings`` again, at SIGHUP.
        keys: tenant name to API key.
        quotas: of each tenant.
        secret: of ``namespace_secret_file``, None without one.
        files: the model's tokenizer and template, and the public prefixes.
        path: the model's folder.
        spec: the model's numbers.

    Raises:
        ConfigError: a key or an address cannot be used.
    """

    def __init__(
        self,
        settings: Settings,
        read_settings: Callable[[], Settings],
        keys: dict[str, str],
        quotas: dict[str, TenantQuotas],
        secret: bytes | None,
        files: TextFiles,
        path: Path,
        spec: ModelSpec,
    ) -> None:
        self._settings = settings
        self._read_settings = read_settings
        self._responses = _valkey_responses(settings)
        self._snapshots = open_snapshots(settings, secret)
        if secret is None:
            secret = self._snapshots.secret if self._snapshots else secrets.token_bytes(32)
        self._tenants = Tenants(
            keys,
            settings.isolation,
            secret,
            operator_keys=tuple(key.get_secret_value() for key in settings.operator_key),
        )
        self._tenants.set_quotas(quotas)
        self._quotas = quotas
        self._spec = spec
        self._weights_digest = partial(hash_weights, path, spec)
        self._tokenizer = files.tokenizer
        self._template = files.template
        self._prefixes = files.prefixes
        self._tracing = None
        if settings.otlp_endpoint is not None:
            self._tracing = make_tracing(settings.otlp_endpoint, settings.model_names[0])
        self._check_grammar = self._read_vocabulary()

    async def serve(
        self,
        engine: ServedEngine,
        main: socket.socket,
        admin: socket.socket | None,
        started: float,
    ) -> int:
        """Answer requests until a signal; returns the process's exit code.

        Args:
            main, admin: bound sockets.
            started: monotonic time at which the process began.

        Raises:
            ConfigError: a public prefix does not fit, or another server took the port.
        """
        if self._responses is not None:
            await self._responses.check()
        if self._quotas:
            engine.set_tenants(engine_message(self._quotas))
        await load_adapters(engine, self._settings)
        await register_public_prefixes(engine, self._prefixes)
        text = TextService(
            self._tokenizer,
            self._template,
            make_template=lambda source: ChatTemplate(
                source, self._tokenizer, REQUEST_RENDER_SECONDS
            ),
            limits=self._settings,
        )
        settings = self._settings
        app = create_app(
            engine,
            text,
            settings,
            self._tenants,
            GrammarChecker(lambda: self._check_grammar, settings),
            generation_defaults=(
                self._spec.default_sampling if settings.generation_config == "auto" else None
            ),
            tracing=self._tracing,
            responses=self._responses,
            weights_digest=self._weights_digest,
        )
        add_routes(app, dashboard.router)
        admin_app = create_admin_app(app.state.context)
        limits = _limits(settings)
        config = _uvicorn_config(settings, app, limits)
        server = DrainingServer(config, engine, settings.drain_seconds)
        engine.on_death = server.engine_died
        engine.on_restarting = server.engine_restarting
        context: ServerContext = app.state.context
        context.fork_tokens = self._spec.fork_tokens
        context.metrics.engine.supervisor = engine
        if settings.cluster is not None:
            watch_cluster(context, engine)
        context.packs.load_all(engine)
        if self._snapshots is not None:
            digest = self._template.digest if self._template else ""
            self._snapshots.begin(engine, self._tenants, digest)
        engine.on_stats = partial(_record, context)
        engine.max_backlog = settings.max_stream_backlog
        info = engine.info
        logger.info(
            "%s on %s (%s backend), %d chunks of %d tokens, context %d",
            settings.model_names[0],
            info.device,
            f"{info.backend} {info.isa_level}".strip(),
            info.num_chunks,
            info.chunk_size,
            info.max_model_len,
        )
        if info.max_request_tokens < info.max_model_len:
            logger.warning(
                "the K/V pool holds %d tokens, less than the context of %d: longer requests are "
                "refused; raise num_chunks or lower max_model_len",
                info.num_chunks * info.chunk_size,
                info.max_model_len,
            )
        scheme = "https" if settings.ssl_certfile else "http"
        host, port = main.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        freeze_heap()
        _listen(main, "port")
        elapsed = time.monotonic() - started
        logger.info("ready at %s://%s:%d after %.1f s", scheme, host, port, elapsed)
        reloading = Reloader(
            settings,
            self._read_settings,
            self._tenants,
            self._template,
            engine,
            context.metrics.registry,
        ).start()
        limit_accept_log(asyncio.get_running_loop())
        notify_supervisor("READY=1")
        async with (
            publish_kv_events(settings, engine),
            _admin_server(settings, admin_app, admin, limits),
        ):
            await server.serve(sockets=[counting_listener(main, config)])
            engine.cache_watchers.close(EngineDeadError("the server is stopping"))
            if self._snapshots is not None and not server.force_exit:
                await self._snapshots.end(engine)
        reloading.cancel()
        notify_supervisor("STOPPING=1")
        logger.info("stopped")
        return server.exit_code

    def _read_vocabulary(self) -> Callable[[GrammarSpec], None]:
        """Return what compiles grammars as the engine will, over the same vocabulary.

        Reading it holds the interpreter for up to a second, so that no request may begin it.
        """
        try:
            compiler = GrammarCompiler(
                self._tokenizer.to_json(), self._spec.vocab_size, list(self._spec.eos_token_ids)
            )
        except InvalidRequestError as error:  # what asks for a grammar is refused with it
            return partial(_refuse, error)
        return compiler.check


def _valkey_responses(settings: Settings) -> ValkeyResponses | None:
    if settings.response_store is None:
        return None
    return ValkeyResponses(
        settings.response_store.get_secret_value(),
        settings.response_store_bytes,
        settings.response_store_seconds,
    )


def _refuse(error: InvalidRequestError, _: GrammarSpec) -> None:
    raise InvalidRequestError(error.message, error.param, error.code)


def _listen(sock: socket.socket, key: str) -> None:
    """Open the port; only a server that was starting at the same time can have taken it."""
    try:
        sock.listen(_BACKLOG)
    except OSError as error:
        flag = key.replace("_", "-")
        raise ConfigError(
            f"{key}: {error.strerror}: another server has just taken it; choose another --{flag}"
        ) from None


def _limits(settings: Settings) -> HttpLimits:
    """Limits of the main port; descriptors are left for the admin port's connections."""
    has_admin = settings.admin_port is not None
    return fit_to_descriptors(http_limits(settings), 2 * _ADMIN_CONNECTIONS if has_admin else 0)


def _uvicorn_config(settings: Settings, app: FastAPI, limits: HttpLimits) -> uvicorn.Config:
    return uvicorn.Config(
        AccessLog(app),
        http=make_protocol(limits, settings.root_path),
        backlog=_BACKLOG,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=settings.keep_alive_seconds,
        timeout_graceful_shutdown=_GRACE_SECONDS,
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
    )


def _record(context: ServerContext, stats: EngineStats) -> None:
    context.metrics.engine.update(stats)
    context.history.add(stats)


@contextlib.asynccontextmanager
async def _admin_server(
    settings: Settings, app: FastAPI, sock: socket.socket | None, limits: HttpLimits
) -> AsyncIterator[None]:
    """Serve metrics, health and the cache's administration on a port of their own, if asked for."""
    if sock is None:
        yield
        return
    _listen(sock, "admin_port")
    host, port = sock.getsockname()[:2]
    logger.info("the admin port is %s", f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    if not is_loopback(settings.admin_host) and not settings.operator_key:
        logger.warning(
            "the admin port refuses all changes on %s: operator_key is not set", settings.admin_host
        )
    limits = replace(
        limits,
        max_connections=_ADMIN_CONNECTIONS,
        max_peer_connections=_ADMIN_CONNECTIONS,
        reserved_connections=_ADMIN_CONNECTIONS,
    )
    config = _uvicorn_config(settings, app, limits)
    server = uvicorn.Server(config)
    # Signals are the main server's; this one ends with it.
    task = asyncio.create_task(server._serve([counting_listener(sock, config)]))
    try:
        yield
    finally:
        server.should_exit = True
        await task
