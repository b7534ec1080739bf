"""Memory of the native backend: on huge pages, and the pool's committed before it is needed.

A page costs its zeroing when it is first touched; on a virtual machine a 2 MB page takes several
milliseconds, and a step that enters new chunks touches one in every layer.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from typing import Final

import torch

MADV_POPULATE_WRITE: Final = 23  # Linux 5.14; elsewhere the call fails and pages come as touched
HUGE_PAGE: Final = 2 << 20
AHEAD: Final = 1 << 30  # bytes of a pool that are committed ahead; zeroing more takes seconds


def allocate_lazily(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """[elements], zeroed by the system on first touch, on 2 MB pages where it agrees.

    Raises:
        MemoryError: more than the system would ever give.
    """
    size = elements * dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    try:
        memory = mmap.mmap(-1, size + HUGE_PAGE, flags=flags)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"{size} bytes: {error}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    return whole[start : start + size].view(dtype)


class PoolCommitter:
    """Lets the system commit a pool's pages in a thread, from the first ``reach`` on: ``AHEAD``
    bytes beyond the highest chunk in use, the low chunks of every layer first.

    A pool hands out low chunk ids first, so that its memory follows its use. What the pages hold
    stays as it is, so the pool can be used meanwhile. Committing ends early where the system cannot
    do it; pages then come as they are touched.

    Args:
        layers: contiguous tensors of one size, of ``num_chunks`` chunks each.
    """

    def __init__(self, layers: list[torch.Tensor], num_chunks: int) -> None:
        self._layers = layers
        self._size = layers[0].numel() * layers[0].element_size()
        self._chunk_size = self._size // num_chunks
        self._ahead = max(AHEAD // len(layers), HUGE_PAGE)
        self._highest = -1
        self._committed = 0  # bytes of each layer
        self._thread: threading.Thread | None = None

    def reach(self, chunk_id: int) -> None:
        """Note that a chunk is in use; commit more when less than half of that is left."""
        if chunk_id <= self._highest:
            return
        self._highest = chunk_id
        used = (chunk_id + 1) * self._chunk_size
        is_near = self._committed < min(used + self._ahead // 2, self._size)
        if is_near and (self._thread is None or not self._thread.is_alive()):
            target = min(used + self._ahead, self._size)
            thread = threading.Thread(
                target=self._commit, args=(target,), daemon=True, name="commit-pool"
            )
            try:
                thread.start()
            except RuntimeError:  # no further thread is permitted
                self._committed = self._size
                return
            self._thread = thread

    def join(self) -> None:
        """Wait until nothing is being committed."""
        if self._thread is not None:
            self._thread.join()

    def _commit(self, target: int) -> None:
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        page = os.sysconf("SC_PAGE_SIZE")
        while self._committed < target:
            begin = self._committed
            for layer in self._layers:
                start = (layer.data_ptr() + begin) // page * page
                end = layer.data_ptr() + min(begin + HUGE_PAGE, self._size)
                if madvise(start, end - start, MADV_POPULATE_WRITE) != 0:
                    self._committed = self._size  # not again
                    return
            self._committed = begin + HUGE_PAGE
