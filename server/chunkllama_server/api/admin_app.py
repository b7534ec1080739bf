"""Build the admin port's application: metrics, dashboard, administration of cache and requests."""

from __future__ import annotations

from fastapi import FastAPI

from chunkllama import __version__
from chunkllama_server.api import (
    adapters,
    admin,
    dashboard,
    divergence,
    docs_page,
    health,
    live_requests,
    packs,
    usage,
)
from chunkllama_server.api.common.context import ServerContext
from chunkllama_server.api.openapi import install_openapi
from chunkllama_server.transport.auth import AdminAuthMiddleware
from chunkllama_server.transport.body import BodyLimitMiddleware
from chunkllama_server.transport.errors import install_error_handlers
from chunkllama_server.transport.host_check import HostCheckMiddleware, is_loopback
from chunkllama_server.transport.paths import MethodMiddleware, PathMiddleware, add_routes
from chunkllama_server.transport.request_context import RequestInfoMiddleware

DESCRIPTION = (
    "Metrics and administration of ChunkLlama. Reading needs no key; a change needs an operator's "
    "key where there is one, and else a port that only this machine reaches."
)


def create_admin_app(context: ServerContext) -> FastAPI:
    """Build the application of the admin port over the context of the main one."""
    settings = context.settings
    app = FastAPI(
        title="ChunkLlama admin",
        version=__version__,
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    app.state.context = context
    add_routes(
        app,
        health.router,
        health.metrics_router,
        usage.router,
        divergence.router,
        live_requests.router,
        live_requests.admin_router,
        dashboard.router,
        admin.router,
        adapters.router,
        packs.router,
        docs_page.router,
    )
    install_error_handlers(app)
    has_key = bool(context.tenants.operator_keys)
    install_openapi(app, "", keyed="changes" if has_key else "nothing", events=())
    # From innermost to outermost, as on the main port.
    app.add_middleware(MethodMiddleware, routes=app.routes)
    app.add_middleware(BodyLimitMiddleware, settings=settings)
    app.add_middleware(PathMiddleware, root_path="")
    is_local = is_loopback(settings.admin_host)
    app.add_middleware(AdminAuthMiddleware, tenants=context.tenants, is_local=is_local)
    if is_local:
        app.add_middleware(HostCheckMiddleware, names=settings.allowed_hosts)
    # Refusals of this port are none of the clients', which the metrics count.
    app.add_middleware(
        RequestInfoMiddleware, root_path="", on_refusal=lambda _: None, is_admin=True
    )
    return app
