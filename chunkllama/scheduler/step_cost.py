"""What rows of guesses add to the time of a decode step, measured step by step."""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

MIN_GAIN: Final = 1.03  # of tokens per second, from which on guesses are worth their trouble
WEIGHT: Final = 0.2  # of a new measurement in a moving average
_MIN_SAMPLES: Final = 3  # plain steps before an average counts
_LARGEST: Final = 3.0  # a step beyond this multiple of the usual one was disturbed
_GUESS: Final = 0.05  # part of a plain step that a row adds, until it is measured
_FIRST_ROWS: Final = 4  # rows that are tried first; then at most twice as many as before
_PLAIN_EVERY: Final = 32  # steps with guesses before a plain one, which renews the average
_TRIED_AGAIN_AFTER: Final = 512  # plain steps after which the costs of guesses are forgotten


class Average:
    """Moving average of a positive number."""

    def __init__(self) -> None:
        self.value = 0.0
        self.count = 0

    def add(self, value: float) -> None:
        self.count += 1
        weight = max(WEIGHT, 1 / self.count)
        self.value += weight * (value - self.value)


class _Costs:
    """Steps of one number of sequences."""

    def __init__(self) -> None:
        self.plain = Average()
        self.extra: dict[int, Average] = {}  # by rows of guesses, relative to a plain step
        self.since_plain = 0
        self.since_drafts = 0

    def added(self, rows: int) -> float:
        """Part of a plain step that ``rows`` rows add: linear between the counts measured."""
        known = sorted(self.extra)
        if not known:
            return _GUESS * rows
        at = bisect_left(known, rows)
        if at == len(known):
            return self.extra[known[-1]].value * rows / known[-1]
        high = self.extra[known[at]].value
        if known[at] == rows:
            return high
        low_rows = known[at - 1] if at else 0
        low = self.extra[low_rows].value if at else 0.0
        return low + (high - low) * (rows - low_rows) / (known[at] - low_rows)


class StepCost:
    """Step times by sequences and rows of guesses.

    A number of sequences has its own figures: the model's cost rises with the rows of a step in a
    way that depends on the machine.
    """

    def __init__(self) -> None:
        self._costs: dict[int, _Costs] = {}

    def add(self, num_sequences: int, num_drafts: int, seconds: float) -> None:
        """Take in a step that decoded ``num_sequences`` and checked ``num_drafts`` guesses."""
        costs = self._costs.setdefault(num_sequences, _Costs())
        plain = costs.plain
        if plain.count >= _MIN_SAMPLES:
            seconds = min(seconds, _LARGEST * plain.value)
        if num_drafts == 0:
            plain.add(seconds)
            costs.since_plain = 0
            costs.since_drafts += 1
            if costs.since_drafts >= _TRIED_AGAIN_AFTER:
                costs.extra.clear()
                costs.since_drafts = 0
            return
        costs.since_plain += 1
        costs.since_drafts = 0
        if plain.value > 0.0:
            added = max(seconds / plain.value - 1.0, 0.0)
            costs.extra.setdefault(num_drafts, Average()).add(added)

    def most_drafts(self, num_sequences: int) -> int:
        """Rows of guesses that the next step may have; 0 where it should be a plain one."""
        costs = self._costs.get(num_sequences)
        if costs is None or costs.plain.count < _MIN_SAMPLES or costs.since_plain >= _PLAIN_EVERY:
            return 0
        return max(2 * max(costs.extra, default=0), _FIRST_ROWS)

    def plain_seconds(self, num_sequences: int) -> float:
        """Time of a step without guesses; 0.0 until it is measured."""
        costs = self._costs.get(num_sequences)
        return 0.0 if costs is None else costs.plain.value

    def seconds(self, num_sequences: int, num_drafts: int) -> float:
        """Time of a step relative to one without guesses."""
        return 1.0 + self._costs[num_sequences].added(num_drafts)
