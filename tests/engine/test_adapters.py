"""Requests with adapters get the tokens and logits of a model with the adapter's weights added."""

from __future__ import annotations

import contextlib
import json
import math
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import ATTENTION, linear_shapes, write_adapter
from model_families import random_model
from safetensors.torch import load_file

from chunkllama.adapter_messages import LoadAdapter, UnloadAdapter
from chunkllama.engine.core import EngineCore
from chunkllama.errors import InvalidRequestError
from chunkllama.messages import CommandReply, EngineRequest, TokenLogprob
from chunkllama.sampling_params import SamplingParams

MakeCore = Callable[..., EngineCore]
CLOSE = 1e-4  # log-probabilities in fp32
INVOCATION = [290, 7, 291]


@contextlib.contextmanager
def adapted(model: torch.nn.Module, folder: Path | None, start: int) -> Iterator[None]:
    """The model with scale * B (A x) added to each adapted module's output from ``start`` on."""
    hooks = []
    if folder is not None:
        config = json.loads((folder / "adapter_config.json").read_text())
        weights = load_file(folder / "adapter_model.safetensors")
        for name, a in weights.items():
            if "lora_A" not in name:
                continue
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = weights[name.replace("lora_A", "lora_B")]
            rank, alpha = config["r"], config["lora_alpha"]
            for pattern, value in config["rank_pattern"].items():
                rank = value if re.fullmatch(rf"(.*\.)?({pattern})", module) else rank
            for pattern, value in config["alpha_pattern"].items():
                alpha = value if re.fullmatch(rf"(.*\.)?({pattern})", module) else alpha
            scale = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)

            def add(
                _: Any, inputs: Any, output: Any, a: Any = a, b: Any = b, scale: float = scale
            ) -> Any:
                added = scale * (inputs[0] @ a.T) @ b.T
                added[:, :start] = 0
                return output + added

            hooks.append(model.get_submodule(module).register_forward_hook(add))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class Asked:
    """One request and what came of it."""

    adapter: str
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    cached: int = -1


class Driver:
    """An engine with adapters, driven by hand."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self._requests: dict[str, Asked] = {}
        self._count = 0

    def command(self, command: Any) -> CommandReply:
        self._count += 1
        command.command_id = self._count
        if isinstance(command, UnloadAdapter):
            return self.core.unload_adapter(command)
        reply = self.core.load_adapter(command)
        while reply is None:
            self.step()
            reply = next(iter(self.core.adapter_replies()), None)
        return reply

    def load(self, name: str, folder: Path) -> None:
        reply = self.command(LoadAdapter(command_id=0, name=name, folder=str(folder)))
        assert not reply.error, reply.error

    def ask(self, adapter: str, prompt: list[int], max_tokens: int = 6, **fields: Any) -> Asked:
        self._count += 1
        sampling = SamplingParams(
            temperature=0.0, seed=1, ignore_eos=True, max_tokens=max_tokens, logprobs=5
        )
        request = EngineRequest(
            request_id=f"r{self._count}",
            prompt_token_ids=prompt,
            sampling=sampling,
            adapter=adapter,
            **fields,
        )
        asked = self._requests[request.request_id] = Asked(adapter, prompt)
        self.core.add(request)
        return asked

    def step(self) -> None:
        for delta in self.core.step():
            assert delta.error is None, delta.error
            asked = self._requests[delta.request_id]
            asked.cached = delta.num_cached_tokens
            for choice in delta.choices:
                asked.tokens += choice.token_ids
                asked.logprobs += choice.logprobs or []

    def finish(self) -> None:
        while self.core.has_work():
            self.step()
            self.core._scheduler.check_invariants()
        self.core.check_idle()
        assert self.core.stats().invariant_violations == 0


def check(model: torch.nn.Module, asked: Asked, folder: Path | None, start: int = 0) -> None:
    """Every log-probability that the engine gave is the oracle's."""
    ids = torch.tensor([asked.prompt + asked.tokens[:-1]])
    with adapted(model, folder, start), torch.inference_mode():
        logits = model(ids, logits_to_keep=len(asked.tokens)).logits[0]
    expected = logits.float().log_softmax(dim=1)
    assert len(asked.logprobs) == len(asked.tokens) > 0
    for row, entry in zip(expected, asked.logprobs, strict=True):
        for token, logprob in [(entry.token_id, entry.logprob), *entry.top]:
            assert abs(float(row[token]) - logprob) < CLOSE, (token, float(row[token]), logprob)


