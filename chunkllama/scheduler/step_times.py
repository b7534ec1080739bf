"""How long a step of so many tokens takes, measured step by step."""

from __future__ import annotations

from typing import Final

from chunkllama.scheduler.step_cost import Average

GUESS: Final = 0.05  # part of a step of one token that another one adds, until it is measured
LARGEST: Final = 3.0  # a time beyond this multiple of the usual one was disturbed
_MIN_SAMPLES: Final = 3  # before a time counts as usual
_MEASURED_EVERY: Final = 128  # paced steps after which the others' step is measured again
_KEPT: Final = 1024  # steps after which a size that no step had is doubted


class _Octave:
    """Steps of between 2**k and 2**(k + 1) - 1 tokens.

    Attributes:
        seconds, tokens: averages; before there are ``_MIN_SAMPLES`` steps, those of the fastest for
            its tokens, because the others may have touched memory for the first time.
        at: number of the last step of that size.
    """

    def __init__(self) -> None:
        self.seconds = Average()
        self.tokens = Average()
        self.at = 0

    @property
    def is_usual(self) -> bool:
        """Enough steps were measured."""
        return self.seconds.count >= _MIN_SAMPLES

    def add(self, tokens: int, seconds: float) -> None:
        """Take in a step."""
        if self.is_usual:
            self.seconds.add(min(seconds, LARGEST * self.seconds.value))
            self.tokens.add(tokens)
            return
        is_faster = seconds * self.tokens.value < self.seconds.value * tokens
        for average, value in ((self.seconds, seconds), (self.tokens, float(tokens))):
            average.count += 1
            if is_faster or average.count == 1:
                average.value = value

    def doubt(self) -> None:
        """Count the steps so far as one."""
        self.seconds.count = self.tokens.count = 1


class StepTimes:
    """Seconds of steps by octaves of their tokens.

    A size that no step had for long counts as measured once, so that it is tried again: its last
    steps may have been disturbed, and sizes that take too long are not computed.
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
        size = tokens.bit_length()
        octave = self._octaves.get(size)
        if octave is None:
            octave = self._octaves[size] = _Octave()
        octave.add(tokens, seconds)
        octave.at = self._num_steps
        if self._num_steps % _KEPT == 0:
            for each in self._octaves.values():
                if each.at <= self._num_steps - _KEPT:
                    each.doubt()

    def seconds(self, tokens: int) -> float:
        """Estimate a step from those of like size, or else from the nearest size."""
        size = tokens.bit_length()
        octave = self._octaves.get(size)
        if octave is None:
            octave = self._octaves[min(self._octaves, key=lambda known: abs(known - size))]
        return _scaled(octave, tokens)

    def most(self, seconds: float, budget: int) -> int:
        """Return the tokens, at most ``budget``, of a step that takes that long; at least 1.

        Larger steps than measured ones are tried where nothing shows that they take too long, so
        that up to ``_MIN_SAMPLES`` steps take up to ``LARGEST`` times as long, and one may take
        longer.
        """
        while budget > 1 and self._least_seconds(budget) > seconds:
            budget = budget * 7 // 8
        return budget

    def _least_seconds(self, tokens: int) -> float:
        """Estimate a step, rather too short than too long where no step of that size is usual.

        It is on the line through the smallest and the largest usual octave. If there is one at
        most, larger steps than its own take no less, and smaller steps than measured ones at least
        their part.
        """
        key = tokens.bit_length()
        own = self._octaves.get(key)
        if own is not None and own.is_usual:
            return _scaled(own, tokens)
        usual = [self._octaves[each] for each in sorted(self._octaves)]
        usual = [octave for octave in usual if octave.is_usual]
        below = [octave for octave in usual if octave.tokens.value <= tokens]
        if len(usual) > 1:
            first, last = usual[0], usual[-1]
            nearest = below[-1] if below else first
            more = tokens - nearest.tokens.value
            slope = (last.seconds.value - first.seconds.value) / (
                last.tokens.value - first.tokens.value
            )
            return nearest.seconds.value + max(slope, 0.0) * more
        least = below[-1].seconds.value if below else 0.0
        for each, octave in self._octaves.items():
            if each >= key:
                part = octave.seconds.value * min(tokens / octave.tokens.value, 1.0)
                least = max(least, part if octave.is_usual else part / LARGEST)
        return least

    def is_due(self, tokens: int, at: int) -> bool:
        """Tell whether a step of that size should be measured now; ``at`` counts paced steps."""
        key = tokens.bit_length()
        if at - self._tried.get(key, -_MEASURED_EVERY) < _MEASURED_EVERY:
            return False
        self._tried[key] = at
        return True


def _scaled(octave: _Octave, tokens: int) -> float:
    """Estimate a step from those of an octave."""
    return octave.seconds.value * (1.0 + GUESS * tokens) / (1.0 + GUESS * octave.tokens.value)
