"""The bound on what one tenant's work adds to the steps of others, counted under a given cost."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from chunkllama.errors import ConfigError
from chunkllama.messages import BACKGROUND_PRIORITY
from chunkllama.scheduler.output import SchedulerOutput
from chunkllama.scheduler.pace import LEAST, MOST_DEBT, PATIENCE
from chunkllama.simulation.cost_model import StepCost
from chunkllama.simulation.engine import SimulatedEngine, make_limits
from chunkllama.tenant_limits import TenantLimits, TenantTable

SIZE = 64
COST = StepCost(step=0.010, token=0.001)
WINDOW = 24  # steps


class Steps:
    """Runs steps and keeps what each of them computed, by tenant.

    Attributes:
        seconds: of each step.
        tokens: of each step, by tenant.
        outputs: of the scheduler.
    """

    def __init__(
        self, cost: StepCost = COST, *, has_tenants: bool = True, **limits: object
    ) -> None:
        settings = {"max_num_batched_tokens": 128, "max_model_len": 16_384, **limits}
        self.engine = SimulatedEngine(
            2000, SIZE, vocab_size=1000, check=False, cost=cost, **settings
        )
        tenants = dict.fromkeys(("a", "b", *(f"t{i}" for i in range(16))), TenantLimits())
        if has_tenants:
            self.engine.scheduler.set_tenants(TenantTable(tenants))
        self.random = random.Random(0)
        self.seconds: list[float] = []
        self.tokens: list[dict[str, int]] = []
        self.outputs: list[SchedulerOutput] = []

    def add(self, tenant: str, length: int = 20, output: int = 4000, **options: object) -> str:
        prompt = [self.random.randrange(1000) for _ in range(length)]
        return self.engine.add(prompt, output, tenant=tenant, namespace=tenant, **options)

    def run(self, count: int) -> None:
        for _ in range(count):
            before = self.engine.now
            output = self.engine.schedule()
            assert output is not None
            tokens: dict[str, int] = {}
            for sequence in self.engine.scheduler._scheduled:
                tenant = sequence.group.request.tenant
                tokens[tenant] = tokens.get(tenant, 0) + sequence.num_scheduled
            self.engine.commit()
            self.outputs.append(output)
            self.tokens.append(tokens)
            self.seconds.append(self.engine.now - before)

    def total(self, tenant: str, begin: int) -> int:
        """Tokens of a tenant from step ``begin`` on."""
        return sum(tokens.get(tenant, 0) for tokens in self.tokens[begin:])

    def slowdown(self, begin: int) -> float:
        """Worst mean of ``WINDOW`` steps from step ``begin`` on, over the step before it."""
        part = self.seconds[begin:]
        sums = [sum(part[i : i + WINDOW]) for i in range(len(part) - WINDOW + 1)]
        return max(sums) / WINDOW / self.seconds[begin - 1]


def beside_one_stream(bound: float, cost: StepCost = COST, **limits: object) -> Steps:
    """Return steps of tenant b's one stream, which runs alone in the first ten."""
    steps = Steps(cost, max_tenant_slowdown=bound, **limits)
    steps.add("b")
    steps.run(10)
    return steps


@pytest.mark.parametrize(
    ("bound", "slowdown", "tokens"), [(0, 6.46, 11_298), (1.5, 1.44, 863), (3, 2.78, 3567)]
)
def test_63_rows_beside_one(bound: float, slowdown: float, tokens: int) -> None:
    steps = beside_one_stream(bound)
    for _ in range(63):
        steps.add("a", 3)
    steps.run(200)
    assert (round(steps.slowdown(10), 2), steps.total("a", 10)) == (slowdown, tokens)
    assert all(each["b"] == 1 for each in steps.tokens[10:])


def test_rows_that_wait_longest_go_first_and_neighbours_stay_together() -> None:
    steps = beside_one_stream(1.5)
    for _ in range(40):
        steps.add("a", 3)
    while len(steps.engine.scheduler._running) < 41:
        steps.run(1)
    begin = len(steps.outputs)
    steps.run(100)
    order = [s.slot for s in steps.engine.scheduler._running.order.sequences]
    counts = dict.fromkeys(order, 0)
    for output in steps.outputs[begin:]:
        slots = [piece.slot for piece in output.slices]
        for slot in slots:
            counts[slot] += 1
        places = [order.index(slot) for slot in slots if slot]  # slot 0 is b's
        gaps = sum(after - before > 1 + (order.index(0) in range(before, after))
                   for before, after in pairwise(places))  # fmt: skip
        assert gaps <= 1, "more than two groups of neighbours"
    rows = [count for slot, count in counts.items() if slot]
    assert max(rows) - min(rows) <= 1


