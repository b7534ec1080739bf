"""Guesses of a draft model, where they are worth its passes.

After speculative decoding (arXiv 2211.17192). A draft model computes one guess after the other, in
passes of its own before a step. It pays where

    tokens that the step is expected to give
    ------------------------------------------------------------
    plain step + rows of the guesses + passes of the draft model

is larger than what plain steps give. All three times are measured, and so is how often its guesses
have been right. Before its first guess for a sequence the draft model has to compute the sequence's
tokens. They are computed in pieces beside steps, if the guesses of the steps to come are expected
to save more than that takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from chunkllama.sampling_params import SamplingParams
from chunkllama.scheduler.draft_search import Int32Array
from chunkllama.scheduler.draft_state import Rate
from chunkllama.scheduler.request import Sequence
from chunkllama.scheduler.step_cost import MIN_GAIN, Average, StepCost

MAX_DEPTH: Final = 8  # guesses of one sequence in a step
_NEAR: Final = 32  # tokens that a pass computes with its first guess
_MOST_TOKENS: Final = 256  # of a piece
_FIRST_TOKENS: Final = 16  # of the piece that measures the time of a token
_LEAST_TOKENS: Final = 8  # of a piece: a sequence grows meanwhile
_PIECE_SHARE: Final = 0.5  # of a plain step, which a piece takes at most
_STEPS_TO_COME: Final = 32  # that are expected of a sequence, beside as many as it has had
_TRIED_AGAIN_AFTER: Final = 2048  # steps without guesses, after which what is known is forgotten


@dataclass(frozen=True, slots=True)
class DraftContext:
    """A sequence that guesses are wanted for.

    Attributes:
        key: request and choice.
        token_ids: [N] int32, prompt and output.
        index: of the choice, part of the random numbers' counter.
    """

    key: tuple[str, int]
    token_ids: Int32Array
    num_prompt_tokens: int
    sampling: SamplingParams
    index: int


class DraftModel(Protocol):
    """Computes guesses; keeps K/V of the sequences that it has computed."""

    def warm_up(self) -> None:
        """Compute a guess of a sequence of one token."""
        ...

    def begin_step(self, contexts: list[DraftContext]) -> list[int | None]:
        """Return how many of each sequence's tokens are to be computed before its first guess, the
        last one included; None: it has no place for them, or its device no memory for now."""
        ...

    def compute(self, contexts: list[DraftContext], max_tokens: int) -> int:
        """Compute up to so many tokens of sequences of this step, all but their last; returns how
        many, 0 where the device has no memory for it."""
        ...

    def guess(self, contexts: list[DraftContext], depth: int) -> list[list[int]]:
        """Return up to ``depth`` guesses at what follows each of some sequences of this step, as
        far as the device has memory for them."""
        ...


class Candidate(NamedTuple):
    """A sequence, the chance that a guess of it is right, and the most guesses it may have."""

    sequence: Sequence
    chance: float
    room: int


class ModelDrafts:
    """Decides when a draft model guesses.

    Args:
        cost: of the steps that check guesses.
        rate: how often a guess of the model was right.
        clock: monotonic seconds.
    """

    def __init__(
        self, model: DraftModel, cost: StepCost, rate: Rate, clock: Callable[[], float]
    ) -> None:
        self._model = model
        self._cost = cost
        self._rate = rate
        self._clock = clock
        self._passes: dict[int, Average] = {}  # seconds, by number of sequences
        self._token_seconds = Average()
        self._idle_steps = 0
        model.warm_up()  # the first pass takes longer
        self._begin()

    def _begin(self) -> None:
        """Forget how often guesses were right and what they took, and measure one."""
        self._rate.hits = self._rate.trials = 0.0
        self._idle_steps = 0
        began = self._clock()
        self._model.warm_up()
        self._passes = {1: Average()}
        self._passes[1].add(self._clock() - began)

    def look(
        self, candidates: list[Candidate], count: int, most: int, longest: float
    ) -> list[tuple[Sequence, list[int]]]:
        """Return sequences with their guesses, where they are worth their time.

        Args:
            count: sequences of the step.
            most: guesses that the step may have.
            longest: time that it may take, relative to a plain one.
        """
        candidates = sorted(candidates, key=lambda each: -each.chance)[:most]
        depth, gain = self.choose([each.chance for each in candidates], count, most, longest)
        if depth == 0:
            self._idle_steps += 1
            if self._idle_steps >= _TRIED_AGAIN_AFTER:
                self._begin()
            return []
        self._idle_steps = 0
        contexts = [_context(each.sequence) for each in candidates]
        missing = self._model.begin_step(contexts)
        near = [at for at, number in enumerate(missing) if number is not None and number <= _NEAR]
        self._catch_up(candidates, contexts, missing, self._cost.plain_seconds(count), gain)
        if not near:
            return []
        depth = min(depth, max(candidates[at].room for at in near))
        began = self._clock()
        guessed = self._model.guess([contexts[at] for at in near], depth)
        seconds = (self._clock() - began) / depth
        self._passes.setdefault(len(near), Average()).add(seconds)
        return [
            (candidates[at].sequence, tokens[: candidates[at].room])
            for at, tokens in zip(near, guessed, strict=True)
        ]

    def choose(
        self, chances: list[float], count: int, most: int, longest: float
    ) -> tuple[int, float]:
        """Return how many guesses of each sequence give the most tokens per second, and the share
        of a plain step that they save; (0, 0.0): none saves time.

        Args:
            chances: of each sequence's guesses, that one is right if those before it are.
        """
        plain = self._cost.plain_seconds(count)
        if not chances or plain <= 0.0:
            return 0, 0.0
        pass_seconds = self._pass_seconds(len(chances))
        best, depth, gained = MIN_GAIN, 0, 0.0
        for tried in range(1, min(MAX_DEPTH, most // len(chances)) + 1):
            gained += sum(chance**tried for chance in chances)
            seconds = self._cost.seconds(count, tried * len(chances))
            seconds += tried * pass_seconds / plain
            if seconds > longest:
                break
            speed = (count + gained) / count / seconds
            if speed > best:
                best, depth = speed, tried
        return depth, best - 1.0 if depth else 0.0

    def _pass_seconds(self, num_sequences: int) -> float:
        """Time of a pass over so many sequences, by that of the nearest number."""
        nearest = min(self._passes, key=lambda known: abs(known - num_sequences))
        return self._passes[nearest].value

    def _catch_up(
        self,
        candidates: list[Candidate],
        contexts: list[DraftContext],
        missing: list[int | None],
        plain: float,
        gain: float,
    ) -> None:
        """Compute a piece of the sequences that are worth it.

        Args:
            plain: seconds of a plain step.
            gain: share of it that the guesses of a step save.
        """
        each = self._token_seconds.value
        most = int(min(_PIECE_SHARE * plain / each, _MOST_TOKENS)) if each else _FIRST_TOKENS
        if most < _LEAST_TOKENS:
            return
        behind = []
        for candidate, context, number in zip(candidates, contexts, missing, strict=True):
            if number is None or number <= _NEAR:
                continue
            sequence = candidate.sequence
            done = sequence.num_output_tokens
            left = min(sequence.group.max_tokens - done, done + _STEPS_TO_COME)
            if number * each <= left * gain * plain:
                behind.append(context)
        if not behind:
            return
        began = self._clock()
        computed = self._model.compute(behind, most)
        if computed:
            self._token_seconds.add((self._clock() - began) / computed)


def _context(sequence: Sequence) -> DraftContext:
    group = sequence.group
    return DraftContext(
        (group.request_id, sequence.index),
        sequence.token_ids,
        sequence.num_prompt_tokens,
        group.request.sampling,
        sequence.index,
    )
