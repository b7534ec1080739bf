"""Messages between an engine client and the engine loop.

msgspec structs of plain data cross the process boundary: requests, token deltas, statistics.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Literal

import msgspec

from chunkllama.adapter_messages import AdapterInfo, LoadAdapter, UnloadAdapter
from chunkllama.cache_messages import (
    CacheCommand,
    CacheReport,
    CacheWatch,
    EndedPin,
    KeepSnapshot,
    LoadPack,
    OwnedNode,
    PackInfo,
    PinInfo,
    TreeNodeInfo,
    WriteSnapshot,
)
from chunkllama.sampling_params import SamplingParams
from chunkllama.tenant_limits import NO_LIMITS, TenantLimits
from chunkllama.tuning_messages import StartTuning, StopTuning, TuningProgress

FinishReason = Literal["stop", "length", "abort", "error"]
BACKGROUND_PRIORITY = 1000  # and above: the request yields to the prompts of others

STEP_SECONDS_BOUNDS = (
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0,
    2.5,
)  # fmt: skip
BATCH_SIZE_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
STEP_TOKENS_BOUNDS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class TokenLogprob(msgspec.Struct, frozen=True):
    """Natural-log probabilities at one position: of its token (rank 1 is best) and the best few."""

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


class EngineRequest(msgspec.Struct, kw_only=True, tag="request"):
    """One request as the engine sees it: token ids, never text.

    Attributes:
        namespace: "" is public (matched by everyone); any other string is matched by that
            tenant alone, below public.
        tenant: whose share of the engine, queue and cache it uses; "" where there is one tenant.
        delivered: per choice, output tokens the client already has (replay after an engine
            restart).
        wants_hidden_states: return one pooled embedding of the prompt instead of tokens.
        cache_until: insert at most this many prompt tokens into the cache; None is all of them.
        pin_seconds: keep the prompt's path in the cache at least this long, inside the pin
            budget; 0 is no pin.
        priority: lower is served first among waiting requests; from ``BACKGROUND_PRIORITY`` on, a
            request computes nothing in most steps that compute prompts of others.
        explain: say on the first delta why the prompt's match in the cache ended.
        is_replay: an engine process that has ended had accepted it; it needs no place.
        adapter: name of a loaded adapter; "" is the base model.
        prediction_token_ids: what the client expects as output; guesses are taken from it, up to
            the first token that the model does not have.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    namespace: str = ""
    tenant: str = ""
    delivered: list[list[int]] = []
    wants_hidden_states: Literal["", "mean", "last"] = ""
    cache_until: int | None = None
    pin_seconds: float = 0.0
    priority: int = 0
    explain: bool = False
    is_replay: bool = False
    adapter: str = ""
    prediction_token_ids: list[int] = []


class ChoiceDelta(msgspec.Struct, kw_only=True):
    """New tokens of one choice; ``finish_reason`` is set once, on the choice's last delta."""

    index: int
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None


class TokenDelta(msgspec.Struct, kw_only=True, tag="tokens"):
    """What one step added to one request.

    ``num_cached_tokens`` (prompt tokens whose K/V came from the cache), ``num_rounded_tokens``
    (those of them whose K/V the tier has rounded) and ``num_cache_write_tokens`` are final on the
    request's first delta; so is ``pin_refused``: the pin it asked for would exceed the budget.
    ``error`` fails the whole request. Of guesses from the request's prediction, this step has found
    ``num_accepted_predicted`` right and ``num_rejected_predicted`` not.

    Durations, since clocks of two processes cannot be compared: ``queue_seconds`` (arrival to
    first scheduling) and ``prefill_seconds`` (from there to the prompt's end) are final on the
    first delta; ``decode_seconds`` is what has passed since.
    """

    request_id: str
    choices: list[ChoiceDelta]
    num_cached_tokens: int = 0
    num_rounded_tokens: int = 0
    num_cache_write_tokens: int = 0
    pin_refused: bool = False
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    prompt_logprobs: list[TokenLogprob | None] | None = None
    embedding: list[float] | None = None
    explanation: CacheExplanation | None = None
    num_accepted_predicted: int = 0
    num_rejected_predicted: int = 0
    error: EngineErrorInfo | None = None


