"""With ``deterministic`` log-probabilities are equal bit for bit, however a prompt is computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_files import write_adapter
from model_families import random_model

from chunkllama.adapter_messages import LoadAdapter
from chunkllama.cache_messages import KeepSnapshot, WriteSnapshot
from chunkllama.config import EngineConfig
from chunkllama.engine.build import build_engine
from chunkllama.engine.core import EngineCore
from chunkllama.engine.pack_builder import PrefixPrompt, compute_chunks, plan_pack
from chunkllama.engine.size import plan_size
from chunkllama.errors import ConfigError
from chunkllama.messages import EngineRequest
from chunkllama.packs.file import Pack, write_pack
from chunkllama.sampling_params import SamplingParams
from chunkllama.scheduler.memory_pressure import preemption_victim
from chunkllama.scheduler.output import SchedulerOutput

# What a request sees: its tokens, and the log-probability of each and of the best three.
Answer = list[tuple[int, float, list[tuple[int, float]]]]
MakeCore = Callable[..., EngineCore]
MAX_TOKENS = 4


def tokens(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 300, count).tolist()


# 12 prompts behind 600 shared tokens, 6 behind 70, and 6 of 1 to 300 tokens of their own.
PROMPTS = (
    [tokens(1, 600) + tokens(10 + i, 5 + 7 * i) for i in range(12)]
    + [tokens(2, 70) + tokens(30 + i, 1 + 40 * i) for i in range(6)]
    + [tokens(40 + i, 1 + 60 * i) for i in range(6)]
)


def request(index: int, max_tokens: int = MAX_TOKENS, adapter: str = "") -> EngineRequest:
    """Every third is sampled, with top-p; the rest is greedy."""
    sampling = SamplingParams(
        max_tokens=max_tokens,
        temperature=0.0 if index % 3 else 0.9,
        top_p=1.0 if index % 3 else 0.95,
        seed=index,
        ignore_eos=True,
        logprobs=3,
    )
    return EngineRequest(
        request_id=str(index),
        prompt_token_ids=PROMPTS[index],
        sampling=sampling,
        adapter=adapter,
    )


class Answers:
    """What requests have seen, by their index."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self.seen: dict[int, Answer] = {}
        self.cached: dict[int, int] = {}

    def run(self, *requests: EngineRequest, apart: int = 0) -> dict[int, Answer]:
        """Add requests, ``apart`` steps between two; returns their answers."""
        for each in requests:
            self.seen[int(each.request_id)] = []
            self.core.add(each)
            for _ in range(apart):
                self._step()
        while self.core.has_work():
            self._step()
        self.core.check_idle()
        assert self.core.stats().invariant_violations == 0
        return {int(each.request_id): self.seen[int(each.request_id)] for each in requests}

    def _step(self) -> None:
        for delta in self.core.step():
            assert delta.error is None, delta.error
            index = int(delta.request_id)
            self.cached[index] = delta.num_cached_tokens
            for choice in delta.choices:
                for token, entry in zip(choice.token_ids, choice.logprobs or (), strict=True):
                    self.seen[index].append((token, entry.logprob, entry.top))
        self.core.move_chunks()


def alone(make: MakeCore, indexes: list[int], **settings: Any) -> dict[int, Answer]:
    """Each request with an empty cache, in a step of its own."""
    settings = {"num_chunks": 64, "enable_prefix_caching": False, "deterministic": True, **settings}
    core = make(**settings)
    return {i: Answers(core).run(request(i))[i] for i in indexes}


KINDS = {
    "bf16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "kv_dtype": "int8", "quantization": "int8"},
    "fp32, two threads": {"dtype": "float32", "threads": 2},
    "int4": {"dtype": "bfloat16", "quantization": "int4"},
}


