"""Refuse by name what no generating model can do: rerank and score."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from chunkllama_server.api.openapi import refusals
from chunkllama_server.transport.errors import ApiError, invalid

router = APIRouter(tags=["unsupported"])

_REFUSED = refusals(400, 401, 404, 405, 408, 413, 429, 503)


@router.post("/v2/rerank", response_model=None, responses=_REFUSED)
@router.post("/v1/rerank", response_model=None, responses=_REFUSED)
@router.post("/rerank", response_model=None, responses=_REFUSED)
async def rerank() -> Response:
    """Refuse to rerank: that needs a cross-encoder."""
    raise _needs_cross_encoder("Reranking")


@router.post("/v1/score", response_model=None, responses=_REFUSED)
@router.post("/score", response_model=None, responses=_REFUSED)
async def score() -> Response:
    """Refuse to score pairs of texts: that needs a cross-encoder."""
    raise _needs_cross_encoder("Scoring pairs of texts")


def _needs_cross_encoder(what: str) -> ApiError:
    return invalid(
        f"{what} is not supported: it needs a cross-encoder, and this server generates text; "
        "compare embeddings of /v1/embeddings instead",
        code="unsupported",
    )
