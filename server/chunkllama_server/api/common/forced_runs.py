"""Runs of characters that a grammar leaves no choice in, put together from those of its parts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

MANY = 1 << 62


@dataclass(frozen=True, slots=True)
class Runs:
    """The characters in a row that a text has no choice in.

    Attributes:
        first: at its beginning.
        last: at its end.
        longest: anywhere.
        is_whole: the whole text is such a run.
    """

    first: int = 0
    last: int = 0
    longest: int = 0
    is_whole: bool = True

    def then(self, after: Runs) -> Runs:
        """Those of a text that follows on this one."""
        return Runs(
            min(self.first + after.first if self.is_whole else self.first, MANY),
            min(self.last + after.last if after.is_whole else after.last, MANY),
            min(max(self.longest, after.longest, self.last + after.first), MANY),
            self.is_whole and after.is_whole,
        )

    def times(self, count: int) -> Runs:
        """Those of so many texts in a row."""
        if count == 0:
            return Runs()
        if self.is_whole:
            return fixed(min(self.first * count, MANY))
        return self.then(self) if count > 1 else self


def fixed(length: int) -> Runs:
    """Return those of one text of a length."""
    return Runs(length, length, length)


def free(longest: int) -> Runs:
    """Return those of a text with a choice in it, which forces so many characters at most."""
    return Runs(longest, longest, longest, is_whole=False)


def one_of(runs: Iterable[Runs]) -> Runs:
    """Return those of a choice: what comes before it may go on in a branch's beginning, which all
    branches may share."""
    branches = [*runs] or [Runs()]
    return Runs(
        max(run.first for run in branches),
        max(run.last for run in branches),
        max(run.longest for run in branches),
        is_whole=False,
    )


def in_turn(runs: Iterable[Runs]) -> Runs:
    """Return those of a sequence."""
    return reduce(Runs.then, runs, Runs())
