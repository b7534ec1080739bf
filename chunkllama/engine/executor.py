"""Define the executor, the interface between the step loop and the backend."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Protocol

from chunkllama.sampling_params import SamplingParams
from chunkllama.scheduler.output import SampledTokens, SchedulerOutput


class Executor(Protocol):
    """Computes steps. Knows slots, chunks and tokens; never trees, requests or schedulers."""

    def prepare(self, sampling: SamplingParams) -> Future[None] | None:
        """Start what a request needs before its first step and no step should wait for: the
        compilation of its grammar. None: nothing. A failure shows in the request's steps.
        """
        ...

    def execute(self, output: SchedulerOutput) -> SampledTokens:
        """Copy chunks, run the model over every slice, sample where a slice asks for it."""
        ...

    def close(self) -> None:
        """Release the model and the pool."""
        ...
