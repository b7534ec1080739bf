"""Judge how much something slows a stream, on a machine whose speed changes by itself.

A *try* is one window of the stream while the something runs, with a pause before it and one after
it, in which the stream runs alone. Its ratio is the window's time per token divided by that of the
faster pause, so a machine that is slow for seconds cancels out, and work that continues in the
pause behind does not count as the machine's. Most tries are near 1 and settle the matter. Another
is repeated until most of ``MOST`` tries are on one side of the target: a burst of the machine is
rarely in most of them, a slowdown by the something is.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

CLEAR = 1.2  # ratio of a first try after which there is no other
MOST = 7  # tries


@dataclass(frozen=True, slots=True)
class Try:
    """Seconds per token of the stream: in the pause before, beside the something, in the pause
    after.
    """

    before: float
    beside: float
    after: float

    @property
    def ratio(self) -> float:
        return self.beside / min(self.before, self.after)


@dataclass(slots=True)
class Slowdown:
    """The tries of one thing.

    Attributes:
        target: ratio that is allowed.
        ratios: of the tries so far.
    """

    target: float
    ratios: list[float] = field(default_factory=list)

    @property
    def is_settled(self) -> bool:
        """Whether more tries cannot change ``is_over``, or the first one was clear."""
        if self.ratios and self.ratios[0] <= CLEAR:
            return True
        num_over = sum(ratio > self.target for ratio in self.ratios)
        return max(num_over, len(self.ratios) - num_over) > MOST // 2

    @property
    def ratio(self) -> float:
        """The median of the tries."""
        return statistics.median(self.ratios)

    @property
    def is_over(self) -> bool:
        """Whether most tries are over the target."""
        return self.ratio > self.target
