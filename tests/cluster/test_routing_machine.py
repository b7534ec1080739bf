"""Hypothesis searches for a sequence of events after which routing breaks a rule."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from chunkllama.cluster.prefix_keys import prefix_keys
from chunkllama.cluster.routing import Choice, PrefixRouting

NAMES = ["a", "b", "c", "d"]
SPILL = 2
prompts = st.lists(st.integers(0, 1), min_size=0, max_size=6).map(
    lambda tokens: tuple(prefix_keys("x", tokens, 1))
)


class RoutingMachine(RuleBasedStateMachine):
    """Requests, reports, digests and replicas in any order, against sets of keys for each replica.

    ``has`` is what each replica is believed to have while the index forgets nothing.
    """

    @initialize(index_chunks=st.sampled_from([3, 1000]))
    def start(self, index_chunks) -> None:
        self.routing = PrefixRouting(spill=SPILL, index_chunks=index_chunks)
        self.forgets = index_chunks < 100
        self.has: dict[str, set[int]] = {}
        self.usable: set[str] = set()
        self.own: dict[str, list[Choice]] = {}
        self.others: dict[str, int] = {}
        self.free: dict[str, float] = {}
        self.num_recorded = 0

    @rule(name=st.sampled_from(NAMES))
    def add(self, name) -> None:
        self.routing.add(name)
        self.usable.add(name)
        if name not in self.has:
            self.has[name], self.own[name] = set(), []
            self.others[name], self.free[name] = 0, float("inf")

    @precondition(lambda self: self.usable)
    @rule(data=st.data())
    def drain(self, data) -> None:
        name = data.draw(st.sampled_from(sorted(self.usable)))
        self.routing.drain(name)
        self.usable.discard(name)

    @precondition(lambda self: self.has)
    @rule(data=st.data())
    def remove(self, data) -> None:
        name = data.draw(st.sampled_from(sorted(self.has)))
        self.routing.remove(name)
        self.usable.discard(name)
        for table in (self.has, self.own, self.others, self.free):
            del table[name]

    @precondition(lambda self: self.has)
    @rule(data=st.data(), requests=st.integers(0, 6), free=st.none() | st.integers(0, 8))
    def report(self, data, requests, free) -> None:
        name = data.draw(st.sampled_from(sorted(self.has)))
        self.routing.report(name, requests, free)
        self.others[name] = max(requests - len(self.own[name]), 0)
        self.free[name] = float("inf") if free is None else free

    @rule(keys=prompts, num_chunks=st.integers(0, 8), avoid=st.sets(st.sampled_from(NAMES)))
    def request(self, keys, num_chunks, avoid) -> None:
        choice = self.routing.choose(keys, num_chunks=num_chunks, avoid=avoid)
        allowed = self.usable - avoid
        assert (choice is None) == (not allowed)
        if choice is None:
            return
        assert choice.replica in allowed
        load = {name: len(self.own[name]) + self.others[name] for name in allowed}
        calm = {name for name in allowed if load[name] - min(load.values()) <= SPILL}
        assert choice.replica in calm, "a busy replica was chosen"
        if not self.forgets:
            self.check_match(choice, allowed, calm)
        self.routing.record(choice)
        self.num_recorded += 1
        self.has[choice.replica].update(keys)
        self.own[choice.replica].append(choice)
        self.free[choice.replica] -= max(num_chunks - choice.num_matched, 0)

    def check_match(self, choice: Choice, allowed: set[str], calm: set[str]) -> None:
        """The reason is true, and the match is the longest of those that may be used."""
        matched = {name: self.matched(name, choice.keys) for name in allowed}
        assert choice.num_matched == matched[choice.replica]
        fits = {n for n in calm if self.free[n] >= choice.num_chunks - matched[n]} or calm
        assert choice.replica in fits, "a replica without room was chosen"
        best = max(matched.values())
        if choice.why == "match":
            assert choice.num_matched == best > 0
        elif choice.why == "cold":
            assert best == 0
        elif choice.why == "spill":
            assert choice.num_matched < best

    def matched(self, name: str, keys: tuple[int, ...]) -> int:
        number = 0
        while number < len(keys) and keys[number] in self.has[name]:
            number += 1
        return number

    @precondition(lambda self: any(self.own.values()))
    @rule(data=st.data())
    def finish(self, data) -> None:
        names = sorted(name for name, choices in self.own.items() if choices)
        name = data.draw(st.sampled_from(names))
        self.routing.finished(self.own[name].pop())

    @precondition(lambda self: self.has)
    @rule(data=st.data(), stored=st.lists(prompts, max_size=3), num_levels=st.integers(0, 7))
    def digest(self, data, stored, num_levels) -> None:
        """A replica says what it has: the whole tree where it has fewer levels than the digest."""
        name = data.draw(st.sampled_from(sorted(self.has)))
        heads = [{keys[i] for keys in stored if i < len(keys)} for i in range(num_levels)]
        self.routing.apply_digest(name, heads)
        in_flight = {key for choice in self.own[name] for key in choice.keys}
        kept = {k for k in self.has[name] if self.depth(k) >= num_levels or k in in_flight}
        self.has[name] = kept.union(*heads)

    @staticmethod
    def depth(key: int) -> int:
        return DEPTHS[key]

    @invariant()
    def rules_hold(self) -> None:
        if not hasattr(self, "routing"):
            return
        self.routing.check_invariants()
        assert {*self.routing.replicas} == self.usable
        assert sum(self.routing.counts.values()) == self.num_recorded
        for name, choices in self.own.items():
            assert self.routing.load(name) == len(choices) + self.others[name]


def all_prompts(length: int) -> list[list[int]]:
    return [[]] if not length else [[*p, i] for p in all_prompts(length - 1) for i in (0, 1)]


DEPTHS = {key: i for p in all_prompts(6) for i, key in enumerate(prefix_keys("x", p, 1))}
TestRouting = RoutingMachine.TestCase
