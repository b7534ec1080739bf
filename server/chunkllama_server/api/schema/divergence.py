"""GET /dashboard/divergence: response schema."""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict


class DivergenceRow(TypedDict):
    """Prompts of one tenant that differ at ``token`` and then go on equally.

    ``lost_share`` is the part of their possible cache hits that the difference costs.
    """

    tenant: str
    token: int
    kind: str
    requests: int
    lost_tokens: int
    cached_tokens: int
    lost_share: float
    message: str
    text_before: str
    examples: list[str]


class DivergenceReport(TypedDict):
    """The costliest divergences among the last ``prompts``, the costliest first."""

    object: Literal["divergence_report"]
    prompts: int
    prompt_tokens: int
    data: list[DivergenceRow]
