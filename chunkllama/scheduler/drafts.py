"""Speculation: rows that check guesses at the next tokens, where they are likely to save time.

A guess is kept only if it is the token that the sampler draws at its position, so the output is
that of a run without guesses. Guesses come from what a grammar leaves no choice for, from the
prediction that a request carries, from the sequence's own tokens, from the tenant's recent outputs
in the same namespace, and, where these have nothing better, from a draft model
(``model_drafts.py``). A wrong guess leaves nothing behind: its K/V lie behind the tokens that
count, and the next rows overwrite them.

A row of a guess is worth its chance of being kept and costs what such rows have cost in steps like
this one (``step_cost.py``). The step takes the guesses with the best chances, as many as give the
most tokens per second; none if that is not ``MIN_GAIN`` better than a plain step. A step that
computes prompts has none. Beside other tenants' rows, guesses lengthen a step at most to
``max_tenant_slowdown`` times a plain one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import numpy as np

from chunkllama.cache_messages import CacheCommand
from chunkllama.scheduler.draft_search import (
    MAX_MATCH,
    SEPARATOR,
    Int32Array,
    find_continuation,
)
from chunkllama.scheduler.draft_state import DraftSource, DraftState, Rate
from chunkllama.scheduler.limits import SchedulerLimits
from chunkllama.scheduler.model_drafts import Candidate, DraftModel, ModelDrafts
from chunkllama.scheduler.output import SampledTokens
from chunkllama.scheduler.request import Sequence
from chunkllama.scheduler.sequence_lifecycle import SequenceLifecycle
from chunkllama.scheduler.step_cost import MIN_GAIN, StepCost

MAX_DRAFT: Final = 15  # guesses of one sequence in a step
MAX_ROWS: Final = 128  # guesses of all sequences in a step
MIN_CHANCE: Final = 0.05  # of being kept, below which a guess is not worth looking at
MAX_PAUSE: Final = 16  # steps without guesses after guesses that failed
_PRIOR_WEIGHT: Final = 2.0  # trials that the average of all sequences counts for
_ROWS_TO_TRY: Final = (1, 2, 4, 8, 16, 32, 64, MAX_ROWS)

Kind = tuple[DraftSource, int]
_MODEL: Final[Kind] = ("model", 0)


class Drafts:
    """Chooses the guesses of each step and takes in what came of them.

    Args:
        clock: monotonic seconds.

    Attributes:
        may_pay: guesses may save time in a step like the one in flight.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        lifecycle: SequenceLifecycle,
        chunk_size: int,
        clock: Callable[[], float],
    ) -> None:
        self._limits = limits
        self._lifecycle = lifecycle
        self._chunk_size = chunk_size
        self._clock = clock
        self._cost = StepCost()
        self._rates: dict[Kind, Rate] = {}
        self._model: ModelDrafts | None = None
        self.may_pay = False
        self._started = 0.0
        self._shape: tuple[int, int] | None = None  # sequences and guesses of the step in flight

    def use_model(self, model: DraftModel) -> None:
        """Let a draft model guess, too."""
        self._model = ModelDrafts(model, self._cost, self._rate(*_MODEL), self._clock)

    def propose(self, scheduled: list[Sequence]) -> None:
        """Give guesses to sequences of the step that is being put together."""
        self._shape, self.may_pay = None, False
        if not self._limits.speculates or not scheduled or not all(map(_decodes, scheduled)):
            return
        self._started = self._clock()
        count = len(scheduled)
        caps = self._lifecycle.running.caps
        left = min(self._limits.max_num_batched_tokens, caps.tokens) - count
        most = min(self._cost.most_drafts(count), MAX_ROWS, left)
        total = 0
        self.may_pay = most > 0 and self._saves_time(count, most)
        if self.may_pay:
            each = min(MAX_DRAFT, most)
            longest = self._longest(scheduled)
            drafted = [s for s in scheduled if self._look(s, each, count)]
            drafted += self._ask_model(scheduled, count, most, longest)
            total = self._choose(drafted, count, most, longest)
        self._shape = count, total

    def _longest(self, scheduled: list[Sequence]) -> float:
        """Return the longest time that the step may take, relative to one without guesses."""
        slowdown = self._limits.max_tenant_slowdown
        if self._limits.policy != "fair" or slowdown == 0.0:
            return math.inf
        tenants = {s.tenant for s in scheduled}
        return slowdown if len(tenants) > 1 else math.inf

    def end_step(self) -> None:
        """Take in the time of the step in flight."""
        if self._shape is not None:
            self._cost.add(*self._shape, self._clock() - self._started)

    def _saves_time(self, count: int, most: int) -> bool:
        """Whether guesses that are all right would save time in a step of ``count`` sequences."""
        return any(
            count + rows >= MIN_GAIN * count * self._cost.seconds(count, rows)
            for rows in _ROWS_TO_TRY
            if rows <= most
        )

    def after_command(self, command: CacheCommand) -> None:
        """Forget recent outputs when an operator drops what is cached."""
        if command.action in ("drop_branch", "drop_tenant"):
            self._lifecycle.recent.forget()

    # -- guesses ----------------------------------------------------------------------------

    def _look(self, sequence: Sequence, most: int, count: int) -> bool:
        """Look for up to ``most`` guesses at what follows a sequence; whether there are any."""
        state = sequence.draft
        most = min(most, self._room(sequence))
        if most <= 0:
            return False
        tokens, kinds = self._find(sequence, most, count)
        state.token_ids = self._before_end(sequence, tokens)
        state.kinds = kinds[: len(state.token_ids)]
        return bool(state.token_ids)

    def _room(self, sequence: Sequence) -> int:
        """Guesses that a sequence may have; it can have K/V and use for no more."""
        chunks, group = sequence.chunks, sequence.group
        assert chunks is not None
        if group.beam is not None:
            return 0
        return min(
            group.max_tokens - sequence.num_output_tokens - 1,
            len(chunks.ids) * self._chunk_size - sequence.num_tokens,
        )

    def _ask_model(
        self, scheduled: list[Sequence], count: int, most: int, longest: float
    ) -> list[Sequence]:
        """Take the draft model's guesses where no text has better ones.

        Returns:
            Sequences that had no guesses before.
        """
        if self._model is None:
            return []
        began = self._clock()
        candidates = []
        for sequence in scheduled:
            room, chance = self._room(sequence), self._chance(sequence, _MODEL)
            others = self._chances(sequence)
            if room > 0 and _suits_model(sequence) and (not others or others[0] < chance):
                candidates.append(Candidate(sequence, chance, room))
        added = []
        for sequence, guesses in self._model.look(candidates, count, most, longest):
            if tokens := self._before_end(sequence, guesses):
                if not sequence.draft.token_ids:
                    added.append(sequence)
                sequence.draft.token_ids, sequence.draft.kinds = tokens, [_MODEL] * len(tokens)
        self._started += self._clock() - began  # what the step itself takes is compared
        return added

    def _before_end(self, sequence: Sequence, tokens: list[int]) -> list[int]:
        """Guesses before the first one that could end the sequence: the row before it samples that
        token anyway.
        """
        sampling = sequence.group.request.sampling
        ends = {SEPARATOR, *sampling.stop_token_ids}
        if not sampling.ignore_eos:
            ends |= self._limits.eos_token_ids
        if ends.isdisjoint(tokens):
            return tokens
        return tokens[: next(at for at, token in enumerate(tokens) if token in ends)]

    def _find(self, sequence: Sequence, most: int, count: int) -> tuple[list[int], list[Kind]]:
        """Forced tokens, then the rest of a prediction that the output begins, or else the
        continuation of the longest match in any text.
        """
        state = sequence.draft
        forced = state.forced[:most]
        kinds: list[Kind] = [("forced", 0)] * len(forced)
        if len(forced) == most:
            return forced, kinds
        if state.pause:
            state.pause -= 1
            return forced, kinds
        own = sequence.token_ids
        if forced:
            own = np.concatenate((own, forced), dtype=np.int32)
        best: tuple[int, Int32Array, DraftSource] | None = None
        for source, text in self._texts(sequence, own):
            if source == "prediction" and _begins_with(text, own[sequence.num_prompt_tokens :]):
                best = MAX_MATCH, text[len(own) - sequence.num_prompt_tokens :], source
                break
            found = state.followed(own) if source == "prompt" and not forced else None
            found = found or find_continuation(text, own)
            if found is None:
                continue
            start, matched = found
            if source == "prompt" and not forced:
                state.follow(start, len(own))
            if best is None or matched > best[0]:
                rest = text[start : start + most]
                if source == "prompt":  # it goes on with what it continues
                    rest = np.resize(rest, most)
                best = matched, rest, source
            if matched == MAX_MATCH:  # no text has a longer one
                break
        if best is None:
            state.pause = count // 4  # a search of many sequences takes time
            return forced, kinds
        matched, rest, source = best
        rest = rest[: most - len(forced)]
        return forced + rest.tolist(), kinds + [(source, matched)] * len(rest)

    def _texts(self, sequence: Sequence, own: Int32Array) -> list[tuple[DraftSource, Int32Array]]:
        """The texts to search; of equal matches the first counts."""
        texts: list[tuple[DraftSource, Int32Array]] = []
        if len(prediction := sequence.group.prediction):
            texts.append(("prediction", prediction))
        texts.append(("prompt", own))
        if (recent := self._lifecycle.recent_of(sequence.group)) is not None:
            texts.append(("recent", recent))
        return texts

    # -- chances ----------------------------------------------------------------------------

    def _choose(self, drafted: list[Sequence], count: int, most: int, longest: float) -> int:
        """Keep the guesses that give the most tokens per second; returns how many.

        The chance of a guess includes that of those before it, so the best ones are always the
        beginning of each sequence's guesses.
        """
        chances = [self._chances(sequence) for sequence in drafted]
        flat = np.array([chance for own in chances for chance in own])
        if not len(flat):
            return self._keep(drafted, [0] * len(drafted))
        owner = np.repeat(np.arange(len(drafted)), [len(own) for own in chances])
        order = np.argsort(-flat, kind="stable")[:most]
        seconds = self._cost.curve(count, len(order))
        speeds = np.where(seconds <= longest, (count + flat[order].cumsum()) / seconds, 0.0)
        best = int(speeds.argmax())
        kept = best + 1 if speeds[best] > MIN_GAIN * count else 0
        each = np.bincount(owner[order[:kept]], minlength=len(drafted))
        return self._keep(drafted, each.tolist())

    def _keep(self, drafted: list[Sequence], counts: list[int]) -> int:
        """Leave each sequence the first of its guesses; returns how many all have."""
        for sequence, count in zip(drafted, counts, strict=True):
            state = sequence.draft
            if count == 0:
                self._fade(state)
            del state.token_ids[count:], state.kinds[count:]
        return sum(counts)

    def _fade(self, state: DraftState) -> None:
        kind = state.kinds[0]
        self._rate(*kind).fade()
        if kind[0] in state.rates:
            state.rates[kind[0]].fade()

    def _chances(self, sequence: Sequence) -> list[float]:
        """The chance that each guess is kept, as far as it is worth anything."""
        known: dict[Kind, float] = {}
        chances, chance = [], 1.0
        for kind in sequence.draft.kinds:
            if kind not in known:
                known[kind] = self._chance(sequence, kind)
            chance *= known[kind]
            if chance < MIN_CHANCE:
                break
            chances.append(chance)
        return chances

    def _chance(self, sequence: Sequence, kind: Kind) -> float:
        """The chance that a guess is right if those before it are."""
        rate = self._rate(*kind).given(_prior(*kind), _PRIOR_WEIGHT)
        own = sequence.draft.rates.get(kind[0])
        return rate if own is None else own.given(rate, _PRIOR_WEIGHT)

    def _rate(self, source: DraftSource, matched: int) -> Rate:
        return self._rates.setdefault((source, matched), Rate())

    # -- results ----------------------------------------------------------------------------

    def accept(self, sequence: Sequence, sampled: SampledTokens) -> None:
        """Append the guesses that were right; their K/V is computed."""
        state, counters, slot = sequence.draft, self._lifecycle.counters, sequence.slot
        if slot in sampled.deferred:  # with its first row, none of its guesses was checked
            state.drop()
            return
        right = sampled.accepted.get(slot, [])
        for token_id, _ in right:
            sequence.append(token_id)
        count = len(right)
        sequence.num_computed_tokens += count
        if state.token_ids[count : count + 1] == [sampled.token_ids[slot]]:
            # It is right and was not accepted: a row without its mask checks nothing.
            del state.token_ids[count:], state.kinds[count:]
        counters.drafts += bool(state.token_ids)
        counters.draft_tokens += len(state.token_ids)
        counters.accepted_tokens += count
        self._count(sequence, count)
        state.failures = 0 if right else state.failures + 1
        state.pause = min((1 << max(state.failures - 2, 0)) - 1, MAX_PAUSE)
        state.drop()

    def _count(self, sequence: Sequence, num_right: int) -> None:
        """Count right guesses and the first wrong one; those behind it say nothing."""
        state, group = sequence.draft, sequence.group
        tried: dict[Kind, list[int]] = {}
        for number, kind in enumerate(state.kinds[: num_right + 1]):
            tried.setdefault(kind, []).append(number < num_right)
        for (source, matched), hits in tried.items():
            self._rate(source, matched).update(sum(hits), len(hits))
            state.rates.setdefault(source, Rate()).update(sum(hits), len(hits))
        for number, (source, _) in enumerate(state.kinds):
            if source == "prediction":
                group.num_accepted_predicted += number < num_right
                group.num_rejected_predicted += number >= num_right


def _decodes(sequence: Sequence) -> bool:
    """Whether the step computes the one token that the sequence has left, none of a prompt."""
    return (
        sequence.num_scheduled == 1
        and sequence.num_remaining_tokens == 1
        and sequence.num_computed_tokens >= sequence.num_admitted
    )


def _suits_model(sequence: Sequence) -> bool:
    """Whether a draft model knows what the sequence depends on: neither adapter nor grammar."""
    return sequence.group.adapter is None and sequence.group.request.sampling.grammar is None


def _begins_with(text: Int32Array, start: Int32Array) -> bool:
    """Whether a text begins with ``start`` and goes on."""
    return len(start) < len(text) and np.array_equal(text[: len(start)], start)


def _prior(source: DraftSource, matched: int) -> float:
    """Chance of a guess before any was checked."""
    if source in ("forced", "prediction"):
        return 0.8
    if source == "model":
        return 0.7
    return min(0.2 + 0.1 * matched, 0.8)
