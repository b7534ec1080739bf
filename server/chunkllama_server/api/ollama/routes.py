"""Serve Ollama's API: /api/chat, /api/generate, /api/embed, /api/tags, /api/show, /api/ps and
/api/version."""

from __future__ import annotations

import hashlib
import re
import time
import uuid
from datetime import UTC, datetime
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response

from chunkllama_server.api.chat.request import prepare_chat
from chunkllama_server.api.chat.thinking import thought_tags
from chunkllama_server.api.common.context import Context, ServerContext
from chunkllama_server.api.common.embed import embed_inputs, input_ids, num_values, vectors
from chunkllama_server.api.common.request_stream import RequestStream
from chunkllama_server.api.completions.request import completion_streams
from chunkllama_server.api.ollama.request import SPELLED, chat_of, chat_of_prompt, completion_of
from chunkllama_server.api.ollama.response import OLLAMA_STREAM, OllamaAnswer, now
from chunkllama_server.api.openapi import ollama_answers
from chunkllama_server.api.schema.chat import ChatCompletionRequest
from chunkllama_server.api.schema.embeddings import EmbeddingRequest
from chunkllama_server.api.schema.models import Version
from chunkllama_server.api.schema.ollama import (
    OllamaChatRequest,
    OllamaChatResponse,
    OllamaDetails,
    OllamaEmbedding,
    OllamaEmbeddingsRequest,
    OllamaEmbedRequest,
    OllamaEmbedResponse,
    OllamaGenerateRequest,
    OllamaGenerateResponse,
    OllamaGeneration,
    OllamaModel,
    OllamaModels,
    OllamaRequest,
    OllamaRunning,
    OllamaShown,
    OllamaShowRequest,
)
from chunkllama_server.api.tools.config import ToolConfig
from chunkllama_server.transport.body import JsonRoute, json_response
from chunkllama_server.transport.errors import invalid
from chunkllama_server.transport.request_context import RequestInfo, request_info
from chunkllama_server.transport.sse import unless_disconnected

router = APIRouter(route_class=JsonRoute, tags=["ollama"])

_LATEST = ":latest"
# The version of Ollama whose API this follows, the first with /v1/responses and /v1/messages.
# Clients compare it: some ask for 0.6.4, or 0.13.4 for responses.
OLLAMA_VERSION = "0.14.0"
_NEVER = "9999-12-31T23:59:59Z"
_ZERO = r"0+(\.0+)?"
_NO_TIME = re.compile(rf"[+-]?({_ZERO}|({_ZERO}(ns|us|µs|ms|s|m|h))+)")


async def _admit(
    body: OllamaRequest | OllamaShowRequest, request: Request, context: ServerContext
) -> RequestInfo:
    """Check what every request needs; Ollama's clients add a tag to a model's name.

    Raises:
        ApiError: 400, 403, 404 or 503.
    """
    if context.adapter_of(body.model) is None:
        body.__dict__["model"] = body.model.removesuffix(_LATEST)
    info = await context.admit(body, request)
    info.spelled.update(SPELLED)  # later errors name fields of the completion
    return info


def _unloads(keep_alive: float | str | None) -> bool:
    """Whether a time that a model stays loaded is none: a number of seconds, or text as "5m"."""
    if isinstance(keep_alive, str):
        return _NO_TIME.fullmatch(keep_alive) is not None
    return keep_alive == 0


def _loaded(body: OllamaGeneration, key: str, value: Any) -> Response:
    """Answer a request without a prompt, which loads or unloads a model elsewhere: it is loaded,
    and stays so."""
    answer = {"model": body.model, "created_at": now(), key: value}
    reason = "unload" if _unloads(body.keep_alive) else "load"
    return json_response({**answer, "done": True, "done_reason": reason})


def _has_thoughts(context: ServerContext) -> bool:
    template = context.text.template
    able = None if template is None else template.capabilities
    return able is not None and thought_tags(context.settings, able) is not None


