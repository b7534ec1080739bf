"""Serve /admin/cache on the admin port: pins, chunks by tenant, dropping either, and events."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.responses import Response

from chunkllama.cache_messages import CacheEvent, CacheEvents, ChunkStored, OwnedNode
from chunkllama.messages import CommandReply, EngineRequest
from chunkllama.sampling_params import SamplingParams
from chunkllama_server.api.chat.prompt_body import body_token_ids
from chunkllama_server.api.common.context import Context, ServerContext
from chunkllama_server.api.common.prompt_cache import ttl_seconds
from chunkllama_server.api.common.sampling import check_lengths, check_prompt_ids
from chunkllama_server.api.openapi import refusals
from chunkllama_server.api.schema.cache import Dropped, PinAnswer, PinRequest, TenantTree
from chunkllama_server.transport.body import JsonRoute
from chunkllama_server.transport.errors import ApiError, not_found_model
from chunkllama_server.transport.request_context import RequestInfo
from chunkllama_server.transport.sse import sse

router = APIRouter(
    prefix="/admin/cache",
    route_class=JsonRoute,
    tags=["administration"],
    responses=refusals(400, 401, 403, 404, 405, 409, 503),
)

MAX_NODES = 10_000  # of one answer
EVENTS_PER_WRITE = 256


@router.get("/pins")
async def pins(context: Context) -> Response:
    """List the pins; ``chunk_id`` and ``tenant`` name one."""
    reply = await context.engine.cache_command("pins")
    ordered = sorted(reply.pins, key=lambda pin: (pin.tenant, pin.chunk_id))
    return _json({"object": "list", "data": ordered})


@router.post("/pins")
async def add_pin(body: PinRequest, context: Context) -> PinAnswer:
    """Compute a prompt in a tenant's namespace and pin it; an empty tenant makes it public."""
    tenant = _check_tenant(context, body.tenant or "")
    info = RequestInfo(request_id=f"admin-{uuid.uuid4().hex}", started=time.monotonic())
    ids = await body_token_ids(body, context, info)
    adapter = context.adapter_of(body.model) if body.model else ""
    if adapter is None:
        raise not_found_model(body.model or "")
    param = "prompt" if body.messages is None else "messages"
    check_prompt_ids(ids, context.engine.info, param)
    check_lengths(len(ids), 1, context.engine.info, param, "max_tokens")
    request = EngineRequest(
        request_id=info.request_id,
        prompt_token_ids=ids,
        sampling=SamplingParams(temperature=0.0, max_tokens=1),
        namespace=context.tenants.namespace(tenant, body.cache_salt) if tenant else "",
        tenant=tenant,
        pin_seconds=ttl_seconds(body.ttl, "ttl"),
        adapter=adapter,
    )
    deltas = [delta async for delta in context.engine.generate(request)]
    if deltas[0].pin_refused:
        raise ApiError(409, "The pin would exceed the pin budget", "ttl", "over_budget")
    return {"object": "pin", "tenant": tenant, "prompt_tokens": len(ids)}


@router.delete("/pins/{chunk_id}")
async def drop_pin(chunk_id: int, context: Context, tenant: str = "") -> Dropped:
    """End the pin of a tenant on a chunk; the chunks stay cached until they are evicted."""
    reply = await context.engine.cache_command("drop_pin", chunk_id=chunk_id, tenant=tenant)
    return _dropped(reply, f"Tenant {tenant[:64]!r} has no pin on chunk {chunk_id}")


@router.delete("/branches/{chunk_id}")
async def drop_branch(chunk_id: int, context: Context) -> Dropped:
    """Remove a chunk and all below it from the tree, apart from those in use; ends pins there."""
    reply = await context.engine.cache_command("drop_branch", chunk_id=chunk_id)
    return _dropped(reply, f"Chunk {chunk_id} is not in the tree")


@router.delete("/tenants/{tenant:path}")
async def drop_tenant(tenant: str, context: Context) -> Dropped:
    """Remove every chunk that a tenant has added, apart from those in use."""
    reply = await context.engine.cache_command("drop_tenant", tenant=tenant)
    return _dropped(reply, f"Tenant {tenant[:64]!r} has no chunk in the tree")


@router.get("/tree")
async def tree(context: Context, tenant: str | None = None) -> Response:
    """Count the chunks of each tenant; with ``tenant``, also list that tenant's chunks."""
    nodes = (await context.engine.cache_command("tree")).tree
    by_tenant: dict[str, list[OwnedNode]] = defaultdict(list)
    for node in nodes:
        by_tenant[node.tenant].append(node)
    body: dict[str, Any] = {
        "object": "cache_tree",
        "tenants": [_count(name, by_tenant[name]) for name in sorted(by_tenant)],
    }
    if tenant is not None:
        own = sorted(by_tenant[tenant], key=lambda node: node.depth)
        body |= {"nodes": own[:MAX_NODES], "hidden_nodes": max(len(own) - MAX_NODES, 0)}
    return _json(body)


@router.get("/events")
async def events(context: Context) -> Response:
    """Stream an event for each whole chunk that is stored now, then for each change.

    Raises:
        ApiError: 503 when the engine has ended for good.
    """
    batches = context.engine.watch_cache(context.settings.max_cache_events)
    info = RequestInfo(request_id=f"admin-{uuid.uuid4().hex}", started=time.monotonic())
    return context.stream(_event_stream(batches, context.engine.info.chunk_size), info)


async def _event_stream(
    batches: AsyncGenerator[CacheEvents, None], chunk_size: int
) -> AsyncGenerator[bytes, None]:
    async with contextlib.aclosing(batches):
        async for batch in batches:
            if batch.watch_id:
                chunks = len(batch.events)
                cleared = {"type": "cleared", "chunk_size": chunk_size, "chunks": chunks}
                yield sse(cleared, "cleared")
            for start in range(0, len(batch.events), EVENTS_PER_WRITE):
                part = batch.events[start : start + EVENTS_PER_WRITE]
                yield b"".join(map(_event, part))


def _event(event: CacheEvent) -> bytes:
    name = b"stored" if isinstance(event, ChunkStored) else b"removed"
    return b"event: " + name + b"\ndata: " + msgspec.json.encode(event) + b"\n\n"


def _count(tenant: str, nodes: list[OwnedNode]) -> TenantTree:
    return {
        "tenant": tenant,
        "chunks": len(nodes),
        "tokens": sum(node.num_tokens for node in nodes),
        "in_use": sum(node.num_sequences > 0 for node in nodes),
        "pinned": sum(node.num_pins > 0 for node in nodes),
        "public": sum(node.is_public for node in nodes),
        "deepest": max((node.depth + 1 for node in nodes), default=0),
    }


def _check_tenant(context: ServerContext, tenant: str) -> str:
    if tenant and tenant not in context.tenants.keys:
        raise ApiError(404, f"There is no tenant {tenant[:64]!r}", "tenant", "tenant_not_found")
    return tenant


def _dropped(reply: CommandReply, missing: str) -> Dropped:
    if not reply.found:
        raise ApiError(404, missing, code="not_in_cache")
    return {"object": "dropped", "chunks": reply.num_dropped, "kept": reply.num_kept}


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