def prompt_of(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 280, (length,), generator=generator).tolist()


@pytest.fixture
def tiny(tiny_model: tuple[Path, torch.nn.Module]) -> tuple[Path, torch.nn.Module]:
    return tiny_model


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 16},
        {"targets": ATTENTION, "rank": 20, "target_modules": r".*\.self_attn\.[qkvo]_proj"},
        {
            "targets": ("k_proj", "gate_proj", "down_proj"),
            "ranks": {"gate_proj": 128, "down_proj": 1},
            "rank_pattern": {"gate_proj": 128, r"layers\.\d\.mlp\.down_proj": 1},
            "alpha_pattern": {"k_proj": 24.5},
        },
    ],
    ids=["plain", "rslora", "attention", "patterns"],
)
def test_logits_are_those_of_the_model_with_the_adapter_added(
    tiny: tuple[Path, torch.nn.Module],
    tiny_core: MakeCore,
    tmp_path: Path,
    backend: str,
    config: dict[str, Any],
) -> None:
    folder = write_adapter(tmp_path / "a", tiny[0], **config)
    driver = Driver(tiny_core(backend=backend, num_chunks=32))
    driver.load("a", folder)
    with_adapter = driver.ask("a", prompt_of(1, 70))
    driver.finish()
    without = driver.ask("", prompt_of(1, 70))
    driver.finish()
    check(tiny[1], with_adapter, folder)
    check(tiny[1], without, None)
    assert without.cached == 0  # nothing of the adapter's K/V is the base model's


def test_eight_adapters_and_the_base_model_in_one_batch(
    tiny: tuple[Path, torch.nn.Module], tiny_core: MakeCore, tmp_path: Path
) -> None:
    driver = Driver(tiny_core(num_chunks=64, max_num_batched_tokens=200))
    folders: dict[str, Path | None] = {"": None}
    for i in range(8):
        name = f"a{i}"
        folders[name] = write_adapter(tmp_path / name, tiny[0], seed=i, rank=1 + 5 * i)
        driver.load(name, folders[name])
    shared = prompt_of(2, 130)
    asked = [
        driver.ask(name, [*shared, *prompt_of(50 + i + 10 * n, 5)], 8)
        for n in range(2)
        for i, name in enumerate(folders)
    ]
    driver.finish()
    for each in asked:
        check(tiny[1], each, folders[each.adapter])
    # the second request of each adapter shares the first one's prompt
    assert sum(each.cached >= 128 for each in asked) >= 9


def test_eight_tenants_with_activated_adapters_compute_one_system_prompt_once(
    tiny: tuple[Path, torch.nn.Module], tiny_core: MakeCore, tmp_path: Path
) -> None:
    core = tiny_core(num_chunks=64, max_num_batched_tokens=2048)
    driver = Driver(core)
    folders = {}
    for i in range(8):
        folders[f"a{i}"] = write_adapter(
            tmp_path / str(i), tiny[0], seed=i, alora_invocation_tokens=INVOCATION
        )
        driver.load(f"a{i}", folders[f"a{i}"])
    system = prompt_of(3, 1024)
    driver.ask("", system, 1)  # public, as a prefix that the operator registers
    asked = [
        driver.ask(name, [*system, *prompt_of(i, 3), *INVOCATION, 9], namespace=f"tenant{i}")
        for i, name in enumerate(folders)
    ]
    driver.finish()
    for each in asked:
        assert each.cached == 1024
        check(tiny[1], each, folders[each.adapter], 1027)
    assert core.stats().prefill_tokens_computed_total == 1024 + 8 * 7


def test_an_activated_adapter_begins_at_the_last_invocation_and_copies_up_to_it(
    tiny: tuple[Path, torch.nn.Module], tiny_core: MakeCore, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "a", tiny[0], alora_invocation_tokens=INVOCATION)
    driver = Driver(tiny_core(num_chunks=32))
    driver.load("a", folder)
    start = prompt_of(4, 100)
    base = driver.ask("", [*start, *INVOCATION, 4])
    driver.finish()
    twice = driver.ask("a", [*start[:40], *INVOCATION, *start[:17], *INVOCATION, 5])
    once = driver.ask("a", [*start, *INVOCATION, 4])
    never = driver.ask("a", [*start, 8])
    driver.finish()
    assert once.cached == 100  # 64 shared, 36 copied: not those under the adapter
    assert twice.cached == 40
    assert never.cached == 100
    again = driver.ask("a", [*start, *INVOCATION, 4])
    driver.finish()
    assert again.cached == 103
    check(tiny[1], base, None)
    check(tiny[1], once, folder, 100)
    check(tiny[1], again, folder, 100)
    check(tiny[1], twice, folder, 60)
    check(tiny[1], never, None)


