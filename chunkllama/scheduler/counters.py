"""The scheduler's counters, monotonic since its start."""

from __future__ import annotations

from dataclasses import dataclass

from chunkllama.cache.chunk_pool import ChunkState
from chunkllama.cache.manager import CacheManager
from chunkllama.messages import EngineStats


@dataclass(slots=True)
class Counters:
    """``prefill_tokens_computed`` counts tokens known at admission: prompts and recomputation."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_tokens_queried: int = 0
    prefix_tokens_hit: int = 0
    prefix_tokens_hit_public: int = 0
    prefill_tokens_computed: int = 0
    decode_tokens_computed: int = 0
    preemptions: int = 0


def read_stats(counters: Counters, cache: CacheManager) -> EngineStats:
    """Counters and the pool's gauges; requests and steps are filled in by those who know them."""
    pool = cache.pool
    return EngineStats(
        chunks_free=pool.num_free,
        chunks_cached=pool.count(ChunkState.CACHED),
        chunks_referenced=pool.count(ChunkState.REFERENCED),
        chunks_private=pool.count(ChunkState.PRIVATE),
        chunks_total=pool.num_chunks,
        chunks_peak=pool.peak,
        prefix_tokens_queried_total=counters.prefix_tokens_queried,
        prefix_tokens_hit_total=counters.prefix_tokens_hit,
        prefix_tokens_hit_public_total=counters.prefix_tokens_hit_public,
        prefill_tokens_computed_total=counters.prefill_tokens_computed,
        prompt_tokens_total=counters.prompt_tokens,
        generation_tokens_total=counters.generation_tokens,
        preemptions_total=counters.preemptions,
        evicted_chunks_total=cache.tree.evicted_chunks_total,
        pinned_chunks=cache.pins.num_chunks,
        pins_refused_total=cache.pins.refused_total,
    )
