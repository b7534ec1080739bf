"""Say in an answer why a prompt's match in the cache ended, with the caller's own text there."""

from __future__ import annotations

from collections.abc import Sequence

from chunkllama.messages import CacheExplanation, CacheReason
from chunkllama.text.tokenizer import Tokenizer
from chunkllama_server.api.schema.usage import CacheExplanationBody

TEXT_TOKENS = 12  # shown before and after the end of the match

_MESSAGES: dict[CacheReason, str] = {
    "complete": "the whole prompt was cached; its last token is always computed",
    "below_minimum": "the prompt has one token; a match needs two",
    "not_looked_up": "the request returns a value for each prompt token, or caching is disabled",
    "no_room": "the chunk pool had no room for a copy of the rest",
    "in_progress": "another of your requests was still computing the rest",
    "diverged": "your earlier prompts continued with another token",
    "evicted": "your earlier prompt went on, but the memory of the rest was needed",
    "expired": "your earlier prompt went on, but its pin ended and the memory was needed",
    "dropped": "your earlier prompt went on, but an operator removed the rest from the cache",
    "rounded": "the rest is a part of a chunk that was rounded, which is shared whole only",
    "not_stored": "your earlier prompt went on, but was not to be stored beyond its breakpoint",
    "another_namespace": "you sent these tokens before with another cache_salt",
    "another_adapter": "you sent the next token before with another adapter, or without one",
    "another_replica": "another replica of the cluster has the rest of what you sent",
    "never_seen": "you have not sent these tokens before",
    "unknown": "the record of your earlier prompts does not reach back far enough",
}


def explanation_body(
    explanation: CacheExplanation, prompt_token_ids: Sequence[int], tokenizer: Tokenizer
) -> CacheExplanationBody:
    """Put an explanation into words; the text shown is the prompt's own."""
    end = explanation.num_matched_tokens
    seconds = explanation.seconds_ago
    before = prompt_token_ids[max(end - TEXT_TOKENS, 0) : end]
    after = prompt_token_ids[end : end + TEXT_TOKENS]
    return {
        "reason": explanation.reason,
        "message": _MESSAGES[explanation.reason],
        "prompt_tokens": len(prompt_token_ids),
        "matched_tokens": end,
        "tier_tokens": explanation.num_tier_tokens,
        "known_tokens": explanation.num_known_tokens,
        "seconds_ago": None if seconds is None else round(max(seconds, 0.0), 3),
        "text_before": tokenizer.decode(list(before), skip_special_tokens=False),
        "text_after": tokenizer.decode(list(after), skip_special_tokens=False),
    }
