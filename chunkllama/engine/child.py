"""Child processes: started with sockets that they inherit, ended with their parent.

Frames are a 4-byte big-endian length and a payload. The sockets are inherited, so no path or port
exists that others could open. Imports no torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Final, NoReturn

LENGTH: Final = struct.Struct(">I")
_PR_SET_PDEATHSIG: Final = 1
_IGNORED: Final = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})


def frame(payload: bytes) -> bytes:
    """Return a payload behind its length."""
    return LENGTH.pack(len(payload)) + payload


class FrameSocket:
    """A blocking socket that carries frames."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray()

    def send(self, payload: bytes) -> None:
        """Send a frame.

        Raises:
            BrokenPipeError, ConnectionResetError: the other process has ended.
        """
        self._sock.sendall(frame(payload))

    def receive(self) -> bytes | None:
        """Wait for the next frame; None if the other process has ended."""
        while (payload := self.take()) is None:
            if not self.fill():
                return None
        return payload

    def is_readable(self, seconds: float | None) -> bool:
        """Return whether ``fill`` would not wait; waits so long for that, None: without end."""
        return bool(select.select([self._sock], [], [], seconds)[0])

    def fill(self) -> bool:
        """Read what has arrived; False if the other process has ended."""
        try:
            data = self._sock.recv(1 << 20)
        except ConnectionResetError:
            return False
        self._buffer += data
        return bool(data)

    def take(self) -> bytes | None:
        """Return the next frame, if all of it has been read."""
        if len(self._buffer) < LENGTH.size:
            return None
        (length,) = LENGTH.unpack_from(self._buffer)
        end = LENGTH.size + length
        if len(self._buffer) < end:
            return None
        payload = bytes(self._buffer[LENGTH.size : end])
        del self._buffer[:end]
        return payload

    def close(self) -> None:
        self._sock.close()


def start_child(
    module: str, arguments: Sequence[int], descriptors: Sequence[int]
) -> subprocess.Popen[bytes]:
    """Start a Python process that runs a module.

    Call it from a thread that lives as long as the child: the parent-death signal is tied to it.

    Args:
        arguments: the module's; the id of this process comes after the first one.
        descriptors: that it inherits, under the same numbers.
    """
    first, *others = (str(argument) for argument in arguments)
    with _blocked_signals():
        return subprocess.Popen(
            # -P: a module in the working directory, perhaps a model's folder, is not run.
            [sys.executable, "-P", "-m", module, first, str(os.getpid()), *others],
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
            # OpenMP's idle threads would spin for milliseconds after each step, on the cores
            # that the API process needs; read when torch is loaded.
            env={"GOMP_SPINCOUNT": "2000", **os.environ, "PYTHONSAFEPATH": "1"},
        )


@contextlib.contextmanager
def _blocked_signals() -> Iterator[None]:
    """Start a child process inside the block: it begins with these signals blocked.

    A Ctrl-C reaches the whole process group, also a child that has not chosen to ignore it yet.
    For the caller the signals take effect at the block's end, when the child is known.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_child(parent_pid: int) -> None:
    """Tie this process to its parent, which alone decides when it stops.

    Raises:
        SystemExit: the parent has ended.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # the parent died before the signal was set
        raise SystemExit(0)
    # Ctrl-C reaches the whole process group.
    for ignored in _IGNORED:
        signal.signal(ignored, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED)  # compilers it starts can be stopped


def end_process(code: int) -> NoReturn:
    """End this process at once: a thread inside torch would abort one that returns from main."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
