"""Adapters of a model runner: reads them, and finds the rows of a step that use them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from chunkllama.backends.adapter import AdapterRows, PreparedAdapter
from chunkllama.backends.model import RunnableModel
from chunkllama.cache.adapter_tags import MAX_VOCABULARY
from chunkllama.engine.sequence_state import SequenceState
from chunkllama.engine.step_model import StepModel
from chunkllama.errors import ConfigError
from chunkllama.models.loading.adapter_file import AdapterFile, read_adapter
from chunkllama.models.loading.adapter_weights import load_adapter_weights
from chunkllama.scheduler.output import ScheduledSlice


class RunnerAdapters:
    """Implement ``AdapterLoader``.

    Args:
        step_model: that the adapters are for; their weights are in the type of its K/V.
    """

    def __init__(self, step_model: StepModel) -> None:
        self._spec = step_model.spec
        self._model: RunnableModel | None = step_model.model
        self._num_ranks = step_model.num_ranks
        self._dtype = step_model.kv.dtype
        self._device = step_model.backend.device
        self._weights: dict[int, PreparedAdapter] = {}  # by number, of those in memory

    def read_adapter(self, folder: Path) -> AdapterFile:
        if self._num_ranks > 1:
            raise ConfigError(f"{folder}: adapters need tensor_parallel_size 1")
        if self._spec.vocab_size > MAX_VOCABULARY:
            raise ConfigError(f"{folder}: adapters need a vocabulary of at most {MAX_VOCABULARY}")
        return read_adapter(folder, self._spec)

    def size_of(self, file: AdapterFile) -> int:
        return file.num_values * self._dtype.itemsize

    def load_adapter(self, file: AdapterFile) -> tuple[PreparedAdapter, int]:
        assert self._model is not None, "the runner was closed"
        with torch.inference_mode():
            weights = load_adapter_weights(file, self._spec, self._dtype, self._device)
            return self._model.prepare_adapter(weights)

    def set_adapter(self, number: int, weights: PreparedAdapter | None) -> None:
        if weights is None:
            del self._weights[number]
        else:
            self._weights[number] = weights

    def rows(
        self, slices: Sequence[ScheduledSlice], sequences: Mapping[int, SequenceState]
    ) -> list[AdapterRows]:
        """Return the rows of a step's slices that use adapters, one adapter's neighbours together.

        Args:
            sequences: by slot; a slice of none of them is the base model's.
        """
        if not self._weights:
            return []
        found: list[AdapterRows] = []
        end, last = 0, 0
        for piece in slices:
            begin, end = end, end + piece.num_tokens
            sequence = sequences.get(piece.slot)
            use = None if sequence is None else sequence.adapter
            if use is None:
                continue
            begin += max(use.start - piece.first_position, 0)
            if begin >= end:
                continue
            if found and last == use.number and found[-1].end == begin:
                begin = found.pop().begin
            found.append(AdapterRows(begin, end, self._weights[use.number]))
            last = use.number
        return found

    def close(self) -> None:
        """Drop all weights."""
        self._weights.clear()
        self._model = None
