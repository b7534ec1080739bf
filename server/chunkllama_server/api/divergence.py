"""Serve /dashboard/divergence: what differs early in recent prompts, and what that costs."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request

from chunkllama_server.api.common.context import Context, tenant_view
from chunkllama_server.api.openapi import refusals
from chunkllama_server.api.schema.divergence import DivergenceReport, DivergenceRow
from chunkllama_server.metrics.divergence import Divergence, find_divergences

router = APIRouter(tags=["usage"])


@router.get("/dashboard/divergence", responses=refusals(401, 405))
async def divergence(request: Request, context: Context) -> DivergenceReport:
    """Return the costliest divergences of recent prompts that the caller may see."""
    view = tenant_view(context, request)
    tokenizer = context.text.tokenizer

    async def read() -> DivergenceReport:
        prompts = context.metrics.prompts.prompts()
        if view is not None:
            prompts = [prompt for prompt in prompts if prompt.tenant == view]
        rows = await asyncio.to_thread(
            find_divergences, prompts, lambda ids: tokenizer.decode(ids, skip_special_tokens=False)
        )
        return {
            "object": "divergence_report",
            "prompts": len(prompts),
            "prompt_tokens": sum(len(prompt.token_ids) for prompt in prompts),
            "data": [_row(row) for row in rows],
        }

    return await context.read("divergence", view, read)


def _row(row: Divergence) -> DivergenceRow:
    article = "an" if row.kind == "identifier" else "a"
    return {
        "tenant": row.tenant,
        "token": row.token,
        "kind": row.kind,
        "requests": row.num_requests,
        "lost_tokens": row.lost_tokens,
        "cached_tokens": row.cached_tokens,
        "lost_share": round(row.share, 4),
        "message": f"{article} {row.kind} at token {row.token} of this prompt costs "
        f"{row.share:.0%} of its cache hits",
        "text_before": row.text_before,
        "examples": row.examples,
    }
