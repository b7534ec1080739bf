"""Serve the API of Text Generation Inference: /generate, /generate_stream, / and /info.

/embed is that of Text Embeddings Inference, its sibling.
"""

from __future__ import annotations

import uuid
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from chunkllama import __version__
from chunkllama_server.api.common.context import Context, ServerContext
from chunkllama_server.api.common.embed import embed_inputs, input_ids, num_values, vectors
from chunkllama_server.api.completions.request import completion_streams
from chunkllama_server.api.openapi import tgi_answers
from chunkllama_server.api.schema.base import StructuredOutputs
from chunkllama_server.api.schema.completions import CompletionRequest
from chunkllama_server.api.schema.embeddings import EmbeddingRequest
from chunkllama_server.api.schema.tgi import (
    TeiEmbedRequest,
    TgiAnswer,
    TgiCompatRequest,
    TgiGrammar,
    TgiInfo,
    TgiParameters,
    TgiRequest,
)
from chunkllama_server.api.tgi.response import TGI_STREAM, TgiGeneration
from chunkllama_server.transport.body import JsonRoute, json_response
from chunkllama_server.transport.errors import invalid
from chunkllama_server.transport.request_context import request_info
from chunkllama_server.transport.sse import unless_disconnected

router = APIRouter(route_class=JsonRoute, tags=["tgi"])

_DEFAULT_NEW_TOKENS = 100
_SPELLED = {
    "prompt": "inputs",
    "max_tokens": "parameters.max_new_tokens",
    "min_tokens": "parameters.min_new_tokens",
    **dict.fromkeys(
        ("structured_outputs", "structured_outputs.json", "structured_outputs.regex"),
        "parameters.grammar.value",
    ),
    "stop": "parameters.stop",
}


def completion_of(body: TgiRequest, model: str, *, streams: bool) -> CompletionRequest:
    """The text completion that answers this request.

    Raises:
        ApiError: 400 for details of the prompt in a stream, and lengths that count the prompt.
    """
    given = body.parameters or TgiParameters()
    samples = given.do_sample or any(
        value not in (None, off)
        for value, off in ((given.temperature, 1), (given.top_k, 0), (given.top_p, 1))
    )
    wants_prefill = bool(given.details and given.decoder_input_details)
    if wants_prefill and streams:
        raise invalid("Not with a stream", "parameters.decoder_input_details")
    for bound in ("max", "min"):
        if getattr(given, f"{bound}_length") is not None:
            path = f"parameters.{bound}_length"
            raise invalid(f"It counts the prompt; send {bound}_new_tokens", path, "unsupported")
    return CompletionRequest.model_construct(
        model=model,
        prompt=body.inputs,
        max_tokens=given.max_new_tokens,
        min_tokens=given.min_new_tokens,
        temperature=(given.temperature or 1.0) if samples else 0.0,
        top_k=given.top_k,
        top_p=given.top_p,
        repetition_penalty=given.repetition_penalty,
        frequency_penalty=given.frequency_penalty,
        seed=given.seed,
        stop=given.stop,
        include_stop_str_in_output=True,
        truncate_prompt_tokens=given.truncate,
        structured_outputs=_constraint(given.grammar),
        logprobs=0 if streams or given.details else None,
        prompt_logprobs=0 if wants_prefill else None,
    )


def _constraint(grammar: TgiGrammar | None) -> StructuredOutputs | None:
    if grammar is None:
        return None
    value = grammar.value
    if grammar.type == "regex":
        if not isinstance(value, str):
            raise invalid("Must be a regular expression", "parameters.grammar.value")
        return StructuredOutputs(regex=value)
    if grammar.type == "json_object" or value is None:
        return StructuredOutputs(json_object=True)
    if isinstance(value, dict) and isinstance(value.get("schema"), dict):
        value = value["schema"]
    if not isinstance(value, dict | str):
        raise invalid("Must be a JSON schema", "parameters.grammar.value")
    return StructuredOutputs(json=value)


async def _start(
    body: TgiRequest, request: Request, context: ServerContext, *, streams: bool
) -> TgiGeneration:
    info = await context.admit(body, request)
    info.spelled.update(_SPELLED)
    model = context.allowed_models(info.tenant)[0]
    completion = completion_of(body, model, streams=streams)
    parameters = body.parameters or TgiParameters()
    request_id = f"tgi-{uuid.uuid4().hex}"
    streams_of = completion_streams(
        completion, context, info, request_id, default_tokens=_DEFAULT_NEW_TOKENS
    )
    generation = (await streams_of)[0]
    before = body.inputs if parameters.return_full_text else ""
    return TgiGeneration(parameters, generation, context.text.tokenizer, before)


@router.post("/generate", response_model=None, responses=tgi_answers(TgiAnswer))
async def generate(body: TgiRequest, request: Request, context: Context) -> Response:
    """Continue a prompt."""
    answer = await _start(body, request, context, streams=False)
    return json_response(await unless_disconnected(request, answer.whole()))


@router.post(
    "/generate_stream", response_model=None, responses=tgi_answers(TgiAnswer, streams=True)
)
async def generate_stream(body: TgiRequest, request: Request, context: Context) -> Response:
    """Continue a prompt as server-sent events, one a token."""
    answer = await _start(body, request, context, streams=True)
    return context.stream(answer.events(), request_info(request.scope), TGI_STREAM)


@router.post("/", response_model=None, responses=tgi_answers(list[TgiAnswer], streams=True))
async def compat_generate(body: TgiCompatRequest, request: Request, context: Context) -> Response:
    """Continue a prompt, in a list of one answer or as events; huggingface_hub's path."""
    answer = await _start(body, request, context, streams=bool(body.stream))
    if body.stream:
        return context.stream(answer.events(), request_info(request.scope), TGI_STREAM)
    whole: Any = await unless_disconnected(request, answer.whole())
    return json_response([whole])


@router.post("/embed", response_model=None, responses=tgi_answers(list[list[float]]))
async def embed(body: TeiEmbedRequest, request: Request, context: Context) -> Response:
    """Embed one text or several; huggingface_hub's feature_extraction."""
    info = await context.admit(body, request)
    info.spelled["input"] = "inputs"
    scaled = body.normalize is not False
    if not scaled and body.dimensions is not None:
        raise invalid("dimensions needs normalize", "dimensions")
    embedding = EmbeddingRequest.model_construct(input=body.inputs, dimensions=body.dimensions)
    prompts = await input_ids(embedding, context, truncates=bool(body.truncate))
    generations = await unless_disconnected(
        request, embed_inputs(embedding, context, info, prompts)
    )
    return await context.respond(
        num_values(generations), lambda: vectors(generations, body.dimensions, scaled=scaled)
    )


@router.get("/info", response_model=TgiInfo, responses=tgi_answers(TgiInfo))
async def info(request: Request, context: Context) -> TgiInfo:
    """Describe the model and the server's limits."""
    engine, settings = context.engine.info, context.settings
    most = engine.max_request_tokens
    return {
        "model_id": context.allowed_models(request_info(request.scope).tenant)[0],
        "model_sha": None,
        "model_dtype": engine.dtype,
        "model_device_type": engine.device,
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": settings.max_num_seqs + settings.max_waiting,
        "max_best_of": 1,
        "max_stop_sequences": settings.max_stop_strings,
        "max_input_tokens": most - 1,
        "max_total_tokens": most,
        "validation_workers": 1,
        "max_client_batch_size": 1,
        "router": "chunkllama",
        "version": __version__,
        "sha": None,
        "docker_label": None,
    }
