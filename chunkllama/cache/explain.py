"""Why a prompt's match in the cache ended where it did.

| reason | the match ended because |
| --- | --- |
| complete | every token but the last, which is always computed, was matched |
| below_minimum | the prompt has one token; a match needs two |
| not_looked_up | the request returns a value for each prompt token, or caching is disabled |
| no_room | the pool had no chunk free to copy the rest to |
| in_progress | another request of the same tenant was still computing the rest |
| evicted | the chunk's memory was needed |
| expired | the tenant's pin had ended, and then the chunk's memory was needed |
| dropped | an operator removed the chunk |
| rounded | the rest is in a chunk that the cache tier has rounded, which is shared whole only |
| not_stored | the earlier request did not let these tokens be stored |
| another_namespace | the tenant sent these tokens before with another cache salt |
| another_adapter | the tenant sent the next token before under another adapter, or under none |
| diverged | the tenant's earlier prompts continued with another token |
| never_seen | the tenant has not sent these tokens before |
| unknown | the record of the tenant's prompts does not reach back far enough |

Everything but the numbers of tokens matched and read from the tier comes from the caller's own
record (``history.py``), so an explanation does not depend on what other tenants have sent: the time
at which a chunk that several tenants share was removed is left out.
"""

from __future__ import annotations

from chunkllama.cache.history import Known, PromptHistory
from chunkllama.cache.matching import Match
from chunkllama.cache.node import TOKEN_BYTES
from chunkllama.messages import CacheExplanation, CacheReason


def explain_match(
    history: PromptHistory,
    now: float,
    tenant: str,
    namespace: str,
    key: bytes,
    match: Match | None,
    num_used: int,
) -> CacheExplanation:
    """Explain a match of a prompt.

    Args:
        now: seconds by the history's clock.
        key: the prompt's tokens, encoded.
        match: what the tree has of all tokens but the last; None if it was not asked.
        num_used: tokens of the match that the request takes.
    """
    limit = len(key) // TOKEN_BYTES - 1
    known = history.find(tenant, namespace, key[: limit * TOKEN_BYTES])
    seconds: float | None = None
    reason: CacheReason
    if limit < 1:
        reason = "below_minimum"
    elif match is None:
        reason = "not_looked_up"
    elif num_used >= limit:
        reason = "complete"
    elif num_used < match.num_tokens:
        reason = "no_room"
    elif known.num_tokens > num_used:
        reason, seconds = _why_gone(history, now, tenant, known, match)
    elif history.find_elsewhere(tenant, namespace, key[: limit * TOKEN_BYTES]) > num_used:
        reason = "another_namespace"
    elif num_used == known.num_tokens and history.was_sent_under_another_adapter(
        tenant, namespace, key[: limit * TOKEN_BYTES], known
    ):
        reason = "another_adapter"
    elif known.has_branch and known.num_tokens == num_used > 0:
        reason = "diverged"
    else:
        reason = "unknown" if known.lost else "never_seen"
    return CacheExplanation(
        num_matched_tokens=num_used,
        num_known_tokens=known.num_tokens,
        reason=reason,
        seconds_ago=seconds,
    )


def _why_gone(
    history: PromptHistory, now: float, tenant: str, known: Known, match: Match
) -> tuple[CacheReason, float | None]:
    """Why the tree lacks the token after the match, which the tenant has sent before."""
    if match.num_later_tokens > match.num_tokens and match.pending is not None:
        leader = match.pending[0]
        if leader.owner == tenant:
            return "in_progress", None
    at = min(match.num_tokens // history.chunk_size, len(known.path) - 1)
    entry = known.path[at]
    if entry.removed is None:
        if not entry.is_stored:
            return "not_stored", None
        return ("rounded" if match.ends_in_rounded else "unknown"), None
    when, why = entry.removed
    if why == "dropped":
        return "dropped", None if when is None else now - when
    if entry.pin_ended is not None:
        return "expired", now - entry.pin_ended
    return "evicted", None if when is None else now - when
