"""The pool's pages are committed ahead of their use, and keep what they hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from chunkllama.backends.cpu.memory import allocate_lazily, commit_in_background

SIZE = 24 << 20


def resident(address: int) -> int:
    """Resident bytes of the mapping that holds the address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            begin, end = (int(part, 16) for part in head.split("-"))
            inside = begin <= address < end
        elif inside and head == "Rss:":
            return int(line.split()[1]) << 10
    raise AssertionError("no mapping holds the address")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells what is resident")
def test_a_pool_is_committed_before_its_first_use() -> None:
    pool = allocate_lazily(SIZE, torch.uint8)
    layers = list(pool.view(3, SIZE // 3).unbind())
    commit_in_background([pool[:4096]]).join(timeout=60)
    before = resident(pool.data_ptr())
    if before == 0:
        pytest.skip("this kernel has no MADV_POPULATE_WRITE")
    layers[1][12345] = 7
    commit_in_background(layers).join(timeout=60)
    assert before < SIZE <= resident(pool.data_ptr())
    assert layers[1][12345] == 7
    assert int(pool.sum()) == 7
