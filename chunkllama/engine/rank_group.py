"""Sums over the ranks of a model: gloo between CPUs, NCCL between GPUs, all on one machine."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, InvalidStateError
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed

_c10d: Final[Any] = torch.distributed  # whose stubs lack some of what it documents
_TIMEOUT: Final = timedelta(minutes=10)  # for ranks whose first steps compile, or that are stopped
_LOOPBACK: Final = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
_LAUNCH_SECONDS: Final = 1.0  # a GPU whose queue is full takes another sum when others are aborted


class RankGroup:
    """This process's place in a group of ranks, apart from torch's own default group.

    Args:
        rank: of ``size``.
        device: that the tensors lie on.
    """

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self._rank, self._size, self._device = rank, size, device
        self._group: Any = None
        self._is_aborted = False
        self._launching = threading.Lock()

    def join(self, store: int, joined: Future[None]) -> None:
        """Wait for the other ranks.

        Args:
            store: a memory file that all ranks have inherited, in which they find each other; it
                stays open where this fails, since a thread may read it until the timeout.
            joined: gets the result. An exception that another thread sets ends the wait, which the
                libraries cannot do before the timeout.

        Raises:
            Exception: that of ``joined``; RuntimeError: the ranks cannot connect.
        """
        with _loopback():
            threading.Thread(target=self._join, args=(store, joined), daemon=True).start()
            joined.result()

    def _join(self, store: int, joined: Future[None]) -> None:
        with contextlib.suppress(InvalidStateError):  # a rank has ended
            try:
                rendezvous = _c10d.FileStore(f"/proc/self/fd/{store}", self._size)
                rendezvous.set_timeout(_TIMEOUT)
                self._group = self._connect(rendezvous)
                self.all_reduce(torch.zeros(1, device=self._device))  # NCCL connects here
            except Exception as error:
                joined.set_exception(error)
            else:
                joined.set_result(None)

    def _connect(self, rendezvous: Any) -> Any:
        if self._device.type == "cpu":
            return _c10d.ProcessGroupGloo(rendezvous, self._rank, self._size, _TIMEOUT)
        options = _c10d.ProcessGroupNCCL.Options()
        options._timeout = _TIMEOUT
        return _c10d.ProcessGroupNCCL(rendezvous, self._rank, self._size, options)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over the ranks, in its place where it is contiguous.

        Before ``join`` the rank is alone: steps that only measure memory run then.

        Raises:
            RuntimeError: another rank has ended.
        """
        x = x.contiguous()
        if self._group is None:
            return x
        with self._launching:
            if self._is_aborted:
                raise RuntimeError("another rank has ended")
            work = self._group.allreduce([x])
        work.wait()
        return x

    def abort(self) -> None:
        """End the sums that wait for a rank that has ended; further ones fail. For any thread.

        NCCL would wait for the timeout. Its aborted sums end without an error, and what was
        computed with them is of no use.
        """
        self._is_aborted = True
        is_locked = self._launching.acquire(timeout=_LAUNCH_SECONDS)
        try:
            with contextlib.suppress(RuntimeError):  # gloo has no abort: its sums end by an error
                self._group.abort()
        finally:
            if is_locked:
                self._launching.release()


@contextlib.contextmanager
def _loopback() -> Iterator[None]:
    """Let the libraries, which read it from the environment, listen on 127.0.0.1 only."""
    before = {key: os.environ.get(key) for key in _LOOPBACK}
    os.environ.update(_LOOPBACK)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
