"""Provide the demo model in fp32, the same in transformers, and a whole engine to run requests."""

from __future__ import annotations

import copy
import itertools
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from chunkllama.config import EngineConfig
from chunkllama.engine.build import build_engine
from chunkllama.engine.core import EngineCore
from chunkllama.engine.grammar import GrammarCompiler
from chunkllama.engine.supervisor import SupervisedEngineClient
from chunkllama.messages import EngineRequest
from chunkllama.models.loading.hub import resolve_model
from chunkllama.sampling_params import SamplingParams
from chunkllama.text.tokenizer import Tokenizer, load_tokenizer

MakeCore = Callable[..., EngineCore]

TIE = 1e-4  # logits closer than this may swap between two orders of summation


@pytest.fixture(scope="session")
def demo_path() -> Path:
    return resolve_model("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def tokenizer(demo_path: Path) -> Tokenizer:
    return load_tokenizer(demo_path)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    """Compiler of grammars for the demo model, whose end-of-sequence token is 2."""
    return GrammarCompiler(tokenizer.to_json(), 49152, [2])


@pytest.fixture(scope="session")
def transformers_model(demo_path: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(demo_path, dtype=torch.float32).eval()


@dataclass
class Truth:
    """Counts how often an engine's greedy ids agree with another model's argmax, ties apart."""

    model: torch.nn.Module
    checked: int = 0
    ties: list[float] = field(default_factory=list)

    def check(self, prompt: list[int], output: list[int]) -> None:
        """Every output id is the argmax after what stands before it, or within TIE of it."""
        assert output, "no output"
        self._compare(self._logits(prompt + output[:-1], len(output)), output)

    def check_below(self, trunk: list[int], below: list[tuple[int, list[int], list[int]]]) -> None:
        """``check`` for prompts that begin alike: the model computes what they share once.

        Args:
            trunk: the longest common beginning.
            below: of each prompt, how many tokens of the trunk it begins with, those of its own
                after them, and its output.
        """
        from transformers import DynamicCache

        shared, length = DynamicCache(), 0
        for cut, own, output in sorted(below):
            assert output, "no output"
            if cut > length:
                self._logits(trunk[length:cut], 1, past_key_values=shared)
                length = cut
            fork = copy.deepcopy(shared)
            logits = self._logits(own + output[:-1], len(output), past_key_values=fork)
            self._compare(logits, output)

    def _logits(self, ids: list[int], keep: int, **options: object) -> np.ndarray:
        """[keep, vocab_size], the last rows."""
        with torch.inference_mode():
            result = self.model(torch.tensor([ids]), logits_to_keep=keep, **options)
        return result.logits[0].float().numpy()

    def _compare(self, logits: np.ndarray, output: list[int]) -> None:
        chosen = logits[np.arange(len(output)), output]
        gaps = logits.max(axis=1) - chosen
        assert gaps.max() < TIE, f"token {int(gaps.argmax())} is {gaps.max():.5f} below the best"
        self.checked += len(output)
        self.ties.extend(float(gap) for gap in gaps if gap > 0)


def _check_ties(counter: Truth) -> None:
    print(f"\n{counter.checked} tokens checked, {len(counter.ties)} ties (gaps {counter.ties})")
    assert len(counter.ties) <= 0.02 * counter.checked


def _counted(counter: Truth) -> Iterable[Truth]:
    yield counter
    _check_ties(counter)


@pytest.fixture
def truth(transformers_model: torch.nn.Module) -> Iterable[Truth]:
    yield from _counted(Truth(transformers_model))


@pytest.fixture
def truth_of() -> Iterable[Callable[[torch.nn.Module], Truth]]:
    counters: list[Truth] = []

    def make(model: torch.nn.Module) -> Truth:
        counters.append(Truth(model))
        return counters[-1]

    yield make
    for counter in counters:
        _check_ties(counter)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """A random Llama whose logits are far apart: 2 layers, 300 tokens, 4 query heads over 2."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(17)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture
def tiny_truth(tiny_model: tuple[Path, torch.nn.Module]) -> Iterable[Truth]:
    yield from _counted(Truth(tiny_model[1]))


@pytest.fixture
def tiny_core(tiny_model: tuple[Path, torch.nn.Module]) -> Iterable[MakeCore]:
    """Build an engine on the tiny model in fp32 with the backend that a CPU gets by default."""
    cores: list[EngineCore] = []

    def make(**flat: object) -> EngineCore:
        defaults = {"dtype": "float32", "device": "cpu", "threads": 1}
        settings = {"model": str(tiny_model[0]), **defaults, **flat}
        cores.append(build_engine(EngineConfig.from_flat(**settings)))
        return cores[-1]

    yield make
    for core in cores:
        core.close()


@pytest.fixture(scope="session")
def make_core(demo_path: Path) -> MakeCore:
    """Build an engine on the demo model in fp32 with the backend that a CPU gets by default."""

    def make(**flat: object) -> EngineCore:
        settings = {
            "model": str(demo_path),
            "dtype": "float32",
            "device": "cpu",
            "num_chunks": 256,
            **flat,
        }
        return build_engine(EngineConfig.from_flat(**settings))

    return make


class Run:
    """Drive an engine by hand: add requests, step, collect ids."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self.outputs: dict[str, list[int]] = {}
        self.finished: dict[str, str] = {}
        self.cached: dict[str, int] = {}
        self._names = itertools.count()

    def add(self, prompt: list[int], max_tokens: int = 8, **params: object) -> str:
        name = f"r{next(self._names)}"
        defaults = {"temperature": 0.0, "ignore_eos": True, "seed": 1}
        sampling = SamplingParams(max_tokens=max_tokens, **{**defaults, **params})
        self.outputs[name] = []
        self.core.add(EngineRequest(request_id=name, prompt_token_ids=prompt, sampling=sampling))
        return name

    def step(self) -> None:
        for delta in self.core.step():
            assert delta.error is None, delta.error
            self.cached[delta.request_id] = delta.num_cached_tokens
            for choice in delta.choices:
                self.outputs[delta.request_id].extend(choice.token_ids)
                if choice.finish_reason is not None:
                    self.finished[delta.request_id] = choice.finish_reason

    def finish(self) -> None:
        while self.core.has_work():
            self.step()
        self.core.check_idle()
        stats = self.core.stats()
        assert stats.invariant_violations == 0
        assert stats.chunks_referenced == stats.chunks_private == 0
        assert stats.chunks_free + stats.chunks_cached == stats.chunks_total


@pytest.fixture
def run() -> Callable[[EngineCore], Run]:
    return Run


@pytest.fixture
def open_client(tiny_model: tuple[Path, torch.nn.Module]) -> Callable[..., Any]:
    """Start supervised engine processes on the tiny model; none is left after the block."""

    @asynccontextmanager
    async def open_(**options: float) -> AsyncIterator[SupervisedEngineClient]:
        model = {"model": str(tiny_model[0]), "dtype": "float32", "threads": 1}
        config = EngineConfig.from_flat(**model, num_chunks=64)
        client = await SupervisedEngineClient.start(config, **options)
        try:
            yield client
        finally:
            await client.close()
            assert not psutil.pid_exists(client.pid)

    return open_