def test_a_plan_is_kept_while_the_same_rows_run() -> None:
    steps = beside_one_stream(1.5)
    for _ in range(40):
        steps.add("a", 3)
    steps.run(200)
    seen = {}
    repeated = 0
    for before, after in pairwise(steps.outputs[-60:]):
        slots = [tuple(p.slot for p in output.slices) for output in (before, after)]
        if after.plan_version:
            assert seen.setdefault(after.plan_version, slots[1]) == slots[1]
            repeated += before.plan_version == after.plan_version
    assert repeated > 10


def test_a_long_prompt_beside_a_stream() -> None:
    steps = beside_one_stream(1.5)
    name = steps.add("a", 2000, 1)
    while name not in steps.engine.first_deltas:
        steps.run(1)
    assert steps.slowdown(10) <= 1.5
    slices = [each["a"] for each in steps.tokens[10:] if "a" in each]
    assert sum(slices) == 2000 and min(slices[:-1]) >= LEAST
    assert len(steps.tokens) == 478


@pytest.mark.parametrize("weight", [1.0, 8.0])
def test_a_tenant_has_at_least_its_share(weight: float) -> None:
    """Of eight rows against 48: as many tokens as the light tenant, times the weight."""
    steps = Steps(max_tenant_slowdown=1, tenant_weights={"a": weight})
    for _ in range(8):
        steps.add("b", 3)
    steps.run(20)
    for _ in range(48):
        steps.add("a", 3)
    steps.run(100)
    begin = len(steps.tokens)
    steps.run(400)
    least = min(8 * weight, 48) * 400
    assert steps.total("b", begin) == 8 * 400
    assert 0.95 * least <= steps.total("a", begin) <= max(1.05 * least, 16 * 400)


@pytest.mark.parametrize("more", [0, 1, 3])
def test_like_loads_are_left_alone(more: int) -> None:
    """Three rows of each of 12 tenants, and up to twice as many of half of them."""

    def run(bound: float) -> list[dict[str, int]]:
        steps = Steps(max_tenant_slowdown=bound)
        for number in range(12):
            for _ in range(3 + more * (number % 2)):
                steps.add(f"t{number}", 1, 100)
        steps.run(90)
        return steps.tokens

    assert run(1) == run(0)


def test_several_heavy_tenants_each_add_their_part() -> None:
    """Half of the tenants are light: the other two add 0.4 of a step each, and what they saved."""
    steps = Steps(max_tenant_slowdown=1.5)
    for tenant in ("b", "t0"):
        steps.add(tenant)
    steps.run(10)
    for _ in range(24):
        for tenant in ("a", "t1"):
            steps.add(tenant, 3)
    steps.run(200)
    assert round(steps.slowdown(10), 2) == 1.86
    assert steps.total("a", 10) == steps.total("t1", 10)


@pytest.mark.parametrize("tenant", ["", "a"])
def test_a_server_with_one_tenant_is_left_alone(tenant: str) -> None:
    def run(bound: float) -> list[dict[str, int]]:
        steps = Steps(has_tenants=False, max_tenant_slowdown=bound)
        for length in (20, 3, 900, 3000, 5):
            steps.add(tenant, length, 50)
            steps.run(5)
        steps.run(60)
        return steps.tokens

    assert run(1) == run(0)


@pytest.mark.parametrize("has_tenants", [True, False])
@pytest.mark.parametrize(
    ("token", "seconds", "tokens"),
    [(0.001, 0.1, 85), (0.001, 0.0, 128), (0.0001, 0.1, 128), (0.01, 0.1, 48), (0.001, 0.01, 74)],
)
def test_prompts_of_a_step_are_cut_where_it_takes_long(
    token: float, seconds: float, tokens: int, has_tenants: bool
) -> None:
    """Steps of so many seconds, or of eight steps of one token; nothing else runs or waits."""
    cost = StepCost(step=0.01, token=token)
    steps = Steps(cost, has_tenants=has_tenants, max_step_seconds=seconds)
    steps.add("a", 20, 5)
    steps.run(5)
    steps.add("a", 3000, 1)
    steps.run(12)
    assert steps.tokens[-1] == {"a": tokens}


