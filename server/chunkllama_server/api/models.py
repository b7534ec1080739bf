"""Serve GET /v1/models, /v1/models/{id} and /version."""

from __future__ import annotations

from fastapi import APIRouter, Request

from chunkllama import __version__
from chunkllama_server.api.common.context import Context, ServerContext
from chunkllama_server.api.openapi import refusals
from chunkllama_server.api.schema.models import Model, ModelList, Version
from chunkllama_server.transport.request_context import request_info

router = APIRouter(tags=["models"])


def describe_model(context: ServerContext, name: str) -> Model:
    template = context.text.template
    return {
        "id": name,
        "object": "model",
        "created": context.created,
        "owned_by": "chunkllama",
        "root": context.settings.model_names[0],  # not the folder, which callers must not learn
        "parent": None,
        "max_request_tokens": context.engine.info.max_request_tokens,
        "max_model_len": context.engine.info.max_request_tokens,
        "chat_template": None if template is None else template.capabilities.as_dict(),
    }


@router.get("/v1/models", responses=refusals(401, 405, 503))
async def list_models(request: Request, context: Context) -> ModelList:
    """List the served models that the API key may use."""
    names = context.allowed_models(request_info(request.scope).tenant)
    return {"object": "list", "data": [describe_model(context, name) for name in names]}


@router.get("/v1/models/{model:path}", responses=refusals(401, 403, 404, 405, 503))
async def get_model(model: str, request: Request, context: Context) -> Model:
    """Return one served model; its name may contain slashes."""
    tenant = request_info(request.scope).tenant
    return describe_model(context, context.check_model(model, tenant))


@router.get("/version", responses=refusals(401, 405))
async def get_version() -> Version:
    """Return the server's version."""
    return {"version": __version__}
