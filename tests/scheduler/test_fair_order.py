"""Order of many tenants and many prefixes, counted in the simulator."""

from __future__ import annotations

import random
from typing import Any

import pytest

from chunkllama.errors import OverloadedError
from chunkllama.messages import CacheExplanation
from chunkllama.scheduler.queue import WaitingQueue
from chunkllama.scheduler.request import Sequence
from chunkllama.simulation.cost_model import DEFAULT_COST
from chunkllama.simulation.engine import SimulatedEngine

SIZE = 16


def engine(num_chunks: int, **limits: object) -> SimulatedEngine:
    defaults = {"max_num_batched_tokens": 128, "max_num_seqs": 64, "max_waiting": 2048}
    return SimulatedEngine(num_chunks, SIZE, vocab_size=1000, check=False, **{**defaults, **limits})


def prompts(rng: random.Random, count: int, length: int) -> list[list[int]]:
    return [[rng.randrange(1000) for _ in range(length)] for _ in range(count)]


def prefill_over_ideal(
    policy: str, num_tenants: int, each: int, num_prefixes: int, *, skewed: bool = False
) -> float:
    """Prompt tokens computed over the least possible; requests arrive in turn, pool of 40 chunks.

    The least is each distinct prefix once per namespace, and every private suffix.
    """
    rng = random.Random(0)
    run = engine(40, policy=policy, spare_chunks=0)
    prefixes = prompts(rng, num_prefixes, 8 * SIZE)
    used = set()
    suffixes = 0
    for _ in range(each):
        for i in range(num_tenants):
            tenant = f"t{min(i, rng.randrange(num_tenants)) if skewed else i}"
            prefix = rng.randrange(num_prefixes) if skewed else i % num_prefixes
            used.add((tenant, prefix))
            suffixes += 5
            prompt = prefixes[prefix] + [rng.randrange(1000) for _ in range(5)]
            run.add(prompt, 2, tenant=tenant, namespace=tenant)
    run.run()
    computed = run.scheduler.stats().prefill_tokens_computed_total
    return computed / (len(used) * 8 * SIZE + suffixes)


@pytest.mark.parametrize("policy", ["fair", "prefix"])
def test_96_prompts_over_16_prefixes_compute_each_prefix_once(policy: str) -> None:
    assert prefill_over_ideal(policy, 16, 6, 16) == 1.0


def test_fcfs_computes_each_prefix_for_each_prompt() -> None:
    assert prefill_over_ideal("fcfs", 16, 6, 16) > 3.5


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("num_tenants", [2, 16, 64])
def test_private_prefixes_of_many_tenants(num_tenants: int, skewed: bool) -> None:
    assert prefill_over_ideal("fair", num_tenants, 4, 4, skewed=skewed) <= 1.2


def test_one_tenant_with_many_prefixes() -> None:
    rng = random.Random(1)
    run = engine(40, spare_chunks=0)
    prefixes = prompts(rng, 16, 8 * SIZE)
    for i in range(96):
        run.add(prefixes[i % 16] + [rng.randrange(1000) for _ in range(5)], 2)
    run.run()
    ideal = 16 * 8 * SIZE + 96 * 5
    assert run.scheduler.stats().prefill_tokens_computed_total <= 1.2 * ideal
    assert run.monitor.most_overtaken > 0


@pytest.mark.parametrize("policy", ["fair", "prefix", "fcfs"])
def test_a_short_prompt_beside_four_long_ones_starts_at_once(policy: str) -> None:
    rng = random.Random(2)
    run = engine(2000, policy=policy, max_model_len=8000)
    for prompt in prompts(rng, 4, 6000):
        run.add(prompt, 1)
    for _ in range(5):
        run.step()
    short = run.add([1, 2, 3], 4)
    steps = 0
    while short not in run.first_deltas:
        run.step()
        steps += 1
    assert steps <= 3
    alone = engine(2000, policy=policy, max_model_len=8000)
    for prompt in prompts(random.Random(2), 4, 6000):
        alone.add(prompt, 1)
    run.run(), alone.run()
    # the four decode steps of the short prompt take a token each from the long ones
    assert run.num_steps <= alone.num_steps + 1


def test_short_prompts_without_end_leave_long_ones_three_quarters_of_a_step() -> None:
    rng = random.Random(3)
    run = engine(2000, max_model_len=8000, max_waiting=10_000)
    (long,) = prompts(rng, 1, 3000)
    name = run.add(long, 1)
    steps = 0
    while name not in run.first_deltas:
        for prompt in prompts(rng, 20, 20):
            run.add(prompt, 1)
        run.step()
        steps += 1
    assert steps <= 3000 / (128 * 3 / 4) + 2


def test_a_new_tenant_starts_a_long_prompt_beside_another_tenants() -> None:
    rng = random.Random(4)
    run = engine(2000, max_model_len=8000)
    for prompt in prompts(rng, 6, 4000):
        run.add(prompt, 1, tenant="a", namespace="a")
    run.step()
    (prompt,) = prompts(rng, 1, 1000)
    name = run.add(prompt, 1, tenant="b", namespace="b")
    steps = 0
    while name not in run.first_deltas:
        run.step()
        steps += 1
    # b joined level with a, whose promised work counts: b has the step until it catches up
    assert steps <= 1 + 1000 / 128 * 2


