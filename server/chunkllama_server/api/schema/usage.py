"""Token counts, always with what the prefix cache saved."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import NamedTuple, NotRequired

from typing_extensions import TypedDict

from chunkllama.messages import CacheReason


class CacheExplanationBody(TypedDict):
    """Why a prompt's match in the cache ended after ``matched_tokens``.

    Of those, ``tier_tokens`` are read from the cache tier. ``known_tokens`` leading tokens were in
    an earlier prompt of the same key; ``seconds_ago`` is when the cached rest was removed or its
    pin ended. Both texts are the prompt's own.
    """

    reason: CacheReason
    message: str
    prompt_tokens: int
    matched_tokens: int
    tier_tokens: int
    known_tokens: int
    seconds_ago: float | None
    text_before: str
    text_after: str


class PromptTokensDetails(TypedDict):
    """``cached_tokens`` came from the cache, ``cache_write_tokens`` were computed and stored.

    ``cached_tokens_by_precision`` is there if K/V are stored in another type than the model
    computes in, or the cache tier rounds them. ``cache_explanations`` is there on demand, one for
    each prompt.
    """

    cached_tokens: int
    cache_write_tokens: int
    audio_tokens: int
    text_tokens: int
    image_tokens: int
    cached_tokens_by_precision: NotRequired[dict[str, int]]
    cache_explanations: NotRequired[list[CacheExplanationBody]]


class CompletionTokensDetails(TypedDict):
    """Kinds of output tokens; this engine makes text only.

    ``rejected_prediction_tokens`` were computed; they are no output tokens.
    """

    reasoning_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int
    audio_tokens: int


class CompletionUsage(TypedDict):
    """Usage of a chat or text completion; with n > 1 the prompt counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class EmbeddingUsage(TypedDict):
    """Usage of an embedding request."""

    prompt_tokens: int
    total_tokens: int


class InputTokensDetails(TypedDict):
    """As PromptTokensDetails, in the words of the Responses API."""

    cached_tokens: int
    cache_write_tokens: int
    cached_tokens_by_precision: NotRequired[dict[str, int]]
    cache_explanations: NotRequired[list[CacheExplanationBody]]


class OutputTokensDetails(TypedDict):
    """Tokens of thoughts."""

    reasoning_tokens: int


class ResponseUsage(TypedDict):
    """Usage of a response."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Tokens of an answer so far.

    Attributes:
        prompt: counted once for all choices or branches. cached: of them, from the cache.
        rounded: of those, the ones whose K/V the cache tier has rounded.
        written: of them, added to the cache. output: of all choices. reasoning: of them, thoughts.
        accepted, rejected: of the request's prediction, those that were right, and those that were
            computed and were not.
    """

    prompt: int
    cached: int
    written: int
    output: int
    reasoning: int
    accepted: int = 0
    rejected: int = 0
    rounded: int = 0

    @classmethod
    def total(cls, parts: Iterable[TokenCounts]) -> TokenCounts:
        """Sum the counts of several answers."""
        listed = list(parts)
        return cls(**{f.name: sum(getattr(c, f.name) for c in listed) for f in fields(cls)})


class Precision(NamedTuple):
    """Names of the types of cached K/V.

    Attributes:
        stored: in the pool.
        rounded: in the cache tier; "" if that rounds nothing.
    """

    stored: str
    rounded: str

    def split(self, counts: TokenCounts) -> dict[str, int]:
        """Return the cached tokens by type."""
        if not self.rounded:
            return {self.stored: counts.cached}
        return {self.stored: counts.cached - counts.rounded, self.rounded: counts.rounded}


def completion_usage(
    counts: TokenCounts,
    explanations: list[CacheExplanationBody] | None = None,
    precision: Precision | None = None,
) -> CompletionUsage:
    """Fill every required member of a usage object, and the explanations if there are any.

    Args:
        precision: of the cached tokens, where it is not that of the model alone.
    """
    usage: CompletionUsage = {
        "prompt_tokens": counts.prompt,
        "completion_tokens": counts.output,
        "total_tokens": counts.prompt + counts.output,
        "prompt_tokens_details": {
            "cached_tokens": counts.cached,
            "cache_write_tokens": counts.written,
            "audio_tokens": 0,
            "text_tokens": counts.prompt,
            "image_tokens": 0,
        },
        "completion_tokens_details": {
            "reasoning_tokens": counts.reasoning,
            "accepted_prediction_tokens": counts.accepted,
            "rejected_prediction_tokens": counts.rejected,
            "audio_tokens": 0,
        },
    }
    if precision:
        usage["prompt_tokens_details"]["cached_tokens_by_precision"] = precision.split(counts)
    if explanations:
        usage["prompt_tokens_details"]["cache_explanations"] = explanations
    return usage
