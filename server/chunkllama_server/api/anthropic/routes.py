"""Serve POST /v1/messages and /v1/messages/count_tokens: Anthropic's Messages API."""

from __future__ import annotations

import uuid
from functools import partial

from fastapi import APIRouter, Request
from starlette.responses import Response

from chunkllama_server.api.anthropic.request import as_chat
from chunkllama_server.api.anthropic.response import ANTHROPIC_STREAM, MessageAnswer
from chunkllama_server.api.chat.request import PreparedChat, prepare_chat
from chunkllama_server.api.chat.thinking import thought_tags
from chunkllama_server.api.common.context import Context, ServerContext
from chunkllama_server.api.openapi import anthropic_answers
from chunkllama_server.api.schema.anthropic import CountTokensRequest, MessagesRequest
from chunkllama_server.api.schema.anthropic_response import (
    AnthropicEvent,
    AnthropicMessage,
    MessageTokensCount,
)
from chunkllama_server.transport.body import JsonRoute, json_response
from chunkllama_server.transport.request_context import request_info
from chunkllama_server.transport.sse import unless_disconnected

router = APIRouter(route_class=JsonRoute, tags=["anthropic"])

_INTERLEAVED = "interleaved-thinking"  # what the name of this beta begins with
_PARAM_NAMES = {"prompt": "messages", "max_tokens": "max_tokens"}


async def _prepare(
    body: CountTokensRequest, request: Request, context: ServerContext
) -> PreparedChat:
    """Check a request, translate it and tokenize its conversation.

    Raises:
        ApiError: 400 naming the field, 403, 404 or 503.
    """
    info = await context.admit(body, request)
    template = context.text.template
    able = None if template is None else template.capabilities
    tags = None if able is None else thought_tags(context.settings, able)
    translate = partial(
        as_chat,
        body,
        has_thoughts=tags is not None,
        thinks_between_tools=_INTERLEAVED in request.headers.get("anthropic-beta", ""),
    )
    translated = await context.prepare(info, translate)
    info.spelled.update(translated.spelled)
    info.name_ignored_fields(translated.ignored)
    return await prepare_chat(translated.chat, context, info)


@router.post(
    "/v1/messages",
    response_model=None,
    responses=anthropic_answers(AnthropicMessage, AnthropicEvent),
)
async def create_message(body: MessagesRequest, request: Request, context: Context) -> Response:
    """Answer a conversation, whole or as server-sent events, in Anthropic's format."""
    prepared = await _prepare(body, request, context)
    info = request_info(request.scope)
    is_clamped = prepared.fit_answer(max(body.max_tokens, 1))
    answer = MessageAnswer(
        body=body,
        generation=await prepared.stream(info, f"msg_{uuid.uuid4().hex}", _PARAM_NAMES),
        tools=prepared.tools,
        marks=prepared.prompt.marks,
        is_clamped=is_clamped,
    )
    if body.stream:
        return context.stream(answer.events(), info, ANTHROPIC_STREAM)
    return json_response(await unless_disconnected(request, answer.whole()))


@router.post(
    "/v1/messages/count_tokens",
    response_model=None,
    responses=anthropic_answers(MessageTokensCount),
)
async def count_tokens(body: CountTokensRequest, request: Request, context: Context) -> Response:
    """Count the tokens that a message's prompt would have."""
    prepared = await _prepare(body, request, context)
    counted: MessageTokensCount = {"input_tokens": len(prepared.prompt.token_ids)}
    return json_response(counted)
