"""Parts of a model, added up, are the model: every family that can be split, in one process."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from model_families import CASES, VOCAB, random_model

from chunkllama.backends.cpu.packed import PackedLinear
from chunkllama.engine.load import load_step_model
from chunkllama.engine.step_model import StepModel
from chunkllama.models.config import read_spec
from chunkllama.models.shard import Shard
from chunkllama.scheduler.output import ScheduledSlice, SchedulerOutput

OFTEN = {"llama gelu", "qwen3 bias", "phi3 partial", "granite bias", "gemma2 caps", "arcee bias"}
SPLIT = [name for name in CASES if CASES[name][1].get("num_key_value_heads") != 1]
WHOLE = {"olmo2", "olmo3", "olmo3 yarn"}  # their norms are over all heads


class Sum:
    """Adds up what ``size`` threads give."""

    def __init__(self, size: int) -> None:
        self._given: list[torch.Tensor] = []
        self._total = torch.empty(0)
        self._given_by_all = threading.Barrier(size, self._add)
        self._taken_by_all = threading.Barrier(size)

    def _add(self) -> None:
        self._total = torch.stack(self._given).sum(dim=0)
        self._given = []

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self._given.append(x)
        self._given_by_all.wait()
        total = self._total.clone()
        self._taken_by_all.wait()
        return total


def logits(model: StepModel, ids: np.ndarray) -> torch.Tensor:
    piece = ScheduledSlice(0, 0, ids, np.arange(2, dtype=np.int32), 0, True)
    with torch.inference_mode():
        hidden = model.run(SchedulerOutput(step=1, slices=[piece], plan_version=0))
        return model.model.logits(hidden)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    "name",
    [
        name if name in OFTEN else pytest.param(name, marks=pytest.mark.nightly)
        for name in SPLIT
        if name not in WHOLE
    ],
)
def test_two_parts_give_the_logits_of_the_whole(
    name: str, backend: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    random_model(*CASES[name]).save_pretrained(tmp_path)
    spec = read_spec(tmp_path)
    size = 2

    def load(shard: Shard | None) -> StepModel:
        return load_step_model(
            model_path=tmp_path,
            spec=spec,
            device="cpu",
            dtype="float32",
            num_chunks=2,
            chunk_size=64,
            max_model_len=128,
            backend=backend,
            shard=shard,
        )

    ids = rng.integers(0, VOCAB, 70).astype(np.int32)
    expected = logits(load(None), ids)
    total = Sum(size)
    parts = [load(Shard(rank, size, total.all_reduce)) for rank in range(size)]
    assert {part.kv.num_kv_heads for part in parts} == {spec.num_kv_heads // size}
    if backend == "cpu":
        layers = parts[0].model.weights.layers
        assert isinstance(layers[0].down, PackedLinear), "a part runs op by op"
    with ThreadPoolExecutor(size) as threads:
        found = list(threads.map(logits, parts, [ids] * size))
    for part in found:
        torch.testing.assert_close(part, expected, atol=2e-5, rtol=2e-5)
