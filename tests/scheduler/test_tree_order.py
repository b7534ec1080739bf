"""Depth-first order and shared chunks, kept incrementally, against sorting from scratch."""

from __future__ import annotations

import itertools
import random

import numpy as np

from chunkllama.cache.adapter_tags import AdapterUse
from chunkllama.cache.sequence_chunks import SequenceChunks
from chunkllama.messages import EngineRequest
from chunkllama.sampling_params import SamplingParams
from chunkllama.scheduler.request import Sequence, SequenceGroup
from chunkllama.scheduler.tree_order import TreeOrder, num_shared_chunks


def sequence(chunk_ids: list[int]) -> Sequence:
    request = EngineRequest(request_id="r", prompt_token_ids=[1], sampling=SamplingParams())
    made = Sequence(SequenceGroup(request, 0, 0.0, 1), 0, np.array([1], np.int32))
    made.chunks = SequenceChunks("", 0, [])
    made.chunks.extend(chunk_ids, 0.0)
    return made


def with_adapter(chunk_ids: list[int], number: int, start: int) -> Sequence:
    made = sequence(chunk_ids)
    made.group.adapter = AdapterUse(number, start)
    return made


def paths(order: TreeOrder) -> list[list[int]]:
    return [s.chunks.ids.tolist() for s in order.sequences if s.chunks is not None]


def test_joins_and_leaves() -> None:
    order = TreeOrder(64)
    a, b, c, d = map(sequence, ([1, 2, 9], [4], [1, 2, 3, 5], [1, 7]))
    for each in (a, b, c, d):
        order.insert(each)
        order.check_invariants()
    assert paths(order) == [[1, 2, 3, 5], [1, 2, 9], [1, 7], [4]]
    assert order.shared == [0, 2, 1, 0]
    order.remove(a)
    assert order.shared == [0, 1, 0]
    order.remove(c)
    assert order.shared == [0, 0]
    order.check_invariants()


def test_growth_past_a_neighbour_that_continues_the_path() -> None:
    order = TreeOrder(64)
    short, long = sequence([1, 2]), sequence([1, 2, 5])
    order.insert(long)
    order.insert(short)
    assert paths(order) == [[1, 2], [1, 2, 5]]
    short.chunks.extend([9], 0.0)
    order.extended(short, 2)
    assert paths(order) == [[1, 2, 5], [1, 2, 9]]
    order.check_invariants()


def test_every_change_has_its_version() -> None:
    order = TreeOrder(64)
    one = sequence([1])
    versions = [order.version]
    order.insert(one)
    versions.append(order.version)
    one.chunks.extend([2], 0.0)
    order.extended(one, 1)
    versions.append(order.version)
    order.move(one)
    versions.append(order.version)
    order.remove(one)
    versions.append(order.version)
    assert len(set(versions)) == 5


def test_the_chunk_array_grows_in_place() -> None:
    chunks = SequenceChunks("", 0, [])
    chunks.extend(list(range(5)), 0.0)
    before = chunks.ids
    chunks.extend([5, 6], 0.0)
    assert np.shares_memory(before, chunks.ids)
    chunks.extend(list(range(7, 100)), 0.0)
    assert chunks.ids.tolist() == list(range(100))


def test_random_changes_equal_a_fresh_sort() -> None:
    rnd = random.Random(1)
    for _ in range(50):
        order, live = TreeOrder(64), []
        unique = iter(range(100, 10_000))
        for _ in range(60):
            kind = rnd.random()
            if kind < 0.5 or not live:
                shared = [rnd.randrange(2) for _ in range(rnd.randrange(5))]
                live.append(sequence([*shared, next(unique)]))
                order.insert(live[-1])
            elif kind < 0.7:
                order.remove(live.pop(rnd.randrange(len(live))))
            elif kind < 0.85:
                grown = rnd.choice(live)
                length = len(grown.chunks)
                grown.chunks.extend([next(unique)], 0.0)
                order.extended(grown, length)
            else:
                moved = rnd.choice(live)
                moved.chunks.ids[rnd.randrange(len(moved.chunks))] = rnd.randrange(3)
                order.move(moved)
            order.check_invariants()
            expected = sorted(s.chunks.ids.tolist() for s in live)
            assert paths(order) == expected
            assert order.shared[1:] == [
                num_shared_chunks(np.array(a), np.array(b)) for a, b in itertools.pairwise(expected)
            ]


def test_rows_of_an_adapter_are_neighbours_below_a_common_path() -> None:
    order = TreeOrder(64)
    given = [
        with_adapter([1, 2, 10], 7, 128),
        sequence([1, 2, 14]),
        with_adapter([1, 2, 11], 9, 130),
        with_adapter([1, 2, 12], 7, 191),
        sequence([1, 2, 3]),
        with_adapter([8, 5], 7, 0),
        with_adapter([0, 5], 9, 0),
        with_adapter([4, 5], 7, 0),
        with_adapter([1, 13], 7, 64),
    ]
    for each in given:
        order.insert(each)
        order.check_invariants()
    assert paths(order) == [
        *([1, 2, 3], [1, 2, 14], [1, 2, 10], [1, 2, 12], [1, 2, 11], [1, 13]),
        *([4, 5], [8, 5], [0, 5]),
    ]
    assert order.shared == [0, 2, 2, 2, 2, 1, 0, 0, 0]


def test_random_changes_with_adapters_keep_paths_and_adapters_together() -> None:
    rnd = random.Random(2)
    for _ in range(30):
        order, live = TreeOrder(64), []
        unique = iter(range(100, 10_000))
        for _ in range(50):
            if rnd.random() < 0.6 or not live:
                depth = rnd.randrange(4)
                ids = [*(rnd.randrange(2) + 10 * i for i in range(depth)), next(unique)]
                number = rnd.randrange(3)
                made = with_adapter(ids, number, 64 * depth) if number else sequence(ids)
                live.append(made)
                order.insert(made)
            else:
                order.remove(live.pop(rnd.randrange(len(live))))
            order.check_invariants()
            for length in range(1, 5):  # each path is contiguous, so its chunks are read once
                prefixes = [tuple(path[:length]) for path in paths(order) if len(path) >= length]
                assert len(list(itertools.groupby(prefixes))) == len(set(prefixes))
