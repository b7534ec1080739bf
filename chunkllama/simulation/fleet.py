"""Many replicas of a fitted cost model behind a router, and generated traces of many tenants.

A replica computes prompts one after the other, slower the more requests it decodes beside them, and
keeps blocks of ``MOONCAKE_BLOCK`` tokens, the least recently used of which are evicted.
"""

from __future__ import annotations

import heapq
import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Final

import numpy as np

from chunkllama.cluster.routing import Choice
from chunkllama.simulation.cluster import DIGEST_KEYS, Routed
from chunkllama.simulation.cost_model import StepCost
from chunkllama.simulation.routers import Router
from chunkllama.simulation.trace import MOONCAKE_BLOCK, TraceRequest

_RECENT_PROMPTS: Final = 2  # of a tenant, that its next prompt may continue
_DIGEST_EVERY: Final = 50  # requests of a replica between its digests


@dataclass(frozen=True, slots=True)
class ReplicaModel:
    """Seconds of a replica's work.

    Attributes:
        token, attention: as in ``StepCost``, of a prompt that is computed alone.
        start: before the first token of any prompt.
        beside: factor on a prompt's seconds for each request that decodes meanwhile, added to 1.
        output, output_beside: of an output token, alone and for each other request.
        error: median relative error of the time to first token in the fit.
    """

    token: float
    attention: float
    start: float
    beside: float
    output: float
    output_beside: float
    error: float = 0.0

    def prompt_seconds(self, num_tokens: int, num_cached: int, running: int) -> float:
        """Return the seconds from a prompt's turn to its first token."""
        new = num_tokens - num_cached
        work = self.token * new + self.attention * new * (num_cached + new / 2)
        return self.start + work * (1 + self.beside * running)

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def fit_replica(sample: Routed, cost: StepCost) -> ReplicaModel:
    """Fit a replica's model to a replay on real schedulers.

    The work of a prompt is that of the step cost; the rest is fitted by least squares to requests
    that did not wait for others.
    """
    prompts, outputs, errors = [], [], []
    for outcome, running in zip(sample.outcomes, sample.running, strict=True):
        request = outcome.request
        if outcome.refusal:
            continue
        new = request.num_prompt_tokens - outcome.cached_tokens
        work = cost.token * new + cost.attention * new * (outcome.cached_tokens + new / 2)
        seconds = outcome.first_token_seconds - outcome.queue_seconds
        prompts.append((1.0, work, work * running, seconds))
        if request.num_output_tokens > 1:
            each = (outcome.ended_at - outcome.first_token_at) / (request.num_output_tokens - 1)
            outputs.append((1.0, float(running), each))
    table = np.asarray(prompts)
    table = table[table[:, 3] <= np.quantile(table[:, 3], 0.9)]  # without preempted ones
    start, scale, beside = _least_squares(table)
    first, other = _least_squares(np.asarray(outputs))
    fitted = ReplicaModel(
        cost.token * scale, cost.attention * scale, start, beside / scale, first, other
    )
    for outcome, running in zip(sample.outcomes, sample.running, strict=True):
        seconds = outcome.first_token_seconds - outcome.queue_seconds
        if not outcome.refusal and seconds > 0:
            tokens = outcome.request.num_prompt_tokens
            guess = fitted.prompt_seconds(tokens, outcome.cached_tokens, running)
            errors.append(abs(guess / seconds - 1))
    return ReplicaModel(**{**asdict(fitted), "error": float(np.median(errors))})


def _least_squares(table: np.ndarray) -> list[float]:
    """Return the coefficients of all columns but the last for the last, at least 0."""
    solved = np.linalg.lstsq(table[:, :-1], table[:, -1], rcond=None)[0]
    return [max(float(value), 0.0) for value in solved]


@dataclass(frozen=True, slots=True)
class FleetRequest:
    """One request of a generated trace.

    Attributes:
        keys: one for each whole block of the prompt.
        num_shared: leading ones that an earlier prompt had too.
    """

    at: float
    num_prompt_tokens: int
    num_output_tokens: int
    keys: tuple[int, ...]
    num_shared: int


