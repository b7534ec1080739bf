"""Signals that arrive before the server is ready.

An exception raised by a signal handler is lost where Python ignores exceptions (weak reference
callbacks, finalizers, hooks of the import system), and leaves a traceback there. So the handler
ends the process itself. While a model is fetched it raises instead, for the sake of temporary
files; see ``unwinding``. Imports no module that takes time.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType

# SIGINT as shells expect it of an interrupted command; the others are a supervisor's decision.
EXIT_CODES = {signal.SIGTERM: 0, signal.SIGHUP: 0, signal.SIGINT: 130}
_REAP_SECONDS = 5.0


class _State:
    """What the handler does, and the exit code it has asked for."""

    unwinds = False
    code: int | None = None


def install() -> None:
    """Handle SIGTERM, SIGINT and SIGHUP until the server installs handlers of its own.

    A SIGHUP that is ignored (``nohup``) stays ignored.
    """
    for number in EXIT_CODES:
        if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
            continue
        signal.signal(number, _handle)


@contextlib.contextmanager
def unwinding() -> Iterator[None]:
    """Let a signal raise SystemExit inside the block, so that temporary files are removed.

    A second signal ends the process at once. An exception that was lost is raised again at the
    block's end.
    """
    ignored = sys.unraisablehook

    def report(unraisable: sys.UnraisableHookArgs) -> None:
        if not isinstance(unraisable.exc_value, SystemExit):
            ignored(unraisable)

    _State.unwinds, sys.unraisablehook = True, report
    try:
        yield
    finally:
        _State.unwinds, sys.unraisablehook = False, ignored
        if _State.code is not None:
            end_process(_State.code)


def _handle(number: int, _: FrameType | None) -> None:
    code = EXIT_CODES[signal.Signals(number)]
    if _State.unwinds and _State.code is None:
        _State.code = code
        raise SystemExit(code)
    end_process(code)


def end_process(code: int) -> None:
    """Kill the child processes, wait for their end, and exit without running other code."""
    descendants = _descendants()
    for pid in descendants:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + _REAP_SECONDS
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < deadline:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.005)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def _descendants() -> list[int]:
    """Process ids of children and their children, from /proc: there is no list to maintain."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                # the name in parentheses may itself hold spaces and parentheses
                parent = int(_read(f"/proc/{name}/stat").rpartition(b")")[2].split()[1])
                children.setdefault(parent, []).append(int(name))
    found: list[int] = []
    unvisited = [os.getpid()]
    while unvisited:
        below = children.get(unvisited.pop(), [])
        found += below
        unvisited += below
    return found


def _read(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, 4096)
    finally:
        os.close(descriptor)
