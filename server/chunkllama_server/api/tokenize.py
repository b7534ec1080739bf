"""Serve /tokenize, /detokenize and the paths that end in /render: what the model would read."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from chunkllama_server.api.chat.prompt_body import body_token_ids
from chunkllama_server.api.chat.request import prepare_chat
from chunkllama_server.api.common.context import Context, ServerContext
from chunkllama_server.api.completions.request import (
    check_completion,
    completion_sampling,
    prompt_ids,
)
from chunkllama_server.api.dialect.route import DialectRoute
from chunkllama_server.api.openapi import answers
from chunkllama_server.api.schema.chat import ChatCompletionRequest
from chunkllama_server.api.schema.completions import CompletionRequest
from chunkllama_server.api.schema.tokenize import (
    DetokenizeRequest,
    DetokenizeResponse,
    RenderedPrompt,
    TokenizeRequest,
    TokenizeResponse,
)
from chunkllama_server.transport.body import json_response
from chunkllama_server.transport.errors import invalid

router = APIRouter(route_class=DialectRoute, tags=["tokenize"])


@router.post("/tokenize", response_model=None, responses=answers(TokenizeResponse))
async def tokenize(body: TokenizeRequest, request: Request, context: Context) -> Response:
    """Return token ids of a prompt, or of a conversation through the chat template."""
    info = await context.admit(body, request)
    ids = await body_token_ids(body, context, info)
    strings = None
    if body.return_token_strs:
        tokenizer = context.text.tokenizer
        strings = await context.text.run(len(ids), lambda: [tokenizer.token_str(i) for i in ids])
    result: TokenizeResponse = {
        "count": len(ids),
        "max_model_len": context.engine.info.max_request_tokens,
        "tokens": ids,
        "token_strs": strings,
    }
    return await context.respond(len(ids) + len(strings or ()), lambda: result)


@router.post("/detokenize", response_model=None, responses=answers(DetokenizeResponse))
async def detokenize(body: DetokenizeRequest, request: Request, context: Context) -> Response:
    """Return the text of token ids."""
    await context.admit(body, request)
    vocab_size = context.engine.info.vocab_size
    for index, token_id in enumerate(body.tokens):
        if token_id >= vocab_size:
            raise invalid(
                f"Token id {token_id} is outside the vocabulary of {vocab_size}",
                f"tokens[{index}]",
            )
    text = await context.text.run(
        len(body.tokens),
        lambda: context.text.tokenizer.decode(body.tokens, bool(body.skip_special_tokens)),
    )
    result: DetokenizeResponse = {"prompt": text}
    return json_response(result)


@router.post("/v1/chat/completions/render", response_model=None, responses=answers(RenderedPrompt))
async def render(body: ChatCompletionRequest, request: Request, context: Context) -> Response:
    """Return the prompt of a chat completion with this body; nothing is generated."""
    info = await context.admit(body, request)
    prepared = await prepare_chat(body, context, info)
    text = await prepared.prompter.render()
    return json_response(_rendered(text, prepared.prompt.token_ids, context))


@router.post("/v1/completions/render", response_model=None, responses=answers(list[RenderedPrompt]))
async def render_completion(
    body: CompletionRequest, request: Request, context: Context
) -> Response:
    """Return each prompt of a text completion with this body; nothing is generated."""
    info = await context.admit(body, request)
    check_completion(body, context)
    prompts = await prompt_ids(body, context)
    await completion_sampling(body, context, info, prompts)
    tokenizer = context.text.tokenizer
    size = sum(map(len, prompts))
    texts = await context.text.run(
        size, lambda: [tokenizer.decode(ids, skip_special_tokens=False) for ids in prompts]
    )
    pairs = zip(texts, prompts, strict=True)
    return json_response([_rendered(text, ids, context) for text, ids in pairs])


def _rendered(text: str, token_ids: list[int], context: ServerContext) -> RenderedPrompt:
    return {
        "prompt": text,
        "token_ids": token_ids,
        "prompt_token_ids": token_ids,
        "count": len(token_ids),
        "max_model_len": context.engine.info.max_request_tokens,
    }
