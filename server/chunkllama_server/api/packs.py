"""Serve /v1/cache/packs on the admin port: packs that were loaded, and loading one more."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter
from starlette.responses import Response

from chunkllama.cache_messages import PackInfo
from chunkllama_server.api.common.context import Context, ServerContext
from chunkllama_server.api.openapi import refusals
from chunkllama_server.api.schema.cache import PackRequest
from chunkllama_server.transport.body import JsonRoute
from chunkllama_server.transport.errors import ApiError

router = APIRouter(
    route_class=JsonRoute, tags=["administration"], responses=refusals(400, 401, 403, 404, 405)
)


@router.get("/v1/cache/packs")
async def packs(context: Context) -> Response:
    """List the packs that were to be loaded, with what became of their chunks."""
    return _json({"object": "list", "data": await _infos(context)})


@router.post("/v1/cache/packs")
async def load_pack(body: PackRequest, context: Context) -> Response:
    """Begin to load a pack of the folder ``packs``, also one that was loaded before."""
    if body.name not in context.packs.names():
        raise ApiError(
            404, f"There is no pack {body.name[:64]!r} in the folder", "name", "pack_not_found"
        )
    context.packs.load(body.name, context.engine)
    named = [info for info in await _infos(context) if info.name == body.name]
    return _json({"object": "list", "data": named}, 202)


async def _infos(context: ServerContext) -> list[PackInfo]:
    return (await context.engine.cache_command("packs")).packs


def _json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
