"""Serve POST /v1/completions."""

from __future__ import annotations

import uuid

from fastapi import APIRouter, Request
from starlette.responses import Response

from chunkllama_server.api.common.context import Context, ServerContext
from chunkllama_server.api.common.logprobs import LogprobFormatter
from chunkllama_server.api.completions.request import completion_generations
from chunkllama_server.api.completions.response import CompletionAnswer
from chunkllama_server.api.dialect.route import DialectRoute
from chunkllama_server.api.openapi import answers
from chunkllama_server.api.schema.completions import Completion, CompletionRequest
from chunkllama_server.transport.sse import unless_disconnected

router = APIRouter(route_class=DialectRoute, tags=["completions"])


@router.post("/v1/completions", response_model=None, responses=answers(Completion, Completion))
async def create_completion(
    body: CompletionRequest, request: Request, context: Context
) -> Response:
    """Continue one prompt or several, whole or as server-sent events."""
    info = await context.admit(body, request)
    completion_id = f"cmpl-{uuid.uuid4().hex}"
    generations = await completion_generations(body, context, info, completion_id)
    prompts = [generation.request.prompt_token_ids for generation in generations]
    texts = await context.text.run(
        sum(map(len, prompts)) if body.echo else 0,
        lambda: [_echo_text(body, context, index, ids) for index, ids in enumerate(prompts)],
    )
    answer = CompletionAnswer(
        body=body,
        completion_id=completion_id,
        generations=generations,
        prompt_texts=texts,
        formatter=LogprobFormatter(context.text.tokenizer, bool(body.return_tokens_as_token_ids)),
        fingerprint=context.fingerprint,
    )
    if body.stream:
        return context.stream(answer.events(), info)
    collected = await unless_disconnected(request, answer.collect())
    num_values = sum(64 + generation.num_logprobs for generation in generations)
    return await context.respond(num_values, lambda: answer.whole(collected))


def _echo_text(body: CompletionRequest, context: ServerContext, index: int, ids: list[int]) -> str:
    """Return the prompt as the client wrote it, or decoded from its ids."""
    if not body.echo:
        return ""
    prompt = body.prompt
    if body.truncate_prompt_tokens is None and prompt is not None:
        item = prompt if isinstance(prompt, str) else prompt[index]
        if isinstance(item, str):
            return item
    return context.text.tokenizer.decode(ids, skip_special_tokens=True)
