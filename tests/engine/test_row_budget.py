"""Time between model passes: one request's masks and sampling do not take the others' time."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from chunkllama.backends.reference.backend import ReferenceBackend
from chunkllama.engine.core import EngineCore
from chunkllama.engine.row_budget import RowBudget
from chunkllama.engine.sampler import RowTimes, Sampler
from chunkllama.engine.sequence_state import SequenceState
from chunkllama.sampling_params import SamplingParams
from chunkllama.scheduler.output import SampledTokens, SchedulerOutput

MakeCore = Callable[..., EngineCore]
PROMPT = list(range(5, 25))


def step(budget: RowBudget, waiting: dict[str, list[int]], cost: dict[str, float]) -> set[int]:
    """A step of 0.02 s of model time: rows by request, each at its request's cost in seconds."""
    rows = [(slot, name) for name, slots in waiting.items() for slot in slots]
    chosen = budget.choose(rows, set(waiting), must_choose=False)
    for name, slots in waiting.items():
        own = [slot for slot in slots if slot in chosen]
        if own:
            budget.charge_rows(name, cost[name] * len(own), len(own))
    budget.refill(0.02, set(waiting))
    return chosen


@pytest.mark.parametrize(
    ("num_rows", "row_seconds", "share"),
    [(63, 0.0005, 0.2), (128, 0.001, 0.2), (1, 0.06, 0.2), (8, 0.03, 0.5), (63, 0.0005, 0.05)],
)
def test_a_dear_request_takes_its_share_and_others_lose_no_row(
    num_rows: int, row_seconds: float, share: float
) -> None:
    budget = RowBudget(share)
    waiting = {"costly": list(range(1, num_rows + 1)), "cheap": [0]}
    cost = {"costly": row_seconds, "cheap": 0.0001}
    seen: Counter[int] = Counter()
    for number in range(500):
        chosen = step(budget, waiting, cost)
        assert 0 in chosen
        seen.update(chosen)
        waiting["costly"].sort(key=lambda slot: seen[slot])  # the longest deferred come first
        spent = sum(seen[slot] for slot in range(1, num_rows + 1)) * row_seconds
        largest_debt = row_seconds  # the first step knows no cost
        assert spent <= share * 0.02 * (number + 1) + largest_debt
    assert spent >= 0.8 * share * 0.02 * 500 - largest_debt, "the share is used"
    counts = [seen[slot] for slot in range(1, num_rows + 1)]
    assert max(counts) - min(counts) <= 1, "its rows take turns"


def test_many_dear_requests_share_half_the_models_time() -> None:
    budget = RowBudget(0.2)
    waiting = {f"r{i}": [i] for i in range(24)} | {"victim": [99]}
    cost = dict.fromkeys(waiting, 0.06) | {"victim": 0.0001}
    counts: Counter[int] = Counter()
    for _ in range(2000):
        counts.update(step(budget, waiting, cost))
    assert counts[99] == 2000
    spent = 0.06 * sum(counts[i] for i in range(24))
    assert spent <= 0.5 * 0.02 * 2000 + 24 * 0.06
    assert min(counts[i] for i in range(24)) >= 0.8 * max(counts[i] for i in range(24))


def test_a_request_alone_has_no_limit_and_no_debt_from_then() -> None:
    budget = RowBudget(0.2)
    for _ in range(50):
        assert step(budget, {"a": [1, 2, 3]}, {"a": 1.0}) == {1, 2, 3}
    assert 1 in step(budget, {"a": [1, 2, 3], "b": [4]}, {"a": 0.001, "b": 0.001})


def test_something_is_chosen_where_all_are_in_debt() -> None:
    budget = RowBudget(0.2)
    step(budget, {"a": [1, 2], "b": [3]}, {"a": 1.0, "b": 9.0})
    rows = [(1, "a"), (2, "a"), (3, "b")]
    assert budget.choose(rows, {"a", "b"}, must_choose=False) == set()
    assert budget.choose(rows, {"a", "b"}, must_choose=True) == {1}, "the least indebted"


