"""The tree drawn, case by case; chunks of four letters."""

from __future__ import annotations

import numpy as np
import pytest
from cache_driver import CacheDriver

from chunkllama.cache.chunk_pool import ChunkPool, ChunkState
from chunkllama.cache.matching import find_match
from chunkllama.cache.node import Children, Node, common_prefix, encode_tokens
from chunkllama.cache.prefix_tree import PrefixTree
from chunkllama.cache.usage import ChunkUsage


@pytest.fixture
def driver() -> CacheDriver:
    return CacheDriver()


class TestMatch:
    def test_nothing_in_an_empty_tree(self, driver: CacheDriver) -> None:
        match = driver.match("abcdefgh")
        assert (match.num_tokens, match.nodes, match.copy_source) == (0, [], None)

    def test_whole_chunks_are_shared_and_the_rest_copied(self, driver: CacheDriver) -> None:
        driver.store("abcdefghij")
        match = driver.match("abcdefghiXYZ")
        assert [node.chunk_id for node in match.nodes] == [0, 1]
        assert match.copy_source is not None and match.copy_source.chunk_id == 2
        assert (match.num_copied, match.num_tokens) == (1, 9)

    def test_a_copy_from_inside_a_whole_chunk(self, driver: CacheDriver) -> None:
        driver.store("abcdefgh")
        match = driver.match("abcdefXY")
        assert (len(match.nodes), match.num_copied, match.num_tokens) == (1, 2, 6)

    @pytest.mark.parametrize("length", range(1, 13))
    def test_at_most_all_but_the_last_token(self, driver: CacheDriver, length: int) -> None:
        driver.store("abcdefghijkl")
        match = driver.match("abcdefghijkl"[:length])
        assert match.num_tokens == length - 1
        assert len(match.nodes) == (length - 1) // 4

    def test_the_longest_of_many_siblings(self, driver: CacheDriver) -> None:
        for text in ("abcdA", "abcdBBx", "abcdBCC", "abcdC"):
            driver.store(text)
        assert driver.match("abcdBCxx").num_tokens == 6
        assert driver.match("abcdBBxx").num_tokens == 7
        assert driver.match("abcdZxxx").num_tokens == 4

    def test_unfilled_tokens_are_promised_not_given(self, driver: CacheDriver) -> None:
        leader = driver.start("abcdefghij")
        leader.compute(5)
        driver.assert_tree("""
            abcd #0 x1
              efgh #1 x1 1/4
                ij #2 x1 0/2
            """)
        match = driver.match("abcdefghijk")
        assert match.num_tokens == 5
        assert match.num_later_tokens == 10

    def test_what_this_step_computes_is_shared_but_not_copied(self, driver: CacheDriver) -> None:
        leader = driver.start("abcdefghij")
        leader.schedule()
        match = driver.match("abcdefghijk")
        assert match.num_tokens == 8
        assert match.num_later_tokens == 10
        leader.commit()
        assert driver.match("abcdefghijk").num_tokens == 10

    def test_a_chunk_being_copied_lends_its_source(self, driver: CacheDriver) -> None:
        driver.store("abcdef")
        first = driver.start("abcdefUV")
        first.schedule()
        match = driver.match("abcdefUW")
        assert match.copy_source is not None and match.copy_source.chunk_id == first.chunk_ids[1]
        assert match.num_tokens == 6, "reused: its first tokens were there before"
        second = driver.start("abcdefXY")
        second.schedule()
        third = driver.match("abcdefXZ")
        assert third.num_tokens == 6
        assert third.copy_source is not None and third.copy_source.chunk_id == first.chunk_ids[1]

    def test_exact_ids_decide_whatever_their_size(self) -> None:
        tokens = np.array([0, 1, 255, 256, 65536, 2**31 - 1], np.int32)
        keys = sorted(encode_tokens(np.array([t], np.int32)) for t in tokens)
        assert keys == [encode_tokens(np.array([t], np.int32)) for t in tokens]


