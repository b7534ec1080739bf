"""The route class of endpoints whose bodies may be in another server's dialect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.types import Scope

from chunkllama_server.api.dialect.meanings import Endpoint
from chunkllama_server.api.dialect.translate import translate
from chunkllama_server.api.schema.base import RequestModel
from chunkllama_server.api.schema.chat import ChatCompletionRequest
from chunkllama_server.api.schema.completions import CompletionRequest
from chunkllama_server.api.schema.embeddings import EmbeddingRequest
from chunkllama_server.api.schema.responses import ResponseRequest
from chunkllama_server.api.schema.tokenize import TokenizeRequest
from chunkllama_server.transport.body import JsonRoute
from chunkllama_server.transport.request_context import request_info

MODELS: Mapping[Endpoint, type[RequestModel]] = {
    "chat": ChatCompletionRequest,
    "completions": CompletionRequest,
    "responses": ResponseRequest,
    "embeddings": EmbeddingRequest,
    "tokenize": TokenizeRequest,
}
_ENDPOINTS: Mapping[str, Endpoint] = {
    "/v1/chat/completions": "chat",
    "/v1/chat/completions/render": "chat",
    "/v1/completions": "completions",
    "/v1/completions/render": "completions",
    "/v1/responses": "responses",
    "/v1/responses/input_tokens": "responses",
    "/v1/responses/compact": "responses",
    "/v1/embeddings": "embeddings",
    "/tokenize": "tokenize",
}


class DialectRoute(JsonRoute):
    """Translates a body to this server's names before the schema sees it."""

    def translate(self, parsed: Any, scope: Scope) -> Any:
        endpoint = _ENDPOINTS.get(self.path)
        if endpoint is None or not isinstance(parsed, dict):
            return parsed
        result = translate(parsed, endpoint, MODELS[endpoint].wire_names())
        info = request_info(scope)
        info.spelled.update(result.spelled)
        info.harmless, info.unknown = result.harmless, result.unknown
        return result.body
