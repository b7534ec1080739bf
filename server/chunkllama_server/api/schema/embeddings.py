"""POST /v1/embeddings: request and response schemas."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from typing_extensions import TypedDict

from chunkllama_server.api.schema.base import CacheFields, TokenIds
from chunkllama_server.api.schema.usage import EmbeddingUsage

InputIds = Annotated[TokenIds, Field(min_length=1, max_length=2**20)]
EmbeddingInput = (
    str
    | InputIds
    | Annotated[list[str], Field(min_length=1, max_length=2048, fail_fast=True)]
    | Annotated[list[InputIds], Field(min_length=1, max_length=2048, fail_fast=True)]
)


class EmbeddingRequest(CacheFields):
    """Body of POST /v1/embeddings."""

    model: str = Field(
        default="",
        description="Honoured: a served model name; another is 404. Absent: the served model.",
    )
    input: EmbeddingInput = Field(
        description="Honoured: up to 2048 texts or lists of token ids, none empty."
    )
    encoding_format: Literal["float", "base64"] | None = Field(
        default=None, description="Honoured: base64 is little-endian float32."
    )
    dimensions: int | None = Field(
        default=None,
        ge=1,
        le=2**20,
        description="Honoured: the first so many values, normalised again; above the model's "
        "size is 400.",
    )
    add_special_tokens: bool | None = Field(
        default=None, description="Honoured: whether texts begin with BOS. Default true."
    )
    truncate_prompt_tokens: int | None = Field(
        default=None,
        ge=-1,
        le=2**20,
        description="Honoured: keeps the last N tokens of each input; -1 keeps as many as fit.",
    )
    user: str | None = Field(default=None, max_length=512, description="Validated (deprecated).")


class Embedding(TypedDict):
    """One input's embedding, of length 1: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingList(TypedDict):
    """Answer to POST /v1/embeddings."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
