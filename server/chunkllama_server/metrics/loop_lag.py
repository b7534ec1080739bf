"""Measure how late the event loop runs what is due: work on it that others wait for."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

from prometheus_client import CollectorRegistry, Gauge

PERIOD_SECONDS: Final = 0.1
WINDOW_SECONDS: Final = 60.0


class LoopLag:
    """Exports the largest delay of a timer in the last minute.

    Args:
        registry: gets the gauge ``chunkllama_event_loop_lag_seconds``.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._lags: deque[tuple[float, float]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        Gauge(
            "chunkllama_event_loop_lag_seconds",
            "Largest delay of a timer of the HTTP server's event loop in the last minute.",
            registry=registry,
        ).set_function(self.largest)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Measure from now on."""
        self._loop = loop
        self._set_timer()

    def stop(self) -> None:
        """End the measurement."""
        if self._timer is not None:
            self._timer.cancel()

    def largest(self) -> float:
        """Return the largest delay of the last minute in seconds, with that of a timer now due."""
        if self._loop is None or self._timer is None:
            return 0.0
        now = self._loop.time()
        self._forget(now)
        overdue = max(now - self._timer.when(), 0.0)
        return max(self._lags[0][1] if self._lags else 0.0, overdue)

    def _set_timer(self) -> None:
        assert self._loop is not None
        self._timer = self._loop.call_later(PERIOD_SECONDS, self._ring)

    def _ring(self) -> None:
        assert self._loop is not None and self._timer is not None
        now = self._loop.time()
        lag = max(now - self._timer.when(), 0.0)
        # Smaller ones before it cannot be the largest any more.
        while self._lags and self._lags[-1][1] <= lag:
            self._lags.pop()
        self._lags.append((now, lag))
        self._forget(now)
        self._set_timer()

    def _forget(self, now: float) -> None:
        while self._lags and now - self._lags[0][0] > WINDOW_SECONDS:
            self._lags.popleft()
