"""Serve POST /v1/responses, stored responses, and the count of input tokens."""

from __future__ import annotations

import uuid
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import Response as HttpResponse

from chunkllama_server.api.chat.request import PreparedChat, prepare_chat
from chunkllama_server.api.common.background import RunningResponse
from chunkllama_server.api.common.context import Context, ServerContext
from chunkllama_server.api.common.joined_stream import Generation
from chunkllama_server.api.common.logprobs import LogprobFormatter
from chunkllama_server.api.common.response_store import StoredResponse
from chunkllama_server.api.common.responses import replay
from chunkllama_server.api.dialect.route import DialectRoute
from chunkllama_server.api.openapi import answers, refusals
from chunkllama_server.api.responses.followed import followed
from chunkllama_server.api.responses.items import assistant_message, compaction, input_items
from chunkllama_server.api.responses.request import ReadRequest, read_request
from chunkllama_server.api.responses.response import OnEnded, ResponseAnswer
from chunkllama_server.api.responses.tools import tool_paths
from chunkllama_server.api.schema.chat import ChatMessage
from chunkllama_server.api.schema.response_object import (
    CompactedResponse,
    DeletedResponse,
    InputItems,
    InputTokens,
    Response,
    ResponseEvent,
)
from chunkllama_server.api.schema.responses import ResponseRequest
from chunkllama_server.transport.body import json_response
from chunkllama_server.transport.errors import ApiError, invalid
from chunkllama_server.transport.request_context import RequestInfo, request_info
from chunkllama_server.transport.sse import unless_disconnected

router = APIRouter(route_class=DialectRoute, tags=["responses"])

_SUMMARISE = (
    "Summarise the conversation so far for someone who continues it: the task, decisions, facts, "
    "names and numbers, and what is still to do. Write nothing else."
)
_SUMMARY_TOKENS = 256
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
) -> tuple[PreparedChat, ReadRequest]:
    """Translate and tokenize a request.

    Raises:
        ApiError: 400 naming the field, 404 for a previous response that is not stored, 413 for a
            request that follows more than it may.
    """
    read = await _read(body, context, info)
    return await prepare_chat(read.chat, context, info), read


async def _read(body: ResponseRequest, context: ServerContext, info: RequestInfo) -> ReadRequest:
    """Read a request and what it follows.

    Raises:
        ApiError: as ``prepare``.
    """
    found = await followed(body, context, info.tenant)
    info.body_bytes += found.num_bytes
    read = await context.prepare(info, lambda: read_request(body, found))
    info.spelled.update(tool_paths(read.tools, info.spelled))
    return read


def rename_param(error: ApiError) -> ApiError:
    """Name the field as this endpoint calls it."""
    param = error.param or ""
    error.param = _PARAM_NAMES.get(param, error.param)
    return error


def _answer(
    body: ResponseRequest,
    prepared: PreparedChat,
    read: ReadRequest,
    generation: Generation,
    context: ServerContext,
    on_ended: OnEnded,
) -> ResponseAnswer:
    return ResponseAnswer(
        body=body,
        generation=generation,
        tools=prepared.tools,
        offered=read.tools,
        formatter=LogprobFormatter(context.text.tokenizer, as_token_ids=False),
        wants_logprobs=bool(prepared.body.logprobs),
        beside=context.text.write,
        on_ended=on_ended,
    )


@router.post("/v1/responses", response_model=None, responses=answers(Response, ResponseEvent))
async def create_response(
    body: ResponseRequest, request: Request, context: Context
) -> HttpResponse:
    """Answer an input, whole, as events or in the background; the response is stored unless store
    is false."""
    info = await context.admit(body, request)
    if body.background:
        context.background.check_room(info.tenant)
    response_id = f"resp_{uuid.uuid4().hex}"
    try:
        prepared, read = await prepare(body, context, info)
        generation = await prepared.generation(
            info, response_id, {"prompt": "input", "max_tokens": "max_output_tokens"}
        )
    except ApiError as error:
        raise rename_param(error) from None
    items = await context.prepare(info, lambda: input_items(body, response_id))

    async def keep(response: Response, events: bytes) -> None:
        if body.store is not False and (body.background or response["status"] != "failed"):
            messages = [*read.conversation, assistant_message(response["output"])]
            most = context.tenants.quotas(info.tenant).stored_responses
            stored = StoredResponse(response, messages, items, read.kept_tools, events)
            await context.responses.put(info.tenant, stored, most)

    answer = _answer(body, prepared, read, generation, context, keep)
    events = answer.events()
    if body.background:
        running = RunningResponse(answer.snapshot, answer.cancelled, info.charge.settle)
        context.background.start(info.tenant, response_id, running, events)
        info.runs_on = True
        events = running.log.follow()
    if body.stream:
        return context.stream(events, info)
    if body.background:
        return json_response(answer.snapshot())
    response = await unless_disconnected(request, answer.whole())
    return await context.respond(generation.num_logprobs, lambda: response)


