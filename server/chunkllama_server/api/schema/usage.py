"""Token counts, always with what the prefix cache saved."""

from __future__ import annotations

from typing import NotRequired

from typing_extensions import TypedDict

from chunkllama.messages import CacheReason


class CacheExplanationBody(TypedDict):
    """Why a prompt's match in the cache ended after ``matched_tokens``.

    ``known_tokens`` leading tokens were in an earlier prompt of the same key; ``seconds_ago`` is
    when the cached rest was removed or its pin ended. Both texts are the prompt's own.
    """

    reason: CacheReason
    message: str
    prompt_tokens: int
    matched_tokens: int
    known_tokens: int
    seconds_ago: float | None
    text_before: str
    text_after: str


class PromptTokensDetails(TypedDict):
    """``cached_tokens`` came from the cache, ``cache_write_tokens`` were computed and stored.

    ``cache_explanations`` is there on demand, one for each prompt.
    """

    cached_tokens: int
    cache_write_tokens: int
    audio_tokens: int
    text_tokens: int
    image_tokens: int
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


def completion_usage(
    prompt_tokens: int,
    completion_tokens: int,
    cached_tokens: int,
    cache_write_tokens: int,
    reasoning_tokens: int = 0,
    explanations: list[CacheExplanationBody] | None = None,
    predicted: tuple[int, int] = (0, 0),
) -> CompletionUsage:
    """Fill every required member of a usage object, and the explanations if there are any.

    ``predicted``: tokens of the request's prediction that were right, and that were computed and
    were not.
    """
    usage: CompletionUsage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": cached_tokens,
            "cache_write_tokens": cache_write_tokens,
            "audio_tokens": 0,
            "text_tokens": prompt_tokens,
            "image_tokens": 0,
        },
        "completion_tokens_details": {
            "reasoning_tokens": reasoning_tokens,
            "accepted_prediction_tokens": predicted[0],
            "rejected_prediction_tokens": predicted[1],
            "audio_tokens": 0,
        },
    }
    if explanations:
        usage["prompt_tokens_details"]["cache_explanations"] = explanations
    return usage
