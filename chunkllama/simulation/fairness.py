"""Compare the fair order with an ideal fluid fair scheduler, for many tenants under pressure.

Requests arrive in turn, faster than they can be served, over more prefixes than the pool holds. The
least prefill is each distinct prefix once per namespace and every private suffix. A request waits
from its arrival to its first token, at least one step; the time unit is one step.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from chunkllama.scheduler.limits import SchedulerLimits
from chunkllama.simulation.fluid import FluidRequest, first_token_times
from chunkllama.simulation.replay import Replay, Replayed
from chunkllama.simulation.trace import TraceRequest

CHUNK_SIZE: Final = 16
STEP_TOKENS: Final = 128
PREFIX_CHUNKS: Final = 8
SUFFIX_TOKENS: Final = {"private": 5, "public": 29}  # a tenant's work is more than the quantum
OUTPUT_TOKENS: Final = 2
NUM_CHUNKS: Final = 160  # 20 prefixes
VOCABULARY: Final = 32_000
LEAST_REQUESTS: Final = 600  # of all tenants: waits are then long beside the unit of one step


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Traffic of one comparison.

    Attributes:
        num_tenants: each sends at least 4 requests.
        prefixes: ``private`` gives each tenant prefixes in its own namespace; ``public`` ones are
            computed before, and all tenants match them.
        skewed: few tenants send most requests, and few prefixes are used most.
        quantum_steps: fair_quantum in steps; the server's default is 16.
        max_tenant_slowdown: of ``SchedulerLimits``; no bound by default, since each step takes one
            unit of time for any work.
        overload: arriving work over what can be served meanwhile.
    """

    num_tenants: int
    prefixes: Literal["private", "public"]
    skewed: bool
    quantum_steps: int = 4
    overload: float = 4.0
    seed: int = 0
    policy: Literal["fair", "prefix", "fcfs"] = "fair"
    max_tenant_slowdown: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Result of one scenario.

    Attributes:
        prefill_over_ideal: prompt tokens computed over the least possible.
        worst_wait_ratio: largest of ``wait_ratios``.
        wait_ratios: by tenant, its P99 wait over that under the fluid scheduler.
        waits, fluid_waits: P99 waits in steps, by tenant.
    """

    scenario: Scenario
    num_requests: int
    prefill_over_ideal: float
    worst_wait_ratio: float
    wait_ratios: dict[str, float]
    waits: dict[str, float]
    fluid_waits: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def percentile(values: Iterable[float], quantile: float) -> float:
    """Return the smallest value that at least ``quantile`` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(math.ceil(quantile * len(ordered)) - 1, 0)]


def compare(scenario: Scenario) -> Comparison:
    """Run one scenario under the real scheduler and under the fluid one."""
    prefixes, requests, fluid, ideal = _traffic(scenario)
    limits = SchedulerLimits(
        max_num_seqs=64,
        max_num_batched_tokens=STEP_TOKENS,
        max_model_len=1024,
        max_waiting=10**6,
        policy=scenario.policy,
        fair_quantum=scenario.quantum_steps * STEP_TOKENS,
        min_wait_tokens=32,
        max_tenant_slowdown=scenario.max_tenant_slowdown,
        max_step_seconds=0.0,
        spare_chunks=0,
        enable_prefix_caching=True,
    )
    replay = Replay(limits, NUM_CHUNKS, CHUNK_SIZE, lambda output, size: 1.0, check=True)
    if scenario.prefixes == "public":
        for prefix in prefixes:
            replay.add_public_prefix(prefix)
    before = replay.scheduler.stats().prefill_tokens_computed_total
    result = replay.run(requests)
    computed = result.stats.prefill_tokens_computed_total - before
    waits = _waits(result)
    times = first_token_times(fluid, STEP_TOKENS)
    by_tenant: dict[str, list[float]] = defaultdict(list)
    for request, time in zip(fluid, times, strict=True):
        by_tenant[request.tenant].append(max(time - request.at, 1.0))
    fluid_waits = {tenant: percentile(values, 0.99) for tenant, values in by_tenant.items()}
    ratios = {tenant: waits[tenant] / fluid_waits[tenant] for tenant in waits}
    return Comparison(
        scenario=scenario,
        num_requests=len(requests),
        prefill_over_ideal=computed / ideal,
        worst_wait_ratio=max(ratios.values()),
        wait_ratios=ratios,
        waits=waits,
        fluid_waits=fluid_waits,
    )


def _waits(result: Replayed) -> dict[str, float]:
    by_tenant: dict[str, list[float]] = defaultdict(list)
    for outcome in result.outcomes:
        assert not outcome.refusal
        by_tenant[outcome.request.tenant].append(outcome.first_token_seconds)
    return {tenant: percentile(values, 0.99) for tenant, values in by_tenant.items()}


def _traffic(
    scenario: Scenario,
) -> tuple[list[list[int]], list[TraceRequest], list[FluidRequest], int]:
    """Return prefixes, requests, their work under an ideal cache, and the least prefill tokens."""
    rng = random.Random(scenario.seed)
    size, suffix_tokens = PREFIX_CHUNKS * CHUNK_SIZE, SUFFIX_TOKENS[scenario.prefixes]
    num_prefixes = 4 if scenario.prefixes == "public" else min(4, max(scenario.num_tenants // 4, 1))
    prefixes = [[rng.randrange(VOCABULARY) for _ in range(size)] for _ in range(num_prefixes)]
    turns = []
    for i in range(scenario.num_tenants):
        count = max(4, LEAST_REQUESTS // scenario.num_tenants)
        if scenario.skewed:
            count = max(4, LEAST_REQUESTS // (2 * i + 2))
        turns += [(turn, i) for turn in range(count)]
    turns.sort()  # in turn, not one tenant after the other
    used: set[tuple[str, int]] = set()
    chosen: list[tuple[str, int, int]] = []
    for _, i in turns:
        tenant = f"t{i}"
        prefix = min(rng.randrange(num_prefixes), rng.randrange(num_prefixes))
        if not scenario.skewed:
            prefix = i % num_prefixes
        is_first = scenario.prefixes == "private" and (tenant, prefix) not in used
        used.add((tenant, prefix))
        chosen.append((tenant, prefix, suffix_tokens + (size if is_first else 0)))
    ideal = sum(prefill for _, _, prefill in chosen)
    total = ideal + len(chosen) * (OUTPUT_TOKENS - 1)
    window = total / STEP_TOKENS / scenario.overload
    requests, fluid = [], []
    for number, (tenant, prefix, prefill) in enumerate(chosen):
        at = window * number / len(chosen)
        suffix = [rng.randrange(VOCABULARY) for _ in range(suffix_tokens)]
        prompt = (*prefixes[prefix], *suffix)
        requests.append(TraceRequest(at, tenant, len(prompt), OUTPUT_TOKENS, prompt))
        fluid.append(FluidRequest(at, tenant, prefill, OUTPUT_TOKENS - 1))
    return prefixes, requests, fluid, ideal
