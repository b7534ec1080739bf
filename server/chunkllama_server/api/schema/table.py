"""The field tables of docs/http.md, made from the request models."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Any

from annotated_types import Ge, Gt, Le, MaxLen, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from chunkllama_server.api.schema.adapters import LoadAdapterRequest, UnloadAdapterRequest
from chunkllama_server.api.schema.anthropic import CountTokensRequest, MessagesRequest
from chunkllama_server.api.schema.batch import BatchRequest
from chunkllama_server.api.schema.cache import ExplainRequest
from chunkllama_server.api.schema.chat import ChatCompletionRequest
from chunkllama_server.api.schema.completions import CompletionRequest
from chunkllama_server.api.schema.embeddings import EmbeddingRequest
from chunkllama_server.api.schema.ollama import (
    OllamaChatRequest,
    OllamaEmbeddingsRequest,
    OllamaEmbedRequest,
    OllamaGenerateRequest,
    OllamaShowRequest,
)
from chunkllama_server.api.schema.responses import ResponseRequest
from chunkllama_server.api.schema.tgi import TeiEmbedRequest, TgiCompatRequest, TgiRequest
from chunkllama_server.api.schema.tokenize import DetokenizeRequest, TokenizeRequest
from chunkllama_server.api.schema.tuning import FineTuningRequest

REQUESTS: dict[str, type[BaseModel]] = {
    "POST /v1/chat/completions": ChatCompletionRequest,
    "POST /v1/completions": CompletionRequest,
    "POST /v1/responses": ResponseRequest,
    "POST /v1/messages": MessagesRequest,
    "POST /v1/messages/count_tokens": CountTokensRequest,
    "POST /v1/embeddings": EmbeddingRequest,
    "POST /api/chat": OllamaChatRequest,
    "POST /api/generate": OllamaGenerateRequest,
    "POST /api/embed": OllamaEmbedRequest,
    "POST /api/embeddings": OllamaEmbeddingsRequest,
    "POST /api/show": OllamaShowRequest,
    "POST /generate, /generate_stream": TgiRequest,
    "POST /": TgiCompatRequest,
    "POST /embed": TeiEmbedRequest,
    "POST /v1/batches": BatchRequest,
    "POST /v1/fine_tuning/jobs": FineTuningRequest,
    "POST /tokenize": TokenizeRequest,
    "POST /detokenize": DetokenizeRequest,
    "POST /v1/cache/explain": ExplainRequest,
    "POST /v1/load_lora_adapter": LoadAdapterRequest,
    "POST /v1/unload_lora_adapter": UnloadAdapterRequest,
}


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Models anywhere in a field's type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from models_in(part)


def all_models() -> dict[type[BaseModel], str]:
    """Every request model, parents before the models they contain, with the table's title."""
    titles: dict[type[BaseModel], str] = {model: title for title, model in REQUESTS.items()}
    queue = list(titles)
    while queue:
        model = queue.pop(0)
        for field in model.model_fields.values():
            for inner in models_in(field.annotation):
                if inner not in titles:
                    titles[inner] = f"`{inner.__name__}`"
                    queue.append(inner)
    return titles


def _type_name(annotation: Any) -> str:
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type_name(parts[0])
    if origin is typing.Literal:
        return ", ".join(str(part) for part in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(p) for p in parts if p is not type(None))
    if origin is list:
        return f"list of {_type_name(parts[0])}"
    if origin is dict:
        return "object"
    if annotation is Any:
        return "any"
    names = {str: "string", int: "integer", float: "number", bool: "boolean"}
    return names.get(annotation) or str(annotation.__name__)


def _limits(field: FieldInfo) -> str:
    bounds = {"at least": "", "above": "", "at most": "", "length": ""}
    lengths = {"min": "", "max": ""}
    for limit in field.metadata:
        match limit:
            case Ge():
                bounds["at least"] = str(limit.ge)
            case Gt():
                bounds["above"] = str(limit.gt)
            case Le():
                bounds["at most"] = str(limit.le)
            case MinLen():
                lengths["min"] = str(limit.min_length)
            case MaxLen():
                lengths["max"] = str(limit.max_length)
    if any(lengths.values()):
        bounds["length"] = f"{lengths['min'] or 0} to {lengths['max'] or 'any'}"
    return ", ".join(f"{word} {value}" for word, value in bounds.items() if value)


def _row(name: str, field: FieldInfo) -> str:
    kind = "; ".join(part for part in (_type_name(field.annotation), _limits(field)) if part)
    star = "\\*" if field.is_required() else ""
    return f"| `{field.alias or name}`{star} | {kind} | {field.description} |"


def field_tables() -> str:
    """One table per request model; required fields carry a star."""
    lines = []
    for model, title in all_models().items():
        lines += [f"### {title}", "", (model.__doc__ or "").strip().splitlines()[0], ""]
        lines += ["| Field | Type and range | Handling |", "| --- | --- | --- |"]
        lines += [_row(name, field) for name, field in model.model_fields.items()]
        lines.append("")
    return "\n".join(lines)
