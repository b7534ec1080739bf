"""The record of each tenant's prompts: bounds, order, and what is found."""

from __future__ import annotations

import random

import numpy as np

from chunkllama.cache.history import MAX_TENANTS, PromptHistory
from chunkllama.cache.node import encode_tokens

SIZE = 4


def key(*tokens: int) -> bytes:
    return encode_tokens(np.array(tokens, np.int32))


def test_a_prompt_is_known_up_to_where_it_differs() -> None:
    history = PromptHistory(100, SIZE, lambda: 0.0)
    history.record("a", "", key(1, 2, 3, 4, 5, 6, 7), 7)
    for tokens, known, branch in [
        ((1, 2, 3, 4, 5, 6, 7), 7, False),
        ((1, 2, 3, 4, 5, 6, 7, 8, 9), 7, False),
        ((1, 2, 3, 4, 5, 9), 5, True),
        ((1, 2, 3, 4, 9), 4, True),
        ((1, 2, 9), 2, True),
        ((1, 2), 2, True),
        ((9,), 0, True),
    ]:
        found = history.find("a", "", key(*tokens))
        assert (found.num_tokens, found.has_branch, found.lost) == (known, branch, False), tokens
    assert history.find("b", "", key(1, 2)).num_tokens == 0
    assert history.find("a", "salt", key(1, 2)).num_tokens == 0


def test_a_longer_tail_replaces_a_shorter_one() -> None:
    history = PromptHistory(100, SIZE, lambda: 0.0)
    history.record("a", "", key(1, 2), 2)
    history.record("a", "", key(1, 2, 3), 3)
    history.record("a", "", key(1), 1)
    assert history.num_chunks("a") == 1
    history.record("a", "", key(1, 2, 4), 3)
    assert history.num_chunks("a") == 2
    history.check_invariants()


def test_the_oldest_prompts_of_a_tenant_are_dropped_and_no_others() -> None:
    history = PromptHistory(3, SIZE, lambda: 0.0)
    history.record("b", "", key(7, 7, 7, 7, 7), 5)
    for first in range(5):
        history.record("a", "", key(first, 0, 0, 0), 4)
        history.check_invariants()
    assert [history.find("a", "", key(i, 0, 0, 0)).num_tokens for i in range(5)] == [0, 0, 4, 4, 4]
    assert history.find("a", "", key(0)).lost
    assert history.find("b", "", key(7, 7, 7, 7, 7)).num_tokens == 5
    assert not history.find("b", "", key(8)).lost


def test_a_prompt_longer_than_the_record_is_known_at_its_start() -> None:
    history = PromptHistory(2, SIZE, lambda: 0.0)
    history.record("a", "", key(*range(12)), 12)
    found = history.find("a", "", key(*range(12)))
    assert (found.num_tokens, found.lost) == (8, True)
    history.check_invariants()


def test_nothing_is_recorded_where_the_record_has_no_room() -> None:
    history = PromptHistory(0, SIZE, lambda: 0.0)
    history.record("a", "", key(1, 2, 3, 4), 4)
    assert history.find("a", "", key(1, 2)).num_tokens == 0
    assert history.find("a", "", key(1, 2)).lost


def test_the_number_of_tenants_is_bounded() -> None:
    history = PromptHistory(4, SIZE, lambda: 0.0)
    for i in range(MAX_TENANTS + 5):
        history.record(f"t{i}", "", key(1, 2, 3, 4, 5), 5)
    history.check_invariants()
    assert history.find("t0", "", key(1)).num_tokens == 0 and history.find("t0", "", key(1)).lost
    assert history.find("t5", "", key(1)).num_tokens == 1


def test_random_prompts_keep_the_record_in_order() -> None:
    rng = random.Random(0)
    history = PromptHistory(20, SIZE, lambda: 0.0)
    for _ in range(600):
        tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 15))]
        tenant, namespace = rng.choice("ab"), rng.choice(["", "x", "y"])
        history.record(tenant, namespace, key(*tokens), rng.randrange(15))
        history.check_invariants()
        found = history.find(tenant, namespace, key(*tokens))
        assert found.num_tokens == len(tokens)
    assert history.num_chunks("a") == history.num_chunks("b") == 20
