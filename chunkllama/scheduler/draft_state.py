"""The guesses at a sequence's next tokens, and how often such guesses have been right."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np

from chunkllama.scheduler.draft_search import MAX_MATCH, Int32Array

DraftSource = Literal["forced", "prediction", "prompt", "recent", "model"]

_KEPT: Final = 0.85  # of the older counts, with each update
_FADED: Final = 0.98  # of the counts, with each step that leaves out guesses


@dataclass(slots=True)
class Rate:
    """A decaying share: how often the next token of a draft was right after those before it."""

    hits: float = 0.0
    trials: float = 0.0

    def update(self, hits: int, trials: int) -> None:
        """Count ``hits`` right tokens among ``trials``."""
        self.hits = self.hits * _KEPT + hits
        self.trials = self.trials * _KEPT + trials

    def fade(self) -> None:
        """Forget a little, so that what was rarely right is tried again."""
        self.hits *= _FADED
        self.trials *= _FADED

    def given(self, prior: float, weight: float) -> float:
        """Return the share, with a prior that counts as ``weight`` trials."""
        return (self.hits + prior * weight) / (self.trials + weight)


@dataclass(slots=True)
class DraftState:
    """Of one sequence.

    Attributes:
        token_ids: guesses in the step that is being put together or in flight.
        kinds: of each guess, where it comes from and how many tokens matched before it.
        forced: tokens that must come next by the sequence's grammar.
        rates: how often guesses of this sequence were right, by source.
        pause: steps to come in which no guess is looked for.
        failures: drafts in a row without a right token.
        source, length: an index in the sequence's own tokens, and their number when what follows
            the index was found to match their end.
    """

    token_ids: list[int] = field(default_factory=list)
    kinds: list[tuple[DraftSource, int]] = field(default_factory=list)
    forced: list[int] = field(default_factory=list)
    rates: dict[DraftSource, Rate] = field(default_factory=dict)
    pause: int = 0
    failures: int = 0
    source: int = 0
    length: int = 0

    def follow(self, source: int, length: int) -> None:
        """Note where the tokens of a sequence, ``length`` now, are guessed to repeat themselves."""
        self.source, self.length = source, length

    def followed(self, own: Int32Array) -> tuple[int, int] | None:
        """Return where ``own`` repeats itself still, as ``find_continuation`` does, without a
        search; None if it does not for ``MAX_MATCH`` tokens."""
        end = self.source + len(own) - self.length
        if self.length == 0 or end < MAX_MATCH:
            return None
        is_equal = np.array_equal(own[end - MAX_MATCH : end], own[-MAX_MATCH:])
        return (end, MAX_MATCH) if is_equal else None

    def drop(self) -> None:
        """Forget the guesses; what is known of the sequence stays."""
        self.token_ids, self.kinds, self.forced = [], [], []