class TestNamespaces:
    def test_a_tenants_chunks_hang_below_public_ones(self, driver: CacheDriver) -> None:
        driver.store("sysAsysB")
        driver.store("sysAsysBmine", "T")
        driver.store("sysAsysByour", "U")
        driver.assert_tree("""
            sysA #0
              sysB #1
                mine #2 @T
                your #3 @U
            """)
        assert driver.match("sysAsysBmine!", "T").num_tokens == 12
        assert driver.match("sysAsysBmine!", "U").num_tokens == 8
        assert driver.match("sysAsysBmine!", "").num_tokens == 8

    def test_a_public_request_sees_no_private_chunk(self, driver: CacheDriver) -> None:
        driver.store("abcdefgh", "T")
        assert driver.match("abcdefghi").num_tokens == 0
        driver.store("abcdefgh")
        driver.assert_tree("""
            abcd #2
              efgh #3
            abcd #0 @T
              efgh #1 @T
            """)

    def test_the_longer_of_two_equal_starts_is_found(self, driver: CacheDriver) -> None:
        driver.store("abcdefghijkl", "T")
        driver.store("abcd")
        assert driver.match("abcdefghijklm", "T").num_tokens == 12
        driver.store("abcdefghijklmnop")
        assert driver.match("abcdefghijklmnopq", "T").num_tokens == 16

    @pytest.mark.parametrize("public", ["", "sysA"])
    def test_a_tenants_whole_chunk_is_shared_not_copied(
        self, driver: CacheDriver, public: str
    ) -> None:
        """However few tokens stand behind it: a copy would match as many."""
        if public:
            driver.store(public)
        driver.store(public + "mine", "T")
        match = driver.match(public + "mine!", "T")
        assert match.copy_source is None
        assert len(match.nodes) == len(public + "mine") // 4

    def test_roots_keep_variants_apart(self) -> None:
        tree = PrefixTree(ChunkPool(4, 4), ChunkUsage(lambda: 0.0))
        one, other = tree.root("llama/bf16"), tree.root("llama/fp8")
        (chunk_id,) = tree.pool.allocate(1)
        key = encode_tokens(np.array([1, 2, 3, 4], np.int32))
        tree.insert(one, "", key, chunk_id, 4)
        assert find_match(one, key, 4, "", 4).num_tokens == 4
        assert find_match(other, key, 4, "", 4).num_tokens == 0


class TestEviction:
    def test_least_recently_used_leaves_first_children_before_parents(
        self, driver: CacheDriver
    ) -> None:
        driver.store("abcdefgh")
        driver.store("abcdIJKL")
        driver.store("wxyz")
        driver.start("abcdefghi").release()  # makes that branch the youngest
        for gone in ("abcdIJKL", "wxyz", "abcdefgh", "abcd"):
            assert driver.match(gone, limit=len(gone)).num_tokens == len(gone)
            assert driver.cache.tree.evict(1) == 1
            assert driver.match(gone, limit=len(gone)).num_tokens < len(gone)
            driver.check()
        assert driver.cache.pool.num_free == 16
        assert driver.cache.tree.evict(1) == 0

    def test_used_and_held_chunks_stay(self, driver: CacheDriver) -> None:
        driver.store("abcdefgh")
        driver.store("wxyz")
        live = driver.start("wxyzab")
        copying = driver.start("abcdefXY")
        assert driver.cache.tree.num_evictable == 0
        assert driver.cache.tree.evict(9) == 0
        driver.check(in_step=True)
        copying.compute()
        assert driver.cache.tree.evict(9) == 1  # the copy's source, once the copy is done
        live.compute()
        driver.check()

    def test_a_prefix_hit_for_ever_does_not_grow_the_heap(self, driver: CacheDriver) -> None:
        driver.store("abcdefgh")
        for _ in range(1000):
            live = driver.start("abcdefghi")
            live.compute()
            live.release()
        assert driver.cache.tree.order.num_entries < 200
        assert driver.cache.tree.num_nodes == 3


def test_neighbours_find_the_longest_prefix_by_brute_force() -> None:
    rng = np.random.default_rng(5)
    for _ in range(200):
        children = Children()
        root = Node(None, "", b"", -1, 0)
        keys = {tuple(rng.integers(0, 2, rng.integers(1, 7))) for _ in range(12)}
        for key in keys:
            children.add(Node(root, "", encode_tokens(np.array(key, np.int32)), 0, 0))
        wanted = encode_tokens(rng.integers(0, 2, 6).astype(np.int32))
        best = max(common_prefix(node.key, wanted) for node in children)
        found = max(common_prefix(node.key, wanted) for node in children.neighbours(wanted))
        assert found == best


def test_states_of_the_pool_follow_the_tree(driver: CacheDriver) -> None:
    live = driver.start("abcdefgh")
    assert driver.cache.pool.count(ChunkState.REFERENCED) == 2
    live.compute()
    live.write("ij")
    assert driver.cache.pool.count(ChunkState.PRIVATE) == 1
    live.release()
    assert driver.cache.pool.count(ChunkState.CACHED) == 3
    assert driver.cache.pool.count(ChunkState.PRIVATE) == 0