def _check_thinking(body: OllamaGeneration, context: ServerContext) -> None:
    """Refuse to think where the model has no thoughts, as Ollama does.

    Raises:
        ApiError: 400.
    """
    if body.think and not _has_thoughts(context):
        raise invalid(f"The model {body.model[:200]!r} does not support thinking", "think")


async def _chat_stream(
    chat: ChatCompletionRequest, context: ServerContext, info: RequestInfo, prompt: str
) -> tuple[RequestStream, ToolConfig]:
    prepared = await prepare_chat(chat, context, info)
    prepared.fit_answer(chat.max_completion_tokens)
    names = {"prompt": prompt, "max_tokens": "options.num_predict"}
    return await prepared.stream(info, f"ollama-{uuid.uuid4().hex}", names), prepared.tools


async def _send(
    answer: OllamaAnswer, body: OllamaGeneration, request: Request, context: ServerContext
) -> Response:
    if body.stream is not False:
        return context.stream(answer.lines(), request_info(request.scope), OLLAMA_STREAM)
    return json_response(await unless_disconnected(request, answer.whole()))


@router.post("/api/chat", response_model=None, responses=ollama_answers(OllamaChatResponse))
async def chat(body: OllamaChatRequest, request: Request, context: Context) -> Response:
    """Answer a conversation in Ollama's format, as lines of JSON unless stream is false."""
    info = await _admit(body, request, context)
    if not body.messages:
        return _loaded(body, "message", {"role": "assistant", "content": ""})
    _check_thinking(body, context)
    translated = await context.prepare(info, lambda: chat_of(body, context.generation_defaults))
    generation, tools = await _chat_stream(translated, context, info, "messages")
    answer = OllamaAnswer(
        model=body.model,
        generation=generation,
        is_chat=True,
        parser=tools.parser(),
        started=info.started,
    )
    return await _send(answer, body, request, context)


@router.post("/api/generate", response_model=None, responses=ollama_answers(OllamaGenerateResponse))
async def generate(body: OllamaGenerateRequest, request: Request, context: Context) -> Response:
    """Answer a prompt in Ollama's format; a raw one is continued as it is."""
    info = await _admit(body, request, context)
    if not body.prompt:
        return _loaded(body, "response", "")
    _check_thinking(body, context)
    if body.raw:
        completion = completion_of(
            body, context.generation_defaults, context.engine.info.max_request_tokens
        )
        request_id = f"ollama-{uuid.uuid4().hex}"
        streams = await completion_streams(completion, context, info, request_id, fits=True)
        generation = streams[0]
    else:
        generation, _ = await _chat_stream(
            chat_of_prompt(body, context.generation_defaults), context, info, "prompt"
        )
    answer = OllamaAnswer(
        model=body.model, generation=generation, is_chat=False, started=info.started
    )
    return await _send(answer, body, request, context)


async def _embed(
    texts: list[str],
    dimensions: int | None,
    request: Request,
    context: ServerContext,
    *,
    truncates: bool,
    scaled: bool = True,
) -> tuple[list[list[float]], int]:
    """Embeddings of texts, and the number of their tokens.

    Args:
        scaled: to length 1.
    """
    if not texts:
        return [], 0
    embedding = EmbeddingRequest.model_construct(input=texts, dimensions=dimensions)
    prompts = await input_ids(embedding, context, truncates=truncates)
    work = embed_inputs(embedding, context, request_info(request.scope), prompts)
    generations = await unless_disconnected(request, work)
    scale = partial(vectors, generations, dimensions, scaled=scaled)
    found = await context.text.prepare(num_values(generations), scale)
    return found, sum(map(len, prompts))


@router.post("/api/embed", response_model=None, responses=ollama_answers(OllamaEmbedResponse))
async def embed(body: OllamaEmbedRequest, request: Request, context: Context) -> Response:
    """Embed one text or several."""
    info = await _admit(body, request, context)
    texts = [body.input] if isinstance(body.input, str) and body.input else list(body.input)
    found, num_tokens = await _embed(
        texts, body.dimensions, request, context, truncates=body.truncate is not False
    )
    answer: OllamaEmbedResponse = {
        "model": body.model,
        "embeddings": found,
        "total_duration": int((time.monotonic() - info.started) * 1e9),
        "load_duration": 0,
        "prompt_eval_count": num_tokens,
    }
    return await context.respond(sum(map(len, found)), lambda: answer)


