"""Continue sequences with the tokens that a step sampled for them."""

from __future__ import annotations

from chunkllama.scheduler.beam_steps import advance_beams
from chunkllama.scheduler.limits import SchedulerLimits
from chunkllama.scheduler.output import SampledTokens
from chunkllama.scheduler.request import Sequence
from chunkllama.scheduler.sequence_lifecycle import SequenceLifecycle
from chunkllama.scheduler.step_deltas import StepDeltas


def use_sample(
    sequence: Sequence,
    sampled: SampledTokens,
    deltas: StepDeltas,
    lifecycle: SequenceLifecycle,
    limits: SchedulerLimits,
) -> None:
    """Continue a sequence with its next token, unless the executor has deferred it."""
    group = sequence.group
    sequence.awaits_sample = sequence.slot in sampled.deferred
    if sequence.awaits_sample:
        return
    if group.beam is None:
        _append_token(sequence, sampled, deltas, lifecycle, limits)
        return
    group.beam.feed(sequence.index, sampled.beam_candidates[sequence.slot])
    if group.beam.is_fed:
        advance_beams(group, deltas, lifecycle)


def _append_token(
    sequence: Sequence,
    sampled: SampledTokens,
    deltas: StepDeltas,
    lifecycle: SequenceLifecycle,
    limits: SchedulerLimits,
) -> None:
    slot = sequence.slot
    token_id = sampled.token_ids[slot]
    sequence.append(token_id)
    sequence.draft.forced = sampled.forced.get(slot, [])
    token_ids, logprob = [token_id], sampled.logprobs.get(slot)
    logprobs = None if logprob is None else [logprob]
    if accepted := sampled.accepted.get(slot):
        token_ids[:0] = [each for each, _ in accepted]
        logprobs = [*(each for _, each in accepted if each is not None), *(logprobs or ())] or None
    lifecycle.counters.generation_tokens += len(token_ids)
    reason, stop_token_id = sequence.finish_reason(limits.eos_token_ids)
    if reason is None and slot in sampled.finished_grammar:
        reason = "length" if slot in sampled.closed_grammar else "stop"
    deltas.add_tokens(sequence, token_ids, logprobs, reason, stop_token_id)
    if reason is not None:
        lifecycle.finish(sequence)
