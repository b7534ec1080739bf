"""Sample the rows of a step within the time of their requests; defer the others.

While the model runs, threads compute the masks of the rows that this step samples. A row whose mask
is late, whose grammar is still being compiled, or whose request has used up its time keeps its
hidden state and is sampled in a later step, without another pass of the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, Final

import torch

from chunkllama.backends.base import Backend
from chunkllama.backends.model import RunnableModel
from chunkllama.engine.mask_threads import SLOW_SECONDS, MaskThreads
from chunkllama.engine.row_budget import RowBudget
from chunkllama.engine.sampler import Sampled, Sampler, takes_best
from chunkllama.engine.sequence_state import SequenceState
from chunkllama.model_spec import ModelSpec
from chunkllama.scheduler.output import SampledTokens, SchedulerOutput

# While a step has nothing but masks or compilations to wait for, the inbox is looked at this often.
_POLL_SECONDS: Final = 0.02


class StepSampler:
    """Rows to tokens, step by step.

    Args:
        spec: of the model.
        sequences: state of every slot, which the model runner keeps.
        share: of the model's time that one request's rows may take in a step with others.
        ops: of the model.
        clock: seconds.
    """

    def __init__(
        self,
        spec: ModelSpec,
        sequences: Mapping[int, SequenceState],
        share: float,
        ops: Backend,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._sampler = Sampler(spec.eos_token_ids, ops, clock)
        self._masks = MaskThreads(spec.vocab_size, spec.eos_token_ids, clock)
        self._budget = RowBudget(share)
        self._sequences = sequences
        self._clock = clock
        self._started = 0.0
        self._chosen: list[int] = []
        self._is_alone = True
        self._take_best = False  # all that was asked for
        self._model_seconds = 0.0

    def begin(self, output: SchedulerOutput) -> None:
        """Choose the rows that this step samples and start their masks.

        The longest deferred come first, then the slices in their order.
        """
        self._started = self._clock()
        states = self._sequences
        asked = [*output.awaited, *_samples(output)]
        self._chosen = asked
        for piece in output.slices:
            if piece.num_drafts:
                states[piece.slot].drafts = piece.token_ids[-piece.num_drafts :].tolist()
        self._take_best = all(takes_best(states[slot].sampling) for slot in asked)
        if self._take_best:
            return
        for slot in asked:
            _settle_matcher(states[slot])
        present = self._present(output)
        self._is_alone = len(present) == 1
        rows = [(s, states[s].request_id) for s in asked if states[s].pending_matcher is None]
        chosen = self._budget.choose(rows, present, must_choose=not output.slices)
        self._chosen = [slot for slot in asked if slot in chosen]
        self._masks.start(states[slot] for slot in self._chosen)

    def finish(
        self,
        output: SchedulerOutput,
        model: RunnableModel,
        hidden: torch.Tensor,
        sampled: SampledTokens,
    ) -> None:
        """Sample what was chosen and is ready.

        Args:
            hidden: [R, H] final hidden states of the slices that sample: of the last token that
                is no guess, and of the guesses.
            sampled: gets the tokens, and the slots that are deferred.
        """
        fresh = _first_rows(output)
        states = self._sequences
        waited = 0.0
        if self._take_best:
            slots = self._chosen
        else:
            waiting = self._clock()
            slots = self._ready(output)
            waited = self._clock() - waiting
        for slot in {*output.awaited, *fresh}.difference(slots):
            if slot in fresh:
                row = hidden[fresh[slot]]
                if not bool(row.isfinite().all()):  # now: its K/V must not be shared meanwhile
                    sampled.failed[slot] = "model_nan"
                    continue
                states[slot].hidden = row.clone()
                states[slot].drop_drafts()
            sampled.deferred.add(slot)
        if slots:
            if slots != list(fresh) or sum(states[s].num_rows for s in slots) != hidden.shape[0]:
                hidden = torch.cat([_rows(states[s], hidden, fresh.get(s)) for s in slots])
            began = self._started + waited if output.slices else None
            self._sample(slots, model, hidden, began, sampled)
            if output.wants_forced:
                self._report_forced(slots, sampled)
        if output.slices and not self._take_best:
            self._budget.refill(self._model_seconds, self._present(output))

    def close(self) -> None:
        self._masks.close()

    def _present(self, output: SchedulerOutput) -> set[str]:
        """Ids of the requests that take part in a step."""
        slots = [*output.awaited, *(piece.slot for piece in output.slices)]
        return {self._sequences[slot].request_id for slot in slots}

    def _ready(self, output: SchedulerOutput) -> list[int]:
        """The chosen slots whose masks are there, after a wait that the other requests can bear."""
        states = [self._sequences[slot] for slot in self._chosen]
        limit = self._budget.share * self._model_seconds
        if self._is_alone:
            self._masks.wait_for_all(states)
        else:
            self._masks.wait(limit)
        ready = [slot for slot in self._chosen if self._sequences[slot].is_ready]
        if ready or output.slices:
            return ready
        pending: set[Future[Any]] = {
            task
            for slot in output.awaited
            for task in (self._sequences[slot].pending_matcher, self._sequences[slot].mask_task)
            if task is not None
        }
        wait(pending, _POLL_SECONDS, return_when=FIRST_COMPLETED)
        return [slot for slot in self._chosen if self._sequences[slot].is_ready]

    def _sample(
        self,
        slots: list[int],
        model: RunnableModel,
        hidden: torch.Tensor,
        began: float | None,
        sampled: SampledTokens,
    ) -> None:
        """Draw a token for each slot, and for each of its guesses.

        Args:
            hidden: [R, H], the ``num_rows`` rows of each slot.
            began: when the model's pass did; None if this step has none.
        """
        states = [self._sequences[slot] for slot in slots]
        counts = [state.num_rows for state in states]
        if self._take_best or all(takes_best(state.sampling) for state in states):
            outcomes = _best(model, hidden)
            self._end_model(began)
        else:
            rows = [
                state.after_drafts(row) if row else state
                for state, count in zip(states, counts, strict=True)
                for row in range(count)
            ]
            masks = {row: s.mask for row, s in enumerate(rows) if s.mask is not None}
            outcomes = self._sampler.sample(model.logits(hidden), rows, masks)
            # A device works behind the calls until the tokens are read.
            self._end_model(began, sum(outcome.seconds for outcome in outcomes))
            self._charge(rows, outcomes)
        end = 0
        for slot, state, count in zip(slots, states, counts, strict=True):
            start, end = end, end + count
            _take(slot, state, outcomes[start:end], sampled)

    def _report_forced(self, slots: list[int], sampled: SampledTokens) -> None:
        """Report what the grammars leave no choice for after the tokens of this step.

        It is computed here, between two steps, so a grammar whose masks are slow goes without: the
        same text is what makes them slow. All together take what one request's masks may take, and
        each request's credit pays for its own.
        """
        began = now = self._clock()
        limit = max(self._budget.share * self._model_seconds, SLOW_SECONDS)
        for slot in slots:
            state = self._sequences[slot]
            if state.matcher is None or slot not in sampled.token_ids:
                continue
            if state.slowest_mask > SLOW_SECONDS:
                continue
            if not self._is_alone and now - began > limit:
                return
            with state.using_grammar():
                if forced := state.matcher.forced():
                    sampled.forced[slot] = forced
            before, now = now, self._clock()
            self._budget.charge(state.request_id, now - before)

    def _end_model(self, began: float | None, rows_seconds: float = 0.0) -> None:
        """Note what a pass took but for ``rows_seconds``, which single rows are charged for."""
        if began is not None:
            self._model_seconds = self._clock() - began - rows_seconds

    def _charge(self, states: list[SequenceState], outcomes: list[Sampled]) -> None:
        costs: dict[str, list[float]] = {}
        for state, outcome in zip(states, outcomes, strict=True):
            mask_seconds = state.mask_seconds if state.mask is not None else 0.0
            costs.setdefault(state.request_id, []).append(outcome.seconds + mask_seconds)
        for request_id, seconds in costs.items():
            self._budget.charge_rows(request_id, sum(seconds), len(seconds))


def _samples(output: SchedulerOutput) -> list[int]:
    return [piece.slot for piece in output.slices if piece.samples]


def _first_rows(output: SchedulerOutput) -> dict[int, int]:
    """The first row of each slot that samples, among the rows of those that do."""
    rows, end = {}, 0
    for piece in output.slices:
        if piece.samples:
            rows[piece.slot] = end
            end += 1 + piece.num_drafts
    return rows


def _rows(state: SequenceState, hidden: torch.Tensor, row: int | None) -> torch.Tensor:
    """The hidden states [N, H] of this step, or the one of the step that deferred it."""
    if row is not None:
        return hidden[row : row + state.num_rows]
    assert state.hidden is not None, "a deferred row without its hidden state"
    return state.hidden[None]


def _settle_matcher(state: SequenceState) -> None:
    """Use the matcher that has been made; an error fails its request alone."""
    future = state.pending_matcher
    if future is None or not future.done():
        return
    error = future.exception()
    if error is None:
        state.matcher = future.result()
    else:
        state.fail_grammar(error)
    state.pending_matcher = None


def _best(model: RunnableModel, hidden: torch.Tensor) -> list[Sampled]:
    """Greedy sampling alone needs no logits in memory."""
    values, tokens = model.best_tokens(hidden)
    ids = tokens.where(values.isfinite(), -1).tolist()  # one read of the device
    return [Sampled(max(token, 0), failed="" if token >= 0 else "model_nan") for token in ids]


def _take(slot: int, state: SequenceState, outcomes: list[Sampled], sampled: SampledTokens) -> None:
    """Move a sequence on by its tokens, the last one that of the first wrong guess, and report
    them."""
    drafts = state.drafts[: len(outcomes) - 1]
    state.hidden = None
    state.drop_drafts()
    for outcome, draft in zip(outcomes, [*drafts, None], strict=True):
        if not (state.failed or outcome.failed):
            state.append(outcome.token_id)
        if reason := state.failed or outcome.failed:
            sampled.failed[slot] = reason
            return
        if outcome.token_id != draft:
            break
        sampled.accepted.setdefault(slot, []).append((outcome.token_id, outcome.logprob))
    if state.matcher is not None:
        with state.using_grammar():
            if state.matcher.is_finished:
                if state.matcher.is_closing:
                    sampled.closed_grammar.add(slot)
                sampled.finished_grammar.add(slot)
        if state.failed:
            sampled.failed[slot] = state.failed
            return
    sampled.token_ids[slot] = outcome.token_id
    if outcome.logprob is not None:
        sampled.logprobs[slot] = outcome.logprob
    if outcome.beam_candidates is not None:
        sampled.beam_candidates[slot] = outcome.beam_candidates
