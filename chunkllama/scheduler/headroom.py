"""Slots and chunks that the running requests of one tenant leave to other tenants.

A tenant's running sequences may be ``HEADROOM`` times as many as the slots that stay free, and so
their chunks: one tenant takes at most 8/9 of both, and k tenants leave 1 / (1 + 8k) (the rule of
``intake.check_places``, with another factor). A tenant that runs alone leaves a slot in any case.
A request of a tenant that has none running therefore starts in the next step, however many requests
another tenant has sent, and with however many choices. Chunks that a sequence shared when it was
admitted do not count; a tenant with nothing running is never held back.

A beam search counts as many slots as it has beams, also before they are forked. Its beams advance
together, so those that wait for a slot are not held back once one of them runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from chunkllama.cache.manager import CacheManager, Match
from chunkllama.scheduler.limits import SchedulerLimits
from chunkllama.scheduler.request import Sequence, SequenceGroup
from chunkllama.scheduler.sequence_lifecycle import SequenceLifecycle

HEADROOM: Final = 8


class Headroom:
    """What each tenant's running sequences hold while a step is put together.

    It holds no tenant back with another policy than ``fair``, or where there is one tenant.

    Attributes:
        promised: chunks that running sequences will still ask for.
    """

    def __init__(
        self, lifecycle: SequenceLifecycle, cache: CacheManager, limits: SchedulerLimits
    ) -> None:
        self._lifecycle = lifecycle
        self._cache = cache
        self._is_active = limits.policy == "fair" and lifecycle.accounts.are_several
        self._slots: dict[str, int] = {}
        self._chunks: dict[str, int] = {}
        self._num_slots = 0  # of all tenants
        self._promised_slots = 0  # to beams that running searches will still fork
        self.promised = lifecycle.admission.reserved(lifecycle.running.by_age)
        if self._is_active:
            self._count(lifecycle.running.by_age)

    def add(self, sequence: Sequence) -> None:
        """Count a sequence that has started."""
        self.promised += self._lifecycle.admission.reserved([sequence])
        if self._is_active:
            self._count([sequence])

    def _count(self, sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            group, chunks, tenant = sequence.group, sequence.chunks, sequence.tenant
            assert chunks is not None
            slots = 1 if group.beam is None else _num_slots(group)
            self._num_slots += slots
            self._promised_slots += slots - 1
            if tenant in self._slots:
                self._slots[tenant] += slots
                self._chunks[tenant] += chunks.num_own
            else:
                self._slots[tenant], self._chunks[tenant] = slots, chunks.num_own

    def remains(self, sequence: Sequence, match: Match) -> bool:
        """Whether enough is left to other tenants if the sequence starts; it shares ``match``."""
        tenant, group = sequence.tenant, sequence.group
        if not self._is_active or not tenant or tenant not in self._slots:
            return True
        if group.beam is not None and group.is_running:
            return True
        slots = _num_slots(group)
        free_slots = self._lifecycle.running.num_free_slots - self._promised_slots - slots
        runs_alone = self._slots[tenant] == self._num_slots
        if free_slots < runs_alone or self._slots[tenant] + slots > HEADROOM * (free_slots + 1):
            return False
        more = self._lifecycle.admission.num_needed(sequence, match)
        free_chunks = self._cache.num_available - self.promised - more
        return self._chunks[tenant] + more <= HEADROOM * (free_chunks + 1)


def _num_slots(group: SequenceGroup) -> int:
    """Slots that a sequence of the group takes, with those of the beams that follow it."""
    beam = group.beam
    if beam is None or (beam.is_expanded and group.is_running):
        return 1
    return len(group.sequences) if beam.is_expanded else beam.width
