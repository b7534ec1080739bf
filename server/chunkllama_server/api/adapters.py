"""Serve POST /v1/load_lora_adapter and /v1/unload_lora_adapter, for operators."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request

from chunkllama.errors import ConfigError, InvalidRequestError
from chunkllama.logger import init_logger
from chunkllama_server.api.common.context import Context, ServerContext
from chunkllama_server.api.common.model_description import describe_model
from chunkllama_server.api.openapi import answers, refusals
from chunkllama_server.api.schema.adapters import LoadAdapterRequest, UnloadAdapterRequest
from chunkllama_server.api.schema.models import Model
from chunkllama_server.transport.body import JsonRoute
from chunkllama_server.transport.errors import ApiError, invalid
from chunkllama_server.transport.host_check import is_loopback
from chunkllama_server.transport.request_context import request_info

logger = init_logger(__name__)

router = APIRouter(route_class=JsonRoute, tags=["models"])


def _check_operator(request: Request, context: ServerContext) -> None:
    """Admit operators; ``AdminAuthMiddleware`` has done so on the admin port.

    Raises:
        ApiError: 403.
    """
    info = request_info(request.scope)
    if info.is_admin or info.is_operator:
        return
    if not context.tenants.keys and is_loopback(context.settings.host):
        return
    raise ApiError(
        403, "Only an operator_key, or the admin port, may change adapters", code="operator_key"
    )


async def _admit(
    body: LoadAdapterRequest | UnloadAdapterRequest, request: Request, context: ServerContext
) -> None:
    _check_operator(request, context)
    await context.admit(body, request)


@router.post("/v1/load_lora_adapter", responses=answers(Model))
async def load_adapter(body: LoadAdapterRequest, request: Request, context: Context) -> Model:
    """Load an adapter; other requests run meanwhile. Operators alone may do so."""
    await _admit(body, request, context)
    name = body.lora_name
    if name in context.settings.model_names:
        raise invalid(f"{name!r} is the name of the model", "lora_name")
    try:
        await context.engine.load_adapter(name, str(Path(body.lora_path).absolute()))
    except ConfigError as error:
        raise invalid(str(error), "lora_path", "adapter_refused") from None
    logger.info("adapter %s loaded on demand", name)
    return describe_model(context, name)


@router.post("/v1/unload_lora_adapter", responses={**answers(Model), **refusals(409)})
async def unload_adapter(body: UnloadAdapterRequest, request: Request, context: Context) -> Model:
    """Forget an adapter that no request uses, and what is cached under it."""
    await _admit(body, request, context)
    name = body.lora_name
    missing = ApiError(404, f"There is no adapter {name!r}", "lora_name", "adapter_not_found")
    if name not in context.engine.adapters:
        raise missing
    described = describe_model(context, name)
    try:
        if not await context.engine.unload_adapter(name):
            raise missing
    except InvalidRequestError as error:
        raise ApiError(409, error.message, "lora_name", "adapter_in_use") from None
    logger.info("adapter %s unloaded on demand", name)
    return described
