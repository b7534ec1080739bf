"""A request whose grammar is being compiled waits; other requests run."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest

from chunkllama.engine.core import EngineCore
from chunkllama.sampling_params import GrammarSpec, SamplingParams

MakeCore = Callable[..., EngineCore]
GRAMMAR = GrammarSpec(kind="regex", text="(yes|no)!")
PROMPT = list(range(5, 25))


@pytest.fixture
def pending(monkeypatch: pytest.MonkeyPatch) -> Future[None]:
    """What requests that want log-probabilities wait for."""
    future: Future[None] = Future()

    def prepare(_runner: object, sampling: SamplingParams) -> Future[None] | None:
        return future if sampling.logprobs is not None else None

    monkeypatch.setattr("chunkllama.engine.model_runner.ModelRunner.prepare", prepare)
    return future


def test_others_are_served_while_a_request_is_prepared(
    tiny_core: MakeCore, run: Callable, pending: Future[None]
) -> None:
    engine = run(tiny_core(num_chunks=8))
    slow = engine.add(PROMPT, 4, logprobs=0)
    other = engine.add(PROMPT, 4)
    while other not in engine.finished:
        engine.step()
    assert engine.outputs[slow] == []
    engine.step()  # nothing can run: it waits a moment and returns
    assert slow not in engine.finished
    pending.set_result(None)
    engine.finish()
    assert engine.outputs[slow] == engine.outputs[other]


def test_a_request_is_dropped_while_it_is_prepared(
    tiny_core: MakeCore, run: Callable, pending: Future[None]
) -> None:
    engine = run(tiny_core(num_chunks=8))
    engine.core.abort(engine.add(PROMPT, 4, logprobs=0))
    assert not engine.core.has_work()
    assert pending.cancelled()
    other = engine.add(PROMPT, 4)
    engine.finish()
    assert len(engine.outputs[other]) == 4


def test_a_failed_preparation_lets_the_request_begin(
    tiny_core: MakeCore, run: Callable, pending: Future[None]
) -> None:
    engine = run(tiny_core(num_chunks=8))
    request = engine.add(PROMPT, 4, logprobs=0)
    pending.set_exception(ValueError("its steps will tell"))
    engine.finish()
    assert engine.finished[request] == "length"


def test_only_the_first_request_of_a_grammar_is_held(make_core: MakeCore, demo_path: Path) -> None:
    core = make_core(num_chunks=8, threads=1)
    sampling = SamplingParams(max_tokens=8, seed=1, grammar=GRAMMAR)
    executor = core._executor
    preparation = executor.prepare(sampling)
    assert preparation is not None
    preparation.result(timeout=60)
    assert executor.prepare(sampling) is None
    assert executor.prepare(SamplingParams(seed=1)) is None
    core.close()
