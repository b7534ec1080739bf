"""Serve /dashboard: a static page, and the snapshot that it draws once a second."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from importlib import resources
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, Response

from chunkllama import __version__
from chunkllama.cache_messages import TreeNodeInfo
from chunkllama.engine.client import EngineClient
from chunkllama.messages import EngineStats
from chunkllama_server.api.common.context import Context, ServerContext, tenant_view
from chunkllama_server.metrics.tenant_view import LATENCIES
from chunkllama_server.transport.errors import unavailable
from chunkllama_server.transport.request_context import request_info

router = APIRouter(include_in_schema=False)

ANSWER_SECONDS = 3.0  # a step of the engine may take longer
ENGINE_KEYS = ("device", "backend", "chunk_size")
# The page is self-contained, runs only its own script, and connects only to this server.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

# Read once: anyone may ask for it, also while no descriptor is left to open a file with.
_PAGE = (
    resources.files("chunkllama_server.api")
    .joinpath("static/dashboard.html")
    .read_text(encoding="utf-8")
)


@router.get("/dashboard")
async def page() -> HTMLResponse:
    """Return the page, which needs no key because it holds nothing secret; its data does."""
    return HTMLResponse(_PAGE, headers={"content-security-policy": _POLICY})


class SnapshotCache:
    """One snapshot of the engine's tree for all who look at it within ``seconds``.

    The step loop copies the whole tree for each snapshot, which all requests wait for.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._taken = -seconds
        self._stats: asyncio.Future[EngineStats] | None = None

    async def get(self, engine: EngineClient) -> EngineStats:
        now = time.monotonic()
        stale = self._stats is None or (self._stats.done() and now - self._taken > self._seconds)
        if self._stats is None or stale or (self._stats.done() and self._stats.exception()):
            self._taken = now
            self._stats = asyncio.ensure_future(engine.stats(include_tree=True))
        return await asyncio.shield(self._stats)


def snapshots(request: Request, seconds: float) -> SnapshotCache:
    """The application's cache, made at first use."""
    state = request.app.state
    if not hasattr(state, "snapshots"):
        state.snapshots = SnapshotCache(seconds)
    cache = state.snapshots
    assert isinstance(cache, SnapshotCache)
    return cache


@router.get("/dashboard/data")
async def data(context: Context, request: Request) -> Response:
    """Return counters, latencies and the tree's nodes that the caller may see, without tokens.

    A tenant sees its own part: no totals, no nodes of others, and no use of public nodes, which
    others read too.

    Raises:
        ApiError: 503 when the engine does not answer in time; nothing old is shown.
    """
    limits = context.settings
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            stats = await snapshots(request, limits.dashboard_seconds).get(context.engine)
    except TimeoutError:
        raise unavailable("The engine is in a long step; try again", "engine_busy") from None
    tenant = tenant_view(context, request)
    visible = visible_namespaces(context, request)

    async def encode() -> bytes:
        return _encode(context, stats, tenant, visible)

    content = await context.read("dashboard", tenant, encode)
    return Response(content, media_type="application/json")


def _encode(
    context: ServerContext, stats: EngineStats, tenant: str | None, visible: set[str] | None
) -> bytes:
    """The page's data as JSON: all of it, or a tenant's part."""
    limits = context.settings
    num_chunks = stats.chunks_total or context.num_chunks
    nodes = [n for n in stats.tree if visible is None or n.namespace in visible]
    if tenant is None:
        counters, latency = msgspec.structs.asdict(stats), _latencies(context)
        del counters["tree"]
        counters["engine_restarts"] = context.metrics.engine.supervisor.restarts
        hidden = len(stats.tree) - min(len(nodes), limits.dashboard_nodes)
    else:
        nodes = [_without_use(node) if not node.namespace else node for node in nodes]
        counters = _own_counters(context, tenant, nodes, num_chunks)
        latency = context.metrics.own.latency(tenant)
        hidden = max(len(nodes) - limits.dashboard_nodes, 0)
    body = {
        "version": __version__,
        "models": context.settings.model_names,
        # Not the model's folder: callers are tenants.
        "info": {
            **{key: getattr(context.engine.info, key) for key in ENGINE_KEYS},
            "num_chunks": num_chunks,
        },
        "view": "server" if tenant is None else "tenant",
        "stats": counters,
        "latency": latency,
        "sharing": _sharing(nodes),
        "hidden_nodes": hidden,
        "tree": sorted(nodes, key=lambda n: n.depth)[: limits.dashboard_nodes],
    }
    if tenant is None and context.replicas is not None:
        body["replicas"] = context.replicas()
        body["failovers"] = context.failovers
    return msgspec.json.encode(body)


@router.get("/dashboard/history")
async def history(context: Context, request: Request) -> Response:
    """Return the engine's last minutes for the curves; a tenant gets none, they are of all."""
    rows = context.history.rows() if tenant_view(context, request) is None else []
    return Response(msgspec.json.encode({"data": rows}), media_type="application/json")


def _sharing(nodes: list[TreeNodeInfo]) -> dict[str, int]:
    """Return the chunks in use, and how many they would be if each sequence had its own."""
    used = [node.num_sequences for node in nodes if node.num_sequences]
    return {"chunks_in_use": len(used), "chunks_without_sharing": sum(used)}


def _without_use(node: TreeNodeInfo) -> TreeNodeInfo:
    """A public node without its state, which tells what other tenants do."""
    return msgspec.structs.replace(node, num_sequences=0, state="cached")


def _own_counters(
    context: ServerContext, tenant: str, nodes: list[TreeNodeInfo], total: int
) -> dict[str, int]:
    """The counters that the page shows, of one tenant; what belongs to no tenant is 0."""
    names = (name for name in EngineStats.__struct_fields__ if name.endswith("_total"))
    states = Counter(node.state for node in nodes)
    return {
        **dict.fromkeys(names, 0),
        **context.metrics.own.counters(context.metrics.usage, tenant),
        "chunks_total": total,
        "chunks_peak": len(nodes),
        **{f"chunks_{state}": states[state] for state in ("referenced", "private", "cached")},
        "chunks_free": total - len(nodes),
    }


def visible_namespaces(context: ServerContext, request: Request) -> set[str] | None:
    """Return the namespaces that the caller may see: public and its own; None is all of them."""
    if not context.tenants.are_isolated or tenant_view(context, request) is None:
        return None
    return {"", context.tenants.namespace(request_info(request.scope).tenant, None)}


def _latencies(context: ServerContext) -> dict[str, dict[str, Any]]:
    """Return sum, count and [bound, count up to it] of each latency since the start.

    The page computes differences.
    """
    metrics = context.metrics
    found: dict[str, dict[str, Any]] = {}
    histograms = (metrics.first_token, metrics.inter_token, metrics.latency)
    for name, histogram in zip(LATENCIES, histograms, strict=True):
        (family,) = histogram.collect()
        parts: dict[str, Any] = {}
        buckets: list[tuple[float, float]] = []
        for sample in family.samples:
            kind = sample.name.rpartition("_")[2]
            if kind == "bucket" and sample.labels["le"] != "+Inf":
                buckets.append((float(sample.labels["le"]), sample.value))
            elif kind in ("sum", "count"):
                parts[kind] = sample.value
        found[name] = {**parts, "buckets": buckets}
    return found
