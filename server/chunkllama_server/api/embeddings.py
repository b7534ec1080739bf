"""Serve POST /v1/embeddings: pooled hidden states of the prompt, normalised."""

from __future__ import annotations

import array
import asyncio
import base64
import math
import sys
import uuid
from typing import cast

from fastapi import APIRouter, Request
from starlette.responses import Response

from chunkllama.messages import EngineRequest
from chunkllama.sampling_params import SamplingParams
from chunkllama_server.api.common.context import Context, ServerContext
from chunkllama_server.api.common.prompt_cache import cache_plan
from chunkllama_server.api.common.request_stream import RequestStream
from chunkllama_server.api.common.sampling import check_lengths, check_prompt_ids
from chunkllama_server.api.common.text_service import texts_size
from chunkllama_server.api.dialect.route import DialectRoute
from chunkllama_server.api.openapi import answers
from chunkllama_server.api.schema.embeddings import Embedding, EmbeddingList, EmbeddingRequest
from chunkllama_server.transport.body import json_response
from chunkllama_server.transport.errors import invalid
from chunkllama_server.transport.sse import gather_or_cancel, unless_disconnected

router = APIRouter(route_class=DialectRoute, tags=["embeddings"])

# A large batch must not fill the engine's queue, where other requests wait.
MAX_AT_ONCE = 16


def normalised(vector: list[float], dimensions: int | None) -> list[float]:
    """Return the first ``dimensions`` values, scaled to length 1.

    Raises:
        ApiError: 400 when the model has fewer.
    """
    if dimensions is not None and dimensions > len(vector):
        raise invalid(f"This model's embeddings have {len(vector)} dimensions", "dimensions")
    kept = vector[:dimensions]
    length = math.sqrt(sum(value * value for value in kept)) or 1.0
    return [value / length for value in kept]


def base64_float32(vector: list[float]) -> str:
    """Encode as little-endian float32, which the openai client decodes."""
    values = array.array("f", vector)
    if sys.byteorder == "big":
        values.byteswap()
    return base64.b64encode(values.tobytes()).decode()


async def input_ids(body: EmbeddingRequest, context: ServerContext) -> list[list[int]]:
    """Return the token ids of each input.

    Raises:
        ApiError: 400 for an empty input, one beyond the context, or an unknown id.
    """
    given = body.input
    is_one = isinstance(given, str) or isinstance(given[0], int)
    inputs = cast(list[str | list[int]], [given] if is_one else given)
    info, result = context.engine.info, []
    size = texts_size(inputs)
    for index, item in enumerate(inputs):
        param = "input" if is_one else f"input[{index}]"
        if item == "":
            raise invalid("An input must not be empty", param)
        ids = item
        if isinstance(ids, str):
            ids = await context.text.encode(
                ids, add_special_tokens=body.add_special_tokens is not False, size=size
            )
        check_prompt_ids(ids, info.vocab_size, param)
        check_lengths(len(ids), 0, info, param, param)
        result.append(ids)
    return result


@router.post("/v1/embeddings", response_model=None, responses=answers(EmbeddingList))
async def create_embeddings(body: EmbeddingRequest, request: Request, context: Context) -> Response:
    """Embed one input or several."""
    info = context.admit(body, request)
    prompts = await input_ids(body, context)
    namespace = context.tenants.namespace(info.tenant, body.cache_salt)
    cache = cache_plan(body, context.settings)
    slots = asyncio.Semaphore(MAX_AT_ONCE)

    requests = [
        EngineRequest(
            request_id=f"embd-{uuid.uuid4().hex}",
            prompt_token_ids=ids,
            sampling=SamplingParams(temperature=0.0, max_tokens=1),
            namespace=namespace,
            tenant=info.tenant,
            wants_hidden_states=context.settings.embedding_pooling,
            cache_until=cache.until,
            pin_seconds=cache.pin_seconds,
        )
        for ids in prompts
    ]
    context.charge(info, requests)

    async def embed(engine_request: EngineRequest) -> RequestStream:
        generation = RequestStream(
            context.engine,
            engine_request,
            context.text.tokenizer,
            context.metrics,
            info=info,
            param_names={"prompt": "input"},
        )
        async with slots:
            await generation.collect()
        return generation

    async def embed_all() -> EmbeddingList:
        return _answer(body, await gather_or_cancel([embed(each) for each in requests]))

    return json_response(await unless_disconnected(request, embed_all()))


def _answer(body: EmbeddingRequest, generations: list[RequestStream]) -> EmbeddingList:
    data: list[Embedding] = []
    for index, generation in enumerate(generations):
        assert generation.output.embedding is not None, "the engine sent no embedding"
        vector = normalised(generation.output.embedding, body.dimensions)
        data.append(
            {
                "object": "embedding",
                "index": index,
                "embedding": (
                    base64_float32(vector) if body.encoding_format == "base64" else vector
                ),
            }
        )
    num_tokens = sum(len(g.request.prompt_token_ids) for g in generations)
    return {
        "object": "list",
        "data": data,
        "model": body.model,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
