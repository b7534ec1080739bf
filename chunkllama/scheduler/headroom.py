"""Slots and chunks that the running requests of one tenant leave to other tenants.

A tenant's running sequences may be ``HEADROOM`` times as many as the slots that stay free, and so
their chunks: one tenant takes at most 8/9 of both, and k tenants leave 1 / (1 + 8k) (the rule of
``intake.check_places``, with another factor). A request of a tenant that has none running therefore
starts in the next step, however many requests another tenant has sent. Chunks that a sequence
shared when it was admitted do not count; a tenant with nothing running is never held back.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from chunkllama.cache.manager import CacheManager, Match
from chunkllama.scheduler.limits import SchedulerLimits
from chunkllama.scheduler.request import Sequence
from chunkllama.scheduler.sequence_lifecycle import SequenceLifecycle

HEADROOM: Final = 8


class Headroom:
    """What each tenant's running sequences hold while a step is put together.

    It holds no tenant back with another policy than ``fair``, or where there is one tenant.
    """

    def __init__(
        self, lifecycle: SequenceLifecycle, cache: CacheManager, limits: SchedulerLimits
    ) -> None:
        self._lifecycle = lifecycle
        self._cache = cache
        self._is_active = limits.policy == "fair" and lifecycle.accounts.are_several
        self._slots: Counter[str] = Counter()
        self._chunks: Counter[str] = Counter()
        if self._is_active:
            for sequence in lifecycle.running.by_age:
                self.add(sequence)

    def add(self, sequence: Sequence) -> None:
        """Count a sequence that has started."""
        tenant, chunks = sequence.group.request.tenant, sequence.chunks
        assert chunks is not None
        self._slots[tenant] += 1
        self._chunks[tenant] += len(chunks.ids) - chunks.num_shared

    def remains(self, sequence: Sequence, match: Match, promised: int) -> bool:
        """Whether enough is left to other tenants if the sequence starts.

        Args:
            match: what it would share.
            promised: chunks that running sequences will still ask for.
        """
        tenant, group = sequence.group.request.tenant, sequence.group
        if not self._is_active or not tenant or not self._slots[tenant] or group.is_running:
            return True
        more = self._lifecycle.admission.num_needed(sequence, match)
        free_slots = self._lifecycle.running.num_free_slots - 1
        free_chunks = self._cache.num_available - promised - more
        return self._slots[tenant] + 1 <= HEADROOM * (free_slots + 1) and self._chunks[
            tenant
        ] + more <= HEADROOM * (free_chunks + 1)