def test_no_adapter_reads_what_another_one_or_the_base_model_computed(
    tiny: tuple[Path, torch.nn.Module], tiny_core: MakeCore, tmp_path: Path
) -> None:
    driver = Driver(tiny_core(num_chunks=64))
    folders: dict[str, Path | None] = {"": None}
    for i in range(3):
        folders[f"a{i}"] = write_adapter(tmp_path / str(i), tiny[0], seed=i)
        driver.load(f"a{i}", folders[f"a{i}"])
    prompt = prompt_of(5, 140)
    for name in folders:
        asked = driver.ask(name, prompt)
        driver.finish()
        assert asked.cached == 0
        check(tiny[1], asked, folders[name])
    for name in folders:
        asked = driver.ask(name, prompt)
        driver.finish()
        assert asked.cached == 139
        check(tiny[1], asked, folders[name])


def test_an_unloaded_adapter_leaves_nothing_for_the_next_one_of_its_name(
    tiny: tuple[Path, torch.nn.Module], tiny_core: MakeCore, tmp_path: Path
) -> None:
    core = tiny_core(num_chunks=64)
    driver = Driver(core)
    first = write_adapter(tmp_path / "1", tiny[0], seed=1)
    second = write_adapter(tmp_path / "2", tiny[0], seed=2)
    driver.load("a", first)
    prompt = prompt_of(6, 140)
    driver.ask("a", prompt, pin_seconds=60.0)
    busy = driver.command(UnloadAdapter(command_id=0, name="a"))
    assert "used by 1 requests" in busy.error
    driver.finish()
    reply = driver.command(UnloadAdapter(command_id=0, name="a"))
    assert reply.found and not reply.error and reply.num_dropped == 3
    (pin,) = reply.ended_pins
    assert (pin.askers, pin.token_ids[:140]) == ([(140, "a")], prompt)
    assert core.stats().chunks_cached == 0
    with pytest.raises(InvalidRequestError, match="'a' is not loaded"):
        driver.ask("a", prompt)
    driver.load("a", second)
    asked = driver.ask("a", prompt)
    driver.finish()
    assert asked.cached == 0
    check(tiny[1], asked, second)
    assert not driver.command(UnloadAdapter(command_id=0, name="b")).found


def test_weights_beyond_the_memory_are_read_again_when_they_are_needed(
    tiny: tuple[Path, torch.nn.Module], tiny_core: MakeCore, tmp_path: Path
) -> None:
    folders = [write_adapter(tmp_path / str(i), tiny[0], seed=i) for i in range(3)]
    probe = Driver(tiny_core(num_chunks=16))
    probe.load("a", folders[0])
    size = probe.core._adapters.bytes_in_memory  # type: ignore[union-attr]
    core = tiny_core(num_chunks=64, adapter_memory=2 * size)
    driver = Driver(core)
    for i, folder in enumerate(folders):
        driver.load(f"a{i}", folder)
    asked = [driver.ask(f"a{i % 3}", prompt_of(i, 20), 4) for i in range(9)]
    driver.finish()
    assert core._adapters.bytes_in_memory <= 2 * size  # type: ignore[union-attr]
    for each in asked:
        check(tiny[1], each, folders[int(each.adapter[1])])
    small = Driver(tiny_core(num_chunks=16, adapter_memory=size - 1))
    reply = small.command(LoadAdapter(command_id=0, name="a", folder=str(folders[0])))
    assert "raise adapter_memory" in reply.error


