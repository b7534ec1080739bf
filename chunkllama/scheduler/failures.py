"""Requests on which the model failed, the sequences that read what they computed, and steps that
did not fit the device's memory.
"""

from __future__ import annotations

from chunkllama.cache.manager import CacheManager
from chunkllama.scheduler.output import SampledTokens, SchedulerOutput
from chunkllama.scheduler.request import Sequence
from chunkllama.scheduler.sequence_lifecycle import SequenceLifecycle
from chunkllama.scheduler.step_deltas import StepDeltas


def usable(
    scheduled: list[Sequence],
    output: SchedulerOutput,
    sampled: SampledTokens,
    deltas: StepDeltas,
    lifecycle: SequenceLifecycle,
    cache: CacheManager,
) -> list[Sequence]:
    """Take failures out of a step; returns the sequences whose results may be used.

    After a step that did not fit the memory all its sequences go back to the queue, and fewer run
    for a while. Requests that do not fit a step of their own end.
    """
    caps = lifecycle.running.caps
    if not sampled.ran_out:
        caps.grow()
        failed = sampled.failed
        return _drop_failed(scheduled, failed, deltas, lifecycle, cache) if failed else scheduled
    if not caps.shrink(len(scheduled), output.num_tokens):
        failed = {sequence.slot: "out_of_memory" for sequence in scheduled}
        return _drop_failed(scheduled, failed, deltas, lifecycle, cache)
    for sequence in scheduled:
        _undo(sequence, cache)
    copies = {copy[1]: copy for copy in output.copies}
    for sequence in scheduled:  # before any is preempted, and with it the other beams of its search
        assert sequence.chunks is not None
        # They may not have been made.
        sequence.chunks.copies += [copies[i] for i in sequence.chunks.ids.tolist() if i in copies]
    for sequence in scheduled:
        lifecycle.preempt(sequence)
    return []


def _drop_failed(
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
