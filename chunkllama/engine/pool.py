"""The chunk pool of a GPU: what a worst step leaves of its memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import torch

from chunkllama.engine.sampler import Sampler
from chunkllama.engine.sequence_state import SequenceState
from chunkllama.engine.step_model import StepModel
from chunkllama.sampling_params import SamplingParams
from chunkllama.scheduler.output import ScheduledSlice, SchedulerOutput

PROFILE_CHUNKS: Final = 16  # of the pool that the worst step runs in
_LOGPROBS: Final = 20


class DeviceMemory(Protocol):
    """What is in use of a device's memory."""

    total: int

    def begin(self) -> None:
        """Forget the largest use so far."""
        ...

    def largest_use(self) -> int:
        """Bytes in use: by tensors at most since ``begin``, by all else now."""
        ...


class CudaMemory:
    """Implements ``DeviceMemory``; what torch has cached and does not use is given back."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.total = torch.cuda.mem_get_info(device)[1]

    def begin(self) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)

    def largest_use(self) -> int:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        beside_torch = total - free - torch.cuda.memory_reserved(self._device)
        return beside_torch + torch.cuda.max_memory_allocated(self._device)


@dataclass(frozen=True, slots=True)
class WorstStep:
    """The step of a configuration that takes the most memory.

    Attributes:
        num_seqs: that compute and are sampled.
        num_tokens: of all of them; the first has all but one of each other.
        longest: context of the first one in tokens; the others have as much together, or each if
            it is less than ``num_tokens``.
        num_guesses: tokens that are sampled beside the last one of each sequence.
    """

    num_seqs: int
    num_tokens: int
    longest: int
    num_guesses: int = 0

    def output(self, chunk_size: int) -> SchedulerOutput:
        """The step in a pool of ``PROFILE_CHUNKS``, which its contexts go through again and again:
        memory depends on lengths only.
        """
        num_seqs = min(self.num_seqs, self.num_tokens)
        other = self.longest if self.longest < self.num_tokens else self.longest // num_seqs
        slices, left = [], self.num_tokens
        for slot in range(num_seqs):
            end = max(other if slot else self.longest, 1)
            count = min(left - (num_seqs - slot - 1), end)
            left -= count
            chunk_ids = np.arange(-(-end // chunk_size), dtype=np.int32) % PROFILE_CHUNKS
            tokens = np.zeros(count, np.int32)
            slices.append(ScheduledSlice(slot, end - count, tokens, chunk_ids, 0, samples=False))
        return SchedulerOutput(step=0, slices=slices, plan_version=0)


@torch.inference_mode()
def fitting_chunks(
    model: StepModel, step: WorstStep, memory: DeviceMemory, utilization: float, *, samples: bool
) -> int:
    """Run a worst step; returns how many chunks fit beside what it took, 0 or less if none do.

    Args:
        model: of this rank, with a pool of ``PROFILE_CHUNKS``.
        utilization: part of the device's memory that may be in use.
        samples: whether this rank samples.

    Raises:
        torch.OutOfMemoryError: the step does not fit.
    """
    layers = model.kv.layers
    for layer in layers:
        layer.zero_()  # it may hold NaN
    memory.begin()
    hidden = model.run(step.output(model.kv.chunk_size))
    if samples:
        _sample(model, hidden[: step.num_seqs + step.num_guesses])
    del hidden
    pool = sum(layer.nbytes for layer in layers)
    left = utilization * memory.total - (memory.largest_use() - pool)
    return int(left) // (pool // PROFILE_CHUNKS)


def _sample(model: StepModel, hidden: torch.Tensor) -> None:
    """Sample with what needs the most memory at once."""
    sampling = SamplingParams(
        temperature=1.0, top_p=0.9, top_k=50, logprobs=_LOGPROBS, presence_penalty=0.1, seed=0
    )
    start = np.zeros(1, np.int32)
    states = [SequenceState(sampling, 0, start, []) for _ in range(len(hidden))]
    Sampler(model.spec.eos_token_ids, model.backend).sample(model.model.logits(hidden), states, {})
