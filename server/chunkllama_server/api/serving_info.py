"""Serve /server_info, /model_info and /v1/loads: what routers ask a server for."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

from fastapi import APIRouter, Request

from chunkllama import __version__
from chunkllama.errors import EngineDeadError
from chunkllama_server.api.common.context import (
    PROBE_SECONDS,
    Context,
    ServerContext,
    tenant_view,
)
from chunkllama_server.api.openapi import refusals
from chunkllama_server.api.schema.serving_info import Load, Loads, ModelInfo, ServerInfo
from chunkllama_server.transport.errors import unavailable

router = APIRouter(tags=["models"])


def _model_name(context: ServerContext, request: Request) -> str:
    """Return the name that the caller's requests get without one; routers group servers by it."""
    view = tenant_view(context, request)
    return context.settings.model_names[0] if view is None else context.allowed_models(view)[0]


@router.get("/server_info", responses=refusals(401, 405))
async def server_info(request: Request, context: Context) -> ServerInfo:
    """Return the served model's name and the server's sizes."""
    await context.refresh_stats(tenant_view(context, request))
    info, name = context.engine.info, _model_name(context, request)
    return {
        "model_path": name,  # not the folder, which callers must not learn
        "served_model_name": name,
        "version": __version__,
        "tp_size": context.settings.tensor_parallel_size,
        "dp_size": 1,
        "pp_size": 1,
        "is_embedding": False,
        "page_size": info.chunk_size,
        "context_length": info.max_request_tokens,
        "max_total_tokens": context.num_chunks * info.chunk_size,
        "max_running_requests": context.max_running,
    }


@router.get("/model_info", responses=refusals(401, 405))
async def model_info(request: Request, context: Context) -> ModelInfo:
    """Return the served model's name and what it can do."""
    return {
        "model_path": _model_name(context, request),
        "is_generation": True,
        "has_image_understanding": False,
        "has_audio_understanding": False,
    }


@router.get("/v1/loads", responses=refusals(401, 405, 503))
async def loads(request: Request, context: Context) -> Loads:
    """Return the requests and the K/V in use: a tenant's own part, or all for an operator."""
    view = tenant_view(context, request)

    async def read() -> Load:
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                stats = await context.engine.stats(include_tenants=view is not None)
        except (TimeoutError, EngineDeadError):
            raise unavailable("The engine does not answer", "engine_unavailable") from None
        info = context.engine.info
        size, total = info.chunk_size, stats.chunks_total or info.num_chunks
        if view is None:
            running, waiting = stats.requests_running, stats.requests_waiting
            used = float(stats.chunks_referenced + stats.chunks_private)
        else:
            own = stats.tenants.get(view)
            running, waiting = (own.requests_running, own.requests_waiting) if own else (0, 0)
            used = own.chunks_used if own else 0.0
        return {
            "dp_rank": 0,
            "num_running_reqs": running,
            "num_waiting_reqs": waiting,
            "num_total_reqs": running + waiting,
            "num_used_tokens": round(used * size),
            "max_total_num_tokens": total * size,
            "max_running_requests": context.max_running,
            "token_usage": round(used / total, 4),
        }

    load = await context.read("loads", view, read)
    return {"timestamp": datetime.now(UTC).isoformat(), "version": __version__, "loads": [load]}
