"""Requests on which the model failed, and the sequences that read what they computed."""

from __future__ import annotations

from chunkllama.cache.manager import CacheManager
from chunkllama.scheduler.request import Sequence
from chunkllama.scheduler.sequence_lifecycle import SequenceLifecycle
from chunkllama.scheduler.step_deltas import StepDeltas


def drop_failed(
    scheduled: list[Sequence],
    failed: dict[int, str],
    deltas: StepDeltas,
    lifecycle: SequenceLifecycle,
    cache: CacheManager,
) -> list[Sequence]:
    """End requests whose slots failed; returns the sequences whose results may be used.

    Sequences that joined the step of a failed leader read chunks that cannot be trusted: they go
    back to the queue, and the first of them leads in the next ``schedule()``.
    """
    reasons = {s.group.request_id: failed[s.slot] for s in scheduled if s.slot in failed}
    dropped = [s for s in scheduled if s.group.request_id in reasons]
    rest = [s for s in scheduled if s.group.request_id not in reasons]
    for sequence in dropped:
        _undo(sequence, cache)
    tainted = [s for s in rest if s.chunks and not cache.is_readable(s.chunks)]
    for sequence in tainted:
        _undo(sequence, cache)
    for request_id, reason in reasons.items():
        group = lifecycle.groups[request_id]
        for sequence in list(group.sequences.values()):
            lifecycle.discard(sequence)
        deltas.fail(group, reason)
    for sequence in tainted:
        lifecycle.requeue(sequence)
    return [s for s in rest if s not in tainted]


def _undo(sequence: Sequence, cache: CacheManager) -> None:
    assert sequence.chunks is not None
    if not sequence.num_scheduled:  # it only awaited a sample
        return
    start = sequence.num_computed_tokens
    cache.undo_compute(sequence.chunks, start, start + sequence.num_scheduled)
