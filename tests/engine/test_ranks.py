"""A model over several ranks: the same numbers as on one, and what happens when a rank ends."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from model_families import SMALL, random_model
from tiny_model import write_tokenizer

from chunkllama import LLM, SamplingParams
from chunkllama.cache.tier_entry import ReadPrice
from chunkllama.config import EngineConfig
from chunkllama.engine.core import EngineCore
from chunkllama.engine.rank_checks import check_ranks, rank_device
from chunkllama.engine.rank_group import RankGroup
from chunkllama.engine.ranks import RunStep
from chunkllama.engine.size import EngineSize, _gpu_pool_memory, plan_size
from chunkllama.errors import ConfigError, EngineDeadError
from chunkllama.model_spec import LayerSpec, ModelSpec
from chunkllama.scheduler.memory_pressure import preemption_victim
from chunkllama.scheduler.output import ScheduledSlice, SchedulerOutput

CHUNK = 64
NEAR = 4e-5
TEXT = np.random.default_rng(4).integers(3, 300, 4 * CHUNK).tolist()
# Each begins like TEXT and leaves it inside a chunk, at its end, or not at all.
PROMPTS = [[*TEXT[:cut], 7, cut] for cut in (20, 100, 128, 129, 200, 256)]


def ranks_of(process: psutil.Process) -> list[psutil.Process]:
    """The processes of the other ranks that run."""
    return [
        child
        for child in process.children(recursive=True)
        if "chunkllama.engine.rank_process" in child.cmdline()
    ]


@pytest.fixture(scope="module")
def folder(tiny_model: tuple[Path, torch.nn.Module]) -> Path:
    """The tiny model with a tokenizer, which ``LLM`` reads."""
    write_tokenizer(tiny_model[0])
    return tiny_model[0]


@pytest.fixture(scope="module")
def make_llm(folder: Path) -> Iterator[Callable[..., LLM]]:
    made: list[LLM] = []

    def make(**settings: Any) -> LLM:
        given = {"dtype": "float32", "device": "cpu", "num_chunks": 12, "tensor_parallel_size": 2}
        given["threads"] = settings.get("tensor_parallel_size", 2)  # one each
        given |= {"max_step_seconds": 0, "max_num_batched_tokens": 512}  # no time cuts a step
        made.append(LLM(str(folder), **{**given, **settings}))
        return made[-1]

    yield make
    for llm in made:
        llm.close()
    assert not ranks_of(psutil.Process())


@pytest.fixture(scope="module")
def split(make_llm: Callable[..., LLM]) -> LLM:
    """The tiny model on two ranks."""
    return make_llm()


GREEDY = {"temperature": 0.0, "ignore_eos": True}
SAMPLED = {"temperature": 0.8, "top_p": 0.95, "ignore_eos": True}


def ask(llm: LLM, prompts: list[list[int]], **fields: Any) -> list[Any]:
    params = SamplingParams(**{**GREEDY, "max_tokens": 40, "logprobs": 0, "seed": 9, **fields})
    return llm.generate(prompts, params, use_progress_bar=False)


def check_logprobs(model: torch.nn.Module, output: Any) -> None:
    """Log-probabilities of prompt and answer are those of transformers."""
    answer = output.outputs[0]
    ids = torch.tensor([output.prompt_token_ids + answer.token_ids])
    with torch.inference_mode():
        logits = model(ids).logits[0, :-1].float()
    expected = logits.log_softmax(dim=1).gather(1, ids[0, 1:, None])[:, 0].numpy()
    found = [entry.logprob for entry in (*output.prompt_logprobs[1:], *answer.logprobs)]
    assert np.abs(np.array(found) - expected).max() < NEAR
    start = len(output.prompt_token_ids) - 1
    assert logits[start:].argmax(dim=1).tolist() == answer.token_ids


def disturb(core: EngineCore, copies: list[tuple[int, int, int]]) -> Callable[..., None]:
    """Requeue the newest sequence after every ninth step, as if the pool were full."""

    def on_step(step: SchedulerOutput, _: float) -> None:
        copies.extend(step.copies)
        victim = preemption_victim(core._scheduler._running)
        if victim is not None and core.stats().steps_total % 9 == 8:
            core._scheduler._lifecycle.preempt(victim)

    return on_step


def test_two_ranks_answer_as_one_and_as_transformers(split, make_llm, tiny_model) -> None:
    """With prefix hits, copies inside a chunk, grouped heads and preemption."""
    one = make_llm(tensor_parallel_size=1)
    copies: list[tuple[int, int, int]] = []
    for llm in (one, split):
        llm._core.on_step = disturb(llm._core, copies)
    for output in ask(split, PROMPTS[:3], prompt_logprobs=0, max_tokens=6):
        check_logprobs(tiny_model[1], output)
    for prompts, fields in ((PROMPTS, GREEDY), (PROMPTS, SAMPLED), (PROMPTS[::-1], GREEDY)):
        expected, found = ask(one, prompts, **fields), ask(split, prompts, **fields)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.outputs[0].token_ids == theirs.outputs[0].token_ids
            logprobs = [[e.logprob for e in x.outputs[0].logprobs] for x in (ours, theirs)]
            assert np.abs(np.subtract(*logprobs)).max() < NEAR
    stats = split._core.stats()
    assert copies and stats.preemptions_total
    assert stats.invariant_violations == 0
    assert max(x.num_cached_tokens for x in found) >= 3 * CHUNK


def test_chunks_are_read_and_written_whole(split, make_llm) -> None:
    """As packs and snapshots do: the pieces of all ranks make up a chunk of one."""
    one = make_llm(tensor_parallel_size=1, num_chunks=8)
    prompt = TEXT[: 2 * CHUNK]
    content = {}
    for llm in (one, split):
        chunk_ids: list[list[int]] = []
        llm._core.on_step = lambda step, _, found=chunk_ids: found.extend(
            piece.chunk_ids[:2].tolist() for piece in step.slices
        )
        ask(llm, [[*prompt, 5]], max_tokens=1)
        chunk_io = llm._core.packs.io
        content[llm] = [bytes(chunk_io.read(chunk_id)) for chunk_id in chunk_ids[-1]]
        assert {len(data) for data in content[llm]} == {chunk_io.chunk_bytes}
    for ours, theirs in zip(content[split], content[one], strict=True):
        difference = np.frombuffer(ours, np.float32) - np.frombuffer(theirs, np.float32)
        assert np.abs(difference).max() < NEAR

    data = content[one][1]
    assert data != content[split][1], "only written, not computed"
    chunk_id = chunk_ids[-1][1]
    chunk_io.write(chunk_id, chunk_io.arrange(bytearray(data), chunk_io.identify()))
    assert bytes(chunk_io.read(chunk_id)) == data


def test_evicted_chunks_of_all_ranks_are_read_from_the_tier(
    make_llm, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(ReadPrice, "is_lower", lambda self, num_chunks, seconds: True)
    llm = make_llm(cache_tier_dir=tmp_path, num_chunks=6)
    prompts = [[*TEXT[start : start + 3 * CHUNK], 5] for start in (0, CHUNK // 2, CHUNK - 1)]
    answers = []
    for prompt in prompts * 2:
        answers += ask(llm, [prompt], max_tokens=4)
        while llm._core.is_moving_chunks():  # what was evicted is written
            llm._core.move_chunks()
    first, again = answers[:3], answers[3:]
    assert [x.outputs[0].token_ids for x in first] == [x.outputs[0].token_ids for x in again]
    for ours, theirs in zip(again, first, strict=True):
        logprobs = [[e.logprob for e in x.outputs[0].logprobs] for x in (ours, theirs)]
        assert np.abs(np.subtract(*logprobs)).max() < NEAR
    stats = llm._core.stats()
    assert stats.tier_chunks_promoted_total >= 3 and stats.tier_chunks_damaged_total == 0
    sizes = {path.stat().st_size for path in tmp_path.glob("*/*.chunk")}
    assert sizes == {llm._core.packs.io.stored_bytes}


def test_ranks_are_reached_from_this_machine_only(split) -> None:
    """And torch's own group and environment are left to the importing program."""
    assert split._core._executor.step_model.num_ranks == 2
    processes = [psutil.Process(), *ranks_of(psutil.Process())]
    addresses = [
        connection.laddr.ip
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(addresses) >= 2 and set(addresses) == {"127.0.0.1"}
    assert not torch.distributed.is_initialized()
    assert "GLOO_SOCKET_IFNAME" not in os.environ


def test_an_adapter_is_refused(split, tmp_path) -> None:
    with pytest.raises(ConfigError, match="adapters need tensor_parallel_size 1"):
        split.load_adapter("a", str(tmp_path))


def test_a_rank_that_ends_fails_the_step(make_llm) -> None:
    before = {process.pid for process in ranks_of(psutil.Process())}
    llm = make_llm()
    (rank,) = [process for process in ranks_of(psutil.Process()) if process.pid not in before]
    ask(llm, [[1, 2, 3]], max_tokens=2)
    os.kill(rank.pid, signal.SIGKILL)
    with pytest.raises(EngineDeadError):
        ask(llm, [[4, 5, 6]], max_tokens=2)
    with pytest.raises(EngineDeadError):
        llm._core.packs.io.read(0)
    assert not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE


class LikeNccl:
    """A group of gloo that loses a rank in one of its sums, and waits for it as NCCL does: until
    the sum is aborted, which then ends without an error.

    Args:
        kill_at: the number of the sum, from 0 on.
    """

    def __init__(self, group: Any, rank: psutil.Process, kill_at: int) -> None:
        self._group, self._rank, self._kill_at = group, rank, kill_at
        self._aborted = threading.Event()
        self.num_sums = 0

    def allreduce(self, tensors: list[torch.Tensor]) -> Any:
        self.num_sums += 1
        if self.num_sums <= self._kill_at:
            return self._group.allreduce(tensors)
        self._rank.kill()
        return SimpleNamespace(wait=self._aborted.wait)

    def abort(self) -> None:
        self._aborted.set()


@pytest.mark.parametrize(
    "kill_at",
    [pytest.param(0, id="first sum", marks=pytest.mark.nightly), pytest.param(3, id="last sum")],
)
def test_a_step_that_waits_for_a_rank_as_nccl_does_is_aborted(
    make_llm, tiny_model, monkeypatch, kill_at: int
) -> None:
    groups: list[RankGroup] = []
    made = RankGroup.__init__
    monkeypatch.setattr(
        RankGroup, "__init__", lambda self, *args: (groups.append(self), made(self, *args))[1]
    )
    before = {process.pid for process in ranks_of(psutil.Process())}
    llm = make_llm()
    assert tiny_model[1].config.num_hidden_layers == 2, "two sums each"
    (rank,) = [process for process in ranks_of(psutil.Process()) if process.pid not in before]
    waits = groups[0]._group = LikeNccl(groups[0]._group, rank, kill_at)
    with pytest.raises(EngineDeadError):
        ask(llm, [[1, 2, 3]], max_tokens=1)
    assert waits.num_sums == kill_at + 1


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("os._exit(3)", r"rank 1 ended while starting \(exit code 3\)"),
        pytest.param(
            "from chunkllama.engine import build\n"
            "    from chunkllama.errors import ConfigError\n"
            "    def load_rank(config, rank): raise ConfigError('no memory')\n"
            "    build.load_rank = load_rank",
            "rank 1: no memory",
            marks=pytest.mark.nightly,
        ),
        (
            "from chunkllama.engine.rank_group import RankGroup\n"
            "    RankGroup.join = lambda *_: os._exit(4)",
            r"rank 1 ended while starting \(exit code 4\)",
        ),
    ],
    ids=["ends", "refuses", "ends before it joins"],
)
def test_a_rank_that_cannot_start_is_one_line(
    make_llm, tmp_path, monkeypatch, statement, message
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        f"import os, sys\nif 'chunkllama.engine.rank_process' in sys.orig_argv:\n    {statement}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    before = len(ranks_of(psutil.Process()))
    with pytest.raises(ConfigError, match=message):
        make_llm()
    assert len(ranks_of(psutil.Process())) == before


SETTINGS = {
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
    "int8 K/V": {"kv_dtype": "int8"},
    "bfloat16": {"dtype": "bfloat16"},
    "reference": {"backend": "reference", "chunk_size": 32},
    "speculation": {"speculation": "auto"},
    "no prefix cache": {"enable_prefix_caching": False},
}


@pytest.mark.nightly
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_work_on_several_ranks(make_llm, name) -> None:
    """Each rank rounds its part as one rank rounds all of it, but for the order of sums; in
    bfloat16 the fused model of one rank rounds activations that the ranks do not."""
    settings = SETTINGS[name]
    one, two = (make_llm(**settings, tensor_parallel_size=n) for n in (1, 2))
    wanted = {"max_tokens": 4, "prompt_logprobs": 0}
    expected, found = ask(one, PROMPTS, **wanted), ask(two, PROMPTS, **wanted)
    for ours, theirs in zip(found, expected, strict=True):
        logprobs = [[e.logprob for e in x.prompt_logprobs[1:]] for x in (ours, theirs)]
        assert np.abs(np.subtract(*logprobs)).mean() < 0.05
        if name != "bfloat16":
            assert ours.outputs[0].token_ids == theirs.outputs[0].token_ids


@pytest.mark.nightly
def test_four_ranks(tmp_path, make_llm) -> None:
    model = random_model("Llama", {"num_attention_heads": 8, "num_key_value_heads": 4})
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    settings = {"dtype": "float32", "device": "cpu", "num_chunks": 32, "threads": 2}
    with LLM(str(tmp_path), tensor_parallel_size=4, **settings) as llm:
        assert len(ranks_of(psutil.Process())) >= 3
        for output in ask(llm, [[5, 6, 7] * 40], prompt_logprobs=0, max_tokens=8):
            check_logprobs(model, output)


# -- without processes ----------------------------------------------------------------------------


def test_a_step_reaches_a_rank_unchanged() -> None:
    ids = np.arange(40, dtype=np.int32)
    slices = [ScheduledSlice(3, 64, ids[:2], ids[7:20:2], 1, True, num_drafts=1)]
    step = SchedulerOutput(5, slices, plan_version=8, copies=[(1, 2, 3)])
    (piece,) = (received := RunStep.of(step).output()).slices
    assert (received.plan_version, received.copies) == (8, [(1, 2, 3)])
    assert (piece.slot, piece.first_position, piece.shared) == (3, 64, 1)
    assert piece.token_ids.tolist() == [0, 1]
    assert piece.chunk_ids.tolist() == [7, 9, 11, 13, 15, 17, 19]


SPEC = ModelSpec(
    num_layers=2,
    hidden_size=SMALL["hidden_size"],
    intermediate_size=96,
    num_qo_heads=12,
    num_kv_heads=6,
    head_dim=16,
    vocab_size=16,
    max_position=64,
)


@pytest.mark.parametrize(
    ("size", "changes", "message"),
    [
        (5, {}, "tensor_parallel_size: 5 does not divide the 12 attention heads; use 3"),
        (4, {}, "tensor_parallel_size: 4 does not divide the 6 key/value heads; use 3"),
        (12, {}, "tensor_parallel_size: 12 does not divide the 6 key/value heads; use 6"),
        (6, {"intermediate_size": 100}, "6 does not divide the 100 columns of the MLP; use 2"),
        (2, {"num_kv_heads": 1}, "2 does not divide the 1 key/value heads; use 1"),
        (2, {"is_native": False}, "transformers runs LlamaForCausalLM, on one rank only; use 1"),
        (2, {"layers": (LayerSpec(qk_norm="all"),)}, "normalises all heads together"),
        (2, {"quantization_method": "awq"}, "the checkpoint's weights are quantized"),
    ],
)
def test_a_model_that_does_not_divide_is_refused(
    size: int, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_ranks(size, replace(SPEC, **changes), [], "cpu")
    check_ranks(1, replace(SPEC, **changes), [], "cpu")


def test_quantized_blocks_of_a_gguf_file_are_refused() -> None:
    matrix = SimpleNamespace(dtype="Q4_0", shape=(32, 32))
    with pytest.raises(ConfigError, match="the checkpoint's weights are quantized"):
        check_ranks(2, SPEC, [matrix], "cpu")


@pytest.mark.parametrize(
    ("device", "gpus", "message"),
    [
        ("cuda:1", 8, "device: cuda:1 is one GPU; use cuda with tensor_parallel_size 2"),
        ("cuda", 1, "tensor_parallel_size: 2 ranks need a GPU each, and the number of GPUs is 1"),
        ("cuda", 2, ""),
    ],
)
def test_each_rank_needs_a_gpu(
    device: str, gpus: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if message:
        with pytest.raises(ConfigError, match=message):
            check_ranks(2, SPEC, [], device)
    else:
        check_ranks(2, SPEC, [], device)


def test_every_rank_has_the_embedding_and_the_head(tiny_model) -> None:
    """The rest of the weights, and the pool, are there once."""

    def plan(num_ranks: int) -> EngineSize:
        settings = {"dtype": "float32", "device": "cpu", "tensor_parallel_size": num_ranks}
        config = EngineConfig.from_flat(model=str(tiny_model[0]), num_chunks=8, **settings)
        return plan_size(config, tiny_model[0])

    one, two = plan(1), plan(2)
    assert two.weight_bytes - one.weight_bytes == 2 * 300 * 128 * 4
    assert two.pool_bytes == one.pool_bytes


def test_the_pool_of_several_gpus_fits_the_fullest(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cuda:0": 100, "cuda:1": 80}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device], 100))
    assert _gpu_pool_memory("cuda", 40, 2, 0.9) == 2 * (80 - 10) - 40


def test_the_device_of_a_rank() -> None:
    assert [rank_device("cuda", rank, 2) for rank in range(2)] == ["cuda:0", "cuda:1"]
    assert rank_device("cpu", 1, 2) == "cpu"
    assert rank_device("cuda", 0, 1) == "cuda"
