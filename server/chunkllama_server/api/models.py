"""Serve GET /v1/models, /v1/models/{id} and /version."""

from __future__ import annotations

from datetime import UTC, datetime

from fastapi import APIRouter, Request
from starlette.responses import Response

from chunkllama import __version__
from chunkllama_server.api.common.context import Context, ServerContext
from chunkllama_server.api.common.model_description import describe_model
from chunkllama_server.api.openapi import refusals
from chunkllama_server.api.schema.anthropic_response import AnthropicModel, AnthropicModelList
from chunkllama_server.api.schema.models import Model, ModelList, Version
from chunkllama_server.transport.body import json_response
from chunkllama_server.transport.request_context import request_info

router = APIRouter(tags=["models"])


def anthropic_model(context: ServerContext, name: str) -> AnthropicModel:
    """Describe a model to clients of Anthropic's API, which send ``anthropic-version``."""
    most = context.engine.info.max_request_tokens
    created = datetime.fromtimestamp(context.created, UTC)
    return {
        "type": "model",
        "id": name,
        "display_name": name,
        "created_at": created.isoformat().replace("+00:00", "Z"),
        "lifecycle": "active",
        "max_input_tokens": most,
        "max_tokens": most,
    }


def _is_anthropic(request: Request, context: ServerContext) -> bool:
    return "anthropic-version" in request.headers and "anthropic" in context.settings.protocols


@router.get("/v1/models", response_model=ModelList, responses=refusals(401, 405, 503))
async def list_models(request: Request, context: Context) -> ModelList | Response:
    """List the served models and adapters that the API key may use."""
    names = context.visible_models(request_info(request.scope).tenant)
    if _is_anthropic(request, context):
        listed: AnthropicModelList = {
            "data": [anthropic_model(context, name) for name in names],
            "first_id": names[0] if names else None,
            "last_id": names[-1] if names else None,
            "has_more": False,
        }
        return json_response(listed)
    return {"object": "list", "data": [describe_model(context, name) for name in names]}


@router.get(
    "/v1/models/{model:path}", response_model=Model, responses=refusals(401, 403, 404, 405, 503)
)
async def get_model(model: str, request: Request, context: Context) -> Model | Response:
    """Return one served model; its name may contain slashes."""
    tenant = request_info(request.scope).tenant
    name = context.check_model(model, tenant)
    if _is_anthropic(request, context):
        return json_response(anthropic_model(context, name))
    return describe_model(context, name)


@router.get("/version", responses=refusals(401, 405))
async def get_version() -> Version:
    """Return the server's version."""
    return {"version": __version__}