def test_rows_that_cost_nothing_run_but_for_steps_that_measure() -> None:
    steps = beside_one_stream(1.5, StepCost(step=0.01))
    for _ in range(56):
        steps.add("a", 3)
    steps.run(60)
    begin = len(steps.tokens)
    steps.run(512)
    assert [each.get("a", 0) for each in steps.tokens[begin:]].count(56) == 508


def test_what_rows_cost_is_measured() -> None:
    """Rows behind a long context of their own cost nine times what others do."""
    cost = StepCost(step=0.010, token=0.001, read=4e-6)
    steps = beside_one_stream(1.5, cost, max_num_batched_tokens=512)
    for _ in range(12):
        steps.add("a", 2000)
    steps.run(3000)
    assert len(steps.engine.scheduler._running) == 13
    begin = len(steps.seconds)
    steps.run(300)
    usual = min(steps.seconds[-50:])
    assert 1.3 <= sum(steps.seconds[begin:]) / 300 / usual <= 1.5
    assert steps.total("a", begin) > 150


@pytest.mark.parametrize(("num_streams", "slowdown"), [(1, 1.5), (16, 1.7)])
def test_rows_in_the_background_beside_streams_of_their_tenant(
    num_streams: int, slowdown: float
) -> None:
    """The tenant's chats have as many tokens as another's; its batch pays for what it adds."""
    steps = Steps(max_tenant_slowdown=1.5)
    for tenant in "a", "b":
        for _ in range(num_streams):
            steps.add(tenant)
    steps.run(10)
    begun = steps.total("a", 0)
    for _ in range(30):
        steps.add("a", 3, priority=BACKGROUND_PRIORITY)
    steps.run(200)
    assert steps.slowdown(10) <= slowdown
    assert all(each["b"] == num_streams for each in steps.tokens[10:])
    assert all(each["a"] >= num_streams for each in steps.tokens[10:])
    assert steps.total("a", 0) - begun - 200 * num_streams > 200


def test_a_stream_of_a_tenant_starts_beside_its_rows_in_the_background() -> None:
    steps = beside_one_stream(1.5)
    for _ in range(20):
        steps.add("a", 3, priority=BACKGROUND_PRIORITY)
    steps.run(40)
    name = steps.add("a", 2)
    steps.run(3)
    assert len(steps.engine.outputs[name, 0]) == 3


def test_streams_beside_batches_of_all_tenants_pay_for_none() -> None:
    """No step computes all rows because a step without the batches is to be measured."""
    steps = Steps(max_tenant_slowdown=1.5)
    steps.add("a")
    steps.run(10)
    for tenant in "aabb":
        for _ in range(7):
            steps.add(tenant, 3, priority=BACKGROUND_PRIORITY)
    steps.run(300)
    assert all(each["a"] >= 1 for each in steps.tokens[10:])
    part = steps.seconds[20:]
    assert sum(part) / len(part) <= 2.0 * steps.seconds[9], "each batch adds half of a step"
    assert steps.total("b", 10) > 200


def test_prompts_in_the_background_have_half_of_a_step() -> None:
    steps = Steps(max_step_seconds=0.1)
    steps.add("a", 20, 5)
    steps.run(5)
    steps.add("a", 3000, 1, priority=BACKGROUND_PRIORITY)
    steps.run(12)
    assert steps.tokens[-1] == {"a": 36}


@pytest.mark.parametrize("token", [0.0001, 0.001, 0.5])
def test_a_limited_tenant_always_advances(token: float) -> None:
    steps = beside_one_stream(1, StepCost(step=0.01, token=token))
    for _ in range(20):
        steps.add("a", 100)
    steps.run(600)
    ran = [i for i, each in enumerate(steps.tokens) if "a" in each]
    assert max(b - a for a, b in pairwise(ran)) <= PATIENCE + MOST_DEBT + 1


def test_a_debt_is_paid_in_time_when_the_others_want_less() -> None:
    """A disturbed step beside a prompt of the other tenant, which then decodes one token a step."""
    steps = Steps(max_tenant_slowdown=1.5)
    for _ in range(20):
        steps.add("a", 100)
    steps.run(40)
    steps.add("b", 400)
    steps.run(2)
    usual, steps.engine._cost = steps.engine._cost, StepCost(step=5.0, token=0.001)
    steps.run(1)
    steps.engine._cost = usual
    steps.run(300)
    ran = [i for i, each in enumerate(steps.tokens) if "a" in each]
    assert max(b - a for a, b in pairwise(ran)) <= PATIENCE + MOST_DEBT + 1