def test_requests_that_left_are_forgotten() -> None:
    budget = RowBudget(0.2)
    for number in range(1000):
        step(budget, {f"r{number}": [1], "other": [2]}, {f"r{number}": 0.1, "other": 0.1})
    assert len(budget._credits) == len(budget._row_seconds) == 2


def test_each_row_is_charged_what_it_asked_for() -> None:
    """A fake clock that ticks once per reading: the costly row pays for its own work."""
    ticks = iter(range(10_000))
    sampler = Sampler([2], ReferenceBackend(torch.device("cpu")), clock=lambda: float(next(ticks)))
    plain = SamplingParams(seed=1, temperature=0.0)
    asked = SamplingParams(seed=1, temperature=1.0, top_p=0.5, logprobs=20, frequency_penalty=1.0)
    rows = [plain, asked, SamplingParams(seed=1, temperature=1.0)]
    states = [SequenceState(p, 0, np.array([1], np.int32), [3]) for p in rows]
    outcomes = sampler.sample(torch.randn(3, 64), states, {})
    greedy, costly, drawn = (outcome.seconds for outcome in outcomes)
    assert greedy <= drawn < costly
    times = RowTimes(2, iter([0.0, 3.0, 5.0]).__next__)
    times.charge([0, 1])
    times.charge([1])
    assert times.seconds == [1.5, 3.5]


def test_no_row_is_charged_for_what_the_first_read_waits_for(monkeypatch) -> None:
    """A device computes the model's pass behind the calls: its time is of no row."""
    clock, tolist = _Clock(), torch.Tensor.tolist

    def waiting(tensor: torch.Tensor) -> Any:
        if clock.now == 0.0:
            clock.now = 0.02
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", waiting)
    sampler = Sampler([2], ReferenceBackend(torch.device("cpu")), clock)
    asked = [{"logprobs": 1}, {"beam_width": 2, "n": 2}, {"temperature": 1.0}, {}]
    params = [SamplingParams(**{"seed": 1, "temperature": 0.0, **each}) for each in asked]
    states = [SequenceState(each, 0, np.array([1], np.int32), [3]) for each in params]
    outcomes = sampler.sample(torch.randn(4, 64), states, {})
    assert clock.now == 0.02 and [each.seconds for each in outcomes] == [0.0] * 4


class _Clock:
    """Seconds that pass only where a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def timed_core(tiny_core: MakeCore, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A core whose model takes 20 ms a step and whose sampled rows cost what the test says."""

    def make(seconds_of: Callable[[SequenceState], float], **flat: object) -> EngineCore:
        core = tiny_core(num_chunks=64, **flat)
        runner, clock = core._executor, _Clock()
        sampler = runner._sampler
        sampler._clock = clock
        run = runner.step_model.run
        sample = sampler._sampler.sample

        def timed_run(output: SchedulerOutput, *others: Any) -> torch.Tensor:
            clock.now += 0.02 if output.slices else 0.0
            return run(output, *others)

        def timed_sample(logits: Any, states: list[SequenceState], masks: Any) -> Any:
            outcomes = sample(logits, states, masks)
            for state, outcome in zip(states, outcomes, strict=True):
                object.__setattr__(outcome, "seconds", seconds_of(state))
                clock.now += outcome.seconds
            return outcomes

        monkeypatch.setattr(runner.step_model, "run", timed_run)
        monkeypatch.setattr(sampler._sampler, "sample", timed_sample)
        core.test_clock = clock
        return core

    return make


