"""The pool's pages are committed ahead of their use, and keep what they hold."""

from __future__ import annotations

import ctypes
import mmap

import pytest
import torch

from chunkllama.backends.cpu.memory import HUGE_PAGE, PoolCommitter, allocate_lazily

SIZE = 24 << 20


def resident(tensor: torch.Tensor) -> int:
    """Bytes of the tensor's whole pages that have memory."""
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    pages = (tensor.data_ptr() + tensor.nbytes - start) // page
    states = (ctypes.c_ubyte * pages)()
    mincore = ctypes.CDLL(None).mincore
    mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    assert mincore(start, pages * page, states) == 0
    return sum(state & 1 for state in states) * page


def committed(committer: PoolCommitter) -> PoolCommitter:
    """Begin at the first chunk, and wait."""
    committer.reach(0)
    committer.join()
    return committer


@pytest.fixture
def layers() -> list[torch.Tensor]:
    """Three layers of 12 chunks, where the system can commit pages."""
    probe = allocate_lazily(HUGE_PAGE, torch.uint8)
    committed(PoolCommitter([probe], 1))
    if resident(probe) == 0:
        pytest.skip("this kernel has no MADV_POPULATE_WRITE")
    return list(allocate_lazily(SIZE, torch.uint8).view(3, SIZE // 3).unbind())


def total(layers: list[torch.Tensor]) -> int:
    return sum(resident(layer) for layer in layers)


def test_a_small_pool_is_committed_before_its_first_use(layers) -> None:
    layers[1][12345] = 7
    committed(PoolCommitter(layers, 12))
    assert total(layers) == SIZE
    assert layers[1][12345] == 7
    assert sum(int(layer.sum()) for layer in layers) == 7


def test_a_pool_works_where_no_thread_can_be_started(layers, monkeypatch) -> None:
    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", refuse)
    committer = PoolCommitter(layers, 12)
    committer.reach(0)
    monkeypatch.undo()
    committer.reach(11)
    committer.join()
    assert total(layers) == 0


def test_pages_are_committed_ahead_of_the_highest_chunk(layers, monkeypatch) -> None:
    monkeypatch.setattr("chunkllama.backends.cpu.memory.AHEAD", 3 * HUGE_PAGE)
    committer = committed(PoolCommitter(layers, 12))
    first = total(layers)
    assert 0 < first < SIZE
    committer.reach(1)  # more than half of what is committed lies ahead of it
    committer.join()
    assert total(layers) == first
    committer.reach(5)
    committer.join()
    second = total(layers)
    assert first < second < SIZE
    committer.reach(2)
    committer.join()
    assert total(layers) == second
    committer.reach(11)
    committer.join()
    assert total(layers) == SIZE
