"""Names and texts of what is exported of the engine's statistics and of its supervisor's."""

ENGINE_COUNTERS = {
    "prefix_tokens_queried_total": "Prompt tokens looked up in the prefix tree.",
    "prefill_tokens_computed_total": "Prompt tokens whose K/V were computed.",
    "prompt_tokens_total": "Prompt tokens of admitted requests.",
    "generation_tokens_total": "Tokens sampled.",
    "preemptions_total": "Sequences preempted due to insufficient chunks.",
    "drafts_total": "Slices of a step that check guesses at the next tokens.",
    "draft_tokens_total": "Guesses checked.",
    "accepted_draft_tokens_total": "Guesses that were right.",
    "evicted_chunks_total": "Cached chunks evicted.",
    "pins_refused_total": "Pins refused because the pin budget was used up.",
    "prefix_tokens_hit_tier_total": "Prompt tokens whose K/V were read from the cache tier.",
    "tier_chunks_written_total": "Chunks written to the cache tier.",
    "tier_chunks_promoted_total": "Chunks read from the cache tier into the pool.",
    "tier_chunks_damaged_total": "Files of the cache tier that were damaged.",
}
HITS = ("prefix_tokens_hit_total", "prefix_tokens_hit_public_total")  # one metric, by scope
# Of TenantStats, exported as tenant_{name}_total.
TENANT_COUNTERS = {
    "computed_tokens": "Prompt tokens computed, shared ones divided.",
    "chunk_seconds": "Chunks in use over time, shared ones divided.",
    "cached_chunk_seconds": "Unused cached chunks over time.",
    "evicted_chunks": "Cached chunks evicted.",
    "evictions_of_others": "Chunks of other tenants evicted for this one.",
}
ENGINE_HISTOGRAMS = {
    "step_seconds": "Duration of a step.",
    "batch_size": "Sequences in a step.",
    "step_tokens": "Tokens computed in a step, of prompts and of answers.",
}
SUPERVISOR_COUNTERS = {
    "engine_restarts": ("restarts", "Restarts of the engine process."),
    "watchdog_kills": ("hangs", "Engine processes killed because they made no progress."),
    "replayed_requests": ("replays", "Requests continued in another engine process."),
    "slow_cache_readers": ("slow_readers", "Dropped readers of /admin/cache/events."),
}
ENGINE_GAUGES = {
    "requests_running": ("requests_running", "Requests in the running batch."),
    "requests_waiting": ("requests_waiting", "Requests waiting for admission."),
    "chunks_peak": ("kv_chunks_peak", "Highest number of chunks in use at once."),
    "chunks_total": ("kv_chunks_capacity", "Chunks of the pool."),
    "pinned_chunks": ("kv_chunks_pinned", "Chunks pinned by prompt_cache_options."),
    "tier_chunks": ("tier_chunks", "Chunks in the cache tier."),
    "tier_chunks_capacity": ("tier_chunks_capacity", "Chunks that the cache tier may hold."),
    "tier_memory_bytes": ("tier_memory_bytes", "Bytes of the cache tier's chunks in memory."),
    "tier_file_bytes": ("tier_file_bytes", "Bytes of the cache tier's chunks in files."),
    "invariant_violations": ("invariant_violations", "Violations; non-zero indicates a bug."),
}
