"""``chunkllama serve``: check everything that is cheap, start the engine, answer HTTP, drain, stop.

The order makes failures quick and quiet: settings, socket, model files and text come before the
engine process, and so before any weight is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from chunkllama.engine.grammar import GrammarCompiler
from chunkllama.engine.process import ProcessEngineClient
from chunkllama.errors import ConfigError
from chunkllama.logger import configure_logging, init_logger
from chunkllama.models.checkpoint import Checkpoint
from chunkllama.models.registry import resolve_model
from chunkllama.models.spec import ModelSpec, read_spec
from chunkllama.sampling_params import GrammarSpec
from chunkllama.text.chat_template import ChatTemplate, load_chat_template
from chunkllama.text.tokenizer import Tokenizer, load_tokenizer
from server.access_log import AccessLog
from server.app import create_app
from server.config import Settings
from server.http_protocol import HttpLimits, make_protocol
from server.lifecycle import DrainingServer, notify_supervisor
from server.public_prefixes import load_public_prefixes, register_public_prefixes
from server.routes import dashboard, health
from server.settings import ApiSettings
from server.text_service import TextService

logger = init_logger(__name__)

# What is left after the drain limit: error events to write and connections to close.
_GRACE_SECONDS = 5


@dataclass(frozen=True)
class Model:
    """A model's folder, checked as far as its files tell without reading weights."""

    path: Path
    spec: ModelSpec
    tokenizer: Tokenizer
    template: ChatTemplate | None


def serve_forever(settings: Settings) -> int:
    """Serve until a signal; returns the process's exit code.

    Raises:
        ConfigError: anything that keeps the server from starting; one line names the fix.
    """
    started = time.monotonic()
    configure_logging(settings.log_level, settings.log_format)
    keys = settings.keys_by_tenant()
    check_tls(settings)
    with contextlib.ExitStack() as sockets:
        main = sockets.enter_context(bind(settings.host, settings.port, "port"))
        admin = None
        if settings.admin_port is not None:
            admin = sockets.enter_context(bind(settings.host, settings.admin_port, "admin_port"))
        model = load_model_files(settings)
        api = api_settings(settings, keys, model)
        return asyncio.run(_serve(settings, api, model, main, admin, started))


def bind(host: str, port: int, key: str) -> socket.socket:
    """A bound socket, not yet listening: the port is ours, and nobody is kept waiting on it.

    Raises:
        ConfigError: the port is taken or privileged, or the host is not of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"host: {host} cannot be resolved: {error}") from None
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
    except OSError as error:
        sock.close()
        flag = key.replace("_", "-")
        raise ConfigError(
            f"{key}: cannot listen on {host}:{port}: {error.strerror}; choose another --{flag}"
        ) from None
    return sock


def check_tls(settings: Settings) -> None:
    """Load the certificate as uvicorn will.

    Raises:
        ConfigError: a file is missing or the two do not belong together.
    """
    if settings.ssl_certfile is None:
        return
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
            settings.ssl_certfile, settings.ssl_keyfile
        )
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"ssl_certfile, ssl_keyfile: cannot be used: {error}") from None


def load_model_files(settings: Settings) -> Model:
    """Fetch the model if need be and check every file of it but the weights' values.

    Raises:
        ConfigError: a file is missing, damaged, of the wrong shape, or of another model.
    """
    path = resolve_model(settings.model)
    spec = read_spec(path)
    Checkpoint(path, spec)
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > spec.vocab_size:
        raise ConfigError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens and the model "
            f"{spec.vocab_size}; they are not of the same model"
        )
    template = load_chat_template(path, tokenizer, settings.chat_template)
    return Model(path, spec, tokenizer, template)


def api_settings(settings: Settings, keys: dict[str, str], model: Model) -> ApiSettings:
    """The HTTP application's part of the settings."""
    use_defaults = settings.generation_config == "auto"
    own_name = settings.model.rstrip("/").rpartition("/")[2].removesuffix(".gguf")
    return ApiSettings(
        served_model_names=settings.served_model_name or (own_name,),
        api_keys=keys,
        isolation=settings.isolation,
        strict=settings.strict,
        root_path=settings.root_path,
        cors_origins=settings.cors_origins,
        generation_defaults=model.spec.default_sampling if use_defaults else {},
        max_body_bytes=settings.max_body_bytes,
        trust_request_chat_template=settings.trust_request_chat_template,
        chat_template_kwargs=settings.chat_template_kwargs,
        tool_call_parser=settings.tool_call_parser,
        embedding_pooling=settings.embedding_pooling,
        store_max_items=settings.response_store_items,
        store_max_bytes=settings.response_store_bytes,
        store_ttl_seconds=settings.response_store_seconds,
        stream_stall_seconds=settings.stream_stall_seconds,
        expose_metrics=settings.admin_port is None,
    )


