"""Chunks whose K/V come from a file, inserted into the tree."""

from __future__ import annotations

from cache_driver import CacheDriver, ids

from chunkllama.cache.imports import ChunkImport
from chunkllama.cache.node import encode_tokens


def add(chunks: ChunkImport, parent: int, text: str, namespace: str = "") -> str:
    return chunks.add(parent, namespace, encode_tokens(ids(text)), namespace)[1]


def test_inserted_chunks_are_cached_and_matched() -> None:
    driver = CacheDriver()
    chunks = ChunkImport(driver.cache)
    assert [add(chunks, -1, "abcd"), add(chunks, 0, "efgh"), add(chunks, 0, "ijkl", "A")] == [
        "new"
    ] * 3
    driver.assert_tree("""
        abcd #0
          efgh #1
          ijkl #2 @A
        """)
    assert driver.match("abcdefgh.").num_tokens == 8
    assert driver.match("abcdijkl.", "A").num_tokens == 8
    assert driver.match("abcdijkl.", "B").num_tokens == 4
    assert driver.cache.pool.peak == 0


def test_what_is_there_is_kept() -> None:
    driver = CacheDriver()
    driver.store("abcdef")
    chunks = ChunkImport(driver.cache)
    assert [add(chunks, -1, "abcd"), add(chunks, 0, "efgh")] == ["present", "new"]
    driver.assert_tree("""
        abcd #0
          efgh #2
        """)  # which covers the partial leaf "ef"


def test_a_chunk_that_is_being_computed_is_left_to_its_request() -> None:
    driver = CacheDriver()
    live = driver.start("abcdefgh.")
    chunks = ChunkImport(driver.cache)
    assert [add(chunks, -1, "abcd"), add(chunks, 0, "xxxx")] == ["pending", "lost"]
    live.compute()
    live.release()
    assert add(ChunkImport(driver.cache), -1, "abcd") == "present"


def test_a_parent_is_not_evicted_for_its_child() -> None:
    driver = CacheDriver(num_chunks=2)
    live = driver.start("wxyz")
    chunks = ChunkImport(driver.cache)
    assert [add(chunks, -1, "abcd"), add(chunks, 0, "efgh")] == ["new", "no room"]
    live.compute()
    live.release()
    assert add(chunks, 0, "ijkl") == "new"
    driver.assert_tree("""
        abcd #1
          ijkl #0
        """)


def test_nothing_is_inserted_below_a_chunk_that_was_evicted_or_left_out() -> None:
    driver = CacheDriver()
    chunks = ChunkImport(driver.cache)
    assert add(chunks, -1, "abcd") == "new"
    chunks.leave_out()
    assert add(chunks, 1, "efgh") == "lost"
    driver.cache.tree.evict(1)
    assert [add(chunks, 0, "ijkl"), add(chunks, -1, "mnop")] == ["lost", "new"]
    driver.check()


def test_a_request_adopts_the_chunk_that_was_inserted_while_it_decoded() -> None:
    driver = CacheDriver()
    live = driver.start("ab")
    live.compute()
    chunks = ChunkImport(driver.cache)
    assert add(chunks, -1, "abcd") == "new"
    assert live.write("cd")
    live.release()
    driver.assert_tree("abcd #1")