@pytest.mark.parametrize(
    "name",
    ["bf16", "int8", *(pytest.param(name, marks=pytest.mark.nightly) for name in [*KINDS][2:])],
)
def test_cold_and_warm_alone_and_among_24(tiny_core: MakeCore, name: str) -> None:
    kind = KINDS[name]
    expected = alone(tiny_core, list(range(24)), **kind)
    core = tiny_core(num_chunks=256, max_num_batched_tokens=192, deterministic=True, **kind)
    answers = Answers(core)
    everything = [request(i) for i in range(24)]
    assert answers.run(*everything) == expected, "together, cold"
    assert answers.run(*everything[::-1]) == expected, "together, warm"
    assert answers.cached[3] >= 600
    for i in (0, 5, 13, 20):
        assert answers.run(request(i))[i] == expected[i], "alone, warm"


def test_without_the_setting_they_differ(tiny_core: MakeCore) -> None:
    """So that the tests here can fail."""
    expected = alone(tiny_core, list(range(24)), dtype="bfloat16", deterministic=False)
    core = tiny_core(num_chunks=256, dtype="bfloat16")
    found = Answers(core).run(*(request(i) for i in range(24)))
    assert sum(found[i] == expected[i] for i in range(24)) < 12


@pytest.mark.parametrize("step_tokens", [16, 512])
def test_prompts_in_slices_beside_decodes(tiny_core: MakeCore, step_tokens: int) -> None:
    expected = alone(tiny_core, [0, 1, 2, 14, 23])
    core = tiny_core(
        num_chunks=64, max_num_batched_tokens=step_tokens, max_num_seqs=8, deterministic=True
    )
    found = Answers(core).run(*(request(i) for i in (0, 23, 1, 14, 2)), apart=2)
    assert found == expected


def test_preempted_sequences_go_on_with_the_same_numbers(tiny_core: MakeCore) -> None:
    chosen = [0, 1, 2, 12, 13]
    core = tiny_core(num_chunks=64, deterministic=True)
    expected = {i: Answers(core).run(request(i, 30))[i] for i in chosen}
    core = tiny_core(num_chunks=64, deterministic=True)

    def requeue(step: SchedulerOutput, _: float) -> None:
        """The newest sequence after every fifth step, as if the pool were full."""
        victim = preemption_victim(core._scheduler._running)
        if victim is not None and step.step % 5 == 4:
            core._scheduler._lifecycle.preempt(victim)

    core.on_step = requeue
    assert Answers(core).run(*(request(i, 30) for i in chosen)) == expected
    assert core.stats().preemptions_total > 3


def test_speculation_changes_no_number(tiny_core: MakeCore) -> None:
    """A random model repeats itself: guesses from the output are taken."""
    repeating = EngineRequest(
        request_id="0",
        prompt_token_ids=tokens(1, 40) * 4,
        sampling=SamplingParams(
            max_tokens=60, temperature=0.0, ignore_eos=True, seed=0, logprobs=3
        ),
    )
    found = {}
    for speculation in ("off", "auto"):
        core = tiny_core(num_chunks=32, speculation=speculation, deterministic=True)
        found[speculation] = Answers(core).run(repeating)[0]
    assert found["auto"] == found["off"]


def test_a_restart_changes_no_number(tiny_core: MakeCore, tmp_path: Path) -> None:
    settings = {"num_chunks": 128, "dtype": "bfloat16", "deterministic": True}
    keep = KeepSnapshot(
        path=str(tmp_path / "s.ckpack"),
        tenants=[""],
        template="",
        realm="here",
        seconds=0.0,
        max_bytes=1 << 30,
    )
    chosen = [0, 3, 12, 17, 23]
    expected = alone(tiny_core, chosen, dtype="bfloat16")
    first = tiny_core(**settings)
    first.file_command(keep)
    assert Answers(first).run(*(request(i) for i in chosen)) == expected
    first.file_command(WriteSnapshot(command_id=1, seconds=60.0))
    while first.is_moving_chunks():
        first.move_chunks()
    second = tiny_core(**settings)
    second.file_command(keep)
    while second.is_moving_chunks():
        second.move_chunks()
    answers = Answers(second)
    assert answers.run(*(request(i) for i in chosen)) == expected
    assert answers.cached[0] >= 576


