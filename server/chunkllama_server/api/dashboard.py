"""Serve /dashboard: a static page, and the snapshot that it draws once a second."""

from __future__ import annotations

import asyncio
import time
from importlib import resources
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, Response

from chunkllama import __version__
from chunkllama.engine.client import EngineClient
from chunkllama.messages import EngineStats
from chunkllama_server.api.common.context import Context, ServerContext
from chunkllama_server.transport.errors import unavailable
from chunkllama_server.transport.request_context import request_info

router = APIRouter(include_in_schema=False)

# No screen shows more rectangles; the page says how many were left out.
MAX_NODES = 4000
SNAPSHOT_SECONDS = 0.5
ANSWER_SECONDS = 3.0  # a step of the engine may take longer
ENGINE_KEYS = ("device", "backend", "num_chunks", "chunk_size")
# The page is self-contained, runs only its own script, and connects only to this server.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@router.get("/dashboard")
async def page() -> HTMLResponse:
    """Return the page, which needs no key because it holds nothing secret; its data does."""
    text = (
        resources.files("chunkllama_server.api")
        .joinpath("static/dashboard.html")
        .read_text(encoding="utf-8")
    )
    return HTMLResponse(text, headers={"content-security-policy": _POLICY})


class SnapshotCache:
    """One snapshot of the engine's tree for all who look at it within ``seconds``.

    The step loop copies the whole tree for each snapshot, which all requests wait for.
    """

    def __init__(self, seconds: float = SNAPSHOT_SECONDS) -> None:
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


def snapshots(request: Request) -> SnapshotCache:
    """The application's cache, made at first use."""
    state = request.app.state
    if not hasattr(state, "snapshots"):
        state.snapshots = SnapshotCache()
    cache = state.snapshots
    assert isinstance(cache, SnapshotCache)
    return cache


@router.get("/dashboard/data")
async def data(context: Context, request: Request) -> Response:
    """Return counters, latencies and the tree's nodes that the caller may see, without tokens.

    Raises:
        ApiError: 503 when the engine does not answer in time; nothing old is shown.
    """
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            stats = await snapshots(request).get(context.engine)
    except TimeoutError:
        raise unavailable("The engine is in a long step; try again", "engine_busy") from None
    visible = visible_namespaces(context, request)
    nodes = [n for n in stats.tree if visible is None or n.namespace in visible]
    counters = msgspec.structs.asdict(stats)
    del counters["tree"]
    body = {
        "version": __version__,
        "models": context.settings.model_names,
        # Not the model's folder: callers are tenants.
        "info": {key: getattr(context.engine.info, key) for key in ENGINE_KEYS},
        "stats": counters,
        "latency": {
            name: mean_seconds(context, f"chunkllama_{name}_seconds")
            for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency")
        },
        "hidden_nodes": len(stats.tree) - min(len(nodes), MAX_NODES),
        "tree": sorted(nodes, key=lambda n: n.depth)[:MAX_NODES],
    }
    return Response(msgspec.json.encode(body), media_type="application/json")


def visible_namespaces(context: ServerContext, request: Request) -> set[str] | None:
    """Return the namespaces that the caller may see: public and its own; None is all of them."""
    if not context.tenants.are_isolated or request_info(request.scope).is_operator:
        return None
    return {"", context.tenants.namespace(request_info(request.scope).tenant, None)}


def mean_seconds(context: ServerContext, histogram: str) -> dict[str, Any]:
    """Return sum and count of a histogram since the start; the page computes differences."""
    registry = context.metrics.registry
    return {
        "sum": registry.get_sample_value(f"{histogram}_sum") or 0.0,
        "count": registry.get_sample_value(f"{histogram}_count") or 0.0,
    }
