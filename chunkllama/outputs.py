"""What a finished or streaming generation looks like to a caller of the offline API, and token log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec


class TokenLogprob(msgspec.Struct, frozen=True):
    """Natural-log probabilities at one position: of the token there, its rank (1 is best), and the best few."""

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


@dataclass(slots=True)
class CompletionOutput:
    """One choice of a request: ``text`` is the decoded output, ``finish_reason`` None while it runs."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprob] | None = None


@dataclass(slots=True)
class RequestOutput:
    """All choices of one request; ``num_cached_tokens`` prompt tokens were not computed again."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finished: bool = False