def test_what_is_read_from_the_tier_changes_no_number(
    tiny_core: MakeCore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chunkllama.cache.tier_entry import ReadPrice

    monkeypatch.setattr(ReadPrice, "is_lower", lambda self, num_chunks, seconds: True)
    expected = alone(tiny_core, [0, 1, 12, 23])
    core = tiny_core(num_chunks=16, cache_tier_dir=tmp_path, deterministic=True)
    answers = Answers(core)
    for _ in range(2):
        for i in (0, 12, 23, 1):
            assert answers.run(request(i))[i] == expected[i]
    assert core.stats().tier_chunks_promoted_total > 0


def test_prompt_log_probabilities_and_embeddings_do_not_depend_on_slices(
    tiny_core: MakeCore,
) -> None:
    def scored(**settings: Any) -> tuple[list[float], list[float]]:
        core = tiny_core(num_chunks=64, max_num_seqs=8, deterministic=True, **settings)
        sampling = SamplingParams(max_tokens=1, temperature=0.0, seed=0, prompt_logprobs=0)
        core.add(EngineRequest(request_id="s", prompt_token_ids=PROMPTS[0], sampling=sampling))
        core.add(
            EngineRequest(
                request_id="e",
                prompt_token_ids=PROMPTS[1],
                sampling=SamplingParams(max_tokens=1, seed=0),
                wants_hidden_states=True,
            )
        )
        entries, embedding = [], []
        while core.has_work():
            for delta in core.step():
                entries += [entry.logprob for entry in delta.prompt_logprobs or () if entry]
                embedding = delta.embedding or embedding
        return entries, embedding

    one = scored(max_num_batched_tokens=2048, max_scored_tokens=2048)
    assert one == scored(max_num_batched_tokens=50, max_scored_tokens=13)
    assert len(one[0]) == len(PROMPTS[0]) - 1 and len(one[1]) == 128


# Windows, soft caps of scores and logits, GELU, norms of each head: op by op.
FAMILIES = {
    "gemma2": (
        "Gemma2",
        {"sliding_window": 100, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
    ),
    "olmo2": ("Olmo2", {"attention_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 100}),
}


@pytest.mark.parametrize(
    "name", ["gemma2", *(pytest.param(n, marks=pytest.mark.nightly) for n in [*FAMILIES][1:])]
)
def test_models_that_run_op_by_op(name: str, tiny_core: MakeCore, tmp_path: Path) -> None:
    family, changes = FAMILIES[name]
    sizes = {"vocab_size": 300, "max_position_embeddings": 1024}
    random_model(family, {**changes, **sizes}).save_pretrained(tmp_path)
    chosen = [0, 1, 12, 20]
    settings = {"model": str(tmp_path), "deterministic": True}
    expected = alone(tiny_core, chosen, **settings)
    core = tiny_core(num_chunks=96, max_num_batched_tokens=130, **settings)
    answers = Answers(core)
    for _ in range(2):
        assert answers.run(*(request(i) for i in chosen)) == expected
    if name == "gemma2":
        folder = tmp_path / "adapter"
        write_adapter(folder, tmp_path)
        reply = load_adapter(core, folder)
        assert reply == "deterministic: Gemma2ForCausalLM takes no adapters with it; leave it out"


def load_adapter(core: EngineCore, folder: Path) -> str:
    """Load an adapter "a"; returns why it was refused."""
    refused = core.load_adapter(LoadAdapter(command_id=1, name="a", folder=str(folder)))
    replies = [] if refused is None else [refused]
    while not replies:
        core.step()
        replies = core.adapter_replies()
    return replies[0].error


def test_rows_of_adapters(tiny_core: MakeCore, tiny_model: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path, tiny_model[0])
    settings = {"deterministic": True, "dtype": "bfloat16"}
    chosen = [0, 1, 2, 3, 12, 13, 20]

    def requests() -> list[EngineRequest]:
        return [request(i, adapter="a" if i % 2 else "") for i in chosen]

    core = tiny_core(num_chunks=64, enable_prefix_caching=False, **settings)
    assert load_adapter(core, tmp_path) == ""
    expected: dict[int, Answer] = {}
    for each in requests():
        expected |= Answers(core).run(each)
    core = tiny_core(num_chunks=96, max_num_batched_tokens=150, **settings)
    assert load_adapter(core, tmp_path) == ""
    answers = Answers(core)
    assert answers.run(*requests()) == expected
    assert answers.run(*requests()) == expected


def test_a_pack_of_other_arithmetic_is_refused_by_name(tiny_core: MakeCore, tmp_path: Path) -> None:
    cores = {is_on: tiny_core(num_chunks=16, deterministic=is_on) for is_on in (False, True)}
    refusals = {}
    for is_on, core in cores.items():
        path = tmp_path / f"{is_on}.ckpack"
        prompt = PrefixPrompt("p", "", tokens(4, 200))
        planned, ordered = plan_pack([prompt], core.packs.io.identify(), "t")
        write_pack(path, planned, compute_chunks(core, planned, ordered))
        with Pack(path) as pack:
            for other in cores:
                refusals[is_on, other] = cores[other].packs.io.refusal(pack, "t", b"")
    arithmetic = cores[True].packs.io.identify().arithmetic
    assert arithmetic.startswith(f"{cores[True].info.isa_level}-")
    assert refusals.pop((False, True)) == (
        "it has K/V of a server that is not deterministic, and this server is deterministic with "
        f"{arithmetic}"
    )
    assert set(refusals.values()) == {""}
    assert [cores[is_on].info.is_deterministic for is_on in (False, True)] == [False, True]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"backend": "reference"}, "not available with the reference backend"),
        ({"chunk_size": 32}, "chunk_size: 32 is not one of 64"),
        ({"tensor_parallel_size": 2}, "use --tp 1"),
    ],
    ids=["reference", "chunk size", "ranks"],
)
def test_what_cannot_be_deterministic_is_refused(
    tiny_model: Any, settings: dict[str, Any], reason: str
) -> None:
    config = EngineConfig.from_flat(
        model=str(tiny_model[0]), device="cpu", num_chunks=8, deterministic=True, **settings
    )
    with pytest.raises(ConfigError, match=reason) as error:
        build_engine(config).close()
    assert "\n" not in str(error.value)