def test_a_backlog_of_one_tenant_lets_another_ones_adapter_in(
    tiny: tuple[Path, torch.nn.Module], tiny_core: MakeCore, tmp_path: Path
) -> None:
    """There is memory for one adapter, and one tenant has queued far more than can run."""
    folders = [write_adapter(tmp_path / str(i), tiny[0], seed=i) for i in range(2)]
    probe = Driver(tiny_core(num_chunks=16))
    probe.load("a", folders[0])
    size = probe.core._adapters.bytes_in_memory  # type: ignore[union-attr]
    driver = Driver(tiny_core(num_chunks=64, adapter_memory=size, max_num_seqs=4))
    driver.load("a0", folders[0])
    driver.load("a1", folders[1])
    backlog = [driver.ask("a0", prompt_of(i, 20), 4, tenant="greedy") for i in range(40)]
    driver.step()
    others = [driver.ask("a1", prompt_of(50 + i, 20), 4, tenant="other") for i in range(3)]
    while not all(len(each.tokens) == 4 for each in others):
        driver.step()
    assert sum(bool(each.tokens) for each in backlog) <= 20, "16 and those that ran"
    driver.finish()
    for each in (*backlog, *others):
        assert len(each.tokens) == 4
        check(tiny[1], each, folders[int(each.adapter[1])])


@pytest.mark.parametrize("family", ["Phi3", "Ernie4_5", "Qwen3", "Gemma2", "Arcee", "SmolLM3"])
def test_architectures_with_fused_reordered_or_other_layers(
    family: str, tiny_core: MakeCore, tmp_path: Path
) -> None:
    """Fused modules, heads in another order, norms of q and k, an MLP without a gate."""
    model = random_model(family, {})
    model.save_pretrained(tmp_path / "model")
    names = {name.rpartition(".")[2] for name in linear_shapes(tmp_path / "model")}
    folder = write_adapter(tmp_path / "a", tmp_path / "model", targets=tuple(names), size=0.5)
    driver = Driver(tiny_core(model=str(tmp_path / "model"), num_chunks=16))
    driver.load("a", folder)
    asked = [driver.ask(name, [3, 5, *range(20, 90)]) for name in ("a", "")]
    driver.finish()
    check(model, asked[0], folder)
    check(model, asked[1], None)


def test_other_requests_run_while_an_adapter_is_read(
    tiny: tuple[Path, torch.nn.Module], tiny_core: MakeCore, tmp_path: Path
) -> None:
    first, second = (write_adapter(tmp_path / str(i), tiny[0], seed=i) for i in range(2))
    core = tiny_core(num_chunks=32)
    driver = Driver(core)
    driver.load("a", first)
    adapters = core._adapters
    assert adapters is not None
    adapters._evict(adapters._adapters["a"])
    loader, gate = adapters._loader, threading.Event()
    read = loader.load_adapter

    def slow(file: Any) -> Any:
        gate.wait()
        return read(file)

    loader.load_adapter = slow  # type: ignore[method-assign]
    waiting = driver.ask("a", prompt_of(1, 70))
    core.load_adapter(LoadAdapter(command_id=9, name="b", folder=str(second)))
    running = driver.ask("", prompt_of(2, 70))
    while len(running.tokens) < 6:
        driver.step()
    assert not waiting.tokens and not core.adapter_replies()
    gate.set()
    while not (replies := core.adapter_replies()):
        driver.step()
    driver.finish()
    check(tiny[1], running, None)
    check(tiny[1], waiting, first)
    (reply,) = replies
    assert reply.adapter is not None and reply.adapter.name == "b"


def test_sampled_choices_of_one_request_use_its_adapter(
    tiny: tuple[Path, torch.nn.Module], tiny_core: MakeCore, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "a", tiny[0], alora_invocation_tokens=INVOCATION)
    driver = Driver(tiny_core(num_chunks=64))
    driver.load("a", folder)
    prompt = [*prompt_of(3, 100), *INVOCATION, *INVOCATION, *prompt_of(4, 30)]
    choices = [Asked("a", prompt) for _ in range(3)]
    sampling = SamplingParams(
        n=3, temperature=0.9, seed=1, ignore_eos=True, max_tokens=70, logprobs=2
    )
    driver.core.add(
        EngineRequest(request_id="n", prompt_token_ids=prompt, sampling=sampling, adapter="a")
    )
    while driver.core.has_work():
        for delta in driver.core.step():
            assert delta.error is None
            for choice in delta.choices:
                choices[choice.index].tokens += choice.token_ids
                choices[choice.index].logprobs += choice.logprobs or []
        driver.core._scheduler.check_invariants()
    assert len({tuple(each.tokens) for each in choices}) == 3
    for each in choices:
        assert len(each.tokens) == 70
        check(tiny[1], each, folder, 103)
