"""Short steps for tenants that arrive while one tenant fills every step."""

from __future__ import annotations

import random
from dataclasses import replace
from statistics import median
from typing import Any

import pytest

from chunkllama.simulation.cost_model import DEFAULT_COST, StepCost
from chunkllama.simulation.engine import SimulatedEngine, make_limits
from chunkllama.simulation.replay import Outcome, Replay
from chunkllama.simulation.trace import TraceRequest
from chunkllama.tenant_limits import TenantLimits, TenantTable

SIZE = 64
LIMITS = make_limits(max_num_batched_tokens=512, max_waiting=1024)


def tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(1000) for _ in range(count)]


def outcomes_beside(
    flood: tuple[int, int, int] | None,
    cost: StepCost = DEFAULT_COST,
    *,
    num_probes: int = 12,
    **limits: float,
) -> list[Outcome]:
    """What becomes of probes of tenant b beside a flood of tenant a.

    Args:
        flood: requests, prompt and output tokens; all arrive at once.
        limits: that differ from ``LIMITS``.
    """
    rng = random.Random(1)
    system = tokens(rng, 10 * SIZE)
    requests = []

    def add(at: float, tenant: str, prompt: list[int], output: int) -> None:
        requests.append(TraceRequest(at, tenant, len(prompt), output, tuple(prompt)))

    add(0.0, "b", system + tokens(rng, 8), 4)
    count, length, output = flood or (0, 0, 0)
    for _ in range(count):
        add(1.0, "a", tokens(rng, length), output)
    for number in range(num_probes):
        add(2.0 + 0.513 * number, "b", system + tokens(rng, 8), 4)
    run = Replay(replace(LIMITS, **limits), 400, SIZE, cost.seconds, check=True)
    return run.run(requests).outcomes


