"""Serve Ollama's API: /api/chat, /api/generate, /api/embed, /api/tags, /api/show, /api/ps and
/api/version."""

from __future__ import annotations

import hashlib
import time
import uuid
from datetime import UTC, datetime
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response

from chunkllama import __version__
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
    OllamaShown,
    OllamaShowRequest,
)
from chunkllama_server.api.tools.config import ToolConfig
from chunkllama_server.transport.body import JsonRoute, json_response
from chunkllama_server.transport.errors import SPELLED as SPELLED_KEY
from chunkllama_server.transport.request_context import RequestInfo, request_info
from chunkllama_server.transport.sse import unless_disconnected

router = APIRouter(route_class=JsonRoute, tags=["ollama"])

_LATEST = ":latest"


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
    request.scope[SPELLED_KEY] = SPELLED  # later errors name fields of the completion
    return info


def _loaded(body: OllamaGeneration, key: str, value: Any) -> Response:
    """Answer a request without a prompt, which loads a model elsewhere: it is loaded."""
    answer = {"model": body.model, "created_at": now(), key: value}
    return json_response({**answer, "done": True, "done_reason": "load"})


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
) -> tuple[list[list[float]], int]:
    """Embeddings of texts, and the number of their tokens."""
    if not texts:
        return [], 0
    embedding = EmbeddingRequest.model_construct(input=texts, dimensions=dimensions)
    prompts = await input_ids(embedding, context, truncates=truncates)
    work = embed_inputs(embedding, context, request_info(request.scope), prompts)
    generations = await unless_disconnected(request, work)
    scale = partial(vectors, generations, dimensions)
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
    """Embed one text, by the former path."""
    await _admit(body, request, context)
    texts = [body.prompt] if body.prompt else []
    found, _ = await _embed(texts, None, request, context, truncates=True)
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
@router.get("/api/ps", response_model=None, responses=ollama_answers(OllamaModels, is_get=True))
async def tags(request: Request, context: Context) -> Response:
    """List the served models that the API key may use; all of them are loaded."""
    return json_response(_models(request, context))


@router.post("/api/show", response_model=None, responses=ollama_answers(OllamaShown))
async def show(body: OllamaShowRequest, request: Request, context: Context) -> Response:
    """Describe a served model."""
    await _admit(body, request, context)
    template = context.text.template
    able = None if template is None else template.capabilities
    capabilities = ["completion", "embedding"]
    if able is not None:
        capabilities.append("tools")
        if thought_tags(context.settings, able) is not None:
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
    """Return the server's version."""
    return json_response({"version": __version__})
