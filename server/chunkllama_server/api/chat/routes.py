"""POST /v1/chat/completions."""

from __future__ import annotations

import uuid

from fastapi import APIRouter, Request
from starlette.responses import Response

from chunkllama.messages import EngineRequest
from chunkllama_server.api.chat.prompt import ChatPrompt, ChatPrompter
from chunkllama_server.api.chat.response import ChatAnswer
from chunkllama_server.api.common.context import Context, ServerContext, check_stream_options
from chunkllama_server.api.common.logprobs import LogprobFormatter
from chunkllama_server.api.common.prompt_cache import cache_plan
from chunkllama_server.api.common.request_stream import RequestStream
from chunkllama_server.api.common.sampling import (
    PRIORITY_OF_TIER,
    check_lengths,
    check_prompt_ids,
    sampling_params,
)
from chunkllama_server.api.common.structured_outputs import grammar_of
from chunkllama_server.api.openapi import answers
from chunkllama_server.api.schema.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
)
from chunkllama_server.api.tools.config import ToolConfig, plan_tools, tool_format
from chunkllama_server.transport.auth import cache_namespace
from chunkllama_server.transport.body import JsonRoute, json_response
from chunkllama_server.transport.errors import invalid
from chunkllama_server.transport.request_context import RequestInfo
from chunkllama_server.transport.sse import SseResponse, unless_disconnected

router = APIRouter(route_class=JsonRoute, tags=["chat"])


def check_chat(body: ChatCompletionRequest) -> None:
    """Fields that only make sense together, or that this server validates and then lets be.

    Raises:
        ApiError: 400 naming the field.
    """
    check_stream_options(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
    if body.modalities is not None and "audio" in body.modalities:
        raise invalid("Audio output is not supported", "modalities")
    if body.store:
        raise invalid("Chat completions are not stored; use /v1/responses", "store")
    for key, value in (body.metadata or {}).items():
        if len(key) > 64 or len(value) > 512:
            raise invalid(
                "metadata keys have up to 64 characters, values up to 512", f"metadata.{key[:64]}"
            )


def max_tokens_field(body: ChatCompletionRequest) -> str:
    """The field that limits the answer: the newer one wins."""
    return "max_completion_tokens" if body.max_completion_tokens is not None else "max_tokens"


def plan_request_tools(body: ChatCompletionRequest, context: ServerContext) -> ToolConfig:
    configured = context.settings.tool_call_parser
    return plan_tools(body, tool_format(configured, context.text.template))


async def engine_request(
    body: ChatCompletionRequest,
    context: ServerContext,
    info: RequestInfo,
    prompt: ChatPrompt,
    tools: ToolConfig,
) -> EngineRequest:
    """The request as the engine sees it.

    Raises:
        ApiError, InvalidRequestError: 400 naming the field.
    """
    engine_info = context.engine.info
    check_prompt_ids(prompt.token_ids, engine_info.vocab_size, "messages")
    param = max_tokens_field(body)
    max_tokens = getattr(body, param)
    check_lengths(len(prompt.token_ids), max_tokens, engine_info, "messages", param)
    grammar, grammar_param = grammar_of(body.response_format, body.structured_outputs)
    if tools.grammar is not None:
        if grammar is not None:
            raise invalid("A forced tool call excludes another output format", grammar_param)
        grammar, grammar_param = tools.grammar, "tools"
    if grammar is not None:
        await context.grammars.check(grammar, grammar_param)
    sampling = sampling_params(
        body,
        context.settings,
        engine_info,
        context.text.tokenizer,
        max_tokens=max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        grammar=grammar,
    )
    cache = cache_plan(
        body, context.settings, () if prompt.breakpoint is None else (prompt.breakpoint,)
    )
    return EngineRequest(
        request_id=f"chatcmpl-{uuid.uuid4().hex}",
        prompt_token_ids=prompt.token_ids,
        sampling=sampling,
        namespace=cache_namespace(context.settings, info.tenant, body.cache_salt),
        cache_until=cache.until,
        pin_seconds=cache.pin_seconds,
        priority=(body.priority or 0) + PRIORITY_OF_TIER.get(body.service_tier or "auto", 0),
    )


@router.post(
    "/v1/chat/completions",
    response_model=None,
    responses=answers(ChatCompletion, ChatCompletionChunk),
)
async def create_chat_completion(
    body: ChatCompletionRequest, request: Request, context: Context
) -> Response:
    """Answer a conversation, whole or as server-sent events."""
    info = context.admit(body, request)
    check_chat(body)
    tools = plan_request_tools(body, context)
    prompt = await ChatPrompter(body, context.settings, context.text, tools.prompt_tools).encode()
    answer = ChatAnswer(
        body=body,
        generation=RequestStream(
            context.engine,
            await engine_request(body, context, info, prompt, tools),
            context.text.tokenizer,
            context.metrics,
            tenant=info.tenant,
            param_names={
                "prompt": "messages",
                "max_tokens": max_tokens_field(body),
                "beam_width": "n",
            },
            on_pin=info.name_pin,
        ),
        tools=tools,
        formatter=LogprobFormatter(context.text.tokenizer, bool(body.return_tokens_as_token_ids)),
        model=body.model,
        fingerprint=context.fingerprint,
        service_tier=None if body.service_tier is None else _tier_used(body.service_tier),
        prefix=prompt.continued_text if body.echo else "",
    )
    if body.stream:
        return SseResponse(answer.events(), context.settings.stream_stall_seconds)
    return json_response(await unless_disconnected(request, answer.whole()))


def _tier_used(asked: str) -> str:
    return "default" if asked in ("auto", "scale") else asked
