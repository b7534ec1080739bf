"""Runs of nodes that are used as one: what joining, leaving and matching them costs."""

from __future__ import annotations

import random

import pytest
from cache_driver import CacheDriver

from chunkllama.cache.edge import Edge, edges_of
from chunkllama.cache.matching import Match
from chunkllama.cache.node import Node

LONG = "".join(chr(ord("a") + i % 26) + chr(ord("A") + i // 26 % 26) for i in range(400))


def edges(match: Match) -> list[int]:
    """Lengths of the edges of a match that ends with one."""
    return [len(edge.nodes) for edge in edges_of(match.nodes)]


@pytest.fixture
def driver() -> CacheDriver:
    return CacheDriver(num_chunks=600)


def test_a_prompt_without_branches_is_one_edge(driver: CacheDriver) -> None:
    driver.store(LONG + "Z")
    assert edges(driver.match(LONG + "Z")) == [200]


def test_a_join_looks_at_edges_and_not_at_their_nodes(driver: CacheDriver, monkeypatch) -> None:
    driver.store(LONG)
    leader = driver.start(LONG + "12345")
    leader.compute()
    looked_at: list[Node] = []
    monkeypatch.setattr(
        Node, "num_sequences", property(lambda node: looked_at.append(node) or 0), raising=True
    )
    monkeypatch.setattr(
        Node, "is_evictable", property(lambda node: looked_at.append(node) or False), raising=True
    )
    follower = driver.start(LONG + "67890")
    assert len(looked_at) < 8
    assert len(follower.chunks.path) == 202
    assert [len(edge.nodes) for edge in edges_of(follower.chunks.path)] == [200, 1, 1]


def test_branches_divide_an_edge_until_they_are_gone(driver: CacheDriver) -> None:
    driver.store(LONG)
    driver.store(LONG[:400] + "branch")
    driver.check()
    assert edges(driver.match(LONG + "Z")) == [100, 100]
    driver.cache.tree.evict(100)  # of the first text, which was used before
    driver.check()
    assert edges(driver.match(LONG[:400] + "branch")) == [101]


def test_an_edge_that_is_used_in_part_is_whole_again_after_it_was_used_whole(
    driver: CacheDriver,
) -> None:
    driver.store(LONG)
    hidden = driver.start(LONG[:400] + "hidden", insert_limit=0)
    hidden.compute()
    assert edges(driver.match(LONG + "Z")) == [100, 100]
    hidden.release()
    assert edges(driver.match(LONG + "Z")) == [100, 100], "their last uses differ"
    driver.store(LONG)
    assert edges(driver.match(LONG + "Z")) == [200]


def test_output_extends_the_edge_of_its_sequence(driver: CacheDriver) -> None:
    live = driver.start("abcdefgh")
    live.compute()
    live.write("ijklmnopqrstuvwxyz")
    driver.check()
    assert [len(edge.nodes) for edge in edges_of(live.chunks.path)] == [6]


@pytest.mark.parametrize("seed", range(20))
def test_split_and_joined_edges_keep_what_sequences_have_noted(seed: int) -> None:
    """Chunk-seconds of all sequences add up to the time that the nodes were in use."""
    rng = random.Random(seed)
    driver = CacheDriver(num_chunks=200)
    tree, texts, live = driver.cache.tree, [LONG[:160]], []
    busy = 0.0
    for _ in range(60):
        elapsed = rng.random()
        driver.now += elapsed
        used = {node for each in live for node in each.chunks.path}
        busy += elapsed * (len(used) + sum(each.chunks.num_private for each in live))
        if live and rng.random() < 0.5:
            live.pop(rng.randrange(len(live))).release()
        else:
            text = rng.choice(texts)
            text = text[: rng.randrange(1, len(text) + 1)] + rng.choice(["", "x", "yyyyy"])
            texts.append(text)
            started = driver.start(text, insert_limit=rng.choice([0, 2**62]), tenant="t")
            started.compute()
            live.append(started)
        if rng.random() < 0.3:
            tree.evict(rng.randrange(6))
        driver.check()
    stats = driver.cache.usage.read([each.chunks for each in live])
    assert stats["t"].chunk_seconds == pytest.approx(busy)


def test_the_longer_part_keeps_its_object() -> None:
    """So that a branch near an end of a long edge costs little."""
    driver = CacheDriver(num_chunks=600)
    driver.store(LONG)
    (edge,) = edges_of(driver.match(LONG + "Z").nodes)
    assert isinstance(edge, Edge)
    driver.store(LONG[:8] + "other")
    assert len(edge.nodes) == 198
    driver.store(LONG[:780] + "other")
    assert len(edge.nodes) == 193
