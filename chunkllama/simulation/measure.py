"""Measure the cost model of a model on this machine, by running steps of the real engine."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from chunkllama.config import EngineConfig
from chunkllama.engine.build import build_engine
from chunkllama.engine.core import EngineCore
from chunkllama.messages import EngineReady, EngineRequest
from chunkllama.sampling_params import SamplingParams
from chunkllama.scheduler.output import SchedulerOutput
from chunkllama.simulation.cost_model import StepCost, fit_cost, step_work

# (requests, prompt tokens of each, of which shared, output tokens)
_LOADS = (
    (1, 32, 0, 16),
    (1, 128, 0, 16),
    (1, 512, 0, 16),
    (1, 2048, 0, 16),
    (4, 128, 0, 16),
    (16, 128, 0, 16),
    (16, 512, 0, 16),
    (32, 64, 0, 16),
    (16, 1024, 1008, 16),
    (16, 2048, 2032, 16),
)


@dataclass(frozen=True, slots=True)
class Measured:
    """A fitted cost model, its median relative error, and the engine it was measured on."""

    cost: StepCost
    error: float
    num_steps: int
    engine: EngineReady


def measure_cost(
    config: EngineConfig, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Measured:
    """Load the model and time steps of different kinds; takes about half a minute on a CPU.

    Args:
        on_progress: told the loads done and their number.

    Raises:
        ConfigError: the model or a setting cannot be used.
    """
    core = build_engine(config)
    work: list[tuple[float, ...]] = []
    seconds: list[float] = []

    def record(output: SchedulerOutput, elapsed: float) -> None:
        work.append(step_work(output, core.info.chunk_size))
        seconds.append(elapsed)

    try:
        loads = [load for load in _LOADS if _fits(load, core.info)]
        _run(core, list(_requests("warm-up", (4, 128, 0, 8), core.info)))
        core.on_step = record
        for number, load in enumerate(loads):
            _run(core, list(_requests(f"load-{number}", load, core.info)))
            on_progress(number + 1, len(loads))
    finally:
        core.close()
    cost, error = fit_cost(work, seconds)
    return Measured(cost, error, len(work), core.info)


def _fits(load: tuple[int, int, int, int], info: EngineReady) -> bool:
    """Whether the context and the pool hold all requests of a load at once."""
    count, prompt, _, output = load
    chunks = count * (-(-(prompt + output) // info.chunk_size) + 1)
    return prompt + output <= info.max_request_tokens and chunks <= info.num_chunks


def _requests(
    name: str, load: tuple[int, int, int, int], info: EngineReady
) -> Iterator[EngineRequest]:
    count, prompt, shared, output = load
    rng = random.Random(name)
    prefix = [rng.randrange(info.vocab_size) for _ in range(shared)]
    for i in range(count):
        own = [rng.randrange(info.vocab_size) for _ in range(prompt - shared)]
        yield EngineRequest(
            request_id=f"{name}-{i}",
            prompt_token_ids=[*prefix, *own],
            sampling=SamplingParams(max_tokens=output, ignore_eos=True, temperature=0.0, seed=0),
        )


def _run(core: EngineCore, requests: list[EngineRequest]) -> None:
    for request in requests:
        core.add(request)
    while core.has_work():
        core.step()
