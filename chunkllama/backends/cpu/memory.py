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
COMMITTED: Final = 1 << 30  # bytes of a pool that are committed ahead; zeroing more takes seconds


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


def commit_in_background(layers: list[torch.Tensor]) -> threading.Thread:
    """Let the system commit the layers' pages, the low chunks of every layer first, ``COMMITTED``
    bytes in all.

    What the pages hold stays as it is, so the pool can be used meanwhile. The thread ends early
    where the system cannot do it.

    Args:
        layers: contiguous tensors of one size.
    """
    thread = threading.Thread(target=_commit, args=(list(layers),), daemon=True, name="commit-pool")
    thread.start()
    return thread


def _commit(layers: list[torch.Tensor]) -> None:
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    page = os.sysconf("SC_PAGE_SIZE")
    size = layers[0].numel() * layers[0].element_size()
    for begin in range(0, min(size, max(COMMITTED // len(layers), HUGE_PAGE)), HUGE_PAGE):
        for layer in layers:
            start = (layer.data_ptr() + begin) // page * page
            end = layer.data_ptr() + min(begin + HUGE_PAGE, size)
            if madvise(start, end - start, MADV_POPULATE_WRITE) != 0:
                return
