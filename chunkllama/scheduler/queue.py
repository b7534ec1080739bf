"""The waiting queue and the order in which its sequences are looked at."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from typing import Final, Literal

from chunkllama.scheduler.request import Sequence

PREFIX_WINDOW: Final = 64  # waiting sequences whose shared prefix is looked up in one step


def queue_key(sequence: Sequence) -> tuple[bool, int, int, int]:
    """Priority, then order of arrival: a preempted sequence comes back where it was.

    Beams of a search that has begun stand before all others: their siblings hold chunks and can
    do nothing without them.
    """
    beam = sequence.group.beam
    joins_others = beam is not None and beam.is_expanded
    return not joins_others, sequence.group.request.priority, *sequence.age


class WaitingQueue:
    """Sequences that hold nothing, in order of (priority, arrival)."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def add(self, sequence: Sequence) -> None:
        insort(self._sequences, sequence, key=queue_key)

    def remove(self, sequence: Sequence) -> None:
        at = bisect_left(self._sequences, queue_key(sequence), key=queue_key)
        assert self._sequences[at] is sequence
        del self._sequences[at]

    def candidates(
        self,
        policy: Literal["fcfs", "prefix"],
        num_live_tokens: Callable[[Sequence], int],
        arrived_before: float,
    ) -> list[Sequence]:
        """The order of admission.

        ``prefix`` puts those first that share most with sequences running now, so that a group
        is served while its prefix is in use; a request that arrived before ``arrived_before`` is
        overtaken by nobody.
        """
        if policy == "fcfs" or len(self._sequences) < 2:
            return list(self._sequences)
        window = self._sequences[:PREFIX_WINDOW]
        aged: list[Sequence] = []
        young: list[Sequence] = []
        for s in window:
            is_first = s.group.arrived_at <= arrived_before or not queue_key(s)[0]
            (aged if is_first else young).append(s)
        young.sort(key=lambda s: (s.group.request.priority, -num_live_tokens(s)))
        return aged + young
