"""Serve POST /v1/responses, stored responses, and the count of input tokens."""

from __future__ import annotations

import uuid

from fastapi import APIRouter, Request
from starlette.responses import Response as HttpResponse

from chunkllama_server.api.chat.request import PreparedChat, prepare_chat
from chunkllama_server.api.common.context import Context, ServerContext
from chunkllama_server.api.common.logprobs import LogprobFormatter
from chunkllama_server.api.common.response_store import StoredResponse
from chunkllama_server.api.openapi import answers, refusals
from chunkllama_server.api.responses.items import assistant_message
from chunkllama_server.api.responses.request import as_chat, previous_messages
from chunkllama_server.api.responses.response import ResponseAnswer
from chunkllama_server.api.schema.chat import ChatMessage
from chunkllama_server.api.schema.response_object import (
    DeletedResponse,
    InputTokens,
    Response,
    ResponseEvent,
)
from chunkllama_server.api.schema.responses import ResponseRequest
from chunkllama_server.transport.body import JsonRoute, json_response
from chunkllama_server.transport.errors import ApiError
from chunkllama_server.transport.request_context import RequestInfo, request_info
from chunkllama_server.transport.sse import unless_disconnected

router = APIRouter(route_class=JsonRoute, tags=["responses"])

_PARAM_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "response_format.json_schema.schema": "text.format.schema",
    "tool_choice.function.name": "tool_choice.name",
    "tool_choice.allowed_tools.tools": "tool_choice.tools",
}


async def prepare(
    body: ResponseRequest, context: ServerContext, info: RequestInfo
) -> tuple[PreparedChat, list[ChatMessage]]:
    """Translate and tokenize a request; also returns its messages without the instructions.

    Raises:
        ApiError: 400 naming the field, 404 for a previous response that is not stored.
    """
    history = previous_messages(body, context.responses, info.tenant)
    chat = as_chat(body, history, lambda item_id: context.responses.find_item(info.tenant, item_id))
    conversation = chat.messages[chat.messages[0].origin == "instructions" :]
    return await prepare_chat(chat, context, info), conversation


def rename_param(error: ApiError) -> ApiError:
    """Name the field as this endpoint calls it."""
    param = error.param or ""
    error.param = _PARAM_NAMES.get(param, error.param)
    return error


@router.post("/v1/responses", response_model=None, responses=answers(Response, ResponseEvent))
async def create_response(
    body: ResponseRequest, request: Request, context: Context
) -> HttpResponse:
    """Answer an input, whole or as events; the response is stored unless store is false."""
    info = context.admit(body, request)
    try:
        prepared, conversation = await prepare(body, context, info)
        generation = await prepared.stream(
            info,
            f"resp_{uuid.uuid4().hex}",
            {"prompt": "input", "max_tokens": "max_output_tokens"},
        )
    except ApiError as error:
        raise rename_param(error) from None

    def keep(response: Response) -> None:
        if body.store is not False:
            messages = [*conversation, assistant_message(response["output"])]
            most = context.tenants.quotas(info.tenant).stored_responses
            context.responses.put(info.tenant, StoredResponse(response, messages), most)

    answer = ResponseAnswer(
        body=body,
        generation=generation,
        tools=prepared.tools,
        formatter=LogprobFormatter(context.text.tokenizer, as_token_ids=False),
        wants_logprobs=bool(prepared.body.logprobs),
        on_finished=keep,
    )
    if body.stream:
        return context.stream(answer.events(), info)
    return json_response(await unless_disconnected(request, answer.whole()))


@router.post("/v1/responses/input_tokens", response_model=None, responses=answers(InputTokens))
async def count_input_tokens(
    body: ResponseRequest, request: Request, context: Context
) -> HttpResponse:
    """Count the tokens a response's prompt would have."""
    info = context.admit(body, request)
    try:
        prepared, _ = await prepare(body, context, info)
    except ApiError as error:
        raise rename_param(error) from None
    counted: InputTokens = {
        "object": "response.input_tokens",
        "input_tokens": len(prepared.prompt.token_ids),
    }
    return json_response(counted)


def _missing(response_id: str) -> ApiError:
    return ApiError(
        404,
        f"Response {response_id[:100]!r} is not stored (any more)",
        "response_id",
        "response_not_found",
    )


@router.get("/v1/responses/{response_id}", responses=refusals(401, 404, 405))
async def get_response(response_id: str, request: Request, context: Context) -> Response:
    """Return a stored response."""
    stored = context.responses.get(request_info(request.scope).tenant, response_id)
    if stored is None:
        raise _missing(response_id)
    return stored.response


@router.delete("/v1/responses/{response_id}", responses=refusals(401, 404, 405))
async def delete_response(response_id: str, request: Request, context: Context) -> DeletedResponse:
    """Delete a stored response."""
    if not context.responses.delete(request_info(request.scope).tenant, response_id):
        raise _missing(response_id)
    return {"id": response_id, "object": "response", "deleted": True}
