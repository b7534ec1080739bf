"""The deltas of one step: what each request gained, one ``TokenDelta`` per request."""

from __future__ import annotations

from chunkllama.messages import (
    ChoiceDelta,
    EngineErrorInfo,
    FinishReason,
    TokenDelta,
    TokenLogprob,
)
from chunkllama.scheduler.request import Sequence, SequenceGroup


class StepDeltas:
    """Collects the deltas of a step that was committed at ``now`` (monotonic seconds)."""

    def __init__(self, now: float) -> None:
        self.now = now
        self._deltas: dict[str, TokenDelta] = {}

    def all(self) -> list[TokenDelta]:
        return list(self._deltas.values())

    def add_tokens(
        self,
        sequence: Sequence,
        token_ids: list[int],
        logprobs: list[TokenLogprob] | None,
        reason: FinishReason | None,
        stop_token_id: int | None,
    ) -> None:
        """Add sampled tokens, and the reason if the last one ends the choice."""
        choice = ChoiceDelta(
            index=sequence.index,
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=reason,
            stop_token_id=stop_token_id,
        )
        self._of(sequence.group).choices.append(choice)

    def end_prompt(self, sequence: Sequence, embedding: list[float] | None) -> None:
        """End a prompt that was only scored or pooled."""
        delta = self._of(sequence.group)
        delta.embedding = embedding
        reason: FinishReason = "length" if embedding is None else "stop"
        choice = ChoiceDelta(index=sequence.index, token_ids=[], finish_reason=reason)
        delta.choices.append(choice)

    def end_beams(self, group: SequenceGroup) -> None:
        """Add the best hypotheses of a finished search, best first."""
        assert group.beam is not None
        delta = self._of(group)
        for rank, hypothesis in enumerate(group.beam.best()):
            delta.choices.append(
                ChoiceDelta(
                    index=rank,
                    token_ids=hypothesis.token_ids,
                    finish_reason=hypothesis.finish_reason,
                    stop_token_id=hypothesis.stop_token_id,
                )
            )

    def fail(self, group: SequenceGroup, reason: str) -> None:
        """End the whole request with an error."""
        self._deltas[group.request_id] = TokenDelta(
            request_id=group.request_id,
            choices=[],
            error=EngineErrorInfo(
                kind="failed",
                message=f"the model failed on this request: {reason}",
                code=reason,
            ),
        )

    def _of(self, group: SequenceGroup) -> TokenDelta:
        """The request's delta of this step, with the fields that only its first delta carries."""
        request_id = group.request.request_id
        delta = self._deltas.get(request_id)
        if delta is None:
            assert group.prefilled_at is not None
            delta = TokenDelta(
                request_id=request_id,
                choices=[],
                num_cached_tokens=max(group.num_cached_tokens, 0),
                num_rounded_tokens=group.num_rounded_tokens,
                num_cache_write_tokens=group.num_cache_write_tokens,
                pin_refused=group.pin_refused,
                queue_seconds=group.started_at - group.arrived_at,
                prefill_seconds=group.prefilled_at - group.started_at,
                decode_seconds=self.now - group.prefilled_at,
            )
            self._deltas[request_id] = delta
        delta.num_accepted_predicted += group.num_accepted_predicted
        delta.num_rejected_predicted += group.num_rejected_predicted
        group.num_accepted_predicted = group.num_rejected_predicted = 0
        if group.explanation is not None:
            delta.explanation, group.explanation = group.explanation, None
        if group.prompt_logprobs is not None and not group.collects_prompt_logprobs:
            delta.prompt_logprobs, group.prompt_logprobs = group.prompt_logprobs, None
        return delta
