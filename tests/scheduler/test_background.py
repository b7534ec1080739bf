"""Lines of batches beside other requests: first tokens, progress, and memory they hold."""

from __future__ import annotations

import random
from statistics import median
from typing import Any

import pytest

from chunkllama.messages import BACKGROUND_PRIORITY
from chunkllama.scheduler.scheduler import MAX_PAUSED
from chunkllama.simulation.cost_model import DEFAULT_COST
from chunkllama.simulation.engine import SimulatedEngine, make_limits
from chunkllama.simulation.random_traffic import RandomTraffic
from chunkllama.simulation.replay import Outcome, Replay
from chunkllama.simulation.trace import TraceRequest

SIZE = 64
LIMITS = make_limits(max_num_batched_tokens=512, max_waiting=1024)


def replay(lines_per_second: float, seconds: float = 30.0, tenant: str = "b") -> list[Outcome]:
    """Online requests of tenant a, one a second, beside lines; a line takes about a second."""
    rng = random.Random(1)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(1000) for _ in range(count))

    system, requests = tokens(8 * SIZE), []
    prefixes = [tokens(8 * SIZE) for _ in range(16)]
    at = 0.0
    while at < seconds:
        at += rng.expovariate(1.0)
        prompt = system + tokens(250)
        requests.append(TraceRequest(at, "a", len(prompt), 32, prompt))
    for number in range(int(lines_per_second * seconds)):
        prompt = prefixes[number * 16 // int(lines_per_second * seconds)] + tokens(60)
        requests.append(
            TraceRequest(number / lines_per_second, tenant, len(prompt), 64, prompt,
                         priority=BACKGROUND_PRIORITY)
        )  # fmt: skip
    requests.sort(key=lambda each: each.at)
    return Replay(LIMITS, 600, SIZE, DEFAULT_COST.seconds, check=True).run(requests).outcomes


@pytest.mark.parametrize("tenant", ["a", "b"])
def test_first_tokens_beside_lines(tenant: str) -> None:
    """About four lines run at once; the time of a step is that of the README's machine."""
    alone, beside = (
        median(o.first_token_seconds for o in replay(rate, tenant=tenant) if not o.request.priority)
        for rate in (0, 5)
    )
    assert beside <= 1.2 * alone


@pytest.mark.parametrize("num_chunks", [60, 600])
def test_lines_advance_beside_prompts_that_fill_every_step(num_chunks: int) -> None:
    """They hold chunks that the prompts need, and end before the prompts do."""
    rng = random.Random(2)

    def request(at: float, count: int, output: int, priority: int = 0) -> TraceRequest:
        prompt = tuple(rng.randrange(1000) for _ in range(count))
        return TraceRequest(at, "a", count, output, prompt, priority=priority)

    lines = [request(0.0, 100, 16, BACKGROUND_PRIORITY) for _ in range(4)]
    prompts = [request(0.05 + i / 1000, 500, 2) for i in range(400)]
    run = Replay(LIMITS, num_chunks, SIZE, DEFAULT_COST.seconds, check=True)
    ends = [each.ended_at for each in run.run([*lines, *prompts]).outcomes]
    assert min(ends) > 0 and max(ends[:4]) < max(ends[4:])


def test_lines_pause_for_prompts_and_not_for_answers() -> None:
    """A prompt of many steps: the lines advance in every ninth of them, and beside its answer."""
    run = SimulatedEngine(96, 8, max_num_batched_tokens=16, max_num_seqs=4)
    line = run.add([1, 2, 3], 100, priority=BACKGROUND_PRIORITY)
    other = run.add([4, 5, 6], 100)
    for _ in range(3):
        run.step()
    prompt = [i % 7 for i in range(16 * 2 * (MAX_PAUSED + 1))]
    begun, before = len(run.outputs[line, 0]), len(run.outputs[other, 0])
    name = run.add(prompt, 4)
    steps = 0
    while not run.outputs.get((name, 0)):
        run.step()
        steps += 1
    advanced = len(run.outputs[line, 0]) - begun
    assert len(run.outputs[other, 0]) - before == steps
    assert 0 < advanced <= steps // MAX_PAUSED
    begun = len(run.outputs[line, 0])
    for _ in range(3):
        run.step()
    assert len(run.outputs[line, 0]) == begun + 3
    run.run()
    assert run.finished[line, 0] == run.finished[name, 0] == "length"


@pytest.mark.parametrize("seed", range(6))
def test_random_traffic_with_lines_equals_the_serial_oracle(seed: int) -> None:
    """Half of the requests are lines; every bound and invariant holds."""
    traffic = RandomTraffic(seed, 4)
    add = traffic.engine.add

    def add_line(prompt: list[int], max_tokens: int | None, **options: Any) -> str:
        if traffic.random.random() < 0.5:
            options["priority"] = BACKGROUND_PRIORITY
        return add(prompt, max_tokens, **options)

    traffic.engine.add = add_line  # type: ignore[method-assign]
    traffic.run(150)


@pytest.mark.parametrize("priority", [0, BACKGROUND_PRIORITY])
def test_a_line_whose_prefix_another_request_waits_for_does_not_pause(priority: int) -> None:
    """One that waits for a chunk of the line would else wait for all other prompts, too."""
    rng = random.Random(2)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(100) for _ in range(count)]

    run = SimulatedEngine(256, 8, max_num_batched_tokens=16, max_num_seqs=8)
    shared = tokens(160)
    run.add([*shared, 1], 4, priority=priority)
    run.step()
    name = run.add([*shared, 2], 4)
    for _ in range(2):
        run.add(tokens(600), 4)
    steps = 0
    while not run.outputs.get((name, 0)):
        run.step()
        steps += 1
    assert steps < 3 * MAX_PAUSED
