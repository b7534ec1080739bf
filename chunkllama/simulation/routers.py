"""Routers for simulated replicas: the cluster's own, and three that know no prefixes."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from typing import Final, Protocol

from chunkllama.cluster.routing import Choice, PrefixRouting


class Router(Protocol):
    """Chooses a replica, from 0, for each request."""

    def route(self, keys: Sequence[int], num_chunks: int) -> tuple[int, Choice | None]:
        """Return the replica for a prompt, and what ``finished`` needs."""

    def finished(self, replica: int, choice: Choice | None) -> None:
        """Note that a request has ended."""

    def correct(self, replica: int, heads: Sequence[Collection[int]], free_chunks: int) -> None:
        """Take the digest of a replica's tree, and its room."""


class PrefixRouter:
    """The router of the cluster.

    Attributes:
        routing: its logic.
    """

    def __init__(self, num_replicas: int, *, spill: int = 8, index_chunks: int = 1 << 20) -> None:
        self.routing = PrefixRouting(spill=spill, index_chunks=index_chunks)
        self._names = [f"replica-{i}" for i in range(num_replicas)]
        self._numbers = {name: i for i, name in enumerate(self._names)}
        for name in self._names:
            self.routing.add(name)

    def route(self, keys: Sequence[int], num_chunks: int) -> tuple[int, Choice | None]:
        choice = self.routing.choose(keys, num_chunks=num_chunks)
        assert choice is not None
        self.routing.record(choice)
        return self._numbers[choice.replica], choice

    def finished(self, replica: int, choice: Choice | None) -> None:
        assert choice is not None
        self.routing.finished(choice)

    def correct(self, replica: int, heads: Sequence[Collection[int]], free_chunks: int) -> None:
        name = self._names[replica]
        self.routing.report(name, self.routing.load(name), free_chunks)
        self.routing.apply_digest(name, heads)


class _Blind:
    """A router that looks at no prompt.

    Attributes:
        load: requests of each replica that have not ended.
    """

    def __init__(self, num_replicas: int) -> None:
        self.load = [0] * num_replicas
        self._random = random.Random(num_replicas)

    def choose(self) -> int:
        """Return a replica."""
        return self._random.randrange(len(self.load))

    def route(self, keys: Sequence[int], num_chunks: int) -> tuple[int, Choice | None]:
        replica = self.choose()
        self.load[replica] += 1
        return replica, None

    def finished(self, replica: int, choice: Choice | None) -> None:
        self.load[replica] -= 1

    def correct(self, replica: int, heads: Sequence[Collection[int]], free_chunks: int) -> None:
        pass


class RandomRouter(_Blind):
    """Any replica, with equal probability."""


class RoundRobinRouter(_Blind):
    """Each replica in turn."""

    _next = -1

    def choose(self) -> int:
        self._next = (self._next + 1) % len(self.load)
        return self._next


class PowerOfTwoRouter(_Blind):
    """The less busy of two random replicas (Mitzenmacher, 2001)."""

    def choose(self) -> int:
        first, second = (self._random.randrange(len(self.load)) for _ in range(2))
        return min(first, second, key=lambda replica: self.load[replica])


ROUTERS: Final[dict[str, Callable[[int], Router]]] = {
    "prefix": PrefixRouter,
    "random": RandomRouter,
    "round robin": RoundRobinRouter,
    "power of two": PowerOfTwoRouter,
}
