"""A clock for what expires."""

from __future__ import annotations

import time
from collections.abc import Callable


def steady_clock() -> Callable[[], float]:
    """Return a clock of Unix time that does not jump: it reads the system's once, now.

    When the system's clock is set, jobs and files expire after the time that they were given.
    """
    offset = time.time() - time.monotonic()
    return lambda: time.monotonic() + offset