async def _serve(
    settings: Settings,
    api: ApiSettings,
    model: Model,
    main: socket.socket,
    admin: socket.socket | None,
    started: float,
) -> int:
    prefixes = load_public_prefixes(settings.public_prefixes, model.template)
    logger.info("loading %s", model.path)
    async with _engine(settings) as engine:
        await register_public_prefixes(engine, prefixes)
        text = TextService(
            model.tokenizer,
            model.template,
            make_template=lambda source: ChatTemplate(source, model.tokenizer),
        )
        app = create_app(engine, text, api, load_grammars=lambda: _grammar_check(model))
        app.include_router(dashboard.router)
        server = DrainingServer(_uvicorn_config(settings, app), engine, settings.drain_seconds)
        engine.on_death = server.engine_died
        info = engine.info
        scheme = "https" if settings.ssl_certfile else "http"
        host, port = main.getsockname()[:2]
        logger.info(
            "%s on %s (%s ops), %d chunks of %d tokens, context %d",
            api.served_model_names[0],
            info.device,
            info.op_set,
            info.num_chunks,
            info.chunk_size,
            info.max_model_len,
        )
        elapsed = time.monotonic() - started
        logger.info("ready at %s://%s:%d after %.1f s", scheme, host, port, elapsed)
        _listen(main, "port")
        notify_supervisor("READY=1")
        async with _admin_server(settings, app, admin):
            await server.serve(sockets=[main])
        notify_supervisor("STOPPING=1")
    logger.info("stopped")
    return server.exit_code


def _grammar_check(model: Model) -> Callable[[GrammarSpec], None]:
    """Compiles grammars as the engine will, over the same vocabulary."""
    compiler = GrammarCompiler(
        model.tokenizer.to_json(), model.spec.vocab_size, list(model.spec.eos_token_ids)
    )
    return compiler.check


def _listen(sock: socket.socket, key: str) -> None:
    """Open the port; only a server that was starting at the same time can have taken it."""
    try:
        sock.listen(2048)
    except OSError as error:
        raise ConfigError(f"{key}: {error.strerror}; another server has just taken it") from None


@contextlib.asynccontextmanager
async def _engine(settings: Settings) -> AsyncIterator[ProcessEngineClient]:
    engine = await ProcessEngineClient.start(settings.engine())
    try:
        yield engine
    finally:
        await engine.close()


def _uvicorn_config(settings: Settings, app: FastAPI) -> uvicorn.Config:
    return uvicorn.Config(
        AccessLog(app),
        http=make_protocol(HttpLimits()),
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


@contextlib.asynccontextmanager
async def _admin_server(
    settings: Settings, app: FastAPI, sock: socket.socket | None
) -> AsyncIterator[None]:
    """Metrics and health on a port of their own while the block runs, if one is asked for."""
    if sock is None:
        yield
        return
    admin = FastAPI(title="ChunkLlama admin", docs_url=None, redoc_url=None, openapi_url=None)
    admin.state.context = app.state.context
    admin.include_router(health.router)
    admin.include_router(health.metrics_router)
    _listen(sock, "admin_port")
    server = uvicorn.Server(_uvicorn_config(settings, admin))
    # Signals are the main server's; this one ends with it.
    task = asyncio.create_task(server._serve([sock]))
    try:
        yield
    finally:
        server.should_exit = True
        await task