@router.post("/v1/responses/input_tokens", response_model=None, responses=answers(InputTokens))
async def count_input_tokens(
    body: ResponseRequest, request: Request, context: Context
) -> HttpResponse:
    """Count the tokens a response's prompt would have."""
    info = await context.admit(body, request)
    try:
        prepared, _ = await prepare(body, context, info)
    except ApiError as error:
        raise rename_param(error) from None
    counted: InputTokens = {
        "object": "response.input_tokens",
        "input_tokens": len(prepared.prompt.token_ids),
    }
    return json_response(counted)


@router.post("/v1/responses/compact", response_model=None, responses=answers(CompactedResponse))
async def compact_response(
    body: ResponseRequest, request: Request, context: Context
) -> HttpResponse:
    """Summarise a conversation in one item that stands for it as the input of a later response."""
    info = await context.admit(body, request)
    body.tool_choice = None  # a summary calls none
    if body.parallel is not None:
        raise invalid("A summary has no branches; leave parallel out", "parallel")
    try:
        read = await _read(body, context, info)
        chat = read.chat
        chat.tool_choice = "none" if read.tools else None
        conversation = list(chat.messages)
        chat.messages.append(ChatMessage(role="user", content=_SUMMARISE))
        prepared = await prepare_chat(chat, context, info)
        room = context.engine.info.max_request_tokens - len(prepared.prompt.token_ids)
        if body.max_output_tokens is None and room > 0:
            chat.max_completion_tokens = min(_SUMMARY_TOKENS, room)
        compaction_id = f"resp_{uuid.uuid4().hex}"
        names = {"prompt": "input", "max_tokens": "max_output_tokens"}
        generation = await prepared.stream(info, compaction_id, names)
    except ApiError as error:
        raise rename_param(error) from None
    answer = _answer(body, prepared, read, generation, context, _forget)
    pieces = await unless_disconnected(request, generation.collect())
    compacted: CompactedResponse = {
        "id": compaction_id,
        "object": "response.compaction",
        "created_at": answer.created,
        "output": [compaction(conversation, pieces[0].text)],
        "usage": answer.usage(),
    }
    return json_response(compacted)


async def _forget(response: Response, events: bytes) -> None:
    """Store nothing."""


def _missing(response_id: str) -> ApiError:
    return ApiError(
        404,
        f"Response {response_id[:100]!r} is not stored (any more)",
        "response_id",
        "response_not_found",
    )


@router.get(
    "/v1/responses/{response_id}", response_model=None, responses=answers(Response, ResponseEvent)
)
async def get_response(
    response_id: str,
    request: Request,
    context: Context,
    stream: bool = False,
    starting_after: Annotated[int | None, Query(ge=0, le=2**31 - 1)] = None,
) -> HttpResponse:
    """Return a stored or running response; with stream, its events after ``starting_after``."""
    info = request_info(request.scope)
    tenant = info.tenant
    if starting_after is not None and not stream:
        raise invalid("starting_after needs stream=true", "starting_after")
    running = context.background.get(tenant, response_id)
    if running is not None:
        if stream:
            return context.stream(running.log.follow(starting_after), info)
        return json_response(running.snapshot())
    packed = await context.responses.get(tenant, response_id)
    if packed is None:
        raise _missing(response_id)
    if not stream:
        return HttpResponse(packed.response, media_type="application/json")
    return context.stream(replay(packed, starting_after), info)


@router.get("/v1/responses/{response_id}/input_items", responses=refusals(400, 401, 404, 405))
async def list_input_items(
    response_id: str,
    request: Request,
    context: Context,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
) -> InputItems:
    """List what a stored response was asked with, in pages of ``limit`` items."""
    items = await context.responses.input_items(request_info(request.scope).tenant, response_id)
    if items is None:
        raise _missing(response_id)
    if order == "desc":
        items.reverse()
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise invalid(f"The response has no input item {after[:100]!r}", "after")
        items = items[ids.index(after) + 1 :]
    page = items[:limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(items) > limit,
    }


@router.post("/v1/responses/{response_id}/cancel", response_model=None, responses=answers(Response))
async def cancel_response(response_id: str, request: Request, context: Context) -> HttpResponse:
    """End a background response; one that has ended already is returned as it is."""
    tenant = request_info(request.scope).tenant
    await context.background.cancel(tenant, response_id)
    stored = await context.responses.response(tenant, response_id)
    if stored is None:
        raise _missing(response_id)
    if not stored["background"]:
        raise invalid(
            "Only a response created with background: true can be cancelled",
            "response_id",
            "not_a_background_response",
        )
    return json_response(stored)


@router.delete("/v1/responses/{response_id}", responses=refusals(401, 404, 405))
async def delete_response(response_id: str, request: Request, context: Context) -> DeletedResponse:
    """Delete a stored response; one that is running is ended first."""
    tenant = request_info(request.scope).tenant
    await context.background.cancel(tenant, response_id)
    if not await context.responses.delete(tenant, response_id):
        raise _missing(response_id)
    return {"id": response_id, "object": "response", "deleted": True}
