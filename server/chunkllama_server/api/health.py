"""Serve liveness, readiness and metrics."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from chunkllama_server.api.common.context import Context, tenant_view
from chunkllama_server.api.openapi import refusals
from chunkllama_server.api.schema.models import Health
from chunkllama_server.transport.errors import unavailable

router = APIRouter(tags=["health"])
metrics_router = APIRouter(tags=["health"])


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


@metrics_router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}}, **refusals(401, 405)},
)
async def metrics(context: Context, request: Request) -> Response:
    """Return Prometheus metrics, with a new engine snapshot."""
    view = tenant_view(context, request)
    await context.refresh_stats(view)

    async def render() -> bytes:
        return context.metrics.render(view)

    return Response(
        await context.read("metrics", view, render),
        media_type="text/plain; version=0.0.4; charset=utf-8",
    )
