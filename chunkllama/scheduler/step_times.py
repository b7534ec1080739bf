"""How long a step of so many tokens takes, measured step by step."""

from __future__ import annotations

from typing import Final

from chunkllama.scheduler.step_cost import Average

GUESS: Final = 0.05  # part of a step of one token that another one adds, until it is measured
LARGEST: Final = 3.0  # a time beyond this multiple of the usual one was disturbed
_MIN_SAMPLES: Final = 3  # before a time counts as usual
_MEASURED_EVERY: Final = 128  # paced steps after which the others' step is measured again
_KEPT: Final = 1024  # steps after which a size that no step had is forgotten


class _Octave:
    """Steps of between 2**k and 2**(k + 1) - 1 tokens.

    Attributes:
        seconds, tokens: averages.
        at: number of the last step of that size.
    """

    def __init__(self) -> None:
        self.seconds = Average()
        self.tokens = Average()
        self.at = 0


class StepTimes:
    """Seconds of steps in which no tenant is heavy (``pace.py``), by octaves of their tokens.

    A size that no step had for long is forgotten, so that it is tried again: its last step may
    have been disturbed, and sizes that are estimated to take too long are not computed.
    """

    def __init__(self) -> None:
        self._octaves: dict[int, _Octave] = {}
        self._num_steps = 0
        self._tried: dict[int, int] = {}

    @property
    def are_known(self) -> bool:
        """At least one step was measured."""
        return bool(self._octaves)

    def add(self, tokens: int, seconds: float) -> None:
        """Take in a step."""
        self._num_steps += 1
        octave = self._octaves.setdefault(tokens.bit_length(), _Octave())
        if octave.seconds.count >= _MIN_SAMPLES:
            seconds = min(seconds, LARGEST * octave.seconds.value)
        octave.seconds.add(seconds)
        octave.tokens.add(tokens)
        octave.at = self._num_steps
        if self._num_steps % _KEPT == 0:
            least = self._num_steps - _KEPT
            self._octaves = {key: each for key, each in self._octaves.items() if each.at > least}

    def seconds(self, tokens: int) -> float:
        """Estimate a step from those of like size, or else from the nearest size."""
        size = tokens.bit_length()
        octave = self._octaves.get(size)
        if octave is None:
            octave = self._octaves[min(self._octaves, key=lambda known: abs(known - size))]
        usual = 1.0 + GUESS * octave.tokens.value
        return octave.seconds.value * (1.0 + GUESS * tokens) / usual

    def most(self, seconds: float, budget: int) -> int:
        """Return the tokens, at most ``budget``, of a step that takes that long; at least 1."""
        while budget > 1 and self.seconds(budget) > seconds:
            budget = budget * 7 // 8
        return budget

    def is_due(self, tokens: int, at: int) -> bool:
        """Tell whether a step of that size should be measured now; ``at`` counts paced steps."""
        key = tokens.bit_length()
        if at - self._tried.get(key, -_MEASURED_EVERY) < _MEASURED_EVERY:
            return False
        self._tried[key] = at
        return True
