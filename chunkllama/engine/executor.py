"""The seam between the step loop and whatever computes: one process here, N ranks later."""

from __future__ import annotations

from typing import Protocol

from chunkllama.scheduler.output import SampledTokens, SchedulerOutput


class Executor(Protocol):
    """Computes steps. Knows slots, chunks and tokens; never trees, requests or schedulers."""

    def execute(self, output: SchedulerOutput) -> SampledTokens:
        """Copy chunks, run the model over every slice, sample where a slice asks for it."""
        ...

    def close(self) -> None:
        """Release the model and the pool."""
        ...
