"""The application factory: parts come in as arguments, nothing is global."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from chunkllama import __version__
from chunkllama.engine.client import EngineClient
from chunkllama.logger import init_logger
from chunkllama_server.api import embeddings, health, models, tokenize
from chunkllama_server.api.chat import routes as chat
from chunkllama_server.api.common.context import ServerContext
from chunkllama_server.api.common.response_store import ResponseStore
from chunkllama_server.api.common.structured_outputs import GrammarChecker, Validate
from chunkllama_server.api.common.text_service import TextService
from chunkllama_server.api.completions import routes as completions
from chunkllama_server.api.openapi import install_openapi
from chunkllama_server.api.responses import routes as responses
from chunkllama_server.config.api_settings import ApiSettings
from chunkllama_server.metrics.server_metrics import MAX_TENANT_LABELS, ServerMetrics
from chunkllama_server.transport.auth import AuthMiddleware
from chunkllama_server.transport.body import BodyLimitMiddleware
from chunkllama_server.transport.errors import install_error_handlers
from chunkllama_server.transport.request_context import RequestInfoMiddleware

logger = init_logger(__name__)

DESCRIPTION = (
    "OpenAI-compatible API of ChunkLlama. Errors are OpenAI error bodies; unknown fields are "
    "ignored and named in x-chunkllama-ignored-fields, or refused in strict mode."
)


def create_app(
    engine: EngineClient,
    text: TextService,
    settings: ApiSettings,
    *,
    load_grammars: Callable[[], Validate],
) -> FastAPI:
    """The HTTP application over an engine that is ready.

    Args:
        engine: where requests run; the caller closes it after serving.
        text: tokenizer and chat template.
        settings: names, keys, limits.
        load_grammars: makes the function that compiles a grammar or raises InvalidRequestError.
    """
    context = ServerContext(
        engine=engine,
        text=text,
        settings=settings,
        metrics=ServerMetrics(
            by_tenant=0 < len(settings.api_keys) <= MAX_TENANT_LABELS,
            vllm_model=settings.served_model_names[0] if settings.metrics_compat else None,
        ),
        grammars=GrammarChecker(load_grammars, settings.grammar_seconds),
        responses=ResponseStore(
            settings.store_max_items, settings.store_max_bytes, settings.store_ttl_seconds
        ),
    )
    context.metrics.describe(engine.info, __version__)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        context.grammars.close()
        text.close()

    app = FastAPI(
        title="ChunkLlama",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.context = context
    for family in (chat, completions, responses, embeddings, tokenize, models, health):
        app.include_router(family.router)
    if settings.expose_metrics:
        app.include_router(health.metrics_router)
    install_error_handlers(app)
    install_openapi(app, settings)
    _add_middleware(app, context)
    if settings.isolates_tenants:
        logger.info(
            "cache isolation is on: tenants share nothing but public prefixes; "
            "--isolation off shares all prefixes between keys"
        )
    return app


def _add_middleware(app: FastAPI, context: ServerContext) -> None:
    """From the inside out: body limit, keys, CORS, request ids."""
    settings = context.settings
    app.add_middleware(BodyLimitMiddleware, max_bytes=settings.max_body_bytes)
    app.add_middleware(AuthMiddleware, settings=settings)
    if settings.cors_origins:
        # Outside of the key check: a browser's preflight carries no key.
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
