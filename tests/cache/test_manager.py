"""Admission, publication, adoption, takeover, retention: the life of a node, drawn."""

from __future__ import annotations

import pytest
from cache_driver import CacheDriver, ids

from chunkllama.cache.chunk_pool import ChunkState


@pytest.fixture
def driver() -> CacheDriver:
    return CacheDriver()


class TestLifeOfANode:
    def test_prompt_chunks_are_nodes_before_they_are_computed(self, driver: CacheDriver) -> None:
        live = driver.start("abcdef")
        driver.assert_tree("""
            abcd #0 x1 0/4
              ef #1 x1 0/2
            """)
        live.compute()
        driver.assert_tree("""
            abcd #0 x1
              ef #1 x1
            """)

    def test_a_decode_chunk_becomes_a_node_when_it_is_full(self, driver: CacheDriver) -> None:
        live = driver.start("abcd")
        live.compute()
        live.write("efg")
        driver.assert_tree("abcd #0 x1")
        live.write("h")
        driver.assert_tree("""
            abcd #0 x1
              efgh #1 x1
            """)

    def test_the_live_tail_is_copied_from_while_it_grows(self, driver: CacheDriver) -> None:
        live = driver.start("abcdef")
        live.compute()
        live.write("g")
        assert driver.match("abcdefX").num_tokens == 6
        live.write("hij")
        driver.assert_tree("""
            abcd #0 x1
              efgh #1 x1
            """)

    def test_an_equal_sibling_is_adopted_and_ours_freed(self, driver: CacheDriver) -> None:
        one = driver.start("abcd")
        one.compute()
        two = driver.start("abcd")
        assert (two.num_cached, two.chunk_ids) == (3, [1])
        assert two.compute() is True, "the whole prompt was there: only its copy was computed"
        assert two.chunk_ids == [0]
        one.write("efgh")
        assert two.write("efg") is False
        assert two.chunk_ids == [0, 2]
        assert two.write("h") is True
        assert one.chunk_ids == two.chunk_ids == [0, 1]
        driver.assert_tree("""
            abcd #0 x2
              efgh #1 x2
            """)
        assert driver.cache.pool.num_free == 14

    def test_a_tenant_adopts_a_public_chunk(self, driver: CacheDriver) -> None:
        public, tenant = driver.start("abcdX"), driver.start("abcdY", "T")
        public.compute()
        assert tenant.compute() is True
        assert tenant.chunk_ids == [0, 3]
        driver.assert_tree("""
            abcd #0 x2
              X #1 x1
            """)
        tenant.release()
        driver.assert_tree("""
            abcd #0 x1
              X #1 x1
              Y #3 @T
            """)

    def test_an_unfilled_equal_sibling_is_waited_for(self, driver: CacheDriver) -> None:
        slow = driver.start("abcdefgh")
        fast = driver.start("abcdefgh")
        assert fast.chunk_ids == [2, 3]
        fast.compute()
        driver.assert_tree("""
            abcd #0 x1 0/4
              efgh #1 x1 0/4
            """)
        slow.compute()
        assert fast.write("i") is True
        assert fast.chunk_ids[:2] == [0, 1]
        driver.check()

    def test_the_tail_becomes_a_partial_leaf_at_the_end(self, driver: CacheDriver) -> None:
        live = driver.start("abcd")
        live.compute()
        live.write("ef")
        live.release()
        driver.assert_tree("""
            abcd #0
              ef #1
            """)

    def test_a_covered_tail_leaves_nothing(self, driver: CacheDriver) -> None:
        live = driver.start("abcd")
        live.compute()
        live.write("ef")
        driver.store("abcdefg")
        live.release()
        driver.assert_tree("""
            abcd #0
              efg #2
            """)

    def test_a_longer_leaf_replaces_the_idle_one_it_covers(self, driver: CacheDriver) -> None:
        live = driver.start("abcd")
        live.compute()
        live.write("efg")
        driver.store("abcdef")
        live.release()
        driver.assert_tree("""
            abcd #0
              efg #1
            """)
        assert driver.cache.pool.num_free == 14

    def test_insert_limit_hides_the_rest(self, driver: CacheDriver) -> None:
        live = driver.start("abcdefghij", insert_limit=6)
        live.compute()
        driver.assert_tree("""
            abcd #0 x1
              ef #1 x1
            """)
        live.write("klmnop")
        live.release()
        driver.assert_tree("""
            abcd #0
              ef #1
            """)
        assert driver.cache.pool.num_free == 14

    def test_an_insert_limit_of_nothing_leaves_nothing(self, driver: CacheDriver) -> None:
        live = driver.start("abcdef", insert_limit=0)
        live.compute()
        live.release()
        assert driver.tree() == ""
        assert driver.cache.pool.num_free == 16


