"""The pool of a GPU, and steps that its memory has no room for, on fake GPUs; that of a CPU."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import write_tiny_model

from chunkllama.backends.cpu.memory import PoolCommitter
from chunkllama.config import EngineConfig
from chunkllama.engine import build, size
from chunkllama.engine.build import build_engine
from chunkllama.engine.core import EngineCore
from chunkllama.engine.load import load_step_model
from chunkllama.engine.model_runner import ModelRunner
from chunkllama.engine.pool import PROFILE_CHUNKS, WorstStep
from chunkllama.engine.sampler import Sampler
from chunkllama.engine.step_model import StepModel
from chunkllama.errors import ConfigError
from chunkllama.messages import EngineRequest
from chunkllama.sampling_params import SamplingParams
from chunkllama.scheduler.drafts import MAX_ROWS
from chunkllama.scheduler.output import SchedulerOutput

CHUNK_BYTES = 2 * 2 * 64 * 64 * 2  # of the tiny model in bfloat16: layers, K and V, tokens, head
GPU_BYTES = 1000 * CHUNK_BYTES
STEP_BYTES = 100 * CHUNK_BYTES + 1  # of the weights and the largest step


@dataclass
class FakeMemory:
    """A GPU of ``GPU_BYTES`` in which a step takes ``STEP_BYTES`` beside the pool."""

    device: torch.device
    total: int = GPU_BYTES

    def begin(self) -> None: ...

    def largest_use(self) -> int:
        return STEP_BYTES + PROFILE_CHUNKS * CHUNK_BYTES


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[SchedulerOutput]:
    """Everything that models compute, in order."""
    seen: list[SchedulerOutput] = []
    run = StepModel.run

    def record(self: StepModel, output: SchedulerOutput, *rest: Any) -> torch.Tensor:
        seen.append(output)
        return run(self, output, *rest)

    monkeypatch.setattr(StepModel, "run", record)
    return seen


@pytest.fixture
def on_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., EngineCore]]:
    """Build engines that take the CPU for a GPU, on the reference backend."""

    def load(**arguments: Any) -> StepModel:
        assert arguments["device"] == "cuda"
        return load_step_model(**{**arguments, "device": "cpu", "backend": "reference"})

    monkeypatch.setattr(size, "find_device", lambda wanted: "cuda")
    monkeypatch.setattr(build, "load_step_model", load)
    monkeypatch.setattr(build, "CudaMemory", FakeMemory)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (GPU_BYTES, GPU_BYTES))
    write_tiny_model(tmp_path)
    made: list[EngineCore] = []

    def make(**settings: Any) -> EngineCore:
        config = {"model": str(tmp_path), "dtype": "bfloat16", **settings}
        made.append(build_engine(EngineConfig.from_flat(**config)))
        return made[-1]

    yield make
    for core in made:
        core.close()


@pytest.mark.parametrize(("utilization", "chunks"), [(0.9, 799), (0.5, 399)])
def test_the_pool_takes_what_the_largest_step_leaves(
    on_gpu: Callable[..., EngineCore],
    steps: list[SchedulerOutput],
    utilization: float,
    chunks: int,
) -> None:
    core = on_gpu(gpu_memory_utilization=utilization, max_num_seqs=8, max_num_batched_tokens=300)
    assert core.info.num_chunks == core._executor.kv.num_chunks == chunks
    (largest,) = steps
    assert (largest.num_tokens, len(largest.slices)) == (300, 8)
    assert max(p.first_position + p.num_tokens for p in largest.slices) == 256


@pytest.mark.parametrize(("speculation", "rows"), [("off", 8), ("auto", 8 + MAX_ROWS)])
def test_rows_of_guesses_are_sampled_in_the_largest_step(
    on_gpu: Callable[..., EngineCore],
    monkeypatch: pytest.MonkeyPatch,
    speculation: str,
    rows: int,
) -> None:
    seen: list[int] = []
    sample = Sampler.sample

    def record(self: Sampler, logits: torch.Tensor, *rest: Any) -> Any:
        seen.append(len(logits))
        return sample(self, logits, *rest)

    monkeypatch.setattr(Sampler, "sample", record)
    on_gpu(speculation=speculation, max_num_seqs=8, max_num_batched_tokens=300)
    assert seen == [rows]


def test_a_draft_model_has_its_part(
    on_gpu: Callable[..., EngineCore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are loaded after the largest step, and its pool has as many chunks."""
    monkeypatch.setattr(build, "check_tokenizers", lambda model, draft: None)
    core = on_gpu(draft_model=str(tmp_path), speculation="auto")
    config = EngineConfig.from_flat(
        model=str(tmp_path), dtype="bfloat16", draft_model=str(tmp_path), speculation="auto"
    )
    draft = size.plan_draft(config, "cuda")
    assert draft is not None and draft.chunk_bytes == CHUNK_BYTES
    expected = (799 * CHUNK_BYTES - draft.weight_bytes) // (2 * CHUNK_BYTES)
    assert core.info.num_chunks == core._executor.kv.num_chunks == expected < 400
    assert isinstance(core._executor, ModelRunner) and core._executor.draft_model is not None
    assert core._executor.draft_model._step_model.kv.num_chunks == expected


def test_what_fits_is_logged(
    on_gpu: Callable[..., EngineCore], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="chunkllama"):
        on_gpu()
    assert (
        "chunk pool: 51136 tokens hold 398 requests of 128 tokens behind 128 that all share, "
        "199 without sharing" in caplog.text
    )


