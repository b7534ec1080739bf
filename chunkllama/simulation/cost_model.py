"""Seconds that a step takes on one machine, as a sum of what the step does.

    seconds = step + token * tokens + sequence * slices + read * K/V tokens read
              + attention * sum over slices of (tokens * positions before them)

K/V that neighbouring sequences share count once, as the kernels read them once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from chunkllama.errors import ConfigError
from chunkllama.scheduler.output import SchedulerOutput

Float64Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds for each unit of work; every field is at least 0."""

    step: float = 0.0
    token: float = 0.0
    sequence: float = 0.0
    read: float = 0.0
    attention: float = 0.0

    def seconds(self, output: SchedulerOutput, chunk_size: int) -> float:
        """Return the step's duration in seconds."""
        steps, tokens, sequences, reads, attention = step_work(output, chunk_size)
        return (
            self.step * steps
            + self.token * tokens
            + self.sequence * sequences
            + self.read * reads
            + self.attention * attention
        )

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


# Estimated from the README's step times, not fitted: the demo model in bfloat16 on two cores with
# AMX. `chunkllama capacity --measure` gives a machine's own.
DEFAULT_COST = StepCost(step=8.0e-3, token=1.3e-4, sequence=1.2e-4, read=1.1e-6, attention=2.0e-8)


def step_work(output: SchedulerOutput, chunk_size: int) -> tuple[float, float, float, float, float]:
    """Return the amounts that ``StepCost``'s fields multiply, in their order."""
    tokens = reads = attention = 0
    end_before = 0
    for piece in output.slices:
        start, count = piece.first_position, piece.num_tokens
        end = start + count
        tokens += count
        reads += end - min(piece.shared * chunk_size, end, end_before)
        attention += count * start + count * (count - 1) // 2
        end_before = end
    return 1.0, float(tokens), float(len(output.slices)), float(reads), float(attention)


def read_cost(path: Path) -> StepCost:
    """Read a cost model from the JSON file that ``--measure`` writes.

    Raises:
        ConfigError: naming the file and the field.
    """
    try:
        given = msgspec.json.decode(path.read_bytes(), type=dict[str, object])
    except OSError as error:
        raise ConfigError(f"cost: cannot read {path}: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise ConfigError(f"cost: {path} is not a JSON object: {error}") from None
    seconds = given.get("seconds", given)
    if not isinstance(seconds, dict):
        raise ConfigError(f"cost: seconds in {path} must be an object of seconds for each unit")
    known = [each.name for each in fields(StepCost)]
    for name, value in seconds.items():
        if name not in known:
            raise ConfigError(f"cost: unknown field {name} in {path}; known: {', '.join(known)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e6:
            raise ConfigError(f"cost: {name} in {path} must be seconds in [0, 1e6), got {value!r}")
    cost = StepCost(**{name: float(value) for name, value in seconds.items()})
    if cost.step + cost.token + cost.sequence <= 0:
        raise ConfigError(f"cost: {path} makes steps free; set step, token or sequence")
    return cost


def fit_cost(work: Sequence[Sequence[float]], seconds: Sequence[float]) -> tuple[StepCost, float]:
    """Fit a cost model to measured steps; no field becomes negative.

    Least squares of relative errors: an error of 1 ms matters in a step of 10 ms, not in one of
    500 ms. A field that would be negative is fixed at 0 and the others are fitted again.

    Returns:
        The model, and the median relative error over the steps.
    """
    amounts, measured = np.asarray(work, np.float64), np.asarray(seconds, np.float64)
    rows = amounts / measured[:, None]
    used = [i for i in range(amounts.shape[1]) if amounts[:, i].any()]
    values: Float64Array = np.zeros(amounts.shape[1])
    while used:
        scale = np.linalg.norm(rows[:, used], axis=0)
        solved = np.linalg.lstsq(rows[:, used] / scale, np.ones(len(rows)), rcond=None)[0] / scale
        if (solved >= 0).all():
            values[used] = solved
            break
        del used[int(np.argmin(solved * scale))]
    errors = np.abs(rows @ values - 1.0)
    return StepCost(*(float(value) for value in values)), float(np.median(errors))
