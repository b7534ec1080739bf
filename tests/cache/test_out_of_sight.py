"""Chunks behind the window of a running sequence; a window of five letters, chunks of four."""

from __future__ import annotations

import pytest
from cache_driver import CacheDriver, Text, ids

from chunkllama.cache.out_of_sight import drop_out_of_sight, num_out_of_sight
from chunkllama.cache.sequence_chunks import DROPPED

WINDOW = 5
ALPHABET = "abcdefghijklmnopqrst"


def started(driver: CacheDriver, text: str, **options: object) -> Text:
    live = driver.start(text, **options)
    live.compute()
    return live


def num_hidden(live: Text) -> int:
    return num_out_of_sight(live.driver.cache, live.chunks, live.num_computed)


def drop(live: Text) -> None:
    drop_out_of_sight(live.driver.cache, live.chunks, live.num_computed, "needy")
    live.driver.check()


@pytest.mark.parametrize(("length", "hidden"), [(4, 0), (7, 0), (8, 1), (11, 1), (12, 2), (20, 4)])
def test_a_chunk_is_hidden_once_the_next_token_does_not_see_its_last_one(
    length: int, hidden: int
) -> None:
    """The next token, at position ``length``, sees itself and the four before it."""
    live = started(CacheDriver(reach=WINDOW), ALPHABET[:length])
    assert num_hidden(live) == hidden


def test_without_a_window_in_every_layer_nothing_is_hidden() -> None:
    assert num_hidden(started(CacheDriver(), ALPHABET)) == 0


def test_what_is_dropped_leaves_the_tree_with_all_below_it() -> None:
    driver = CacheDriver(8, reach=WINDOW)
    live = started(driver, "abcdefghijkl")
    driver.assert_tree("""
        abcd #0 x1
          efgh #1 x1
            ijkl #2 x1
    """)
    drop(live)
    driver.assert_tree("")
    assert live.chunk_ids == [DROPPED, DROPPED, 2]
    assert driver.cache.pool.num_free == 7
    live.write("mnopq")  # nothing of it becomes a node again
    assert num_hidden(live) == 1
    drop(live)
    assert live.chunk_ids[:3] == [DROPPED] * 3
    live.release()
    driver.assert_tree("")
    assert driver.cache.pool.num_free == 8
    assert driver.cache.tree.evicted_chunks_total == 2, "the third kept its chunk"


def test_nodes_that_others_use_and_pinned_ones_stay() -> None:
    driver = CacheDriver(12, reach=WINDOW)
    one = started(driver, "aaaabbbbccccdddd")
    two = started(driver, "aaaabbbbeeee")
    assert driver.cache.pin(ids("aaaabbbbcccc"), "", 10.0, "")
    assert num_hidden(one) == num_hidden(two) == 0
    one.write("ffff")
    assert num_hidden(one) == 1
    drop(one)
    driver.assert_tree("""
        aaaa #0 x2 pinned
          bbbb #1 x2 pinned
            cccc #2 x1 pinned
            eeee #4 x1
    """)
    assert one.chunk_ids == [0, 1, 2, DROPPED, 5]
    driver.store("aaaabbbbcccc!")  # a match is what it is without windows
    one.release()
    two.release()
    assert driver.match("aaaabbbbccccdddd.").num_tokens == 12
    assert driver.match("aaaabbbbeeee.").num_tokens == 12


def test_private_chunks_are_dropped_too() -> None:
    """A request that shows nothing, and one that shows its first tokens."""
    driver = CacheDriver(16, reach=WINDOW)
    hidden = started(driver, ALPHABET, insert_limit=0)
    partly = started(driver, ALPHABET[::-1], insert_limit=6)
    for live in (hidden, partly):
        assert num_hidden(live) == 4
        drop(live)
        assert live.chunk_ids[:4] == [DROPPED] * 4
        live.write("uvwxyz")
        driver.check()
        live.release()
    driver.assert_tree("")
    assert driver.cache.pool.num_free == 16


def test_the_rest_of_a_path_is_dropped_when_others_have_left() -> None:
    driver = CacheDriver(16, reach=WINDOW)
    one = started(driver, "aaaabbbbccccdddd")
    two = started(driver, "aaaabbbb")
    assert num_hidden(one) == 1
    drop(one)
    two.release()
    assert num_hidden(one) == 2
    drop(one)
    assert one.chunk_ids == [DROPPED] * 3 + [3]
    driver.assert_tree("")
    one.release()
    assert driver.cache.pool.num_free == 16


def test_chunk_seconds_end_where_a_chunk_is_dropped() -> None:
    driver = CacheDriver(8, reach=WINDOW)
    live = started(driver, "abcdefghijkl", tenant="A")
    driver.now = 2.0
    drop(live)
    driver.now = 5.0
    expected = 2 * 2.0 + 5.0
    read = driver.cache.usage.read
    assert read([live.chunks])["A"].chunk_seconds == pytest.approx(expected)
    live.release()
    stats = read([])["A"]
    assert stats.chunk_seconds == pytest.approx(expected)
    assert stats.evicted_chunks == 2
    assert read([])["needy"].evictions_of_others == 2
    assert stats.chunks_cached == 0


def test_what_is_freed_counts_for_the_tenant_that_needs_it() -> None:
    driver = CacheDriver(8, reach=WINDOW)
    live = started(driver, ALPHABET, tenant="A")
    drop(live)
    stats = driver.cache.usage.read([live.chunks])
    lost, caused = stats["A"], stats["needy"]
    assert (lost.evicted_chunks, lost.evicted_tokens, lost.evictions_for) == (4, 16, 0)
    assert (caused.evicted_chunks, caused.evictions_for, caused.evictions_of_others) == (0, 4, 4)
    assert driver.cache.tree.evicted_chunks_total == 4


@pytest.mark.parametrize(("namespace", "owner"), [("", "A"), ("", "B"), ("N", "B")])
def test_what_was_found_stays_if_it_is_public_or_of_another_tenant(
    namespace: str, owner: str
) -> None:
    driver = CacheDriver(16, reach=WINDOW)
    started(driver, "aaaabbbb", namespace=namespace, tenant=owner).release()
    live = started(driver, "aaaabbbbccccddddeeee", namespace="N", tenant="A")
    drop(live)
    assert live.chunk_ids[:4] == [0, 1, DROPPED, DROPPED]
    live.release()
    assert driver.match("aaaabbbbcccc", namespace="N").num_tokens == 8


def test_a_tenant_gives_up_what_it_stored_itself() -> None:
    driver = CacheDriver(16, reach=WINDOW)
    started(driver, "aaaabbbb", namespace="N", tenant="A").release()
    live = started(driver, "aaaabbbbccccddddeeee", namespace="N", tenant="A")
    drop(live)
    assert live.chunk_ids[:4] == [DROPPED] * 4


def test_the_tier_is_offered_a_path_from_its_start() -> None:
    driver = CacheDriver(8, reach=WINDOW)
    live = started(driver, "abcdefghijkl")
    offered: list[int] = []
    driver.cache.tree.on_evicted = lambda node: offered.append(node.depth)
    drop(live)
    assert offered == [0, 1, 2]
