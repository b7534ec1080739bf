"""/v1/cache and /admin/cache: schemas; explanations are in ``usage.py``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from typing_extensions import TypedDict

from chunkllama_server.api.schema.base import RequestModel
from chunkllama_server.api.schema.tokenize import PromptBody


class ExplainRequest(PromptBody):
    """Body of POST /v1/cache/explain: a prompt, or messages."""

    cache_salt: str | None = Field(
        default=None,
        min_length=1,
        max_length=1024,
        description="Honoured: the salt that the generating request would have.",
    )


class PinRequest(ExplainRequest):
    """Body of POST /admin/cache/pins: a prompt, or messages, of a tenant."""

    tenant: str | None = Field(
        default=None,
        max_length=256,
        description="Honoured: whose prompt it is; absent pins it for all tenants.",
    )
    ttl: str = Field(
        pattern=r"^[0-9]{1,5}[smh]$", description='Honoured: how long it is kept, e.g. "30m".'
    )


class PackRequest(RequestModel):
    """Body of POST /v1/cache/packs on the admin port."""

    name: str = Field(
        min_length=1, max_length=256, description="Honoured: name of a file in the folder packs."
    )


class PinAnswer(TypedDict):
    """A pin that was granted."""

    object: Literal["pin"]
    tenant: str
    prompt_tokens: int


class Dropped(TypedDict):
    """Chunks removed from the tree, and those kept because a request uses them."""

    object: Literal["dropped"]
    chunks: int
    kept: int


class TenantTree(TypedDict):
    """Chunks in the tree that one tenant has added."""

    tenant: str
    chunks: int
    tokens: int
    in_use: int
    pinned: int
    public: int
    deepest: int
