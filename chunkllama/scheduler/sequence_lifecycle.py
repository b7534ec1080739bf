"""The second half of a step: computed chunks are shown, tokens join, sequences end."""

from __future__ import annotations

from collections.abc import Callable

from chunkllama.cache.manager import CacheManager
from chunkllama.messages import ChoiceDelta, EngineErrorInfo, FinishReason, TokenDelta
from chunkllama.scheduler.admission import AdmissionControl
from chunkllama.scheduler.counters import Counters
from chunkllama.scheduler.limits import SchedulerLimits
from chunkllama.scheduler.output import SampledTokens
from chunkllama.scheduler.queue import WaitingQueue
from chunkllama.scheduler.request import Sequence, SequenceGroup
from chunkllama.scheduler.running import RunningSequences


class SequenceLifecycle:
    """Applies the results of a step to sequences and cache; also ends and preempts sequences.

    Works on the scheduler's own collections, between two steps only.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        cache: CacheManager,
        groups: dict[str, SequenceGroup],
        waiting: WaitingQueue,
        running: RunningSequences,
        admission: AdmissionControl,
        counters: Counters,
        clock: Callable[[], float],
    ) -> None:
        self._limits = limits
        self._cache = cache
        self._groups = groups
        self._waiting = waiting
        self._running = running
        self._admission = admission
        self._counters = counters
        self._clock = clock
        self._now = 0.0

    def commit(
        self,
        scheduled: list[Sequence],
        sampled: SampledTokens,
        aborts: list[tuple[str, int | None]],
    ) -> list[TokenDelta]:
        """Deltas of the step; what was aborted meanwhile yields none."""
        deltas: dict[str, TokenDelta] = {}
        self._now = self._clock()
        self._cache.end_step()
        if sampled.failed:
            scheduled = self._drop_failed(scheduled, sampled.failed, deltas)
        for sequence in scheduled:
            start = sequence.num_computed_tokens
            sequence.num_computed_tokens = end = start + sequence.num_scheduled
            sequence.num_scheduled = 0
            if start < sequence.num_admitted:
                assert sequence.chunks is not None
                self._counters.prefill_tokens_computed += end - start
                self._cache.did_compute(sequence.chunks, start, end)
        for request_id, index in aborts:
            self.abort(request_id, index)
        for sequence in scheduled:
            if sequence.chunks is not None:  # else aborted
                self._commit_sequence(sequence, sampled, deltas)
        return list(deltas.values())

    def _commit_sequence(
        self, sequence: Sequence, sampled: SampledTokens, deltas: dict[str, TokenDelta]
    ) -> None:
        chunks, group = sequence.chunks, sequence.group
        assert chunks is not None
        computed = sequence.num_computed_tokens
        if computed >= chunks.next_publish:
            adopted = self._cache.publish(chunks, sequence.token_ids, computed)
            if adopted:
                self._running.order.move(sequence)
        if sequence.wants_prompt_logits:
            assert group.prompt_logprobs is not None
            group.prompt_logprobs += sampled.prompt_logprobs.get(sequence.slot, [])
        if computed < sequence.num_tokens:
            return
        if computed == sequence.num_admitted:
            self._prompt_done(sequence)
        if group.max_tokens == 0:
            self._end_scored(sequence, sampled, deltas)
        elif group.beam is not None:
            group.beam.feed(sequence.index, sampled.beam_candidates[sequence.slot])
            if group.beam.is_fed:
                self._advance_beams(group, deltas)
        else:
            self._append_token(sequence, sampled, deltas)

    def _prompt_done(self, sequence: Sequence) -> None:
        """Every token known at admission is computed."""
        group = sequence.group
        if group.prefilled_at is None:
            group.prefilled_at = self._now
        if sequence.wants_prompt_logits:
            assert group.prompt_logprobs is not None
            # the last row's next position is the first output token, not the prompt's
            del group.prompt_logprobs[group.num_prompt_tokens :]
            group.collects_prompt_logprobs = False
        if group.request.pin_seconds > 0 and not group.is_pinned:
            group.is_pinned = True
            until = group.request.cache_until
            prompt = sequence.prompt_token_ids[:until]
            group.pin_refused = not self._cache.pin(
                prompt, group.request.namespace, group.request.pin_seconds
            )

    def _append_token(
        self, sequence: Sequence, sampled: SampledTokens, deltas: dict[str, TokenDelta]
    ) -> None:
        slot = sequence.slot
        token_id = sampled.token_ids[slot]
        sequence.append(token_id)
        self._counters.generation_tokens += 1
        reason, stop_token_id = sequence.finish_reason(self._limits.eos_token_ids)
        if reason is None and slot in sampled.finished_grammar:
            reason = "stop"
        entry = sampled.logprobs.get(slot)
        choice = ChoiceDelta(
            index=sequence.index,
            token_ids=[token_id],
            logprobs=None if entry is None else [entry],
            finish_reason=reason,
            stop_token_id=stop_token_id,
        )
        self._delta(sequence.group, deltas).choices.append(choice)
        if reason is not None:
            self.finish(sequence)

    def _end_scored(
        self, sequence: Sequence, sampled: SampledTokens, deltas: dict[str, TokenDelta]
    ) -> None:
        """A prompt that was only scored or pooled is done."""
        delta = self._delta(sequence.group, deltas)
        delta.embedding = sampled.embeddings.get(sequence.slot)
        reason: FinishReason = "length" if delta.embedding is None else "stop"
        choice = ChoiceDelta(index=sequence.index, token_ids=[], finish_reason=reason)
        delta.choices.append(choice)
        self.finish(sequence)

    def _delta(self, group: SequenceGroup, deltas: dict[str, TokenDelta]) -> TokenDelta:
        """The request's delta of this step, with what only its first delta carries."""
        delta = deltas.get(group.request_id)
        if delta is None:
            assert group.prefilled_at is not None
            delta = TokenDelta(
                request_id=group.request_id,
                choices=[],
                num_cached_tokens=max(group.num_cached_tokens, 0),
                num_cache_write_tokens=group.num_cache_write_tokens,
                pin_refused=group.pin_refused,
                queue_seconds=group.started_at - group.arrived_at,
                prefill_seconds=group.prefilled_at - group.started_at,
                decode_seconds=self._now - group.prefilled_at,
            )
            deltas[group.request_id] = delta
        if group.prompt_logprobs is not None and not group.collects_prompt_logprobs:
            delta.prompt_logprobs, group.prompt_logprobs = group.prompt_logprobs, None
        return delta

    # -- ends -------------------------------------------------------------------------------

    def finish(self, sequence: Sequence) -> None:
        """The sequence is done; what it computed stays in the cache."""
        if sequence.num_output_tokens:
            self._admission.lengths.add(sequence.num_output_tokens)
        chunks = self._running.stop(sequence)
        self._admission.drain.add(len(chunks) - chunks.num_shared)
        self._cache.release(chunks, sequence.token_ids, sequence.num_computed_tokens)
        self._forget(sequence)

    def abort(self, request_id: str, index: int | None) -> None:
        """Drop a request or one choice. Beams have no choices before they end: all are dropped."""
        group = self._groups.get(request_id)
        if group is None:
            return
        for sequence in list(group.sequences.values()):
            if index in (None, sequence.index) or group.beam is not None:
                self._leave(sequence)
                self._forget(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Back to the queue; its nodes stay in the tree, so recomputing it is mostly a hit.

        Beams advance together, so they are preempted together.
        """
        group = sequence.group
        together = list(group.sequences.values()) if group.beam else [sequence]
        for each in together:
            if each.chunks is not None:
                self._counters.preemptions += 1
                self.requeue(each)

    def requeue(self, sequence: Sequence) -> None:
        """Back to the queue, to be computed again from what the cache has kept."""
        self._leave(sequence)
        if sequence.group.beam is not None:
            sequence.group.beam.forget(sequence.index)
        self._waiting.add(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Out of the running or the waiting set, keeping what is computed in the cache."""
        if sequence.chunks is None:
            self._waiting.remove(sequence)
            return
        computed = sequence.num_computed_tokens
        self._cache.release(self._running.stop(sequence), sequence.token_ids, computed)
        sequence.num_computed_tokens = 0

    def _forget(self, sequence: Sequence) -> None:
        group = sequence.group
        del group.sequences[sequence.index]
        if not group.sequences:
            del self._groups[group.request_id]

    # -- failures ---------------------------------------------------------------------------

    def _drop_failed(
        self,
        scheduled: list[Sequence],
        failed: dict[int, str],
        deltas: dict[str, TokenDelta],
    ) -> list[Sequence]:
        """End requests whose slots failed; returns the sequences whose results may be used.

        Sequences that joined the step of a failed leader read chunks that cannot be trusted:
        they go back to the queue, and the first of them leads in the next ``schedule()``.
        """
        groups = {s.group.request_id: s.group for s in scheduled if s.slot in failed}
        reasons = {s.group.request_id: failed[s.slot] for s in scheduled if s.slot in failed}
        rest = [s for s in scheduled if s.group.request_id not in groups]
        for sequence in scheduled:
            if sequence.group.request_id in groups:
                self._undo(sequence)
        tainted = [s for s in rest if s.chunks and not self._cache.is_readable(s.chunks)]
        for sequence in tainted:
            self._undo(sequence)
        for request_id, group in groups.items():
            self._fail(group)
            reason = reasons[request_id]
            deltas[request_id] = TokenDelta(
                request_id=request_id,
                choices=[],
                error=EngineErrorInfo(
                    kind="failed",
                    message=f"the model failed on this request: {reason}",
                    code=reason,
                ),
            )
        for sequence in tainted:
            self.requeue(sequence)
        return [s for s in rest if s not in tainted]

    def _undo(self, sequence: Sequence) -> None:
        assert sequence.chunks is not None
        start = sequence.num_computed_tokens
        self._cache.undo_compute(sequence.chunks, start, start + sequence.num_scheduled)

    def _fail(self, group: SequenceGroup) -> None:
        """The whole request ends; nothing that it alone computed is kept."""
        for sequence in list(group.sequences.values()):
            if sequence.chunks is None:
                self._waiting.remove(sequence)
            else:
                self._cache.discard(self._running.stop(sequence))
            self._forget(sequence)

    # -- beams ------------------------------------------------------------------------------

    def _advance_beams(self, group: SequenceGroup, deltas: dict[str, TokenDelta]) -> None:
        """All beams are fed: fork those with several children, drop those with none."""
        beam = group.beam
        assert beam is not None
        outputs = {i: s.output_token_ids.tolist() for i, s in group.sequences.items()}
        extensions = beam.advance(outputs)
        if not extensions:
            self._end_beams(group, deltas)
            return
        self._counters.generation_tokens += len(extensions)
        parents = {e.parent for e in extensions}
        for index in [i for i in group.sequences if i not in parents]:
            self._cache.discard(self._running.stop(group.sequences.pop(index)))
        unused = iter(i for i in range(beam.width) if i not in parents)
        logprobs: dict[int, float] = {}
        firsts: dict[int, int] = {}
        for extension in extensions:
            if extension.parent not in firsts:
                firsts[extension.parent] = extension.token_id
                logprobs[extension.parent] = extension.logprob
                continue
            child = self._fork(group.sequences[extension.parent], next(unused))
            child.append(extension.token_id)
            logprobs[child.index] = extension.logprob
        for index, token_id in firsts.items():
            group.sequences[index].append(token_id)
            self._running.renew(group.sequences[index])
        beam.bind(logprobs)

    def _fork(self, parent: Sequence, index: int) -> Sequence:
        """A sequence with the same tokens: running beside its parent, or queued without room."""
        assert parent.chunks is not None
        child = Sequence(parent.group, index, parent.token_ids.tolist())
        parent.group.sequences[index] = child
        chunks = None
        if self._running.num_free_slots:
            chunks = self._cache.fork(parent.chunks, parent.num_computed_tokens)
        if chunks is None:
            self._waiting.add(child)
        else:
            self._running.start(child, chunks, parent.num_computed_tokens)
            child.num_admitted = parent.num_computed_tokens
        return child

    def _end_beams(self, group: SequenceGroup, deltas: dict[str, TokenDelta]) -> None:
        assert group.beam is not None
        delta = self._delta(group, deltas)
        for rank, hypothesis in enumerate(group.beam.best()):
            delta.choices.append(
                ChoiceDelta(
                    index=rank,
                    token_ids=hypothesis.token_ids,
                    finish_reason=hypothesis.finish_reason,
                    stop_token_id=hypothesis.stop_token_id,
                )
            )
        for sequence in list(group.sequences.values()):
            self.finish(sequence)