def test_a_request_of_many_choices_does_not_slow_others(timed_core, run) -> None:
    """63 sampled rows at 1 ms each: the victim gets a token in every step, and each is short."""
    costly = {"n": 63, "temperature": 1.0, "seed": 5}
    engine = run(timed_core(lambda state: 0.001 if state.sampling.n > 1 else 0.0))
    victim = engine.add(PROMPT, 60, temperature=0.0)
    engine.step()
    attack = engine.add([7, 8, 9], 40, **costly)
    clock = engine.core.test_clock
    durations = []
    for _ in range(40):
        before, count = clock.now, len(engine.outputs[victim])
        engine.step()
        durations.append(clock.now - before)
        assert len(engine.outputs[victim]) == count + 1, "the victim is never deferred"
    assert max(durations) <= 0.02 * 1.2 + 0.001 + 1e-9
    engine.finish()
    beside = sorted(engine.outputs[attack])

    alone = run(timed_core(lambda state: 0.001))
    again = alone.add([7, 8, 9], 40, **costly)
    alone.finish()
    assert sorted(alone.outputs[again]) == beside, "deferral changes no token"


class _ForcedText:
    """A grammar that takes 1.5 ms to tell what it forces."""

    is_finished = False

    def __init__(self, clock: _Clock) -> None:
        self._clock = clock
        self.num_calls = 0

    def forced(self) -> list[int]:
        self._clock.now += 0.0015
        self.num_calls += 1
        return [1]


def test_forced_text_takes_a_bounded_part_of_a_step(timed_core) -> None:
    """What it costs is spent between two steps: 20 ms of model allow 4 ms."""
    sampler = timed_core(lambda _: 0.0)._executor._sampler
    grammar = _ForcedText(sampler._clock)
    states = {}
    for slot in range(20):
        state = SequenceState(SamplingParams(), 0, np.array([1], np.int32), [3], f"r{slot}")
        state.matcher, state.slowest_mask = grammar, 0.3 if slot == 0 else 0.0
        states[slot] = state
    sampler._sequences, sampler._model_seconds, sampler._is_alone = states, 0.02, False
    sampled = SampledTokens(dict.fromkeys(states, 1))
    sampler._report_forced(list(states), sampled)
    assert grammar.num_calls == 3 and set(sampled.forced) == {1, 2, 3}
    assert sampler._budget.choose([(1, "r1"), (4, "r4")], {"r1", "r4"}, must_choose=False) == {4}
    sampler._is_alone = True
    sampler._report_forced(list(states), sampled)
    assert grammar.num_calls == 3 + 19, "a slow grammar is not asked"


class _AnyText:
    """A grammar that allows every token."""

    is_finished = False
    error = ""

    def fill_mask(self, mask: np.ndarray) -> None:
        mask[:] = -1

    def accept(self, token_id: int) -> bool:
        return True


def give_matchers(core: EngineCore, make: Callable[[], _AnyText]) -> None:
    """Let requests that want log-probabilities have grammars."""
    runner = core._executor
    new_state = runner._new_state

    def with_matcher(new: Any) -> SequenceState:
        state = new_state(new)
        if new.sampling.logprobs is not None:
            state.new_matcher = make
        return state

    runner._new_state = with_matcher


def test_a_late_mask_is_not_waited_for(tiny_core: MakeCore, run) -> None:
    """Another request's grammar takes as long as it likes; the victim's tokens come meanwhile."""
    release = threading.Event()
    calls: list[str] = []

    class Matcher(_AnyText):
        def fill_mask(self, mask: np.ndarray) -> None:
            calls.append("begin")
            assert release.wait(60)
            super().fill_mask(mask)

    core = tiny_core(num_chunks=64)
    give_matchers(core, Matcher)
    engine = run(core)
    victim = engine.add(PROMPT, 30)
    engine.step()
    slow = engine.add([7, 8, 9], 4, logprobs=0)
    for _ in range(20):
        engine.step()
    assert calls == ["begin"], "one mask, computed once"
    assert engine.outputs[slow] == []
    assert len(engine.outputs[victim]) == 21
    release.set()
    engine.finish()
    assert len(engine.outputs[slow]) == 4
    reference = run(tiny_core(num_chunks=64))
    expected = reference.add([7, 8, 9], 4, logprobs=0)
    reference.finish()
    assert reference.outputs[expected] == engine.outputs[slow]