@router.post("/api/embeddings", response_model=None, responses=ollama_answers(OllamaEmbedding))
async def embeddings(body: OllamaEmbeddingsRequest, request: Request, context: Context) -> Response:
    """Embed one text, by the former path, whose embedding is as the model has it."""
    await _admit(body, request, context)
    texts = [body.prompt] if body.prompt else []
    found, _ = await _embed(texts, None, request, context, truncates=True, scaled=False)
    answer: OllamaEmbedding = {"embedding": found[0] if found else []}
    return json_response(answer)


def _details() -> OllamaDetails:
    return {
        "parent_model": "",
        "format": "chunkllama",
        "family": "llama",
        "families": ["llama"],
        "parameter_size": "",
        "quantization_level": "",
    }


def _modified(context: ServerContext) -> str:
    return datetime.fromtimestamp(context.created, UTC).isoformat().replace("+00:00", "Z")


def _models(request: Request, context: ServerContext) -> OllamaModels:
    models: list[OllamaModel] = [
        {
            "name": name,
            "model": name,
            "modified_at": _modified(context),
            "size": 0,
            "digest": hashlib.sha256(name.encode()).hexdigest(),
            "details": _details(),
        }
        for name in context.visible_models(request_info(request.scope).tenant)
    ]
    return {"models": models}


@router.get("/api/tags", response_model=None, responses=ollama_answers(OllamaModels, is_get=True))
async def tags(request: Request, context: Context) -> Response:
    """List the served models that the API key may use."""
    return json_response(_models(request, context))


@router.get("/api/ps", response_model=None, responses=ollama_answers(OllamaRunning, is_get=True))
async def running(request: Request, context: Context) -> Response:
    """List the loaded models that the API key may use: all that are served, until the server
    ends."""
    most = context.engine.info.max_request_tokens
    answer: OllamaRunning = {
        "models": [
            {**model, "expires_at": _NEVER, "size_vram": 0, "context_length": most}
            for model in _models(request, context)["models"]
        ]
    }
    return json_response(answer)


@router.post("/api/show", response_model=None, responses=ollama_answers(OllamaShown))
async def show(body: OllamaShowRequest, request: Request, context: Context) -> Response:
    """Describe a served model."""
    await _admit(body, request, context)
    capabilities = ["completion", "embedding"]
    if context.text.template is not None:
        capabilities.append("tools")
    if _has_thoughts(context):
        capabilities.append("thinking")
    shown: OllamaShown = {
        "modelfile": f"FROM {body.model}",
        "parameters": "",
        "template": "",
        "details": _details(),
        "model_info": {
            "general.architecture": "llama",
            "llama.context_length": context.engine.info.max_request_tokens,
            "llama.vocab_size": context.engine.info.vocab_size,
        },
        "capabilities": capabilities,
        "modified_at": _modified(context),
    }
    return json_response(shown)


@router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def greet(request: Request) -> Response:
    """Say that the server runs, which Ollama's command asks first; show a browser the dashboard."""
    headers = {"vary": "accept, sec-fetch-mode"}
    if _opens_page(request):
        # Where no root path is configured, a proxy may still have removed one that ends in a slash.
        root_path = request.scope.get("root_path", "").rstrip("/")
        page = f"{root_path}/dashboard" if root_path else "dashboard"
        return RedirectResponse(page, headers=headers)
    return PlainTextResponse("Ollama is running", headers=headers)


def _opens_page(request: Request) -> bool:
    """Whether a browser shows the answer; programs accept text/html too, to read it themselves."""
    mode = request.headers.get("sec-fetch-mode")
    if mode is not None:
        return mode == "navigate"
    return "application/xhtml+xml" in request.headers.get("accept", "")


@router.get("/api/version", response_model=None, responses=ollama_answers(Version, is_get=True))
async def version() -> Response:
    """Return the version of Ollama whose API is served; /version has the server's."""
    return json_response({"version": OLLAMA_VERSION})
