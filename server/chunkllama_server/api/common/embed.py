"""Embed texts: tokenize them, pool each prompt's hidden states, scale them to length 1."""

from __future__ import annotations

import asyncio
import math
import uuid
from typing import cast

from chunkllama.messages import EngineRequest
from chunkllama.sampling_params import SamplingParams
from chunkllama_server.api.common.context import ServerContext
from chunkllama_server.api.common.prompt_cache import cache_plan
from chunkllama_server.api.common.request_stream import RequestStream
from chunkllama_server.api.common.sampling import (
    BATCH_PRIORITY,
    check_lengths,
    check_prompt_ids,
)
from chunkllama_server.api.common.text_service import pause_after
from chunkllama_server.api.schema.embeddings import EmbeddingRequest
from chunkllama_server.transport.errors import invalid
from chunkllama_server.transport.request_context import RequestInfo
from chunkllama_server.transport.sse import gather_or_cancel

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


async def input_ids(
    body: EmbeddingRequest, context: ServerContext, *, truncates: bool = False
) -> list[list[int]]:
    """Return the token ids of each input.

    Args:
        truncates: cut an input beyond the context instead of refusing it.

    Raises:
        ApiError: 400 for an empty input, one beyond the context, or an unknown id.
    """
    given = body.input
    is_one = isinstance(given, str) or isinstance(given[0], int)
    inputs = cast(list[str | list[int]], [given] if is_one else given)
    info = context.engine.info
    result: list[list[int]] = []
    special = body.add_special_tokens is not False
    async for ids in context.text.encode_all(inputs, add_special_tokens=special):
        index = len(result)
        param = "input" if is_one else f"input[{index}]"
        if inputs[index] == "":
            raise invalid("An input must not be empty", param)
        if truncates:
            ids = ids[: info.max_request_tokens]
        if (kept := body.truncate_prompt_tokens) is not None:
            ids = ids[-(info.max_request_tokens if kept < 0 else kept) :] if kept else []
        check_prompt_ids(ids, info, param)
        check_lengths(len(ids), 0, info, param, param)
        result.append(ids)
        await pause_after(index)
    return result


async def embed_inputs(
    body: EmbeddingRequest, context: ServerContext, info: RequestInfo, prompts: list[list[int]]
) -> list[RequestStream]:
    """Run the prompts and return their generations, whose outputs have the embeddings.

    Raises:
        ApiError: 429 beyond the tenant's tokens per minute, and what the engine refuses.
    """
    namespace = context.tenants.namespace(info.tenant, body.cache_salt)
    cache = cache_plan(body, context.settings)
    slots = asyncio.Semaphore(MAX_AT_ONCE)
    embedding_id, sampling = uuid.uuid4().hex, SamplingParams(temperature=0.0, max_tokens=1)
    requests = [
        EngineRequest(
            request_id=f"embd-{embedding_id}-{index}",
            prompt_token_ids=ids,
            sampling=sampling,
            namespace=namespace,
            tenant=info.tenant,
            wants_hidden_states=context.settings.embedding_pooling,
            cache_until=cache.until,
            pin_seconds=cache.pin_seconds,
            priority=BATCH_PRIORITY if info.is_batch else 0,
            explain=info.wants_explanation,
            adapter=info.adapter,
        )
        for index, ids in enumerate(prompts)
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

    return await gather_or_cancel([embed(each) for each in requests])


def num_values(generations: list[RequestStream]) -> int:
    """Return how many numbers the embeddings of generations that have run hold."""
    return sum(len(generation.output.embedding or ()) for generation in generations)


def vectors(
    generations: list[RequestStream], dimensions: int | None, *, scaled: bool = True
) -> list[list[float]]:
    """Return the embeddings of generations that have run.

    Args:
        scaled: to length 1; else all dimensions as the model has them.

    Raises:
        ApiError: 400 for more dimensions than the model has.
    """
    found = []
    for generation in generations:
        assert generation.output.embedding is not None, "the engine sent no embedding"
        vector = generation.output.embedding
        found.append(normalised(vector, dimensions) if scaled else vector)
    return found
