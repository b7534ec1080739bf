"""Usage of each tenant: tokens, time in the queue, chunk-seconds, refusals.

Tokens and refusals are counted in this process, so they do not change when the engine is restarted.
What the engine counts (computed tokens, chunk-seconds, evictions) comes with its snapshots; of an
engine process that ends, what it did after its last snapshot is not known.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from chunkllama.messages import EngineStats, TenantStats

# Fields of TenantStats that only rise, and those that describe a moment.
ENGINE_TOTALS: Final = (
    "computed_tokens", "decoded_tokens", "chunk_seconds", "cached_chunk_seconds", "evicted_chunks",
    "evicted_tokens", "evictions_for", "evictions_of_others", "pins_refused",
)  # fmt: skip
ENGINE_GAUGES: Final = (
    "requests_running", "requests_waiting", "chunks_used", "chunks_cached", "chunks_pinned",
)  # fmt: skip


@dataclass(slots=True)
class TenantUsage:
    """What this process has counted for one tenant.

    Attributes:
        requests: handed to the engine.
        prompt_tokens, cached_tokens, output_tokens: of requests that have begun to answer.
        queue_seconds: sum of their times from arrival to the first step.
        rejections: refused requests by reason.
    """

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    queue_seconds: float = 0.0
    rejections: Counter[str] = field(default_factory=Counter)


class UsageRecorder:
    """Usage by tenant since ``since`` (Unix time)."""

    def __init__(self) -> None:
        self.since = int(time.time())
        self._tenants: dict[str, TenantUsage] = {}
        self._last = EngineStats()
        self._before: dict[str, TenantStats] = {}

    def __getitem__(self, tenant: str) -> TenantUsage:
        """Return the tenant's usage, which the caller may add to."""
        usage = self._tenants.get(tenant)
        if usage is None:
            usage = self._tenants[tenant] = TenantUsage()
        return usage

    def tenants(self) -> list[str]:
        """Names of all tenants with usage of any kind."""
        return sorted({*self._tenants, *self._last.tenants, *self._before})

    def update(self, stats: EngineStats) -> None:
        """Store an engine snapshot; one with fewer steps comes from a new engine process."""
        if stats.steps_total < self._last.steps_total:
            self.restarted()
        self._last = stats

    def restarted(self) -> None:
        """Add up the totals of an engine process that has ended."""
        for name, last in self._last.tenants.items():
            before = self._before.setdefault(name, TenantStats())
            for key in ENGINE_TOTALS:
                setattr(before, key, getattr(before, key) + getattr(last, key))
        self._last = EngineStats()

    def engine(self, tenant: str) -> TenantStats:
        """Totals of all engine processes, and gauges of the last snapshot."""
        before = self._before.get(tenant, TenantStats())
        last = self._last.tenants.get(tenant, TenantStats())
        return TenantStats(
            **{key: getattr(last, key) for key in ENGINE_GAUGES},
            **{key: getattr(before, key) + getattr(last, key) for key in ENGINE_TOTALS},
        )
