"""Build the HTTP application from its parts; nothing is global."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Protocol

from fastapi import FastAPI
from prometheus_client import Gauge
from starlette.middleware.cors import CORSMiddleware

from chunkllama import __version__
from chunkllama.engine.client import EngineClient
from chunkllama.engine.commands import TuningClient
from chunkllama.logger import init_logger
from chunkllama_server.api import (
    adapters,
    cache,
    divergence,
    docs_page,
    embeddings,
    health,
    live_requests,
    models,
    serving_info,
    tokenize,
    unsupported,
    usage,
)
from chunkllama_server.api.anthropic import routes as anthropic
from chunkllama_server.api.batch import routes as batch
from chunkllama_server.api.batch.runner import BatchRunner
from chunkllama_server.api.batch.store import FileStore
from chunkllama_server.api.batch.turns import Reply
from chunkllama_server.api.chat import routes as chat
from chunkllama_server.api.common.admission import ChargedEngine, QueueLimits
from chunkllama_server.api.common.background import BackgroundResponses
from chunkllama_server.api.common.context import ServerContext
from chunkllama_server.api.common.idle_prefill import IdlePrefill
from chunkllama_server.api.common.pack_folder import PackFolder
from chunkllama_server.api.common.response_store import ResponseStore
from chunkllama_server.api.common.responses import LocalResponses, ResponseBackend, Responses
from chunkllama_server.api.common.structured_outputs import GrammarChecker
from chunkllama_server.api.common.text_service import TextService
from chunkllama_server.api.completions import routes as completions
from chunkllama_server.api.ollama import routes as ollama
from chunkllama_server.api.openapi import install_openapi
from chunkllama_server.api.responses import routes as responses_api
from chunkllama_server.api.tgi import routes as tgi
from chunkllama_server.api.tuning import routes as tuning
from chunkllama_server.api.tuning.examples import ExampleReader, FileLimits
from chunkllama_server.api.tuning.runner import TuningRunner
from chunkllama_server.config.settings import Settings
from chunkllama_server.metrics.loop_lag import LoopLag
from chunkllama_server.metrics.server_metrics import ServerMetrics
from chunkllama_server.metrics.tracing import Tracing, TracingMiddleware
from chunkllama_server.transport.auth import AuthMiddleware, Tenants
from chunkllama_server.transport.body import BodyLimitMiddleware
from chunkllama_server.transport.errors import install_error_handlers
from chunkllama_server.transport.full_queue import FullQueueMiddleware
from chunkllama_server.transport.host_check import HostCheckMiddleware, is_loopback
from chunkllama_server.transport.internal import call_route
from chunkllama_server.transport.paths import MethodMiddleware, PathMiddleware, add_routes
from chunkllama_server.transport.request_context import RequestInfoMiddleware

logger = init_logger(__name__)

# Routes of other servers' protocols, which the setting turns off.
PROTOCOLS = {"anthropic": anthropic.router, "ollama": ollama.router, "tgi": tgi.router}
GAP_TOKENS = 1024  # prompt tokens that may wait when a batch's next line is begun
QUIET_SECONDS = 10.0  # after the last other request, until lines may take most of the engine
FEW_LINES = 16  # until then, a line for each so many places of the running batch
WAITING_POOLS = 64  # chunks that may be waited for, in sizes of the pool, unless set
DESCRIPTION = (
    "OpenAI-compatible API of ChunkLlama. Errors are OpenAI error bodies; unknown fields are "
    "ignored and named in x-chunkllama-ignored-fields, or refused in strict mode."
)


class AppEngine(EngineClient, TuningClient, Protocol):
    """An engine that answers requests and trains."""


def create_app(  # noqa: PLR0913
    engine: AppEngine,
    text: TextService,
    settings: Settings,
    tenants: Tenants,
    grammars: GrammarChecker,
    *,
    generation_defaults: Mapping[str, Any] | None = None,
    tracing: Tracing | None = None,
    responses: ResponseBackend | None = None,
    weights_digest: Callable[[Callable[[], None]], str] = lambda _: "",
) -> FastAPI:
    """Build the HTTP application over an engine that is ready.

    Args:
        engine: runs the requests; the caller closes it after serving.
        text: tokenizer and chat template.
        settings: names and limits.
        tenants: API keys and cache namespaces.
        grammars: compiles a request's grammar before the engine does.
        generation_defaults: the model's own sampling values, for fields a client leaves out.
        tracing: makes a span for each request; closed with the application.
        responses: stores responses; closed with the application. None: this process does.
        weights_digest: of the model that the engine serves; called in a thread with a function
            that it calls often and that may raise.
    """
    charged = ChargedEngine(
        engine,
        settings.max_num_seqs * settings.max_engines,
        settings.max_waiting * settings.max_engines,
        _queue_limits(settings, engine),
        lambda tenant: tenants.quotas(tenant).queue_share,
        lambda tenant: tenants.quotas(tenant).max_queued_requests is not None,
    )
    if settings.idle_prefill:
        charged.idle = IdlePrefill(engine, lambda: charged.num_sequences == 0)
    context = ServerContext(
        engine=charged,
        idle=charged.idle,
        text=text,
        settings=settings,
        metrics=ServerMetrics(
            tenant_labels=settings.metrics_tenants if tenants.keys else None,
            vllm_model=settings.model_names[0] if settings.metrics_compat else None,
            recent_prompt_tokens=settings.recent_prompt_tokens,
        ),
        grammars=grammars,
        responses=Responses(responses or _local_responses(settings)),
        background=BackgroundResponses(settings.background_responses, lambda: len(tenants.keys)),
        tenants=tenants,
        packs=PackFolder(settings, tenants, text.template.digest if text.template else ""),
        generation_defaults=generation_defaults or {},
    )
    context.metrics.begin_at_zero(tenants.keys)
    engine_queue = context.engine
    assert isinstance(engine_queue, ChargedEngine)
    text.share = lambda tenant: tenants.quotas(tenant).tokenizer_share or 1.0
    text.is_busy = lambda: charged.num_sequences > 0
    context.metrics.describe(settings.model_names[0], engine.info, __version__)
    lag = LoopLag(context.metrics.registry)
    Gauge(
        "chunkllama_overdue_grammars",
        "Grammars whose compilation takes longer than grammar_seconds and continues.",
        registry=context.metrics.registry,
    ).set_function(grammars.num_overdue)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        lag.start(asyncio.get_running_loop())
        jobs = [each for each in (context.batches, context.tunings) if each is not None]
        for runner in jobs:
            await runner.resume()
        yield
        lag.stop()
        for runner in reversed(jobs):
            await runner.close()
        await context.background.close()
        await context.responses.close()
        if context.idle is not None:
            await context.idle.close()
        context.grammars.close()
        text.close()
        if tracing is not None:
            await tracing.close()

    app = FastAPI(
        title="ChunkLlama",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's own pages load their scripts from the internet
        redoc_url=None,
        openapi_url=None,  # built on the event loop; see install_openapi
        redirect_slashes=False,
    )
    app.state.context = context
    context.batches = _batch_runner(app, engine_queue, settings, tenants)
    context.tunings = _tuning_runner(
        context.batches, engine, text, settings, tenants, weights_digest
    )
    for protocol, router in PROTOCOLS.items():
        if protocol in settings.protocols:
            add_routes(app, router)
    for family in (
        chat,
        completions,
        responses_api,
        embeddings,
        tokenize,
        batch,
        tuning,
        unsupported,
        cache,
        models,
        serving_info,
        adapters,
        usage,
        divergence,
        live_requests,
        docs_page,
        health,
    ):
        add_routes(app, family.router)
    if settings.admin_port is None:
        add_routes(app, health.metrics_router)
    install_error_handlers(app)
    install_openapi(app, settings.root_path, keyed="all" if tenants.keys else "nothing")
    context.metrics.tracing = tracing
    _add_middleware(app, context)
    if tenants.are_isolated:
        logger.info(
            "cache isolation is on: tenants share only public prefixes; "
            "--isolation off shares all prefixes between keys"
        )
    return app


def _local_responses(settings: Settings) -> LocalResponses:
    return LocalResponses(
        ResponseStore(
            settings.response_store_items,
            settings.response_store_bytes,
            settings.response_store_seconds,
        )
    )


def _batch_runner(
    app: FastAPI, engine: ChargedEngine, settings: Settings, tenants: Tenants
) -> BatchRunner | None:
    """The runner of batch jobs; None where they are turned off."""
    if not settings.batches:
        return None
    settings.take_over_files()

    def budget(tenant: str) -> int:
        own = tenants.quotas(tenant).file_bytes
        return settings.file_bytes if own is None else own

    async def call(
        tenant: str,
        path: str,
        body: dict[str, Any],
        request_id: str,
        on_queued: Callable[[], None],
    ) -> Reply:
        return Reply(*await call_route(app, tenant, path, body, request_id, on_queued))

    most = settings.max_batch_lines(settings.max_num_seqs)
    few = min(most, max(settings.max_num_seqs // FEW_LINES, 1))
    return BatchRunner(
        FileStore(settings.files_folder, budget, settings.file_seconds),
        call,
        lambda: engine.has_gap(GAP_TOKENS),
        tenants.has_key,
        lambda: most if engine.is_quiet(QUIET_SECONDS) else few,
        settings.batch_lines,
        settings,
    )


def _tuning_runner(
    batches: BatchRunner | None,
    engine: AppEngine,
    text: TextService,
    settings: Settings,
    tenants: Tenants,
    weights_digest: Callable[[Callable[[], None]], str],
) -> TuningRunner | None:
    """The runner of fine-tuning jobs; None where they are turned off, or nothing trains them."""
    if batches is None or not settings.finetune or settings.cluster is not None:
        return None
    if settings.tensor_parallel_size > 1:  # training has one rank
        return None
    if settings.load_format == "dummy":  # there are no weights to train an adapter of
        return None
    reader = ExampleReader(
        text.template,
        frozenset(engine.info.eos_token_ids),
        engine.info.max_model_len,
        FileLimits(settings.finetune_lines, settings.finetune_answers, settings.finetune_tokens),
        settings,
    )
    return TuningRunner(
        batches.store, engine, reader.read, settings, tenants.has_key, weights_digest
    )


def _queue_limits(settings: Settings, engine: EngineClient) -> QueueLimits:
    chunks = settings.max_waiting_chunks
    engines = settings.max_engines
    return QueueLimits(
        tokens=engines * settings.max_waiting_tokens,
        chunks=engines * (WAITING_POOLS * engine.info.num_chunks if chunks is None else chunks),
        chunk_size=engine.info.chunk_size,
        questions=settings.max_explanations,
        queue_seconds=settings.queue_timeout_seconds,
        request_seconds=settings.request_timeout_seconds,
    )


def _add_middleware(app: FastAPI, context: ServerContext) -> None:
    """Add, from the innermost on: methods, body limit, queue, paths, keys, CORS, ids, traces."""
    settings = context.settings
    app.add_middleware(MethodMiddleware, routes=app.routes)
    app.add_middleware(BodyLimitMiddleware, settings=settings)
    assert isinstance(context.engine, ChargedEngine)
    app.add_middleware(
        FullQueueMiddleware,
        root_path=settings.root_path,
        check=context.engine.check_places,
        on_rejection=context.metrics.reject_tenant,
    )
    # Inside the key check: only the exact spellings of open paths are open.
    app.add_middleware(PathMiddleware, root_path=settings.root_path)
    app.add_middleware(
        AuthMiddleware,
        tenants=context.tenants,
        root_path=settings.root_path,
        on_rejection=context.metrics.reject_tenant,
    )
    if is_loopback(settings.host):
        app.add_middleware(HostCheckMiddleware, names=settings.allowed_hosts)
    if settings.cors_origins:
        # Outside the key check, because a browser's preflight request carries no key.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    app.add_middleware(
        RequestInfoMiddleware, root_path=settings.root_path, on_refusal=context.metrics.reject
    )
    if context.metrics.tracing is not None:
        app.add_middleware(TracingMiddleware, tracing=context.metrics.tracing)
