"""GET /v1/usage and /dashboard/tenants: response schemas."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import TypedDict


class TenantUsage(TypedDict):
    """What one tenant has used.

    Attributes:
        requests: handed to the engine.
        prompt_tokens, cached_tokens, output_tokens: as in ``usage`` of its answers.
        computed_tokens: prompt tokens computed for it; those that requests of several tenants read
            at the time are divided among them.
        chunk_seconds: chunks in use by its requests over time, shared ones divided.
        cached_chunk_seconds: its unused cached chunks over time.
        queue_seconds: sum of its requests' time from arrival to the first step.
        rejections: refused requests by reason: requests, tokens, queue, model.
        quotas: those of its quotas that are set.
    """

    tenant: str
    requests: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    computed_tokens: int
    chunk_seconds: float
    cached_chunk_seconds: float
    queue_seconds: float
    rejections: dict[str, int]
    quotas: dict[str, Any]


class UsageList(TypedDict):
    """Usage since ``since`` (Unix seconds), of the caller's tenant or of all."""

    object: Literal["usage"]
    since: int
    data: list[TenantUsage]


class TenantState(TypedDict):
    """One tenant at this moment, and the totals that a dashboard shows as rates.

    Attributes:
        weight: its share of the service relative to others; ``service_share`` is what it has
            received of the tokens that the engine has computed since its start.
        hit_rate: cached prompt tokens over prompt tokens; null without any.
        requests_running, requests_waiting: unfinished requests.
        queue_seconds_mean: mean time of its requests from arrival to the first step.
        chunks: used (shared ones divided), cached (unused), pinned; pool_share is used and cached
            over the pool.
        evictions: chunks and tokens it lost, chunks evicted for it, of those other tenants' chunks.
        evicted_tokens_per_prompt_token: cost of the evictions of its chunks: the part of its prompt
            tokens that it computes again at worst; null without prompt tokens.
    """

    tenant: str
    weight: float
    service_share: float
    hit_rate: float | None
    requests_running: int
    requests_waiting: int
    queue_seconds_mean: float | None
    chunks: dict[str, float]
    evictions: dict[str, int]
    evicted_tokens_per_prompt_token: float | None
    pins_refused: int
    usage: TenantUsage


class TenantStates(TypedDict):
    """All tenants that the caller may see, those that use most of the pool first."""

    object: Literal["tenants"]
    since: int
    chunks_total: int
    data: list[TenantState]
