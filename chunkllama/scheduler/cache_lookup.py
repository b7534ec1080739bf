"""How much of a prompt may be looked up in the cache, and why the match ended."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from chunkllama.cache.adapter_tags import AdapterUse
from chunkllama.cache.manager import CacheManager, Match, SequenceChunks
from chunkllama.cache.node import encode_tokens
from chunkllama.messages import CacheExplanation
from chunkllama.scheduler.limits import SchedulerLimits
from chunkllama.scheduler.request import Sequence


def match_limit(sequence: Sequence, limits: SchedulerLimits) -> int:
    """All tokens but the last, whose row yields the next; nothing where every row is wanted."""
    wants_rows = sequence.wants_prompt_logits or sequence.group.request.wants_hidden_states
    if wants_rows or not limits.enable_prefix_caching:
        return 0
    return sequence.num_tokens - 1


def record_running(tenant: str, running: Iterable[Sequence], cache: CacheManager) -> None:
    """Record the prompts of a tenant's running sequences, which an explanation depends on."""
    for sequence in running:
        if sequence.tenant == tenant and sequence.chunks is not None:
            cache.record_prompt(sequence.chunks)


def note_prompt(
    sequence: Sequence,
    match: Match,
    used: tuple[SequenceChunks, Match],
    running: Iterable[Sequence],
    cache: CacheManager,
    limits: SchedulerLimits,
) -> None:
    """Explain the match of a prompt that is about to start, if asked to, and note the prompt.

    Args:
        match: what the tree has.
        used: the chunks that the sequence gets, and what it takes of the match.
        running: sequences that run.
    """
    group, request = sequence.group, sequence.group.request
    if group.num_cached_tokens >= 0:  # another choice of the request, or preempted before
        return
    key, tenant, namespace = sequence.cache_key, request.tenant, request.namespace
    chunks, taken = used
    if request.explain:
        record_running(tenant, running, cache)
        is_whole = match_limit(sequence, limits) == sequence.num_tokens - 1
        group.explanation = cache.explain(
            key, match if is_whole else None, taken.num_tokens, tenant, namespace
        )
        if sequence.read is not None:
            group.explanation.num_tier_tokens = sequence.read.tokens_below(
                taken.num_tokens, cache.chunk_size
            )
    if limits.enable_prefix_caching:
        chunks.unrecorded = key, group.insert_limit


def explain_prompt(
    prompt_token_ids: list[int],
    namespace: str,
    tenant: str,
    cache: CacheManager,
    limits: SchedulerLimits,
    adapter: AdapterUse | None,
) -> CacheExplanation:
    """Explain why the match of a prompt would end now; changes nothing."""
    tokens = np.array(prompt_token_ids, np.int32)
    if adapter is not None:
        tokens = adapter.tagged(tokens)
    key, limit = encode_tokens(tokens), len(tokens) - 1
    match, num_read = None, 0
    if limits.enable_prefix_caching:
        match = cache.match(key, limit, namespace)
        if cache.tier is not None:
            match, num_read = cache.tier.extended(match, key, limit, namespace)
    used = 0 if match is None else match.num_tokens
    explanation = cache.explain(key, match, used, tenant, namespace)
    explanation.num_tier_tokens = num_read
    return explanation