class TestTakeover:
    def test_an_idle_partial_leaf_is_taken_over_when_all_of_it_matches(
        self, driver: CacheDriver
    ) -> None:
        driver.store("abcdef")
        live = driver.start("abcdefgh")
        assert live.num_cached == 6
        assert live.chunks.copies == []
        driver.assert_tree("""
            abcd #0 x1
              efgh #1 x1 2/4
            """)

    def test_a_used_leaf_is_copied(self, driver: CacheDriver) -> None:
        first = driver.start("abcdef")
        first.compute()
        live = driver.start("abcdefgh")
        assert live.chunks.copies == [(1, 2, 2)]
        live.compute()
        driver.assert_tree("""
            abcd #0 x2
              ef #1 x1
              efgh #2 x1
            """)

    def test_a_leaf_that_goes_on_differently_is_copied(self, driver: CacheDriver) -> None:
        driver.store("abcdefg")
        live = driver.start("abcdeXYZ")
        assert live.chunks.copies == [(1, 2, 1)]

    def test_short_of_room_a_leaf_gives_up_its_other_tokens(self, driver: CacheDriver) -> None:
        driver.store("abcdefg")
        match = driver.match("abcdeXYZ")
        copied, taken_over, computed = driver.cache.admissions(match, 2, "")
        assert (copied.reuses_leaf, copied.num_new, copied.available) == (False, 1, 14)
        assert (taken_over.reuses_leaf, taken_over.num_new, taken_over.available) == (True, 0, 14)
        assert (computed.match.num_tokens, computed.num_new, computed.available) == (4, 1, 15)
        live = driver.start("abcdeXYZ", option=1)
        driver.assert_tree("""
            abcd #0 x1
              eXYZ #1 x1 1/4
            """)
        live.compute()
        driver.check()

    def test_a_tenant_copies_a_public_leaf(self, driver: CacheDriver) -> None:
        """Reusing it would hide it from all other tenants."""
        driver.store("abcdef")
        live = driver.start("abcdefgh", "T")
        assert live.chunks.copies == [(1, 2, 2)]
        live.compute()
        driver.assert_tree("""
            abcd #0 x1
              ef #1
              efgh #2 x1 @T
            """)
        assert driver.match("abcdefX", "U").num_tokens == 6

    def test_pinned_leaves_are_not_taken_over(self, driver: CacheDriver) -> None:
        driver.store("abcdef")
        assert driver.cache.pin(ids("abcdef"), "", 10.0, "")
        assert driver.start("abcdefgh").chunks.copies == [(1, 2, 2)]


class TestAbandoned:
    def test_what_was_never_computed_leaves_at_once(self, driver: CacheDriver) -> None:
        live = driver.start("abcdefghij")
        live.compute(6)
        live.release()
        driver.assert_tree("""
            abcd #0
              ef #1
            """)
        assert driver.cache.pool.num_free == 14

    def test_nothing_computed_nothing_left(self, driver: CacheDriver) -> None:
        driver.start("abcdefghij").release()
        assert driver.tree() == ""
        assert driver.cache.pool.num_free == 16

    def test_discarded_sequences_leave_only_what_they_shared(self, driver: CacheDriver) -> None:
        driver.store("abcd")
        live = driver.start("abcdefghij")
        live.compute()
        driver.live.remove(live)
        driver.cache.discard(live.chunks)
        driver.assert_tree("abcd #0")

    def test_what_nobody_computes_any_more_is_not_waited_for(self, driver: CacheDriver) -> None:
        driver.store("ab")
        leader = driver.start("abcd")
        match = driver.match("abcdX")
        assert (match.num_tokens, match.num_later_tokens) == (2, 4)
        assert match.pending is not None
        assert driver.cache.is_pending_node(*match.pending)
        leader.release()  # what it took over stays behind, never to be filled
        driver.assert_tree("ab #0")
        assert not driver.cache.is_pending_node(*match.pending)

    def test_progress_comes_in_the_order_of_the_path(self) -> None:
        """Not in that of addresses in memory, which would make a run unrepeatable."""
        driver = CacheDriver(num_chunks=64)
        leader = driver.start("abcd" * 50)
        path = list(leader.chunks.path)
        driver.cache.tree.awaited.update(path)
        leader.release()
        assert [node.depth for node in driver.cache.take_progress()] == list(range(50))


