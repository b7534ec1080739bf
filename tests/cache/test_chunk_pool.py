import pytest

from chunkllama.cache.chunk_pool import ChunkPool, ChunkState
from chunkllama.errors import ConfigError


def test_a_fresh_pool_gives_ids_in_order() -> None:
    pool = ChunkPool(4, 64)
    assert pool.allocate(3) == [0, 1, 2]
    assert pool.num_free == 1


def test_the_chunk_freed_last_is_used_next() -> None:
    pool = ChunkPool(4, 64)
    pool.allocate(3)
    pool.free(0)
    pool.free(2)
    assert pool.allocate(2) == [2, 0]


def test_states_add_up_at_every_moment() -> None:
    pool = ChunkPool(5, 64)
    a, b, c = pool.allocate(3)
    pool.set_state(a, ChunkState.REFERENCED)
    pool.set_state(b, ChunkState.CACHED)
    counts = {state.name: pool.count(state) for state in ChunkState}
    assert counts == {"FREE": 2, "CACHED": 1, "REFERENCED": 1, "PRIVATE": 1}
    pool.check_invariants()
    for chunk_id in (a, b, c):
        pool.free(chunk_id)
    assert pool.count(ChunkState.FREE) == 5
    pool.check_invariants()


def test_peak_counts_chunks_in_use_not_cached_ones() -> None:
    pool = ChunkPool(8, 64)
    taken = pool.allocate(4)
    for chunk_id in taken:
        pool.set_state(chunk_id, ChunkState.CACHED)
    pool.allocate(2)
    assert pool.peak == 4
    for chunk_id in taken[:3]:
        pool.set_state(chunk_id, ChunkState.REFERENCED)
    assert pool.peak == 5


def test_double_free_is_a_bug() -> None:
    pool = ChunkPool(2, 64)
    (chunk_id,) = pool.allocate(1)
    pool.free(chunk_id)
    with pytest.raises(AssertionError, match="free already"):
        pool.free(chunk_id)


def test_more_than_there_is_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="3 chunks wanted, 2 free"):
        ChunkPool(2, 64).allocate(3)


@pytest.mark.parametrize(("num_chunks", "chunk_size"), [(0, 64), (4, 0)])
def test_an_empty_pool_is_refused(num_chunks: int, chunk_size: int) -> None:
    with pytest.raises(ConfigError, match="at least one chunk"):
        ChunkPool(num_chunks, chunk_size)
