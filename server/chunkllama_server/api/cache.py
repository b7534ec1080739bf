"""Serve POST /v1/cache/explain: why a prompt would not be read from the cache."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from chunkllama.errors import OverloadedError
from chunkllama_server.api.chat.prompt_body import body_token_ids
from chunkllama_server.api.common.cache_explanation import explanation_body
from chunkllama_server.api.common.context import Context
from chunkllama_server.api.common.sampling import check_lengths, check_prompt_ids
from chunkllama_server.api.openapi import answers
from chunkllama_server.api.schema.cache import ExplainRequest
from chunkllama_server.api.schema.usage import CacheExplanationBody
from chunkllama_server.transport.body import JsonRoute, json_response

router = APIRouter(route_class=JsonRoute, tags=["cache"])


@router.post("/v1/cache/explain", response_model=None, responses=answers(CacheExplanationBody))
async def explain(body: ExplainRequest, request: Request, context: Context) -> Response:
    """Say where the match of a prompt in the cache would end now, and why; nothing is generated."""
    info = await context.admit(body, request)
    ids = await body_token_ids(body, context, info)
    param = "prompt" if body.messages is None else "messages"
    check_prompt_ids(ids, context.engine.info, param)
    check_lengths(len(ids), None, context.engine.info, param, "max_tokens")
    namespace = context.tenants.namespace(info.tenant, body.cache_salt)
    try:
        explanation = await context.engine.explain(ids, namespace, info.tenant, info.adapter)
    except OverloadedError:
        context.metrics.reject_tenant(info.tenant, "queue")
        raise
    tokenizer = context.text.tokenizer
    return json_response(explanation_body(explanation, ids, tokenizer))
