"""Serve POST /v1/embeddings: pooled hidden states of the prompt, normalised."""

from __future__ import annotations

import array
import base64
import sys

from fastapi import APIRouter, Request
from starlette.responses import Response

from chunkllama_server.api.common.context import Context
from chunkllama_server.api.common.embed import embed_inputs, input_ids, num_values, vectors
from chunkllama_server.api.common.request_stream import RequestStream
from chunkllama_server.api.dialect.route import DialectRoute
from chunkllama_server.api.openapi import answers
from chunkllama_server.api.schema.embeddings import Embedding, EmbeddingList, EmbeddingRequest
from chunkllama_server.transport.sse import unless_disconnected

router = APIRouter(route_class=DialectRoute, tags=["embeddings"])


def base64_float32(vector: list[float]) -> str:
    """Encode as little-endian float32, which the openai client decodes."""
    values = array.array("f", vector)
    if sys.byteorder == "big":
        values.byteswap()
    return base64.b64encode(values.tobytes()).decode()


@router.post("/v1/embeddings", response_model=None, responses=answers(EmbeddingList))
async def create_embeddings(body: EmbeddingRequest, request: Request, context: Context) -> Response:
    """Embed one input or several."""
    info = await context.admit(body, request)
    prompts = await input_ids(body, context)
    work = embed_inputs(body, context, info, prompts)
    generations = await unless_disconnected(request, work)
    return await context.respond(num_values(generations), lambda: _answer(body, generations))


def _answer(body: EmbeddingRequest, generations: list[RequestStream]) -> EmbeddingList:
    data: list[Embedding] = [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64_float32(vector) if body.encoding_format == "base64" else vector,
        }
        for index, vector in enumerate(vectors(generations, body.dimensions))
    ]
    num_tokens = sum(len(g.request.prompt_token_ids) for g in generations)
    return {
        "object": "list",
        "data": data,
        "model": body.model,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