CacheReason = Literal[
    "complete", "below_minimum", "not_looked_up", "no_room", "in_progress", "diverged", "evicted",
    "expired", "dropped", "rounded", "not_stored", "another_namespace", "another_adapter",
    "another_replica", "never_seen", "unknown",
]  # fmt: skip


class CacheExplanation(msgspec.Struct, kw_only=True):
    """How much of a prompt the cache had, and why the match ended there.

    Attributes:
        num_matched_tokens: leading tokens that need no computing; the match ended at this index.
        num_known_tokens: leading tokens that an earlier prompt of the same tenant had too.
        reason: see ``cache/explain.py``.
        seconds_ago: since the chunk was evicted or dropped, or its pin ended; None where that
            would reveal another tenant.
        num_tier_tokens: of the matched tokens, those that are read from the cache tier.
    """

    num_matched_tokens: int
    num_known_tokens: int
    reason: CacheReason
    seconds_ago: float | None = None
    num_tier_tokens: int = 0


class EngineErrorInfo(msgspec.Struct, kw_only=True):
    """A typed failure: ``kind`` is invalid (400), overloaded (429) or failed (500)."""

    kind: Literal["invalid", "overloaded", "failed"]
    message: str
    param: str | None = None
    code: str | None = None
    retry_after: int = 0


class Histogram(msgspec.Struct):
    """How often values fell into buckets.

    Attributes:
        bounds: upper bounds, inclusive and ascending.
        counts: values in each bucket alone; the last one, beyond all bounds, is one more.
        total: sum of the values.
    """

    bounds: tuple[float, ...]
    counts: list[int]
    total: float = 0.0

    @classmethod
    def over(cls, bounds: tuple[float, ...]) -> Histogram:
        """An empty one."""
        return cls(bounds, [0] * (len(bounds) + 1))

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def add(self, other: Histogram) -> None:
        """Count everything that ``other``, of the same bounds, has counted."""
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        self.total += other.total


class EngineStats(msgspec.Struct, kw_only=True, tag="engine_stats"):
    """A snapshot of the engine's counters (monotonic, since its start) and gauges.

    ``batch_size`` counts sequences of a step. Of ``prefix_tokens_hit_total``, the ``public`` ones
    lay in the part of the tree that everyone matches, and the ``tier`` ones were read from the
    cache tier. ``is_pushed``: the step loop sent it unasked.
    """

    is_pushed: bool = False
    steps_total: int = 0
    requests_running: int = 0
    requests_waiting: int = 0
    chunks_free: int = 0
    chunks_cached: int = 0
    chunks_referenced: int = 0
    chunks_private: int = 0
    chunks_total: int = 0
    chunks_peak: int = 0
    prefix_tokens_queried_total: int = 0
    prefix_tokens_hit_total: int = 0
    prefix_tokens_hit_public_total: int = 0
    prefix_tokens_hit_tier_total: int = 0
    prefill_tokens_computed_total: int = 0
    prompt_tokens_total: int = 0
    generation_tokens_total: int = 0
    preemptions_total: int = 0
    drafts_total: int = 0
    draft_tokens_total: int = 0
    accepted_draft_tokens_total: int = 0
    evicted_chunks_total: int = 0
    pinned_chunks: int = 0
    pins_refused_total: int = 0
    tier_chunks: int = 0
    tier_chunks_capacity: int = 0
    tier_memory_bytes: int = 0
    tier_file_bytes: int = 0
    tier_chunks_written_total: int = 0
    tier_chunks_promoted_total: int = 0
    tier_chunks_damaged_total: int = 0
    step_seconds: Histogram = msgspec.field(
        default_factory=lambda: Histogram.over(STEP_SECONDS_BOUNDS)
    )
    batch_size: Histogram = msgspec.field(default_factory=lambda: Histogram.over(BATCH_SIZE_BOUNDS))
    step_tokens: Histogram = msgspec.field(
        default_factory=lambda: Histogram.over(STEP_TOKENS_BOUNDS)
    )
    invariant_violations: int = 0
    tree: list[TreeNodeInfo] = []
    tenants: dict[str, TenantStats] = {}


