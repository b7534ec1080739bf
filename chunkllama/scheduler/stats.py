"""Read a scheduler's counters and gauges, of all requests and of each tenant."""

from __future__ import annotations

from chunkllama.cache.chunk_pool import ChunkState
from chunkllama.cache.manager import CacheManager
from chunkllama.messages import EngineStats, TenantStats
from chunkllama.scheduler.sequence_lifecycle import SequenceLifecycle


def read_stats(
    lifecycle: SequenceLifecycle, cache: CacheManager, *, include_tenants: bool
) -> EngineStats:
    """Counters and gauges of requests and pool; steps are filled in by the step loop."""
    pool, counters = cache.pool, lifecycle.counters
    running = sum(account.num_running for _, account in lifecycle.accounts)
    stats = EngineStats(
        requests_running=running,
        requests_waiting=len(lifecycle.groups) - running,
        chunks_free=pool.num_free,
        chunks_cached=pool.count(ChunkState.CACHED),
        chunks_referenced=pool.count(ChunkState.REFERENCED),
        chunks_private=pool.count(ChunkState.PRIVATE),
        chunks_total=pool.num_chunks,
        chunks_peak=pool.peak,
        prefix_tokens_queried_total=counters.prefix_tokens_queried,
        prefix_tokens_hit_total=counters.prefix_tokens_hit,
        prefix_tokens_hit_public_total=counters.prefix_tokens_hit_public,
        prefix_tokens_hit_tier_total=counters.prefix_tokens_hit_tier,
        prefill_tokens_computed_total=counters.prefill_tokens_computed,
        prompt_tokens_total=counters.prompt_tokens,
        generation_tokens_total=counters.generation_tokens,
        preemptions_total=counters.preemptions,
        drafts_total=counters.drafts,
        draft_tokens_total=counters.draft_tokens,
        accepted_draft_tokens_total=counters.accepted_tokens,
        evicted_chunks_total=cache.tree.evicted_chunks_total,
        pinned_chunks=cache.pins.num_chunks,
        pins_refused_total=cache.pins.refused_total,
        tenants=read_tenants(lifecycle, cache) if include_tenants else {},
    )
    if (tier := cache.tier) is not None:
        stats.tier_chunks = tier.num_chunks
        stats.tier_chunks_capacity = tier.capacity
        stats.tier_memory_bytes, stats.tier_file_bytes = tier.residences()
        stats.tier_chunks_written_total = tier.written_total
        stats.tier_chunks_promoted_total = tier.promoted_total
        stats.tier_chunks_damaged_total = tier.damaged_total
    return stats


def read_tenants(lifecycle: SequenceLifecycle, cache: CacheManager) -> dict[str, TenantStats]:
    """Counters and gauges of every tenant that has used the engine."""
    live = [s.chunks for s in lifecycle.running.by_age if s.chunks is not None]
    result = cache.usage.read(live)
    for tenant, account in lifecycle.accounts:
        stats = result.setdefault(tenant, TenantStats())
        stats.requests_running = account.num_running
        stats.requests_waiting = account.num_waiting
        stats.computed_tokens = account.computed_tokens
        stats.decoded_tokens = account.decoded_tokens
    for tenant, stats in result.items():
        stats.chunks_pinned = cache.pins.num_covered(tenant)
        stats.pins_refused = cache.pins.refused[tenant]
    return result
