"""Serve POST /v1/chat/completions."""

from __future__ import annotations

import uuid

from fastapi import APIRouter, Request
from starlette.responses import Response

from chunkllama_server.api.chat.request import prepare_chat
from chunkllama_server.api.chat.response import ChatAnswer
from chunkllama_server.api.common.context import Context
from chunkllama_server.api.common.logprobs import LogprobFormatter
from chunkllama_server.api.dialect.route import DialectRoute
from chunkllama_server.api.openapi import answers
from chunkllama_server.api.schema.chat import ChatCompletionRequest
from chunkllama_server.api.schema.chat_response import ChatCompletion, ChatCompletionChunk
from chunkllama_server.transport.sse import unless_disconnected

router = APIRouter(route_class=DialectRoute, tags=["chat"])


@router.post(
    "/v1/chat/completions",
    response_model=None,
    responses=answers(ChatCompletion, ChatCompletionChunk),
)
async def create_chat_completion(
    body: ChatCompletionRequest, request: Request, context: Context
) -> Response:
    """Answer a conversation, whole or as server-sent events."""
    info = await context.admit(body, request)
    prepared = await prepare_chat(body, context, info)
    answer = ChatAnswer(
        body=body,
        generation=await prepared.generation(
            info,
            f"chatcmpl-{uuid.uuid4().hex}",
            {
                "prompt": "messages",
                "max_tokens": prepared.max_tokens_field,
                "beam_width": "n",
            },
        ),
        tools=prepared.tools,
        formatter=LogprobFormatter(context.text.tokenizer, bool(body.return_tokens_as_token_ids)),
        model=body.model,
        fingerprint=context.fingerprint,
        service_tier=None if body.service_tier is None else _tier_used(body.service_tier),
        prefix=prepared.prompt.continued_text if body.echo else "",
    )
    if body.stream:
        return context.stream(answer.events(), info)
    pieces = await unless_disconnected(request, answer.generation.collect())
    return await context.respond(answer.generation.num_logprobs, lambda: answer.whole(pieces))


def _tier_used(asked: str) -> str:
    return "default" if asked in ("auto", "scale") else asked