class TestForks:
    def test_whole_nodes_are_shared_and_the_tail_copied(self, driver: CacheDriver) -> None:
        live = driver.start("abcdef")
        live.compute()
        child = driver.cache.fork(live.chunks, 6)
        assert child is not None
        assert child.ids.tolist() == [0, 2]
        assert child.copies == [(1, 2, 2)]
        assert driver.cache.pool.count(ChunkState.PRIVATE) == 1

    def test_at_a_chunk_edge_nothing_is_copied(self, driver: CacheDriver) -> None:
        live = driver.start("abcdefgh")
        live.compute()
        child = driver.cache.fork(live.chunks, 8)
        assert child is not None and child.copies == []
        assert child.ids.tolist() == [0, 1]

    def test_a_fork_that_leaves_before_its_copy_leaves_nothing_behind(
        self, driver: CacheDriver
    ) -> None:
        live = driver.start("abcde")
        live.compute()
        live.write("fg")
        child = driver.cache.fork(live.chunks, 7)
        assert child is not None and child.copies == [(1, 2, 3)]
        driver.cache.release(child, ids("abcdefg"), 7)
        driver.assert_tree("""
            abcd #0 x1
              e #1 x1
            """)
        assert driver.cache.pool.num_free == 14

    def test_a_full_pool_cannot_fork(self) -> None:
        driver = CacheDriver(num_chunks=2)
        live = driver.start("abcdef")
        live.compute()
        assert driver.cache.fork(live.chunks, 6) is None
        driver.check()


class TestPins:
    def test_a_pin_holds_the_path_until_its_time_is_over(self, driver: CacheDriver) -> None:
        driver.store("abcdefgh")
        driver.store("abcdXYZW")
        assert driver.cache.pin(ids("abcdefgh"), "", 10.0, "")
        driver.assert_tree("""
            abcd #0 pinned
              XYZW #2
              efgh #1 pinned
            """)
        assert driver.cache.tree.evict(9) == 1
        driver.now = 9.9
        driver.cache.expire_pins()
        assert driver.cache.pins.num_chunks == 2
        driver.now = 10.0
        driver.cache.expire_pins()
        assert driver.cache.pins.num_chunks == 0
        assert driver.cache.tree.evict(9) == 2

    def test_shared_chunks_are_paid_for_once(self, driver: CacheDriver) -> None:
        for text in ("abcdefgh", "abcdXYZW"):
            driver.store(text)
            assert driver.cache.pin(ids(text), "", 10.0, "")
        assert driver.cache.pins.num_chunks == 3
        driver.check()

    def test_beyond_half_the_pool_a_pin_is_refused_and_counted(self) -> None:
        driver = CacheDriver(num_chunks=6)
        driver.store("abcdefghijkl")
        driver.store("wxyz")
        assert driver.cache.pin(ids("abcdefghijkl"), "", 10.0, "")
        assert not driver.cache.pin(ids("wxyz"), "", 10.0, "")
        assert driver.cache.pins.refused_total == 1
        assert driver.cache.pins.num_chunks == 3

    def test_a_tenant_leaves_half_of_the_free_pin_budget(self) -> None:
        driver = CacheDriver(40)
        texts = [chr(97 + i) * 8 for i in range(12)]
        for text in texts:
            driver.store(text)
        granted = [driver.cache.pin(ids(text), "", 86_400.0, "A") for text in texts]
        assert granted == [True] * 5 + [False] * 7  # 10 of the 20 chunks of the budget
        granted = [driver.cache.pin(ids(text), "", 60.0, "B") for text in texts[5:]]
        assert granted == [True, True, False, False, False, False, False]
        driver.cache.check_invariants([])

    def test_tenants_that_pin_one_node_each_hold_it(self) -> None:
        driver = CacheDriver(40)
        driver.store("abcdefgh")
        assert driver.cache.pin(ids("abcdefgh"), "", 10.0, "A")
        assert driver.cache.pin(ids("abcdefgh"), "", 20.0, "B")
        assert driver.cache.pins.num_chunks == 2
        driver.now += 15.0
        driver.cache.expire_pins()
        driver.cache.check_invariants([])
        assert driver.cache.pins.num_chunks == 2
        driver.now += 15.0
        driver.cache.expire_pins()
        assert driver.cache.pins.num_chunks == 0

    def test_pinning_again_extends(self, driver: CacheDriver) -> None:
        driver.store("abcd")
        driver.cache.pin(ids("abcd"), "", 10.0, "")
        driver.now = 5.0
        driver.cache.pin(ids("abcd"), "", 10.0, "")
        driver.now = 12.0
        driver.cache.expire_pins()
        assert driver.cache.pins.num_chunks == 1

    def test_a_pin_moves_to_the_adopted_twin(self, driver: CacheDriver) -> None:
        one, two = driver.start("abcdef"), driver.start("abcdefg")
        one.compute()
        two.compute()
        assert driver.cache.pin(ids("abcdef"), "", 10.0, "")
        two.write("h")
        one.write("gh")
        driver.check()
        assert driver.cache.pins.num_chunks == 2
