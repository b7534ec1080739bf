"""Replay a trace on several replicas: a router before real schedulers, on one virtual clock."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

from chunkllama.cluster.prefix_keys import prefix_keys, tree_heads
from chunkllama.cluster.routing import Choice
from chunkllama.scheduler.limits import SchedulerLimits
from chunkllama.simulation.replay import Outcome, Replay, Replayed, StepSeconds
from chunkllama.simulation.routers import Router
from chunkllama.simulation.trace import TraceRequest

DIGEST_KEYS = 4096  # of one replica's tree


@dataclass(slots=True)
class Routed:
    """The result of a replay.

    Attributes:
        outcomes: in order of arrival.
        replicas: of each request.
        running: requests on its replica when each arrived.
        by_replica: steps and busy seconds of each replica.
        seconds: from the first arrival to the last token.
    """

    outcomes: list[Outcome]
    replicas: list[int] = field(default_factory=list)
    running: list[int] = field(default_factory=list)
    by_replica: list[Replayed] = field(default_factory=list)
    seconds: float = 0.0


class ClusterReplay:
    """Sends requests to replicas at their times and steps each replica on its own.

    Args:
        num_replicas: replicas, each with a pool of ``num_chunks`` chunks.
        limits: of each scheduler.
        step_seconds: duration of a step, given its output and the chunk size.
        router: chooses the replica of each request.
        digest_seconds: between two digests of a replica's tree.
        check: as of ``Replay``.
    """

    def __init__(
        self,
        num_replicas: int,
        limits: SchedulerLimits,
        num_chunks: int,
        chunk_size: int,
        step_seconds: StepSeconds,
        router: Router,
        digest_seconds: float = 1.0,
        *,
        check: bool = False,
    ) -> None:
        self._size = chunk_size
        self._router = router
        self._digest_seconds = digest_seconds
        self._replicas = [
            Replay(limits, num_chunks, chunk_size, step_seconds, check=check)
            for _ in range(num_replicas)
        ]
        # (time, order, kind, replica, what it is about); a step is at the time it begins
        self._events: list[tuple[float, int, str, int, Choice | None]] = []
        self._order = count()
        self._choices: dict[int, Choice | None] = {}
        self._stepping = [False] * num_replicas

    def run(self, requests: Sequence[TraceRequest]) -> Routed:
        """Replay requests, which are in order of arrival, until all have ended."""
        result = Routed([Outcome(request) for request in requests])
        result.by_replica = [Replayed([]) for _ in self._replicas]
        start = requests[0].at
        for number in range(len(self._replicas)):  # not all at once
            self._push(
                start + self._digest_seconds * (1 + number / len(self._replicas)), "digest", number
            )
        for number, outcome in enumerate(result.outcomes):
            self._run_until(outcome.request.at, result)
            self._arrive(f"r{number}", outcome, result)
        self._run_until(float("inf"), result)
        for each in self._replicas:
            if each.check:
                each.scheduler.check_invariants()
        result.seconds = max(each.now for each in self._replicas) - start
        return result

    def _push(self, at: float, kind: str, replica: int, choice: Choice | None = None) -> None:
        heapq.heappush(self._events, (at, next(self._order), kind, replica, choice))

    def _arrive(self, name: str, outcome: Outcome, result: Routed) -> None:
        request = outcome.request
        namespace = "" if request.is_public else request.tenant
        keys = prefix_keys(namespace, request.prompt(), self._size)
        tokens = request.num_prompt_tokens + request.num_output_tokens
        number, choice = self._router.route(keys, -(-tokens // self._size))
        replica = self._replicas[number]
        replica.now = max(replica.now, request.at)
        result.replicas.append(number)
        result.running.append(replica.scheduler.stats().requests_running)
        replica.arrive(name, outcome)
        if outcome.refusal:
            self._router.finished(number, choice)
            return
        self._choices[id(outcome)] = choice
        if not self._stepping[number]:
            self._stepping[number] = True
            self._push(replica.now, "step", number)

    def _run_until(self, time: float, result: Routed) -> None:
        while self._events and self._events[0][0] < time:
            at, _, kind, number, choice = heapq.heappop(self._events)
            if kind == "step":
                self._step(number, result)
            elif kind == "end":
                self._router.finished(number, choice)
            elif any(self._stepping) or time != float("inf"):
                self._digest(number)
                self._push(at + self._digest_seconds, "digest", number)

    def _step(self, number: int, result: Routed) -> None:
        replica = self._replicas[number]
        for outcome in replica.step(result.by_replica[number]):
            self._push(replica.now, "end", number, self._choices.pop(id(outcome)))
        self._stepping[number] = replica.scheduler.has_unfinished()
        if self._stepping[number]:
            self._push(replica.now, "step", number)

    def _digest(self, number: int) -> None:
        cache = self._replicas[number].cache
        heads = tree_heads(cache.tree.nodes(), self._size, DIGEST_KEYS)
        self._router.correct(number, heads, cache.num_available)