def generate(
    sample: Sequence[TraceRequest], count: int, num_tenants: int, rate: float, *, seed: int
) -> Iterator[FleetRequest]:
    """Yield requests of Zipf-distributed tenants at Poisson arrivals.

    Length, output and the number of leading blocks that were seen before are those of a random
    request of ``sample``. A prompt shares those blocks with a recent prompt of its tenant.

    Args:
        rate: requests per second.
    """
    rng = random.Random(seed)
    seen: set[int] = set()
    drawn: list[tuple[int, int, int]] = []
    for request in sample:
        depth = 0
        while depth < len(request.blocks) and request.blocks[depth] in seen:
            depth += 1
        seen.update(request.blocks)
        drawn.append((request.num_prompt_tokens, request.num_output_tokens, depth))
    weights = list(accumulate(1 / rank for rank in range(1, num_tenants + 1)))
    recent: dict[int, list[tuple[int, ...]]] = {}
    now = 0.0
    tenants = range(num_tenants)
    for _ in range(count):
        now += rng.expovariate(rate)
        tenant = rng.choices(tenants, cum_weights=weights)[0]
        length, output, depth = rng.choice(drawn)
        earlier = recent.setdefault(tenant, [])
        shared = rng.choice(earlier)[:depth] if earlier and depth else ()
        blocks = length // MOONCAKE_BLOCK
        shared = shared[:blocks]
        keys = (*shared, *(rng.getrandbits(64) for _ in range(blocks - len(shared))))
        if keys:
            earlier.append(keys)
            del earlier[:-_RECENT_PROMPTS]
        yield FleetRequest(now, length, output, keys, len(shared))


class _Replica:
    """Blocks by last use, and until when prompts are computed."""

    def __init__(self) -> None:
        self.blocks: OrderedDict[int, int] = OrderedDict()  # key to depth
        self.free_at = 0.0
        self.running = 0
        self.busy_seconds = 0.0
        self.num_requests = 0

    def match(self, keys: Sequence[int]) -> int:
        number = 0
        while number < len(keys) and keys[number] in self.blocks:
            number += 1
        return number

    def store(self, keys: Sequence[int], max_blocks: int) -> None:
        for depth in reversed(range(len(keys))):
            self.blocks[keys[depth]] = depth
            self.blocks.move_to_end(keys[depth])
        while len(self.blocks) > max_blocks:
            self.blocks.popitem(last=False)

    def heads(self) -> list[list[int]]:
        levels: list[list[int]] = []
        for key, depth in self.blocks.items():
            levels.extend([] for _ in range(depth + 1 - len(levels)))
            levels[depth].append(key)
        total = 0
        for depth, level in enumerate(levels):
            total += len(level)
            if total > DIGEST_KEYS:
                return levels[:depth]
        return [*levels, []]


@dataclass(slots=True)
class FleetResult:
    """What became of a trace.

    Attributes:
        hit_rate: prompt tokens from the caches over all prompt tokens.
        best_hit_rate: of one cache that all replicas share and that evicts nothing.
        first_token_seconds: arrival to first token of each request.
        busy: part of the time in which each replica computed prompts.
    """

    hit_rate: float = 0.0
    best_hit_rate: float = 0.0
    first_token_seconds: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)


class Fleet:
    """Replicas of one model behind a router.

    Args:
        pool_tokens: K/V tokens of each replica.
    """

    def __init__(
        self, num_replicas: int, model: ReplicaModel, pool_tokens: int, router: Router
    ) -> None:
        self._replicas = [_Replica() for _ in range(num_replicas)]
        self._model = model
        self._max_blocks = pool_tokens // MOONCAKE_BLOCK
        self._router = router
        self._ends: list[tuple[float, int, int, Choice | None]] = []

    def run(self, requests: Iterator[FleetRequest]) -> FleetResult:
        """Route and serve every request."""
        result = FleetResult()
        cached = best = tokens = 0
        end = 0.0
        for number, request in enumerate(requests):
            self._end_until(request.at)
            matched = self._serve(number, request, result)
            cached += matched * MOONCAKE_BLOCK
            best += request.num_shared * MOONCAKE_BLOCK
            tokens += request.num_prompt_tokens
            end = request.at
        result.hit_rate, result.best_hit_rate = cached / tokens, best / tokens
        end = max(end, *(each.free_at for each in self._replicas))
        result.busy = [each.busy_seconds / end for each in self._replicas]
        return result

    def _serve(self, number: int, request: FleetRequest, result: FleetResult) -> int:
        """Serve one request; returns the blocks that its replica had."""
        index, choice = self._router.route(request.keys, 0)
        replica = self._replicas[index]
        matched = replica.match(request.keys)
        replica.store(request.keys, self._max_blocks)
        seconds = self._model.prompt_seconds(
            request.num_prompt_tokens, matched * MOONCAKE_BLOCK, replica.running
        )
        first = max(request.at, replica.free_at) + seconds
        replica.free_at = first
        replica.busy_seconds += seconds
        replica.running += 1
        each = self._model.output + self._model.output_beside * replica.running
        ended = first + (request.num_output_tokens - 1) * each
        heapq.heappush(self._ends, (ended, number, index, choice))
        result.first_token_seconds.append(first - request.at)
        replica.num_requests += 1
        if replica.num_requests % _DIGEST_EVERY == 0:
            self._router.correct(index, replica.heads(), self._max_blocks)
        return matched

    def _end_until(self, now: float) -> None:
        while self._ends and self._ends[0][0] <= now:
            _, _, index, choice = heapq.heappop(self._ends)
            self._replicas[index].running -= 1
            self._router.finished(index, choice)
