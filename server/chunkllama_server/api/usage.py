"""Serve GET /v1/usage, and /dashboard/tenants: what each tenant has used and uses now."""

from __future__ import annotations

from fastapi import APIRouter, Request

from chunkllama.messages import TenantStats
from chunkllama.tenant_limits import parse_weights
from chunkllama_server.api.common.context import Context, ServerContext, tenant_view
from chunkllama_server.api.openapi import refusals
from chunkllama_server.api.schema.tenants import (
    TenantState,
    TenantStates,
    TenantUsage,
    UsageList,
)

router = APIRouter(tags=["usage"])


@router.get("/v1/usage", responses=refusals(401, 405))
async def usage(request: Request, context: Context) -> UsageList:
    """Return the usage of the caller's tenant; of all for an operator and on the admin port."""
    view = tenant_view(context, request)
    await context.refresh_stats(view)

    async def read() -> UsageList:
        return {
            "object": "usage",
            "since": context.metrics.usage.since,
            "data": [_usage(context, name) for name in _visible(context, view)],
        }

    return await context.read("usage", view, read)


@router.get("/dashboard/tenants", responses=refusals(401, 405))
async def tenants(request: Request, context: Context) -> TenantStates:
    """Return what a dashboard of tenants shows, of the tenants that the caller may see."""
    view = tenant_view(context, request)
    await context.refresh_stats(view)

    async def read() -> TenantStates:
        recorder = context.metrics.usage
        everyone = sum(_service(recorder.engine(name)) for name in recorder.tenants())
        states = [_state(context, name, everyone) for name in _visible(context, view)]
        states.sort(key=lambda state: -state["chunks"]["pool_share"])
        return {
            "object": "tenants",
            "since": recorder.since,
            "chunks_total": context.num_chunks,
            "data": states,
        }

    return await context.read("tenants", view, read)


def _visible(context: ServerContext, view: str | None) -> list[str]:
    """Names of the tenants that the caller may see; a tenant without usage is one of them."""
    if view is not None:
        return [view]
    return sorted({*context.metrics.usage.tenants(), *(context.tenants.keys or [""])})


def _usage(context: ServerContext, tenant: str) -> TenantUsage:
    counted, engine = context.metrics.usage[tenant], context.metrics.usage.engine(tenant)
    return {
        "tenant": tenant,
        "requests": counted.requests,
        "prompt_tokens": counted.prompt_tokens,
        "cached_tokens": counted.cached_tokens,
        "output_tokens": counted.output_tokens,
        "computed_tokens": engine.computed_tokens,
        "chunk_seconds": round(engine.chunk_seconds, 3),
        "cached_chunk_seconds": round(engine.cached_chunk_seconds, 3),
        "queue_seconds": round(counted.queue_seconds, 3),
        "rejections": dict(counted.rejections),
        "quotas": context.tenants.quotas(tenant).model_dump(exclude_none=True),
    }


def _service(stats: TenantStats) -> int:
    return stats.computed_tokens + stats.decoded_tokens


def _state(context: ServerContext, tenant: str, everyone: int) -> TenantState:
    usage, engine = _usage(context, tenant), context.metrics.usage.engine(tenant)
    weight = context.tenants.quotas(tenant).weight
    if weight is None:
        weight = parse_weights(context.settings.tenant_weights).get(tenant, 1.0)
    prompt = usage["prompt_tokens"]
    in_pool = engine.chunks_used + engine.chunks_cached
    return {
        "tenant": tenant,
        "weight": weight,
        "service_share": _service(engine) / max(everyone, 1),
        "hit_rate": usage["cached_tokens"] / prompt if prompt else None,
        "requests_running": engine.requests_running,
        "requests_waiting": engine.requests_waiting,
        "queue_seconds_mean": (
            usage["queue_seconds"] / usage["requests"] if usage["requests"] else None
        ),
        "chunks": {
            "used": engine.chunks_used,
            "cached": engine.chunks_cached,
            "pinned": engine.chunks_pinned,
            "pool_share": in_pool / context.num_chunks,
        },
        "evictions": {
            "chunks": engine.evicted_chunks,
            "tokens": engine.evicted_tokens,
            "for_it": engine.evictions_for,
            "of_others_for_it": engine.evictions_of_others,
        },
        "evicted_tokens_per_prompt_token": engine.evicted_tokens / prompt if prompt else None,
        "pins_refused": engine.pins_refused,
        "usage": usage,
    }
