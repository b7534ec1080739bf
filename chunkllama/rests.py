"""Let a thread rest between the pieces of long Python work, so that steps get the processors.

Work that holds the interpreter's lock cannot have a lower priority: a thread that the kernel sets
aside would keep the lock, and the event loop would wait for it. So it sleeps, without the lock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

FREE_SECONDS: Final = 0.02  # of the thread's own time; ordinary requests need less
PIECE_SECONDS: Final = 0.001  # of that time between two rests
RESTS: Final = 3  # seconds of rest for each second computed
_LONGEST: Final = 0.1  # seconds, behind a piece that could not be interrupted


class _Turns(threading.local):
    """The work that each thread does."""

    turn: _Turn | None = None


_turns = _Turns()


class _Turn:
    """One piece of work.

    Args:
        is_busy: whether others want the processors.
    """

    def __init__(self, is_busy: Callable[[], bool]) -> None:
        self._is_busy = is_busy
        self._computed = time.thread_time() + FREE_SECONDS
        self._look_at = time.monotonic() + FREE_SECONDS

    def rest(self) -> None:
        now = time.monotonic()  # a tenth of the cost of the thread's time
        if now < self._look_at:
            return
        computed = time.thread_time() - self._computed
        if computed >= PIECE_SECONDS:
            if self._is_busy():
                time.sleep(min(RESTS * computed, _LONGEST))
                now = time.monotonic()
            self._computed += computed
            computed = 0.0
        self._look_at = now + PIECE_SECONDS - computed


@contextmanager
def resting(is_busy: Callable[[], bool]) -> Iterator[None]:
    """Let the calls of ``rest`` in this block, in this thread, sleep where the machine is busy.

    Args:
        is_busy: whether others want the processors; called in this thread.
    """
    _turns.turn = _Turn(is_busy)
    try:
        yield
    finally:
        _turns.turn = None


def rest() -> None:
    """Sleep for a while if this thread has computed for long in a block of ``resting``.

    Call it where nothing is locked, at least once for each millisecond of work.
    """
    if _turns.turn is not None:
        _turns.turn.rest()
