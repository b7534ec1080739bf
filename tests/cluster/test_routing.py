"""Prefix routing: matches, bounds, second homes, digests, replicas that come and go."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from chunkllama.cluster.prefix_keys import prefix_keys
from chunkllama.cluster.routing import Choice, PrefixRouting

SIZE = 4


def routing(num_replicas: int = 2, **options: int) -> PrefixRouting:
    made = PrefixRouting(**options)
    for i in range(num_replicas):
        made.add(f"replica-{i}")
    return made


def prompt(prefix: int, user: int, chunks: int = 4) -> list[int]:
    """Keys of a prompt: a system prompt of some chunks, then one chunk of the user's."""
    tokens = [1000 + prefix] * (chunks * SIZE) + [user] * SIZE
    return prefix_keys("a", tokens, SIZE)


def send(front: PrefixRouting, keys: list[int], **options: object) -> Choice:
    choice = front.choose(keys, **options)
    assert choice is not None
    front.record(choice)
    return choice


def serve(front: PrefixRouting, keys: list[int], **options: object) -> Choice:
    """Send a request that ends at once."""
    choice = send(front, keys, **options)
    front.finished(choice)
    return choice


@pytest.mark.parametrize("order", ["in turn", "one after the other", "random"])
def test_64_requests_over_8_prefixes_are_8_cold_ones_and_split_evenly(order: str) -> None:
    for seed in range(20):
        front = routing()
        requests = [(seed * 8 + i % 8, i) for i in range(64)]
        if order == "one after the other":
            requests.sort()
        if order == "random":
            random.Random(seed).shuffle(requests)
        choices = [serve(front, prompt(*request)) for request in requests]
        assert front.counts == {"match": 56, "cold": 8, "spill": 0, "retry": 0}
        places = {(request[0], c.replica) for request, c in zip(requests, choices, strict=True)}
        assert len(places) == 8, "a prefix on two replicas"
        split = Counter(choice.replica for choice in choices)
        assert max(split.values()) <= 40, split


def test_the_longest_match_wins() -> None:
    front = routing(4)
    serve(front, prompt(1, 1))
    system = serve(front, prompt(1, 2))
    assert (system.why, system.num_matched) == ("match", 4)
    front.drain(system.replica)
    longer = serve(front, prompt(1, 3))
    assert (longer.why, longer.num_matched) == ("cold", 0)
    front.add(system.replica)
    for user, expected in ((3, longer.replica), (2, system.replica)):
        again = serve(front, prompt(1, user))
        assert (again.why, again.num_matched, again.replica) == ("match", 5, expected)


def test_a_busy_home_spills_to_a_second_one() -> None:
    front = routing(3, spill=4)
    home = send(front, prompt(1, 0)).replica
    for user in range(1, 5):
        assert send(front, prompt(1, user)).replica == home
    assert front.load(home) == 5
    second = send(front, prompt(1, 5))
    assert (second.why, second.num_matched) == ("spill", 0) and second.replica != home
    for user in range(6, 10):  # the less busy of the two homes
        assert send(front, prompt(1, user)).replica == second.replica
    assert [front.load(name) for name in (home, second.replica)] == [5, 5]
    third = send(front, prompt(1, 10))
    assert third.why == "spill" and third.replica not in (home, second.replica)


def test_a_spill_prefers_a_replica_with_a_shorter_match() -> None:
    front = routing(3, spill=2)
    serve(front, prompt(1, 1))
    first = serve(front, prompt(1, 1))
    front.drain(first.replica)
    second = serve(front, prompt(1, 2))
    front.add(first.replica)
    for _ in range(3):
        send(front, prompt(1, 1))
    choice = send(front, prompt(1, 1))
    assert (choice.why, choice.num_matched, choice.replica) == ("spill", 4, second.replica)


def test_a_home_without_room_is_passed_over_while_another_has_room() -> None:
    front = routing()
    home = serve(front, prompt(1, 1)).replica
    (other,) = {*front.replicas} - {home}
    front.report(home, 0, free_chunks=2)
    assert serve(front, prompt(1, 1), num_chunks=7).replica == home  # five of them are there
    front.report(home, 0, free_chunks=2)
    assert front.choose(prompt(1, 1), num_chunks=8).why == "spill"
    assert front.choose(prompt(1, 1), num_chunks=8).replica == other
    front.report(other, 0, free_chunks=7)  # no one has room: it waits where its prefix is
    assert front.choose(prompt(1, 1), num_chunks=8).replica == home
    front.report(other, 0)
    assert front.choose(prompt(2, 1), num_chunks=3).replica == other


def test_room_is_used_up_by_what_was_sent_since_the_report() -> None:
    front = routing(1)
    front.add("large")
    front.report("replica-0", 0, free_chunks=10)
    front.report("large", 0, free_chunks=1000)
    sent = [send(front, prompt(i, 1), num_chunks=6) for i in range(8)]
    assert [choice.replica for choice in sent].count("replica-0") == 1


def test_reports_count_the_requests_of_other_front_ends() -> None:
    front = routing(spill=4)
    home = send(front, prompt(1, 1)).replica
    (other,) = {*front.replicas} - {home}
    front.report(home, 6)  # one of them is this front end's
    assert (front.load(home), front.load(other)) == (6, 0)
    assert send(front, prompt(1, 1)).why == "spill"
    front.report(home, 1)
    assert front.load(home) == 1