def test_a_pool_that_was_asked_for_is_kept(
    on_gpu: Callable[..., EngineCore], caplog: pytest.LogCaptureFixture
) -> None:
    assert on_gpu(num_chunks=900).info.num_chunks == 900
    assert "the pool has 900 chunks; with gpu_memory_utilization 0.9 799 fit" in caplog.text


def test_no_room_for_a_pool_is_one_line(on_gpu: Callable[..., EngineCore]) -> None:
    with pytest.raises(ConfigError, match=r"gpu_memory_utilization: 0\.1 leaves no memory for"):
        on_gpu(gpu_memory_utilization=0.1)


def test_no_room_for_the_largest_step_is_one_line(
    on_gpu: Callable[..., EngineCore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StepModel, "run", _run_out)
    with pytest.raises(ConfigError, match="max_num_batched_tokens: cpu lacks memory for a step"):
        on_gpu()


def test_no_room_for_the_pool_that_was_asked_for_is_one_line(
    on_gpu: Callable[..., EngineCore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StepModel, "replace_pool", _run_out)
    with pytest.raises(ConfigError, match="kv_cache_memory: cpu lacks memory for the weights"):
        on_gpu(num_chunks=900)


def test_a_draft_model_without_room_for_its_pool_is_closed(
    on_gpu: Callable[..., EngineCore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "check_tokenizers", lambda model, draft: None)
    pools: list[StepModel] = []
    replace_pool = StepModel.replace_pool

    def replace_first(self: StepModel, num_chunks: int) -> None:
        pools.append(self)
        if len(pools) == 2:
            _run_out()
        replace_pool(self, num_chunks)

    monkeypatch.setattr(StepModel, "replace_pool", replace_first)
    with pytest.raises(ConfigError, match="kv_cache_memory: cpu lacks memory"):
        on_gpu(draft_model=str(tmp_path), speculation="auto")
    assert [model._model for model in pools] == [None, None]


def _run_out(*_: object) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nAnd so on.")


@pytest.mark.parametrize(
    ("num_seqs", "num_tokens", "longest"),
    [(8, 300, 256), (64, 512, 4096), (4, 2, 100), (3, 500, 100), (1, 64, 1)],
)
def test_the_largest_step(num_seqs: int, num_tokens: int, longest: int) -> None:
    slices = WorstStep(num_seqs, num_tokens, longest).output(64).slices
    assert len(slices) == min(num_seqs, num_tokens)
    assert sum(p.num_tokens for p in slices) == min(num_tokens, len(slices) * longest)
    ends = [p.first_position + p.num_tokens for p in slices]
    assert ends[0] == longest and max(ends) == longest
    for piece, end in zip(slices, ends, strict=True):
        assert piece.num_tokens >= 1 and piece.first_position >= 0
        assert len(piece.chunk_ids) == -(-end // 64) and max(piece.chunk_ids) < PROFILE_CHUNKS


def answers(core: EngineCore, count: int = 6) -> dict[str, list[int]]:
    """Tokens of some requests, or a code in place of them, once all have ended."""
    found: dict[str, list[int]] = {}
    for index in range(count):
        sampling = SamplingParams(max_tokens=5, seed=index, temperature=0.8, ignore_eos=True)
        prompt = [7] * 70 + [index] * 20
        core.add(EngineRequest(request_id=f"r{index}", prompt_token_ids=prompt, sampling=sampling))
    while core.has_work():
        for delta in core.step():
            if delta.error is not None:
                found[delta.request_id] = [-1]
                assert delta.error.code == "out_of_memory"
            for choice in delta.choices:
                found.setdefault(delta.request_id, []).extend(choice.token_ids)
    return found


def test_steps_that_do_not_fit_are_made_smaller(
    on_gpu: Callable[..., EngineCore],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = answers(on_gpu())
    failed = []
    run = StepModel.run

    def run_or_fail(self: StepModel, output: SchedulerOutput, *rest: Any) -> torch.Tensor:
        if output.num_tokens > 30:
            failed.append(output.num_tokens)
            _run_out()
        return run(self, output, *rest)

    core = on_gpu()
    monkeypatch.setattr(StepModel, "run", run_or_fail)
    assert answers(core) == expected
    assert failed and core.stats().preemptions_total > 0
    assert "did not fit: CUDA out of memory. Tried to allocate 2.00 GiB." in caplog.text
    assert "And so on" not in caplog.text
    core.check_idle()
    assert core.stats().invariant_violations == 0


def test_a_request_that_never_fits_ends_alone(
    on_gpu: Callable[..., EngineCore], monkeypatch: pytest.MonkeyPatch
) -> None:
    core = on_gpu()
    run = StepModel.run

    def run_or_fail(self: StepModel, output: SchedulerOutput, *rest: Any) -> torch.Tensor:
        if any(3 in piece.token_ids for piece in output.slices):
            _run_out()
        return run(self, output, *rest)

    monkeypatch.setattr(StepModel, "run", run_or_fail)
    found = answers(core)
    assert [name for name, tokens in found.items() if tokens == [-1]] == ["r3"]
    assert all(len(tokens) == 5 for name, tokens in found.items() if name != "r3")


def test_on_a_cpu_an_engine_is_ready_once_its_pool_has_memory(
    tiny_core: Callable[..., EngineCore], monkeypatch: pytest.MonkeyPatch
) -> None:
    committed = []
    commit = PoolCommitter._commit

    def commit_late(self: PoolCommitter, target: int) -> None:
        time.sleep(0.2)
        commit(self, target)
        committed.append(target)

    monkeypatch.setattr(PoolCommitter, "_commit", commit_late)
    tiny_core(num_chunks=64)
    assert committed
