"""Serve liveness, readiness and metrics."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import Response

from chunkllama.errors import EngineDeadError
from chunkllama_server.api.common.context import Context, ServerContext
from chunkllama_server.api.openapi import refusals
from chunkllama_server.api.schema.models import Health
from chunkllama_server.transport.errors import unavailable
from chunkllama_server.transport.request_context import has_request_info, request_info

router = APIRouter(tags=["health"])
metrics_router = APIRouter(tags=["health"])

# A probe must answer before the timeout of the prober; Kubernetes' default is one second.
PROBE_SECONDS = 0.8


async def refresh_stats(context: ServerContext) -> None:
    """Update the engine snapshot if a new one arrives in time.

    Else the last one that the step loop sent is shown, with its age.
    """
    try:
        async with asyncio.timeout(PROBE_SECONDS):
            context.metrics.engine.update(await context.engine.stats())
    except (TimeoutError, EngineDeadError):
        return


@router.get("/health/live", responses=refusals(405))
async def live() -> Health:
    """Answer while the event loop runs; does not check the engine."""
    return {"status": "ok"}


@router.get("/health/ready", responses=refusals(405, 503))
@router.get("/health", responses=refusals(405, 503))
async def ready(context: Context) -> Health:
    """The engine takes requests: its model is loaded, it is not restarting, and nothing drains."""
    context.check_serving()
    if context.lifecycle.restarting:  # requests are accepted and wait
        raise unavailable("The engine is restarting", "engine_restarting")
    return {"status": "ok"}


def tenant_view(context: ServerContext, request: Request) -> str | None:
    """The tenant whose part the caller may see; None is all: an operator, the admin port, or a
    server without keys."""
    if not context.tenants.keys or not has_request_info(request.scope):
        return None
    info = request_info(request.scope)
    return None if info.is_operator else info.tenant


@metrics_router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}}, **refusals(401, 405)},
)
async def metrics(context: Context, request: Request) -> Response:
    """Return Prometheus metrics, with a new engine snapshot."""
    await refresh_stats(context)
    return Response(
        context.metrics.render(tenant_view(context, request)),
        media_type="text/plain; version=0.0.4; charset=utf-8",
    )