def replay(
    flood: tuple[int, int, int] | None, cost: StepCost = DEFAULT_COST, **settings: Any
) -> list[float]:
    """Seconds to the first token of the probes; the flood lasts until the last one arrives."""
    outcomes = outcomes_beside(flood, cost, **settings)
    probes = [each for each in outcomes if each.request.tenant == "b"][1:]
    assert {each.cached_tokens // SIZE for each in probes} == {10}
    ends = [each.ended_at for each in outcomes if each.request.tenant == "a"]
    assert flood is None or max(ends) > probes[-1].request.at, "the flood was over too early"
    return [each.first_token_seconds for each in probes]


def seconds_of(tenant: str, outcomes: list[Outcome]) -> float:
    """Seconds from the tenant's first request to its last token."""
    own = [each for each in outcomes if each.request.tenant == tenant]
    return max(each.ended_at for each in own) - own[0].request.at


@pytest.mark.parametrize(
    ("flood", "slowdown", "ratio"),
    [
        ((500, 100, 60), 0, 3.8),
        ((500, 100, 60), 1.5, 1.96),
        ((60, 3000, 4), 0, 5.67),
        ((60, 3000, 4), 1.5, 1.81),
    ],
)
def test_the_first_token_beside_a_flood(
    flood: tuple[int, int, int], slowdown: float, ratio: float
) -> None:
    """Its median over the one without the flood: at most 2, but where nothing bounds the waits."""
    limits = {"max_tenant_slowdown": slowdown, "max_step_seconds": 0.15}
    alone = median(replay(None, num_probes=40))
    assert round(median(replay(flood, num_probes=40, **limits)) / alone, 2) == ratio
    assert slowdown == 0 or ratio <= 2


@pytest.mark.parametrize(
    ("flood", "times"), [((200, 100, 60), 1.28), ((60, 3000, 4), 1.25)], ids=["short", "long"]
)
def test_what_the_short_waits_cost_the_flood(flood: tuple[int, int, int], times: float) -> None:
    """Its time with 12 probes, which end 10 seconds before the bound does, over that without."""
    without = outcomes_beside(flood, num_probes=0)
    assert round(seconds_of("a", outcomes_beside(flood)) / seconds_of("a", without), 2) == times


def test_a_tenant_whose_requests_all_run_has_steps_of_any_time() -> None:
    """Between the other's requests; what remains is the bound beside them."""
    flood = (5, 3000, 200)
    beside = outcomes_beside(flood)
    unbounded = outcomes_beside(flood, max_tenant_slowdown=0.0)
    assert round(seconds_of("a", beside) / seconds_of("a", unbounded), 2) == 1.03


@pytest.mark.parametrize(
    ("flood", "slowdown", "seconds", "ratio"),
    [
        ((200, 100, 60), 0, 0, 12.27),
        ((200, 100, 60), 1.5, 0.1, 1.77),
        ((20, 3000, 4), 0, 0, 12.91),
        ((20, 3000, 4), 1.5, 0.1, 1.73),
    ],
)
def test_the_first_token_where_prompts_take_long(
    flood: tuple[int, int, int], slowdown: float, seconds: float, ratio: float
) -> None:
    """Two cores without AMX: 1.7 ms for each token, so that 128 take as long as 16 steps of one."""
    cost = StepCost(step=0.012, token=0.0017, read=1.1e-6, attention=2e-8)
    limits = {
        "max_num_batched_tokens": 128,
        "max_tenant_slowdown": slowdown,
        "max_step_seconds": seconds,
    }
    alone = median(replay(None, cost, **limits))
    assert round(median(replay(flood, cost, **limits)) / alone, 2) == ratio


def rate_of_long_prompts(seconds_between: float | None) -> tuple[float, list[float]]:
    """Tokens a second of four clients with prompts of 6,000 tokens, and the seconds to the first
    token of another tenant's prompts of three, which come during a step."""
    rng = random.Random(1)
    run = engine(cost=DEFAULT_COST, max_model_len=8000)
    arrivals: dict[str, float] = {}
    waits: list[float] = []
    long: list[str] = []
    coming = 0.5 if seconds_between else float("inf")
    while run.now < 60:
        done = [name for name in long if name in run.first_deltas]
        long = [name for name in long if name not in done]
        while len(long) < 4:
            long.append(run.add(tokens(rng, 6000), 1, tenant="a", namespace="a"))
        if run.now >= coming:
            arrivals[run.add(tokens(rng, 3), 1, tenant="b", namespace="b")] = coming
            coming += seconds_between or 0
        run.step()
        for name in [name for name in arrivals if name in run.first_deltas]:
            waits.append(run.now - arrivals.pop(name))
    return run.scheduler.stats().prefill_tokens_computed_total / run.now, waits


@pytest.mark.parametrize(("seconds", "ratio"), [(0.3, 0.98), (2.0, 1.0), (8.0, 1.0)])
def test_a_few_clients_with_long_prompts_keep_their_rate(seconds: float, ratio: float) -> None:
    """Beside another tenant's short prompts, of which each starts in the next step."""
    alone, _ = rate_of_long_prompts(None)
    rate, waits = rate_of_long_prompts(seconds)
    assert round(rate / alone, 2) == ratio
    assert max(waits) < 0.5 and len(waits) >= 7


def engine(**settings: object) -> SimulatedEngine:
    limits = {"max_num_batched_tokens": 512, "max_waiting": 1024, **settings}
    run = SimulatedEngine(400, SIZE, vocab_size=1000, **limits)
    run.scheduler.set_tenants(TenantTable({"a": TenantLimits(), "b": TenantLimits()}))
    return run


def tenants_of(run: SimulatedEngine) -> set[str]:
    """Tenants with a slice in the step that is about to run."""
    return {s.group.request.tenant for s in run.scheduler._scheduled}


def test_at_most_every_second_step_is_short() -> None:
    rng = random.Random(2)
    run = engine()
    for _ in range(20):
        run.add(tokens(rng, 3000), 40, tenant="a", namespace="a")
    for _ in range(12):
        run.step()
    seen = []
    for number in range(12):
        name = f"b{number}"  # each from another tenant, so that each finds nothing running
        run.add(tokens(rng, 20), 1, tenant=name, namespace=name)
        run.schedule()
        seen.append(tenants_of(run))
        run.commit()
    assert [("a" in tenants) for tenants in seen] == [False, True] * 6
    assert all({f"b{number}"} <= seen[number] for number in range(12))
    run.run()
    run.check_outputs()


def test_steps_that_come_long_after_a_short_one_take_any_time() -> None:
    """All requests left behind it, and nothing ran meanwhile."""
    rng = random.Random(4)
    run = engine(cost=DEFAULT_COST)
    for _ in range(20):
        run.add(tokens(rng, 3000), 40, tenant="a", namespace="a")
    for _ in range(12):
        run.step()
    run.add(tokens(rng, 20), 1, tenant="b", namespace="b")
    run.schedule()
    assert tenants_of(run) == {"b"}
    run.commit()
    for name in run.requests:
        run.scheduler.abort(name)
    run.now += 3600
    for _ in range(100):
        run.add(tokens(rng, 3000), 40, tenant="a", namespace="a")
    output = run.schedule()
    assert output is not None and output.num_tokens == 512
    run.commit()


@pytest.mark.parametrize(
    ("count", "others"),
    [
        (20, 20 * 3000 // 8),  # a prompt as long as those of the flood together, over 8
        (1, 20),  # one request is no flood
    ],
)
def test_no_step_is_short_without_one_tenant_that_has_most(count: int, others: int) -> None:
    rng = random.Random(3)
    run = engine(max_model_len=16_384)
    length = 3000 if count > 1 else 100
    for _ in range(count):
        run.add(tokens(rng, length), 40, tenant="a", namespace="a")
    run.step()
    run.step()
    run.add(tokens(rng, others), 1, tenant="b", namespace="b")
    run.schedule()
    assert tenants_of(run) == {"a", "b"}
    run.commit()
    run.run()
    run.check_outputs()
