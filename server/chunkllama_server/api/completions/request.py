"""Prepare text completions: check the request, tokenize its prompts, make their generations."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

from chunkllama.messages import EngineRequest
from chunkllama.sampling_params import GrammarSpec, SamplingParams
from chunkllama_server.api.common.branches import branch_stream
from chunkllama_server.api.common.context import ServerContext, check_streamable
from chunkllama_server.api.common.forks import fork_stream, without_forks
from chunkllama_server.api.common.joined_stream import Generation
from chunkllama_server.api.common.prompt_cache import cache_plan
from chunkllama_server.api.common.request_stream import RequestStream
from chunkllama_server.api.common.sampling import (
    BATCH_PRIORITY,
    check_lengths,
    check_num_logprobs,
    check_prompt_ids,
    request_priority,
    sampling_params,
)
from chunkllama_server.api.common.schema_relaxing import checked_grammar
from chunkllama_server.api.common.structured_outputs import (
    answer_grammar,
    answer_sources,
    grammar_of,
)
from chunkllama_server.api.common.text_service import pause_after
from chunkllama_server.api.schema.completions import NO_LIMIT, CompletionRequest
from chunkllama_server.transport.errors import exceeded, invalid
from chunkllama_server.transport.request_context import RequestInfo

DEFAULT_MAX_TOKENS = 16


def check_completion(body: CompletionRequest, context: ServerContext) -> None:
    """Refuse fields that exclude each other.

    Raises:
        ApiError: 400 naming the field.
    """
    check_streamable(body)
    if body.suffix:
        raise invalid("suffix needs an infill model", "suffix")
    n = body.n or 1
    if body.best_of is not None:
        if body.best_of and body.best_of < n:
            raise invalid(f"best_of must be at least n = {n}, got {body.best_of}", "best_of")
        if body.stream and body.best_of > n:
            raise invalid("best_of above n cannot be streamed", "best_of")
        if body.use_beam_search:
            raise invalid("Beam search takes n beams; leave best_of out", "best_of")
    if body.stream and body.echo and body.logprobs is not None:
        raise invalid("echo with logprobs cannot be streamed", "echo")


async def prompt_ids(body: CompletionRequest, context: ServerContext) -> list[list[int]]:
    """Return the token ids of each prompt.

    Raises:
        ApiError: 400 for an empty prompt, an id outside the vocabulary, or too many choices.
    """
    prompt, tokenizer = body.prompt, context.text.tokenizer
    if prompt is None:
        begins = [tokenizer.bos_token_id, *tokenizer.eos_token_ids]
        start = next((token for token in begins if token is not None), None)
        if start is None:
            raise invalid("The model has no token that begins a text; send a prompt", "prompt")
        prompt = [start]
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        prompts, is_list = cast(list[str | list[int]], [prompt]), False
    else:
        prompts, is_list = cast(list[str | list[int]], prompt), True
    choices = len(prompts) * max(body.n or 1, body.best_of or 1)
    if choices > context.settings.max_request_choices:
        raise exceeded(context.settings, "max_request_choices", "prompt", value=choices)
    encoded: list[list[int]] = []
    special = body.add_special_tokens is not False
    async for ids in context.text.encode_all(prompts, add_special_tokens=special):
        index = len(encoded)
        if body.truncate_prompt_tokens is not None:
            ids = ids[-body.truncate_prompt_tokens :]
        param = f"prompt[{index}]" if is_list else "prompt"
        check_prompt_ids(ids, context.engine.info, param)
        encoded.append(ids)
        await pause_after(index)
    return encoded


async def completion_sampling(
    body: CompletionRequest,
    context: ServerContext,
    info: RequestInfo,
    prompts: list[list[int]],
    *,
    default_tokens: int = DEFAULT_MAX_TOKENS,
    fits: bool = False,
) -> SamplingParams:
    """Return the sampling parameters that all prompts share; see ``completion_streams``.

    Raises:
        ApiError, InvalidRequestError: 400 naming the field.
    """
    left_out: list[str] = []
    engine = context.engine.info
    longest = max(len(ids) for ids in prompts)
    room, max_tokens = engine.max_request_tokens - longest, body.max_tokens
    if max_tokens == NO_LIMIT:
        max_tokens, default_tokens = None, room
    if max_tokens is not None and fits:
        max_tokens = max(min(max_tokens, room), 1)
    check_lengths(longest, max_tokens, engine, "prompt", "max_tokens")
    if max_tokens is None:
        max_tokens = min(default_tokens, room)
    most = max_tokens

    given, param = await context.prepare(
        info,
        lambda: grammar_of(
            body.response_format, body.structured_outputs, left_out, context.settings
        ),
    )
    sources = answer_sources(given, param, body.response_format)

    async def build(schemas: Sequence[Any], patterns: bool) -> tuple[GrammarSpec | None, str]:
        def make() -> GrammarSpec | None:
            if not sources:
                return given
            return answer_grammar(sources[0], schemas[0], most, patterns=patterns)

        return await context.prepare(info, make), param

    check, limits = context.grammars.check, context.settings
    prepare = partial(context.prepare, info)
    grammar, more = await checked_grammar(check, prepare, build, sources, most, limits)
    info.name_left_out(left_out + more)
    scores_prompt = max_tokens == 0 or (body.echo and body.logprobs is not None)
    if scores_prompt:
        num_top = max(body.prompt_logprobs or 0, body.logprobs or 0)
        body = body.model_copy(update={"prompt_logprobs": num_top})
    return sampling_params(
        body,
        context.generation_defaults,
        engine,
        context.text.tokenizer,
        max_tokens=max_tokens,
        logprobs=body.logprobs,
        best_of=body.best_of or None,
        grammar=grammar,
    )


async def completion_streams(
    body: CompletionRequest,
    context: ServerContext,
    info: RequestInfo,
    completion_id: str,
    *,
    default_tokens: int = DEFAULT_MAX_TOKENS,
    fits: bool = False,
) -> list[RequestStream]:
    """Check a request and make the generation of each of its prompts; they start when read.

    Args:
        default_tokens: of an answer at most, where the request names no ``max_tokens``.
        fits: lower the request's ``max_tokens`` to what fits instead of refusing it.

    Raises:
        ApiError, InvalidRequestError: 400 naming the field, 429 beyond the tenant's tokens per
            minute.
    """
    requests = await _engine_requests(
        body, context, info, completion_id, default_tokens=default_tokens, fits=fits
    )
    context.charge(info, requests)
    return [_start(context, info, without_forks(request, context)) for request in requests]


async def completion_generations(
    body: CompletionRequest, context: ServerContext, info: RequestInfo, completion_id: str
) -> Sequence[Generation]:
    """Make the generation of each prompt, or that of the branches that the body asks for.

    Raises:
        ApiError, InvalidRequestError: as ``completion_streams``.
    """
    requests = await _engine_requests(body, context, info, completion_id)
    start = partial(_start, context, info)
    if body.parallel is None:
        context.charge(info, requests)
        return [fork_stream(body, request, context, start) for request in requests]
    if len(requests) > 1:
        raise invalid("parallel takes one prompt", "prompt")
    branches = await branch_stream(body, requests[0], context, start, "max_tokens")
    context.charge(info, branches.requests)
    return [branches]


async def _engine_requests(
    body: CompletionRequest,
    context: ServerContext,
    info: RequestInfo,
    completion_id: str,
    *,
    default_tokens: int = DEFAULT_MAX_TOKENS,
    fits: bool = False,
) -> list[EngineRequest]:
    check_completion(body, context)
    prompts = await prompt_ids(body, context)
    sampling = await completion_sampling(
        body, context, info, prompts, default_tokens=default_tokens, fits=fits
    )
    if not body.stream:
        check_num_logprobs(prompts, sampling, 0, context.settings)
    cache = cache_plan(body, context.settings)
    namespace = context.tenants.namespace(info.tenant, body.cache_salt)
    highest = context.highest_priority(info.tenant)
    priority = (
        BATCH_PRIORITY
        if info.is_batch
        else request_priority(body.priority, None, info.tenant, highest)
    )
    requests = []
    for index, ids in enumerate(prompts):
        request = EngineRequest(
            request_id=f"{completion_id}-{index}",
            prompt_token_ids=ids,
            sampling=sampling,
            namespace=namespace,
            tenant=info.tenant,
            cache_until=cache.until,
            pin_seconds=cache.pin_seconds,
            priority=priority,
            explain=info.wants_explanation or bool(body.explain_cache),
            adapter=info.adapter,
        )
        requests.append(request)
        await pause_after(index)
    return requests


def _start(context: ServerContext, info: RequestInfo, request: EngineRequest) -> RequestStream:
    return RequestStream(
        context.engine,
        request,
        context.text.tokenizer,
        context.metrics,
        info=info,
        continues_prompt=True,
        param_names={"beam_width": "n"},
    )
