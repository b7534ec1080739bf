"""Serve /dashboard/requests: what waits and runs now, and ending one of them."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request

from chunkllama.logger import init_logger
from chunkllama_server.api.common.admission import ChargedEngine
from chunkllama_server.api.common.context import Context, ServerContext, tenant_view
from chunkllama_server.api.openapi import refusals
from chunkllama_server.api.schema.live import Ended, EndedTenant, LiveRequests
from chunkllama_server.transport.errors import ApiError
from chunkllama_server.transport.request_context import request_info

logger = init_logger(__name__)

router = APIRouter(tags=["usage"])
admin_router = APIRouter(tags=["administration"])

MAX_LISTED = 500


def _engine(context: ServerContext) -> ChargedEngine:
    assert isinstance(context.engine, ChargedEngine)
    return context.engine


def may_abort(context: ServerContext, request: Request) -> bool:
    """Return whether the caller may end requests that it sees: a tenant its own, an operator all.

    On the admin port, ``AdminAuthMiddleware`` has admitted the caller. On the main port an
    operator's key only reads, and without keys one client could end the requests of another.
    """
    return request_info(request.scope).is_admin or tenant_view(context, request) is not None


@router.get("/dashboard/requests", responses=refusals(401, 405))
async def live_requests(request: Request, context: Context) -> LiveRequests:
    """List the requests that wait or run, the oldest first; a tenant sees its own."""
    own = tenant_view(context, request)
    now = asyncio.get_running_loop().time()
    visible = [live for live in _engine(context).live.values() if own in (None, live.tenant)]
    visible.sort(key=lambda live: live.began)
    return {
        "object": "requests",
        "may_abort": may_abort(context, request),
        "hidden": max(len(visible) - MAX_LISTED, 0),
        "data": [
            {
                "request_id": live.request_id,
                "client_request_id": live.client_id,
                "tenant": live.tenant,
                "state": "waiting" if live.is_waiting else "running",
                "age_seconds": round(now - live.began, 3),
                "prompt_tokens": live.num_prompt_tokens,
                "choices": live.num_choices,
            }
            for live in visible[:MAX_LISTED]
        ],
    }


@router.delete("/dashboard/requests/{request_id}", responses=refusals(401, 403, 404, 405))
async def end_request(request_id: str, request: Request, context: Context) -> Ended:
    """End a request, or all of the caller's with this ``x-request-id``.

    Their clients get an error with the code ``aborted``.
    """
    if not may_abort(context, request):
        raise ApiError(
            403, "Without API keys only the admin port ends requests", code="admin_port_only"
        )
    own = tenant_view(context, request)
    engine = _engine(context)
    ended = [
        live.request_id
        for live in engine.live.values()
        if request_id in (live.request_id, live.client_id) and own in (None, live.tenant)
    ]
    if not ended:
        raise ApiError(404, f"No request {request_id[:200]!r} waits or runs", code="not_live")
    await _end(engine, ended)
    return {"object": "ended", "request_id": request_id, "count": len(ended)}


@admin_router.delete("/admin/requests", responses=refusals(400, 401, 403, 405))
async def end_requests(context: Context, tenant: str) -> EndedTenant:
    """End every request of a tenant; "" is the requests that carry no key.

    Their clients get an error with the code ``aborted``. Lines of the tenant's batches that run
    fail with it; further ones begin.
    """
    engine = _engine(context)
    ended = [live.request_id for live in engine.live.values() if live.tenant == tenant]
    await _end(engine, ended)
    return {"object": "ended", "tenant": tenant, "count": len(ended)}


async def _end(engine: ChargedEngine, names: list[str]) -> None:
    for name in names:
        await engine.end(name)
        logger.info("request %s was ended on demand", name)
