"""What rows of guesses add to the time of a decode step, measured step by step."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

MIN_GAIN: Final = 1.03  # of tokens per second, from which on guesses are worth their trouble
WEIGHT: Final = 0.2  # of a new measurement in a moving average
_MIN_SAMPLES: Final = 3  # plain steps before an average counts
_LARGEST: Final = 3.0  # a step beyond this multiple of the usual one was disturbed
# Part of a plain step that a row adds until it is measured, at most; a row of a step of many costs
# about as much as the others.
_GUESS: Final = 0.05
_SHARE: Final = 0.35  # of what a row of a plain step takes on average
_MOST_SHARE: Final = 1.25  # no guess pays at that; what is measured beyond it is a disturbance
_PRIOR: Final = 2.0  # measurements that an estimate counts for
_FIRST_ROWS: Final = 2  # least rows that are tried first; then at most twice as many as before
_PAYING: Final = 8  # steps with guesses in a row, which show that they pay
_PLAIN_EVERY: Final = 32  # steps with guesses before a plain one, which renews the average
# Plain steps after which the costs of guesses are forgotten; twice as many, up to the second
# number, each time that guesses have not paid since.
_TRIED_AGAIN_AFTER: Final = (128, 512)
_TILE: Final = 16  # rows above which only multiples are told apart


class Average:
    """Moving average of a positive number."""

    def __init__(self) -> None:
        self.value = 0.0
        self.count = 0

    def add(self, value: float) -> None:
        self.count += 1
        weight = max(WEIGHT, 1 / self.count)
        self.value += weight * (value - self.value)


class _Rows:
    """What a row of guesses has added to a step, in seconds, over steps of all kinds.

    Attributes:
        most: rows of a step that were measured.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.each = Average()
        self.most = 0

    def add(self, rows: int, seconds: float) -> None:
        self.each.add(seconds / rows)
        self.most = max(self.most, rows)


class _Costs:
    """Steps of one number of sequences.

    Args:
        rows: what is known of steps with other numbers, too.
    """

    def __init__(self, num_sequences: int, rows: _Rows) -> None:
        self._guess = min(_GUESS, _SHARE / num_sequences)
        self._first_rows = max(_FIRST_ROWS, num_sequences)
        self._rows = rows
        self.plain = Average()
        self.extra: dict[int, Average] = {}  # by rows of guesses, relative to a plain step
        self.since_plain = 0
        self.since_drafts = 0
        self.patience = _TRIED_AGAIN_AFTER[0]

    def most_rows(self) -> int:
        """Rows that may be tried."""
        own = 2 * max(self.extra) if self.extra else self._rows.most
        return max(own, self._first_rows)

    def added(self, rows: int) -> NDArray[np.float64]:
        """Part of a plain step that 1 to ``rows`` rows add, [rows]: linear between the counts
        measured. What other numbers of sequences show counts as ``_PRIOR`` measurements: a step
        that was disturbed must not decide."""
        asked = np.arange(1, rows + 1, dtype=np.float64)
        each = self._guess
        if self._rows.each.count >= _MIN_SAMPLES and self.plain.value > 0.0:
            each = self._rows.each.value / self.plain.value
        known = sorted(self.extra)
        if not known:
            return np.asarray(each * asked, np.float64)
        values = [0.0]
        for at in known:
            own = self.extra[at]
            values.append((own.value * own.count + each * at * _PRIOR) / (own.count + _PRIOR))
        beyond = np.maximum(asked / known[-1], 1.0)
        return np.asarray(np.interp(asked, [0, *known], values) * beyond, np.float64)


class StepCost:
    """Step times by sequences and rows of guesses.

    A number of sequences has its own figures: the model's cost rises with the rows of a step in a
    way that depends on the machine.
    """

    def __init__(self) -> None:
        self._costs: dict[int, _Costs] = {}
        self._rows = _Rows()

    def add(self, num_sequences: int, num_drafts: int, seconds: float) -> None:
        """Take in a step that decoded ``num_sequences`` and checked ``num_drafts`` guesses."""
        costs = self._costs.setdefault(num_sequences, _Costs(num_sequences, self._rows))
        plain = costs.plain
        if plain.count >= _MIN_SAMPLES:
            seconds = min(seconds, _LARGEST * plain.value)
        if num_drafts == 0:
            plain.add(seconds)
            costs.since_plain = 0
            costs.since_drafts += 1
            if costs.since_drafts >= costs.patience:
                costs.extra.clear()
                self._rows.forget()
                costs.since_drafts = 0
                costs.patience = min(2 * costs.patience, _TRIED_AGAIN_AFTER[1])
            return
        costs.since_plain += 1
        costs.since_drafts = 0
        if costs.since_plain == _PAYING:
            costs.patience = _TRIED_AGAIN_AFTER[0]
        if plain.value > 0.0:
            most = plain.value * _MOST_SHARE * num_drafts / num_sequences
            added = min(max(seconds - plain.value, 0.0), most)
            costs.extra.setdefault(_measured_as(num_drafts), Average()).add(added / plain.value)
            self._rows.add(num_drafts, added)

    def most_drafts(self, num_sequences: int) -> int:
        """Rows of guesses that the next step may have; 0 where it should be a plain one."""
        costs = self._costs.get(num_sequences)
        if costs is None or costs.plain.count < _MIN_SAMPLES or costs.since_plain >= _PLAIN_EVERY:
            return 0
        return costs.most_rows()

    def plain_seconds(self, num_sequences: int) -> float:
        """Time of a step without guesses; 0.0 until it is measured."""
        costs = self._costs.get(num_sequences)
        return 0.0 if costs is None else costs.plain.value

    def seconds(self, num_sequences: int, num_drafts: int) -> float:
        """Time of a step relative to one without guesses."""
        return float(self.curve(num_sequences, num_drafts)[-1])

    def curve(self, num_sequences: int, num_drafts: int) -> NDArray[np.float64]:
        """Times of steps with 1 to ``num_drafts`` guesses relative to one without, [num_drafts]."""
        return 1.0 + self._costs[num_sequences].added(num_drafts)


def _measured_as(rows: int) -> int:
    return rows if rows <= _TILE else -(-rows // _TILE) * _TILE