@pytest.mark.parametrize("has_tenants", [True, False])
def test_short_prompts_leave_half_of_a_cut_step_to_a_long_one(has_tenants: bool) -> None:
    cost = StepCost(step=0.012, token=0.0017)
    steps = Steps(
        cost,
        has_tenants=has_tenants,
        max_num_batched_tokens=512,
        max_step_seconds=0.1,
        max_tenant_slowdown=0,
    )
    steps.add("a", 3, 6)
    steps.run(6)  # measures steps of one token
    steps.add("a", 5000, 1)
    steps.run(4)
    for number in range(30):
        for _ in range(4):
            steps.add(f"t{number % 16}", 24, 1)
        steps.run(1)
        if "a" in steps.tokens[-1]:  # at most every second step is for others' first tokens alone
            assert steps.tokens[-1]["a"] >= 16
    last = steps.tokens[-30:]
    assert max(steps.seconds[-30:]) <= 0.12
    assert sum("a" in tokens for tokens in last) >= 15


def test_another_tenants_followers_wait_for_no_limit() -> None:
    """A limited tenant computes a prefix of one namespace that another tenant waits for."""
    steps = Steps(max_tenant_slowdown=1)
    steps.add("t0", 3)
    steps.run(4)
    prefix = [steps.random.randrange(1000) for _ in range(2000)]
    steps.engine.add(prefix, 4, tenant="a", namespace="shared")
    steps.run(2)
    steps.engine.add([*prefix, 1], 4, tenant="b", namespace="shared")
    steps.run(20)
    assert sum("b" in tokens for tokens in steps.tokens) > 0  # it would wait for 478 steps


def test_steps_of_a_limited_tenant_are_cut_too() -> None:
    """It computes a prefix that another tenant waits for, which no credit limits."""
    steps = Steps(
        StepCost(step=0.012, token=0.0017),
        max_num_batched_tokens=1024,
        max_step_seconds=0.1,
        max_tenant_slowdown=1.5,
    )
    steps.add("t0", 3)
    steps.run(20)
    prefix = [steps.random.randrange(1000) for _ in range(5001)]
    for tenant in ("b", "a"):
        steps.engine.add([*prefix, len(tenant)], 4, tenant=tenant, namespace="shared")
        steps.run(2)
    steps.run(40)
    assert sum(seconds > 0.13 for seconds in steps.seconds) == 4, "they show the cost"
    assert sum(seconds > 0.32 for seconds in steps.seconds) == 1
    assert max(sum(tokens.values()) for tokens in steps.tokens[24:]) > 40


def test_new_requests_of_a_limited_tenant_start() -> None:
    """They have a quarter of its tokens, while its older ones decode."""
    steps = beside_one_stream(1.5)
    for _ in range(40):
        steps.add("a", 3)
    steps.run(300)
    name = steps.add("a", 3, 4)
    before = len(steps.tokens)
    while name not in steps.engine.first_deltas:
        steps.run(1)
    assert len(steps.tokens) - before == 4


def test_a_step_is_never_empty_because_of_a_limit() -> None:
    """The other tenant's only sequence is in the background and pauses for a prompt."""
    steps = Steps(max_tenant_slowdown=1)
    steps.add("b", priority=1000)
    steps.run(10)
    for _ in range(30):
        steps.add("a", 300, 20)
    steps.run(200)
    steps.engine.run()
    steps.engine.check_outputs()
    assert steps.engine.scheduler.stats().preemptions_total == 0


def test_other_policies_have_no_bound() -> None:
    for policy in ("prefix", "fcfs"):
        steps = beside_one_stream(1, policy=policy)
        for _ in range(30):
            steps.add("a", 3)
        steps.run(20)
        assert steps.tokens[-1] == {"a": 30, "b": 1}


@pytest.mark.parametrize("bound", [-1.0, 0.5])
def test_a_bound_below_one_is_refused(bound: float) -> None:
    with pytest.raises(ConfigError, match="max_tenant_slowdown must be at least 1 or 0"):
        make_limits(max_tenant_slowdown=bound)
