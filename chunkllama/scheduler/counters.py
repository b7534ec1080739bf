"""The scheduler's counters, monotonic since its start."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """``prefill_tokens_computed`` counts tokens known at admission: prompts and recomputation.

    ``drafts`` counts slices with guesses, ``draft_tokens`` their guesses and ``accepted_tokens``
    the right ones; ``decode_tokens_computed`` has them all.
    """

    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_tokens_queried: int = 0
    prefix_tokens_hit: int = 0
    prefix_tokens_hit_public: int = 0
    prefix_tokens_hit_tier: int = 0
    prefill_tokens_computed: int = 0
    decode_tokens_computed: int = 0
    preemptions: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
