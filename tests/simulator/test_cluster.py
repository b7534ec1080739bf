"""Routing before real schedulers and before replicas of a cost model, on a virtual clock."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from chunkllama.scheduler.limits import SchedulerLimits
from chunkllama.simulation.cluster import ClusterReplay, Routed
from chunkllama.simulation.cost_model import StepCost
from chunkllama.simulation.fleet import Fleet, ReplicaModel, fit_replica, generate
from chunkllama.simulation.routers import ROUTERS, PrefixRouter, Router
from chunkllama.simulation.trace import TraceRequest

SIZE = 64
SYSTEM = 4 * SIZE  # tokens of a system prompt
LIMITS = SchedulerLimits(
    max_num_seqs=16, max_num_batched_tokens=512, max_model_len=4096, max_waiting=1000,
    policy="fair", fair_quantum=8192, min_wait_tokens=32, enable_prefix_caching=True,
    max_tenant_slowdown=1.5,
    max_step_seconds=0.0,
)  # fmt: skip
COST = StepCost(step=0.01, token=1e-4, sequence=1e-4)


def request(at: float, prefix: int, user: int, output: int = 8) -> TraceRequest:
    tokens = (*range(1000 * prefix, 1000 * prefix + SYSTEM), 500_000 + user, *range(30))
    return TraceRequest(at, "", len(tokens), output, tokens)


def replay(requests: list[TraceRequest], router: Router, num_replicas: int = 2) -> Routed:
    run = ClusterReplay(num_replicas, LIMITS, 400, SIZE, COST.seconds, router, check=True)
    result = run.run(requests)
    assert not any(outcome.refusal for outcome in result.outcomes)
    assert all(outcome.ended_at for outcome in result.outcomes)
    return result


def is_cold(outcome) -> bool:
    return outcome.cached_tokens < SYSTEM


def test_64_requests_over_8_prefixes_are_8_cold_ones_and_split_evenly() -> None:
    router = PrefixRouter(2)
    result = replay([request(0.05 * i, i % 8, i) for i in range(64)], router)
    assert sum(map(is_cold, result.outcomes)) == 8
    assert router.routing.counts == {"match": 56, "cold": 8, "spill": 0, "retry": 0}
    assert max(Counter(result.replicas).values()) <= 40


def test_a_hot_prefix_keeps_both_replicas_busy_for_two_cold_prefills() -> None:
    """80% of the requests have one prefix, and there is work for nearly two replicas."""
    rng = random.Random(5)
    requests = [
        request(0.006 * i, 0 if rng.random() < 0.8 else rng.randrange(1, 11), i, output=16)
        for i in range(600)
    ]
    router = PrefixRouter(2)
    result = replay(requests, router)
    hot = [o for o in result.outcomes if o.request.token_ids[0] == 0]
    assert len(hot) > 450 and sum(map(is_cold, hot)) == 2
    assert [each.busy_seconds >= 0.7 * result.seconds for each in result.by_replica] == [True] * 2
    assert sum(map(is_cold, result.outcomes)) <= 2 + 10 * 2


@pytest.mark.parametrize("name", [*ROUTERS])
def test_prompts_stay_where_they_are_cached_under_the_prefix_router_alone(name: str) -> None:
    rng = random.Random(6)
    requests = [request(0.02 * i, rng.randrange(20), i) for i in range(200)]
    router = ROUTERS[name](4)
    result = replay(requests, router, 4)
    cold = sum(map(is_cold, result.outcomes))
    assert cold == 20 if name == "prefix" else cold > 45, cold
    assert {*result.replicas} == {0, 1, 2, 3}
    load = router.routing.load if isinstance(router, PrefixRouter) else router.load.__getitem__
    names = router.routing.replicas if isinstance(router, PrefixRouter) else range(4)
    assert [load(each) for each in names] == [0] * 4, "requests that never end"


def test_evicted_prefixes_are_corrected_by_digests() -> None:
    """Pools hold a few prompts: without digests the router sends prompts after lost chunks."""
    router = PrefixRouter(2)
    requests = [request(float(i), i, 0) for i in range(240)] + [request(300.0, 0, 1)]
    result = replay(requests, router)
    assert result.outcomes[-1].cached_tokens == 0
    assert router.routing.counts == {"match": 0, "cold": 241, "spill": 0, "retry": 0}


def test_a_fitted_model_predicts_the_schedulers_first_tokens() -> None:
    requests = [request(0.2 * i, i, i) for i in range(60)]
    model = fit_replica(replay(requests, ROUTERS["round robin"](2)), COST)
    assert model.error < 0.1
    assert model.prompt_seconds(290, 0, 0) == pytest.approx(0.01 + 290e-4 + 1e-4, rel=0.1)


def test_a_fleet_routes_a_generated_trace() -> None:
    model = ReplicaModel(token=1e-4, attention=0.0, start=0.01, beside=0.0, output=0.01,
                         output_beside=0.0)  # fmt: skip
    sample = [
        TraceRequest(0.0, "", 2048 + 10 * i, 20, blocks=(0, 1, 2 + 3 * i, 3 + 3 * i, 4 + 3 * i))
        for i in range(50)
    ]
    hits = {}
    for name in ROUTERS:
        trace = generate(sample, 3000, 40, 50.0, seed=2)
        result = Fleet(10, model, 512 * 400, ROUTERS[name](10)).run(trace)
        assert len(result.first_token_seconds) == 3000
        assert min(result.first_token_seconds) >= 0.01
        assert len(result.busy) == 10 and 0.2 < min(result.busy) <= max(result.busy) <= 1
        assert result.hit_rate <= result.best_hit_rate < 0.5
        hits[name] = result.hit_rate / result.best_hit_rate
    assert hits.pop("prefix") > 0.95
    assert max(hits.values()) < 0.8, hits
