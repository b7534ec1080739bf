"""The guesses at a sequence's next tokens, and how often such guesses have been right."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

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
    """

    token_ids: list[int] = field(default_factory=list)
    kinds: list[tuple[DraftSource, int]] = field(default_factory=list)
    forced: list[int] = field(default_factory=list)
    rates: dict[DraftSource, Rate] = field(default_factory=dict)
    pause: int = 0
    failures: int = 0

    def drop(self) -> None:
        """Forget the guesses; what is known of the sequence stays."""
        self.token_ids, self.kinds, self.forced = [], [], []
