"""POST /v1/cache/explain: request schema; the answer is ``CacheExplanationBody``."""

from __future__ import annotations

from pydantic import Field

from chunkllama_server.api.schema.tokenize import PromptBody


class ExplainRequest(PromptBody):
    """Body of POST /v1/cache/explain: a prompt, or messages."""

    cache_salt: str | None = Field(
        default=None,
        min_length=1,
        max_length=1024,
        description="Honoured: the salt that the generating request would have.",
    )