class TenantStats(msgspec.Struct, kw_only=True):
    """What one tenant uses of the engine and has used since the engine's start.

    Attributes:
        requests_running, requests_waiting: unfinished requests with and without a running sequence.
        chunks_used: chunks in use by its requests; one that several sequences use is divided among
            them.
        chunks_cached: chunks it added that no sequence uses now.
        chunks_pinned: chunks its pins cover.
        computed_tokens: prompt tokens computed for it; positions that requests of several tenants
            read at the time are divided among them.
        decoded_tokens: positions computed for its output.
        chunk_seconds, cached_chunk_seconds: ``chunks_used`` and ``chunks_cached`` over time.
        evicted_chunks, evicted_tokens: its cached chunks that were evicted, and the tokens in them.
        evictions_for: chunks that were evicted to make place for it; ``evictions_of_others`` those
            of them that other tenants had added.
        pins_refused: pins beyond its budget or the server's.
    """

    requests_running: int = 0
    requests_waiting: int = 0
    chunks_used: float = 0.0
    chunks_cached: int = 0
    chunks_pinned: int = 0
    computed_tokens: int = 0
    decoded_tokens: int = 0
    chunk_seconds: float = 0.0
    cached_chunk_seconds: float = 0.0
    evicted_chunks: int = 0
    evicted_tokens: int = 0
    evictions_for: int = 0
    evictions_of_others: int = 0
    pins_refused: int = 0


class AbortRequest(msgspec.Struct, kw_only=True, tag="abort"):
    """The client no longer wants this request (``index`` None) or this one choice."""

    request_id: str
    index: int | None = None


class StatsRequest(msgspec.Struct, kw_only=True, tag="stats"):
    """Ask for an EngineStats; also the liveness probe of an idle engine."""

    include_tree: bool = False
    include_tenants: bool = False


class SetTenants(msgspec.Struct, kw_only=True, tag="set_tenants"):
    """Replace the limits of all tenants; ``default`` is for those not listed."""

    tenants: dict[str, TenantLimits] = {}
    default: TenantLimits = NO_LIMITS


class Shutdown(msgspec.Struct, kw_only=True, tag="shutdown"):
    """Finish the step in flight and exit."""


class ExplainPrompt(msgspec.Struct, kw_only=True, tag="explain"):
    """Ask why the match of a prompt would end; nothing is computed or recorded."""

    command_id: int
    prompt_token_ids: list[int]
    namespace: str = ""
    tenant: str = ""
    adapter: str = ""


ToEngine = (
    EngineRequest
    | AbortRequest
    | StatsRequest
    | ExplainPrompt
    | CacheCommand
    | CacheWatch
    | SetTenants
    | LoadAdapter
    | UnloadAdapter
    | StartTuning
    | StopTuning
    | LoadPack
    | KeepSnapshot
    | WriteSnapshot
    | Shutdown
)


class EngineReady(msgspec.Struct, kw_only=True, tag="ready"):
    """First message of an engine that has loaded its model: what the client needs to know of it."""

    model_name: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: list[int]
    num_chunks: int
    chunk_size: int
    max_request_tokens: int
    device: str
    backend: str
    isa_level: str = ""
    dtype: str = ""
    kv_dtype: str = ""
    is_kv_quantized: bool = False
    is_deterministic: bool = False
    tier_bits: int = 0


class StartFailed(msgspec.Struct, kw_only=True, tag="start_failed"):
    """Only message of an engine that could not start: one line for the user."""

    message: str


class CommandReply(msgspec.Struct, kw_only=True, tag="reply"):
    """Answers the command with the same id.

    Attributes:
        found: the pin, chunk, tenant or adapter of a command exists.
        num_dropped, num_kept: chunks removed, and those left because a request uses them.
        ended_pins: pins that the command has ended, so that no engine process pins them again.
        adapter: that was loaded.
        error: why the command was refused, in one line.
    """

    command_id: int
    explanation: CacheExplanation | None = None
    pins: list[PinInfo] = []
    tree: list[OwnedNode] = []
    packs: list[PackInfo] = []
    found: bool = True
    num_dropped: int = 0
    num_kept: int = 0
    ended_pins: list[EndedPin] = []
    adapter: AdapterInfo | None = None
    error: str = ""


FromEngine = (
    TokenDelta
    | EngineStats
    | CommandReply
    | CacheReport
    | TuningProgress
    | EngineReady
    | StartFailed
)
