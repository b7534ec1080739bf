"""A full pool: evict, then drop what windows hide, then preempt, then end a pin early; sequences
that wait for each other.
"""

from __future__ import annotations

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
    for sequence in full:
        if sequence.chunks is not None:  # else preempted for an older one
            _grow(sequence, lifecycle, cache)


def _grow(sequence: Sequence, lifecycle: SequenceLifecycle, cache: CacheManager) -> None:
    running = lifecycle.running
    while sequence.chunks is not None:
        held = len(sequence.chunks)
        spare = lifecycle.admission.spare_chunks(sequence, held + 1)
        if cache.grow(sequence.chunks, 1, spare):
            running.order.extended(sequence, held)
            return
        if _drop_out_of_sight(running, cache):
            continue
        victim = preemption_victim(running)
        if victim is not None:
            lifecycle.preempt(victim)
        elif not cache.pins.break_one():
            # The beams of the oldest request each hold a copy of a chunk that they will share once
            # it is published.
            assert len(running) > 1, "the oldest sequence does not fit the pool alone"
            lifecycle.requeue(running.by_age[-1])


def _drop_out_of_sight(running: RunningSequences, cache: CacheManager) -> bool:
    """Free the chunks behind all windows of the decoding sequence that has most of them; returns
    whether there were any. Beams copy their chunks and keep them.
    """
    if cache.reach is None:
        return False
    most, holder = 0, None
    for sequence in running.by_age:
        chunks, computed = sequence.chunks, sequence.num_computed_tokens
        if chunks is None or sequence.group.beam is not None or computed < sequence.num_admitted:
            continue
        count = num_out_of_sight(cache, chunks, computed)
        if count > most:
            most, holder = count, sequence
    if holder is None or holder.chunks is None:
        return False
    drop_out_of_sight(cache, holder.chunks, holder.num_computed_tokens)
    running.order.move(holder)
    return True


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
