"""The engine's last minutes, so that a dashboard has curves as soon as it is opened."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final

from chunkllama.messages import EngineStats

SECONDS: Final = 300
# Of EngineStats; what the dashboard draws over time.
FIELDS: Final = (
    *("steps_total", "generation_tokens_total", "prefill_tokens_computed_total", "chunks_total"),
    *("chunks_referenced", "chunks_private", "chunks_cached", "chunks_free"),
)


class StatsHistory:
    """Keeps one snapshot a second of those that the step loop sends."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._samples: deque[tuple[float, dict[str, int]]] = deque(maxlen=SECONDS)

    def add(self, stats: EngineStats) -> None:
        """Keep a snapshot, unless the last one is younger than a second."""
        now = self._clock()
        if self._samples and now - self._samples[-1][0] < 1.0:
            return
        values = {name: getattr(stats, name) for name in FIELDS}
        if self._samples and values["steps_total"] < self._samples[-1][1]["steps_total"]:
            self._samples.clear()  # another engine process, whose counters begin at 0
        self._samples.append((now, values))

    def rows(self) -> list[dict[str, float]]:
        """Return the snapshots of the last minutes with their age, the oldest first."""
        now = self._clock()
        return [
            {"age_seconds": round(now - at, 3), **values}
            for at, values in self._samples
            if now - at <= SECONDS
        ]
