"""The waiting sequences of one tenant, by age and by token order."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Container
from typing import Any, Final

from chunkllama.cache.node import TOKEN_BYTES, common_prefix
from chunkllama.scheduler.request import Sequence

NEAR: Final = 8  # neighbours in token order that are compared when a group continues


def queue_key(sequence: Sequence) -> tuple[bool, int, int, int]:
    """Priority, then order of arrival: a preempted sequence returns to its former place.

    Beams of a search that has begun precede all others: their siblings hold chunks and cannot
    advance without them. Those of several searches go by arrival alone, the reverse of the order of
    preemption: a search that was preempted for an older one does not restart before it.
    """
    if sequence.joins_others:
        return False, 0, *sequence.age
    return True, sequence.group.request.priority, *sequence.age


class TenantQueue:
    """Waiting sequences of one tenant.

    Args:
        parked: sequences of all tenants that may not start now.

    Attributes:
        by_age: all of them in the order of ``queue_key``; ``ready`` those not among ``parked``.
        oldest_age: age of the first one.
        num_tokens: of all of them, when they joined.
        overtaken: tokens of younger requests started since an oldest one did. An oldest that leaves
            without a start, or comes back, resets nothing: the next one has waited meanwhile.
        may_follow: whether a neighbour shares enough with the one started last; None: not known.
    """

    def __init__(self, parked: Container[Sequence]) -> None:
        self.by_age: list[Sequence] = []
        self.ready: list[Sequence] = []
        self.oldest_age = (0, 0)
        self.num_tokens = 0
        self.overtaken = 0
        self.may_follow: bool | None = None
        self._parked = parked
        self._by_prefix: list[tuple[Any, ...]] = []  # (key, age, sequence)
        self._keys: dict[Sequence, bytes] = {}  # a queued beam may still be given its last token
        self._last = b""

    def add(self, sequence: Sequence) -> None:
        insort(self.by_age, sequence, key=queue_key)
        self.unpark(sequence)
        self._keys[sequence] = key = sequence.cache_key
        insort(self._by_prefix, (key, sequence.age, sequence))  # no two have one age
        self._changed(len(key))

    def remove(self, sequence: Sequence) -> None:
        _remove(self.by_age, sequence)
        if sequence not in self._parked:
            self.park(sequence)
        if not self.by_age:
            self.overtaken = 0
        key = self._keys.pop(sequence)
        at = bisect_left(self._by_prefix, (key, sequence.age))
        assert self._by_prefix[at][2] is sequence
        del self._by_prefix[at]
        self._changed(-len(key))

    def _changed(self, num_bytes: int) -> None:
        self.num_tokens += num_bytes // TOKEN_BYTES
        self.oldest_age = self.by_age[0].age if self.by_age else (0, 0)
        self.may_follow = None

    def park(self, sequence: Sequence) -> None:
        """Take a sequence out of ``ready``."""
        _remove(self.ready, sequence)

    def unpark(self, sequence: Sequence) -> None:
        """Return a sequence to ``ready``."""
        insort(self.ready, sequence, key=queue_key)

    def started(self, sequence: Sequence, cost: int) -> None:
        """Note a sequence that is about to leave the queue to run."""
        self._last = self._keys[sequence]
        self.may_follow = None
        self.overtaken = 0 if sequence is self.by_age[0] else self.overtaken + cost

    def follower(self, least: int, passed: Container[Sequence]) -> Sequence | None:
        """The waiting sequence that shares most, at least ``least`` tokens, with the last started.

        Only sequences of the oldest one's priority follow, and none that is parked or passed.
        """
        others = self._by_prefix
        if self.may_follow is False or not others:
            return None
        start = self._last[: least * TOKEN_BYTES]
        at = bisect_left(others, (self._last,))
        if self.may_follow is None:
            self.may_follow = len(start) == least * TOKEN_BYTES and (  # the adjacent two share most
                (at > 0 and others[at - 1][0].startswith(start))
                or (at < len(others) and others[at][0].startswith(start))
            )
            if not self.may_follow:
                return None
        before = self._nearest(range(at - 1, max(at - NEAR, 0) - 1, -1), start, passed)
        after = self._nearest(range(at, min(at + NEAR, len(others))), start, passed)
        if before is None or after is None:
            return after if before is None else before
        # the last one started is between them in token order: one shares as much as both, or more
        both = common_prefix(self._keys[before], self._keys[after])
        more = self._last[: (both + 1) * TOKEN_BYTES]
        return after if self._keys[after].startswith(more) else before

    def neighbours(self, sequence: Sequence, num_tokens: int) -> list[Sequence]:
        """The nearest sequences in token order that go on beyond ``num_tokens`` they share with one
        of them."""
        key = self._keys[sequence]
        start = key[: num_tokens * TOKEN_BYTES]
        at = bisect_left(self._by_prefix, (key, sequence.age))
        near = self._by_prefix[max(at - NEAR, 0) : at + NEAR + 1]
        return [other for key, _, other in near if len(key) > len(start) and key.startswith(start)]

    def _nearest(self, near: range, start: bytes, passed: Container[Sequence]) -> Sequence | None:
        """The first at the places ``near`` that may start, if it begins with ``start``."""
        for at in near:
            key, _, sequence = self._by_prefix[at]
            if sequence in passed or sequence in self._parked:
                continue
            if key.startswith(start) and self._is_of_first_rank(sequence):
                found: Sequence = sequence
                return found
            break
        return None

    def _is_of_first_rank(self, sequence: Sequence) -> bool:
        """Whether the sequence has the priority of the oldest one."""
        group, first = sequence.group, self.by_age[0].group
        if group.beam is None and first.beam is None:  # which is faster
            return group.request.priority == first.request.priority
        return queue_key(sequence)[:2] == queue_key(self.by_age[0])[:2]


def _remove(sequences: list[Sequence], sequence: Sequence) -> None:
    at = 0  # of most that start
    if sequences[0] is not sequence:
        at = bisect_left(sequences, queue_key(sequence), key=queue_key)
    assert sequences[at] is sequence
    del sequences[at]
