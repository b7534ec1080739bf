"""Smaller steps for a while after the device ran out of memory in one."""

from __future__ import annotations

from typing import Final

LEAST_TOKENS: Final = 16  # of a step that is made no smaller
PATIENCE: Final = 256  # steps that fit before larger ones are tried
MOST_FAILURES: Final = 16  # steps in a row that do not fit before their requests are ended
NO_CAP: Final = 2**31 - 1


class StepCaps:
    """Most sequences that run, and most tokens of a step, as far as the device's memory goes.

    Attributes:
        sequences, tokens: those numbers; ``NO_CAP`` while all steps fit.
    """

    def __init__(self) -> None:
        self.sequences = self.tokens = NO_CAP
        self._too_large = 0, 0  # sequences and tokens of the last step that did not fit
        self._num_failed = self._num_fitting = 0

    def shrink(self, num_sequences: int, num_tokens: int) -> bool:
        """Set the caps to half of a step that did not fit.

        Returns:
            Whether a smaller step is worth a try.
        """
        self._num_fitting = 0
        self._num_failed += 1
        is_least = num_sequences <= 1 and num_tokens <= LEAST_TOKENS
        if is_least or self._num_failed > MOST_FAILURES:
            self._num_failed = 0
            return False
        self._too_large = num_sequences, num_tokens
        self.sequences = max(num_sequences // 2, 1)
        self.tokens = max(num_tokens // 2, LEAST_TOKENS)
        return True

    def grow(self) -> None:
        """Note a step that fit; after ``PATIENCE`` of them the caps are doubled or dropped."""
        self._num_failed = 0
        if self.sequences == NO_CAP:
            return
        self._num_fitting += 1
        if self._num_fitting < PATIENCE:
            return
        self._num_fitting = 0
        self.sequences, self.tokens = 2 * self.sequences, 2 * self.tokens
        if self.sequences >= self._too_large[0] and self.tokens >= self._too_large[1]:
            self.lift()

    def lift(self) -> bool:
        """Drop the caps; returns whether there were any."""
        had_caps = self.sequences < NO_CAP
        self.sequences = self.tokens = NO_CAP
        return had_caps