def test_a_gpu_and_transformers_are_refused(tiny_model: Any) -> None:
    from dataclasses import replace

    from chunkllama.backends.choice import check_choice
    from chunkllama.models.config import read_spec

    with pytest.raises(ConfigError, match=r"^deterministic: not available on device cuda:0"):
        check_choice(device="cuda:0", backend="auto", isa_level="auto", deterministic=True)
    folder = tiny_model[0]
    config = EngineConfig.from_flat(
        model=str(folder), device="cpu", num_chunks=8, deterministic=True
    )
    foreign = replace(read_spec(folder), is_native=False, architecture="OddForCausalLM")
    with pytest.raises(ConfigError, match=r"^deterministic: transformers runs OddForCausalLM"):
        plan_size(config, folder, foreign)


@pytest.mark.parametrize("count", [2, 5, 24, 33])
def test_log_softmax_of_a_row_is_that_of_the_row_alone(
    rng: np.random.Generator, count: int
) -> None:
    """torch's, on which log-probabilities depend."""
    for size in (300, 1003, 49152):
        logits = torch.from_numpy(rng.normal(0, 5, (count, size)).astype(np.float32))
        together = logits.log_softmax(dim=1)
        for row in range(count):
            assert torch.equal(logits[row : row + 1].log_softmax(dim=1)[0], together[row])
