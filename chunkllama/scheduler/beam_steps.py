"""One step of a beam search whose beams have all been computed."""

from __future__ import annotations

from chunkllama.scheduler.request import SequenceGroup
from chunkllama.scheduler.sequence_lifecycle import SequenceLifecycle
from chunkllama.scheduler.step_deltas import StepDeltas


def advance_beams(group: SequenceGroup, deltas: StepDeltas, lifecycle: SequenceLifecycle) -> None:
    """Fork the beams with several children, discard those with none, or end the search."""
    beam = group.beam
    assert beam is not None
    outputs = {i: s.output_token_ids.tolist() for i, s in group.sequences.items()}
    extensions = beam.advance(outputs)
    if not extensions:
        deltas.end_beams(group)
        for sequence in list(group.sequences.values()):
            lifecycle.finish(sequence)
        return
    lifecycle.counters.generation_tokens += len(extensions)
    parents = {e.parent for e in extensions}
    for index in [i for i in group.sequences if i not in parents]:
        lifecycle.discard(group.sequences[index])
    unused = iter(i for i in range(beam.width) if i not in parents)
    logprobs: dict[int, float] = {}
    firsts: dict[int, int] = {}
    for extension in extensions:
        if extension.parent not in firsts:
            firsts[extension.parent] = extension.token_id
            logprobs[extension.parent] = extension.logprob
            continue
        child = lifecycle.fork(group.sequences[extension.parent], next(unused))
        child.append(extension.token_id)
        logprobs[child.index] = extension.logprob
    for index, token_id in firsts.items():
        group.sequences[index].append(token_id)
        lifecycle.running.renew(group.sequences[index])
    beam.bind(logprobs)
