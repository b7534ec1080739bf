"""Summaries of replays, and the smallest pool that serves a trace well."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from chunkllama.simulation.replay import Replayed
from chunkllama.simulation.trace import TraceRequest

QUANTILES: Final = (0.5, 0.9, 0.99)
_RESOLUTION: Final = 1.05  # between the pool that is enough and the one that is not


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolResult:
    """One replay with a pool of ``num_chunks``.

    Attributes:
        requests, refused, too_long: in the trace; answered with 429; answered with 400.
        hit_rate: prompt tokens from the cache over all prompt tokens of requests that ran.
        queue_seconds, first_token_seconds: quantiles 0.5, 0.9 and 0.99 over requests that ran.
        output_tokens_per_second: over the time from the first arrival to the last token.
        busy: part of that time spent in steps.
        peak_chunks: most chunks that running requests held at once.
    """

    num_chunks: int
    requests: int
    refused: int
    too_long: int
    hit_rate: float
    queue_seconds: tuple[float, float, float]
    first_token_seconds: tuple[float, float, float]
    output_tokens_per_second: float
    busy: float
    peak_chunks: int
    evicted_chunks: int
    preemptions: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def summarize(replayed: Replayed, num_chunks: int) -> PoolResult:
    """Summarize one replay."""
    ran = [outcome for outcome in replayed.outcomes if not outcome.refusal]
    prompts = sum(outcome.request.num_prompt_tokens for outcome in ran)
    outputs = sum(outcome.request.num_output_tokens for outcome in ran)
    return PoolResult(
        num_chunks=num_chunks,
        requests=len(replayed.outcomes),
        refused=sum(outcome.refusal == "429" for outcome in replayed.outcomes),
        too_long=sum(outcome.refusal == "400" for outcome in replayed.outcomes),
        hit_rate=sum(outcome.cached_tokens for outcome in ran) / max(prompts, 1),
        queue_seconds=_quantiles(outcome.queue_seconds for outcome in ran),
        first_token_seconds=_quantiles(outcome.first_token_seconds for outcome in ran),
        output_tokens_per_second=outputs / replayed.seconds if replayed.seconds else 0.0,
        busy=replayed.busy_seconds / replayed.seconds if replayed.seconds else 0.0,
        peak_chunks=replayed.peak_chunks,
        evicted_chunks=replayed.stats.evicted_chunks_total,
        preemptions=replayed.stats.preemptions_total,
    )


def _quantiles(values: Iterable[float]) -> tuple[float, float, float]:
    ordered = sorted(values)
    if not ordered:
        return 0.0, 0.0, 0.0
    low, middle, high = (
        ordered[max(math.ceil(quantile * len(ordered)) - 1, 0)] for quantile in QUANTILES
    )
    return low, middle, high


def most_chunks(requests: Sequence[TraceRequest], chunk_size: int) -> int:
    """Return a pool that never evicts: every request with chunks of its own, and one spare."""
    return sum(
        -(-(each.num_prompt_tokens + each.num_output_tokens) // chunk_size) + 1 for each in requests
    )


def least_chunks(requests: Sequence[TraceRequest], chunk_size: int, max_tokens: int) -> int:
    """Return the pool that holds the longest request of at most ``max_tokens`` alone."""
    lengths = [each.num_prompt_tokens + each.num_output_tokens for each in requests]
    longest = max((length for length in lengths if length <= max_tokens), default=1)
    return -(-longest // chunk_size) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Needed:
    """The smallest pool found that keeps ``target`` of the best hit rate without more refusals.

    Attributes:
        num_chunks: its size.
        best_hit_rate: with a pool that never evicts.
        target: wanted share of ``best_hit_rate``.
        tried: the replays made, by size.
    """

    num_chunks: int
    best_hit_rate: float
    target: float
    tried: tuple[PoolResult, ...]


def find_needed(
    run: Callable[[int], PoolResult],
    requests: Sequence[TraceRequest],
    chunk_size: int,
    max_tokens: int,
    target: float,
) -> Needed:
    """Find the pool a trace needs, by bisection over replays, to within 5%.

    Args:
        run: replays the trace with a number of chunks.
        max_tokens: longest request that the model serves.
        target: share of the best hit rate to keep.
    """
    high = most_chunks(requests, chunk_size)
    best = run(high)
    tried = {high: best}
    low = min(least_chunks(requests, chunk_size, max_tokens), high) - 1
    while high > low + 1 and high > low * _RESOLUTION:
        middle = min(max(round(math.sqrt(max(low, 1) * high)), low + 1), high - 1)
        result = tried[middle] = run(middle)
        is_enough = (
            result.hit_rate >= target * best.hit_rate
            and result.refused <= best.refused
            and result.too_long <= best.too_long
        )
        if is_enough:
            high = middle
        else:
            low = middle
    return Needed(
        num_chunks=high,
        best_hit_rate=best.hit_rate,
        target=target,
        tried=tuple(tried[size] for size in sorted(tried)),
    )