def test_a_hot_prefix_gets_a_second_home_without_any_load() -> None:
    """80% of the requests have one prefix; nothing overlaps, so load never spills."""
    front = routing()
    rng = random.Random(3)
    choices = []
    for i in range(500):
        prefix = 0 if rng.random() < 0.8 else rng.randrange(1, 20)
        choices.append((prefix, serve(front, prompt(prefix, i))))
    cold_hot = [c for prefix, c in choices if prefix == 0 and c.num_matched < 4]
    assert [c.why for c in cold_hot] == ["cold", "spill"]
    split = Counter(c.replica for _, c in choices)
    assert max(split.values()) <= 500 * 0.6, split


def test_front_ends_agree_on_cold_prompts_in_whatever_order_they_know_the_replicas() -> None:
    names = [f"replica-{i}" for i in range(5)]
    fronts = []
    for seed in range(3):
        random.Random(seed).shuffle(names)
        front = PrefixRouting()
        for name in names:
            front.add(name)
        fronts.append(front)
    for prefix in range(20):
        chosen = {front.choose(prompt(prefix, i)).replica for i, front in enumerate(fronts)}
        assert len(chosen) == 1
        for i, front in enumerate(fronts):
            serve(front, prompt(prefix, i))


def test_cold_prompts_with_a_common_start_are_told_apart_by_what_was_seen_before() -> None:
    """All prompts have one chunk in common; no replica has what was seen behind it."""
    front = routing(8)
    starts = [prefix_keys("a", [7] * SIZE + [i] * SIZE * 3, SIZE) for i in range(40)]
    assert len({front.choose(keys).replica for keys in starts}) == 1
    front.apply_digest("replica-0", [{*level} for level in zip(*starts, strict=True)])
    front.apply_digest("replica-0", [[]])
    chosen = [front.choose(keys) for keys in starts]
    assert {choice.why for choice in chosen} == {"cold"}
    assert len({choice.replica for choice in chosen}) == 8


def test_a_digest_teaches_what_other_front_ends_sent() -> None:
    one, two = routing(6), routing(6)
    one.drain(two.choose(prompt(1, 1)).replica)  # so the two front ends disagree
    home = serve(one, prompt(1, 1)).replica
    two.apply_digest(home, [[key] for key in prompt(1, 1)])
    two.check_invariants()
    choice = two.choose(prompt(1, 2))
    assert (choice.replica, choice.why, choice.num_matched) == (home, "match", 4)


def test_a_digest_corrects_what_was_evicted_and_spares_what_is_in_flight() -> None:
    front = routing()
    keys = prompt(1, 1)
    waiting = send(front, keys)
    front.apply_digest(waiting.replica, [[]])
    assert front.choose(keys).num_matched == 5
    front.finished(waiting)
    front.apply_digest(waiting.replica, [keys[:1], keys[1:2]])  # deeper levels are not in it
    assert front.choose(keys).num_matched == 5
    front.apply_digest(waiting.replica, [keys[:1], []])  # the second chunk is gone
    assert front.choose(keys).num_matched == 1
    front.apply_digest(waiting.replica, [[]])
    assert front.choose(keys).why == "cold"
    front.check_invariants()


def test_draining_and_removed_replicas_get_nothing() -> None:
    front = routing(2)
    home = send(front, prompt(1, 1))
    front.drain(home.replica)
    assert front.replicas == [name for name in ("replica-0", "replica-1") if name != home.replica]
    other = send(front, prompt(1, 1))
    assert other.replica != home.replica and other.why == "cold"
    front.finished(home)
    front.remove(home.replica)
    front.check_invariants()
    front.finished(home)  # its channel closes later
    front.drain(other.replica)
    assert front.choose(prompt(1, 1)) is None
    front.add("replica-9")  # takes the place of the removed one and knows nothing
    assert front.choose(prompt(1, 1)).why == "cold"


def test_a_retry_goes_elsewhere_and_is_counted() -> None:
    front = routing(3)
    home = send(front, prompt(1, 1)).replica
    again = send(front, prompt(1, 1), avoid={home})
    assert (again.why, again.replica != home) == ("retry", True)
    assert front.choose(prompt(1, 1), avoid=front.replicas) is None
    assert front.choose(prompt(1, 1), avoid={"unknown"}).num_matched == 5
    assert front.counts == {"match": 0, "cold": 1, "spill": 0, "retry": 1}


def test_prompts_below_a_chunk_go_to_the_idlest() -> None:
    front = routing(3)
    assert len({send(front, []).replica for _ in range(3)}) == 3


def test_the_index_is_bounded_and_forgets_the_least_recently_used_ends_first() -> None:
    front = routing(index_chunks=10)
    for user in range(20):
        serve(front, prompt(1, user))
    assert front.choose(prompt(1, 99)).num_matched == 4
    assert front.choose(prompt(1, 15)).num_matched == 5
    assert front.choose(prompt(1, 13)).num_matched == 4
    serve(front, prompt(2, 0, chunks=30))  # longer than the index
    assert front.choose(prompt(2, 0, chunks=30)).num_matched == 10


def test_a_new_replica_gets_its_part_and_not_every_cold_prompt() -> None:
    front = routing(3)
    for i in range(300):
        serve(front, prompt(i, 0))
    front.add("new")
    chosen = [serve(front, prompt(1000 + i, 0)).replica for i in range(200)]
    assert chosen[:20].count("new") <= 12
    assert 25 <= chosen.count("new") <= 75


def test_a_lost_replica_moves_its_own_prefixes_only() -> None:
    front = routing(8)
    before = [serve(front, prompt(i, 0)).replica for i in range(80)]
    front.remove("replica-3")
    after = [serve(front, prompt(i, 1)) for i in range(80)]
    moved = [new.replica != old for new, old in zip(after, before, strict=True)]
    assert moved == [old == "replica-3" for old in before]
    assert len({new.replica for new, old in zip(after, before, strict=True) if old[-1] == "3"}) > 3