@pytest.mark.parametrize("priority", [0, -1000])
def test_a_flood_of_one_tenant_delays_another_by_no_more_than_its_running_requests(
    priority: int,
) -> None:
    rng = random.Random(5)
    run = engine(400, max_num_seqs=8)
    for prompt in prompts(rng, 500, 20):
        run.add(prompt, 6, tenant="a", namespace="a", priority=priority)
    for _ in range(10):
        run.step()
    name = run.add(prompts(rng, 1, 20)[0], 6, tenant="b", namespace="b")
    steps = 0
    while name not in run.first_deltas:
        run.step()
        steps += 1
    assert steps <= 7, "more than the output of a running request"


def test_weights_divide_the_service() -> None:
    rng = random.Random(6)
    run = engine(400, max_num_seqs=4, fair_quantum=64, tenant_weights={"heavy": 3.0})
    for i in range(200):
        tenant = ("heavy", "light")[i % 2]
        run.add(prompts(rng, 1, 40)[0], 2, tenant=tenant, namespace=tenant)
    for _ in range(60):
        run.step()
    accounts = run.scheduler._lifecycle.accounts
    ratio = accounts["heavy"].charged / accounts["light"].charged
    assert 2.5 <= ratio <= 3.5


def test_a_shared_chunk_is_charged_to_all_who_read_it() -> None:
    run = engine(64)
    prefix = list(range(4 * SIZE))
    run.add([*prefix, 1], 3, tenant="a")
    run.add([*prefix, 2], 3, tenant="b")
    run.step()
    accounts = run.scheduler._lifecycle.accounts
    assert (accounts["a"].charged, accounts["b"].charged) == (2 * SIZE + 1, 2 * SIZE + 1)
    run.run()
    assert accounts.total_charged == 4 * SIZE + 2 + 2 * 2 * 2


def test_a_tenant_that_was_idle_earns_no_credit_and_keeps_its_debt() -> None:
    run = engine(64)
    run.add(list(range(60)), 1, tenant="a")
    run.run()
    accounts = run.scheduler._lifecycle.accounts
    run.add([7] * 9, 5, tenant="b")
    assert accounts["b"].clock == accounts["a"].clock == 60
    run.step()
    run.add([8] * 9, 1, tenant="a")
    assert accounts["a"].clock == 69


def test_a_refusal_does_not_look_at_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    run = engine(64, max_num_seqs=2, max_waiting=10)
    for i in range(7):
        run.add([i + 1], 1, tenant="a")
    monkeypatch.delattr(WaitingQueue, "__iter__")
    with pytest.raises(OverloadedError, match="this API key"):
        run.add([9], 1, tenant="a")


def test_a_tenant_whose_oldest_request_is_due_is_asked_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many of its requests wait behind that one."""
    rng = random.Random(7)
    run = engine(2000, fair_quantum=1, max_model_len=8000)
    (running, *others) = prompts(rng, 300, 2000)
    run.add(running, 1, tenant="a")
    run.step()
    run.add(others[0], 1, tenant="a")
    follower = run.add(running[:70], 1, tenant="a")  # it overtakes the one before
    run.step()
    assert follower in run.first_deltas
    for prompt in others[1:]:
        run.add(prompt, 1, tenant="a")
    may_overtake, asked = WaitingQueue.may_overtake, [0]

    def counted(self: WaitingQueue, sequence: Sequence) -> bool:
        asked[0] += 1
        return may_overtake(self, sequence)

    monkeypatch.setattr(WaitingQueue, "may_overtake", counted)
    run.step()
    assert 0 < asked[0] <= 3


def test_one_tenant_leaves_half_of_the_places() -> None:
    run = engine(64, max_num_seqs=2, max_waiting=10)
    accepted = 0
    with pytest.raises(OverloadedError, match="this API key"):
        while True:
            run.add([accepted + 1], 1, tenant="a")
            accepted += 1
    assert accepted == 7  # two may run, five wait, five places are left
    for i in range(3):
        run.add([i + 100], 1, tenant="b")
    run.run()


@pytest.mark.parametrize("asks", ["never", "before it sends", "while it waits"])
def test_the_time_of_explanations_is_charged_to_the_tenant_that_asks(
    asks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = SimulatedEngine(40, SIZE, vocab_size=1000, cost=DEFAULT_COST, max_num_seqs=1)
    explain = run.cache.explain

    def explain_slowly(*args: Any) -> CacheExplanation:
        run.now += 1.0
        return explain(*args)

    monkeypatch.setattr(run.cache, "explain", explain_slowly)
    run.add([1, 2, 3], 5, tenant="c", namespace="C")
    run.run()
    run.add([1, 2, 3], 20, tenant="c", namespace="C")
    run.step()
    if asks == "before it sends":
        run.scheduler.explain([4, 5], "A", "a")
    first = run.add([4, 5], 1, tenant="a", namespace="A")
    second = run.add([4, 5], 1, tenant="b", namespace="B")
    if asks == "while it waits":
        run.scheduler.explain([4, 5], "A", "a")
    run.run()
    ended = [name for name, _ in run.finished]
    assert (ended.index(first) < ended.index(second)) == (asks == "never")
