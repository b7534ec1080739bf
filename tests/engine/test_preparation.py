"""A request whose grammar is being compiled waits; other requests run."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest

from chunkllama.engine.core import EngineCore
from chunkllama.engine.loop import QUIET_SECONDS, run_engine_loop
from chunkllama.messages import EngineRequest, FromEngine, Shutdown, ToEngine, TokenDelta
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
    executor.read_vocabulary()
    compiler = executor._grammars
    assert compiler is not None
    preparation = executor.prepare(sampling)
    assert preparation is not None
    preparation.result(timeout=60)
    assert executor.prepare(sampling) is None
    assert executor.prepare(SamplingParams(seed=1)) is None
    assert executor._grammars is compiler
    core.close()


def request(max_tokens: int) -> EngineRequest:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=1)
    return EngineRequest(request_id="r", prompt_token_ids=PROMPT, sampling=sampling)


class Inbox:
    """A channel whose messages come in the loop's calls; [] is a call that waits in vain."""

    def __init__(self, *calls: list[ToEngine]) -> None:
        self.calls = list(calls)
        self.waits: list[float | None] = []
        self.sent: list[FromEngine] = []

    def receive(self, seconds: float | None) -> list[ToEngine]:
        self.waits.append(seconds)
        return self.calls.pop(0)

    def send(self, messages: list[FromEngine]) -> None:
        self.sent += messages


def test_an_idle_engine_reads_the_vocabulary_once_and_never_beside_a_request(
    tiny_core: MakeCore,
) -> None:
    core = tiny_core(num_chunks=8)
    inbox = Inbox([request(3)], [], [], [], [], [Shutdown()])
    read_at: list[int] = []
    assert core.idle_work == core._executor.read_vocabulary
    core.idle_work = lambda: read_at.append(len(inbox.waits))
    run_engine_loop(core, inbox)
    assert sum(isinstance(message, TokenDelta) for message in inbox.sent) == 3
    # it waits for a request, runs three steps, waits for a pause, and then without end
    assert inbox.waits == [QUIET_SECONDS, 0.0, 0.0, QUIET_SECONDS, None, None]
    assert read_at == [4]
    core.close()


def test_an_idle_engine_without_a_tokenizer_goes_on(tiny_core: MakeCore) -> None:
    core = tiny_core(num_chunks=8)
    inbox = Inbox([], [request(2)], [], [Shutdown()])
    run_engine_loop(core, inbox)
    assert core.idle_work is None
    assert sum(isinstance(message, TokenDelta) for message in inbox.sent) == 2
    core.close()