def test_a_mask_that_an_earlier_step_began_is_not_waited_for(
    tiny_core: MakeCore, run, monkeypatch
) -> None:
    """Its request has gone, and the others need no masks."""
    begun, release = threading.Event(), threading.Event()

    class Matcher(_AnyText):
        def fill_mask(self, mask: np.ndarray) -> None:
            begun.set()
            assert release.wait(60)
            super().fill_mask(mask)

    core = tiny_core(num_chunks=64)
    give_matchers(core, Matcher)
    engine = run(core)
    victim = engine.add(PROMPT, 30)
    engine.step()
    slow = engine.add([7, 8, 9], 4, logprobs=0)
    waits: list[object] = []
    monkeypatch.setattr("chunkllama.engine.mask_threads.wait", lambda *what: waits.append(what))
    engine.step()
    assert begun.wait(60) and waits
    core.abort(slow)
    waits.clear()
    for _ in range(5):
        engine.step()
    assert waits == []
    assert len(engine.outputs[victim]) == 7
    release.set()


def test_matchers_of_choices_are_made_as_their_rows_are_sampled(tiny_core: MakeCore, run) -> None:
    """Each copies the state of the grammar: the step that starts 16 choices copies one."""
    made: list[_AnyText] = []

    def make() -> _AnyText:
        made.append(_AnyText())
        return made[-1]

    core = tiny_core(num_chunks=64)
    give_matchers(core, make)
    engine = run(core)
    victim = engine.add(PROMPT, 30)
    engine.step()
    sampled = {"n": 16, "logprobs": 0, "temperature": 1.0, "seed": 3}
    choices = engine.add([7, 8, 9], 4, **sampled)
    engine.step()
    assert len(made) <= 1 and len(core._executor._sequences) > 2
    engine.finish()
    assert len(made) == 16 and len(engine.outputs[victim]) == 30
    reference = run(tiny_core(num_chunks=64))
    expected = reference.add([7, 8, 9], 4, **sampled)
    reference.finish()
    assert sorted(reference.outputs[expected]) == sorted(engine.outputs[choices])


def test_a_matcher_that_cannot_be_made_fails_its_request_alone(tiny_core: MakeCore, run) -> None:
    def make() -> _AnyText:
        raise RuntimeError("a bug")

    core = tiny_core(num_chunks=64)
    give_matchers(core, make)
    engine = run(core)
    engine.add(PROMPT, 10)
    failing = engine.add([7, 8, 9], 4, logprobs=0)
    failed, num_tokens = [], 0
    for _ in range(2000):  # a thread makes the matcher; steps without work wait for it
        deltas = core.step()
        failed += [delta for delta in deltas if delta.request_id == failing]
        num_tokens += sum(len(choice.token_ids) for delta in deltas for choice in delta.choices)
        if failed and num_tokens == 10:
            break
    (delta,) = failed
    assert delta.error is not None and delta.error.code == "grammar_error"
    assert num_tokens == 10


def test_a_preempted_or_aborted_row_that_waits_is_dropped(tiny_core: MakeCore, run) -> None:
    core = tiny_core(num_chunks=64)
    engine = run(core)
    sampler = core._executor._sampler
    sampler._budget.choose = lambda rows, present, must_choose: {
        slot for slot, name in rows if name != "r1" or must_choose
    }
    other = engine.add(PROMPT, 20, temperature=1.0)
    waits = engine.add([7, 8, 9], 5, temperature=1.0)
    for _ in range(3):
        engine.step()
    scheduler = core._scheduler
    (sequence,) = scheduler._groups[waits].sequences.values()
    assert sequence.awaits_sample
    scheduler._lifecycle.preempt(sequence)
    assert not sequence.awaits_sample
    for _ in range(3):
        engine.step()
    assert sequence.awaits_sample
    core.abort(waits)
    engine.finish()
    assert len(engine.outputs[other]) == 20
    assert engine.outputs[waits] == []
