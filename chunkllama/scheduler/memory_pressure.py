"""A full pool: evict, then drop what windows hide, then preempt, then end a pin early; sequences
that wait for each other.
"""

from __future__ import annotations

from operator import itemgetter

from chunkllama.cache.manager import CacheManager
from chunkllama.cache.out_of_sight import drop_out_of_sight, num_out_of_sight
from chunkllama.scheduler.request import Sequence
from chunkllama.scheduler.running import RunningSequences
from chunkllama.scheduler.sequence_lifecycle import SequenceLifecycle


def grow_tails(lifecycle: SequenceLifecycle, cache: CacheManager) -> None:
    """Give every sequence the chunk its next token needs, the oldest first.

    When the pool runs out although everything idle was evicted, the newest sequence goes back to
    the queue. The oldest never does, so it always finishes.
    """
    size = cache.chunk_size
    full = [
        s
        for s in lifecycle.running.by_age
        if s.chunks is not None and len(s.chunks.ids) * size <= s.num_computed_tokens < s.num_tokens
    ]
    hidden = _Hidden(lifecycle.running, cache)
    for sequence in full:
        if sequence.chunks is not None:  # else preempted for an older one
            _grow(sequence, lifecycle, cache, hidden)


def _grow(
    sequence: Sequence, lifecycle: SequenceLifecycle, cache: CacheManager, hidden: _Hidden
) -> None:
    running = lifecycle.running
    while sequence.chunks is not None:
        held = len(sequence.chunks)
        spare = lifecycle.admission.spare_chunks(sequence, held + 1)
        if cache.grow(sequence.chunks, 1, spare):
            running.order.extended(sequence, held)
            return
        if hidden.drop(sequence.tenant):
            continue
        hidden.changed()
        victim = preemption_victim(running)
        if victim is not None:
            lifecycle.preempt(victim)
        elif not cache.pins.break_one():
            # The beams of the oldest request each hold a copy of a chunk that they will share once
            # it is published.
            assert len(running) > 1, "the oldest sequence does not fit the pool alone"
            lifecycle.requeue(running.by_age[-1])


class _Hidden:
    """Chunks behind all windows of decoding sequences. Beams copy their chunks and keep them."""

    def __init__(self, running: RunningSequences, cache: CacheManager) -> None:
        self._running = running
        self._cache = cache
        self._holders: list[Sequence] | None = None  # the one with most of them last

    def changed(self) -> None:
        """Note that fewer sequences or pins than before may keep a chunk in the tree."""
        self._holders = None

    def drop(self, tenant: str) -> bool:
        """Free those of the sequence that has most, the oldest of several, for a tenant that needs
        memory; returns whether there were any.
        """
        if self._holders is None:
            self._holders = self._find()
        if not self._holders:
            return False
        holder = self._holders.pop()
        assert holder.chunks is not None
        drop_out_of_sight(self._cache, holder.chunks, holder.num_computed_tokens, tenant)
        self._running.order.move(holder)
        return True

    def _find(self) -> list[Sequence]:
        if self._cache.reach is None:
            return []
        found: list[tuple[int, Sequence]] = []
        for sequence in reversed(self._running.by_age):
            chunks, computed = sequence.chunks, sequence.num_computed_tokens
            if chunks is None or sequence.group.beam is not None:
                continue
            if computed >= sequence.num_admitted:
                count = num_out_of_sight(self._cache, chunks, computed)
                if count:
                    found.append((count, sequence))
        found.sort(key=itemgetter(0))
        return [sequence for _, sequence in found]


def break_deadlock(lifecycle: SequenceLifecycle, cache: CacheManager) -> bool:
    """Make room where nothing can be computed; returns whether it made any.

    Beams of several requests may wait for one another: the newest sequence is preempted. Beams of
    one request that wait for a slot need larger steps than the last one that did not fit.
    """
    victim = preemption_victim(lifecycle.running)
    if victim is not None:
        lifecycle.preempt(victim)
        return True
    if lifecycle.running.lift_caps():
        return True
    could_start = any(not sequence.group.held for sequence in lifecycle.waiting)
    return could_start and not cache.is_promoting and cache.pins.break_one()


def preemption_victim(running: RunningSequences) -> Sequence | None:
    """Return the newest sequence that is neither the oldest nor one of its beams."""
    if not len(running):
        return None
    oldest = running.by_age[0]
    for sequence in reversed(running.by_age):
        beside_oldest = sequence.group is oldest.group and oldest.group.beam is not None
        if sequence is not oldest and not beside_oldest:
            return sequence
    return None
