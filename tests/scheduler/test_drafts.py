"""Guesses at the next tokens: where they come from, and that they are made only where they pay."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from chunkllama.scheduler.draft_search import (
    MAX_MATCH,
    MAX_NAMESPACES,
    MAX_RECENT_TOKENS,
    MIN_MATCH,
    SEPARATOR,
    RecentOutputs,
    find_continuation,
)
from chunkllama.scheduler.model_drafts import DraftContext
from chunkllama.scheduler.output import SampledTokens, SchedulerOutput
from chunkllama.scheduler.step_cost import StepCost
from chunkllama.simulation.engine import SimulatedEngine


def search_slowly(text: list[int], context: list[int]) -> tuple[int, int] | None:
    """Compare every end of the context with every place."""
    best = None
    for length in range(MIN_MATCH, min(MAX_MATCH, len(context)) + 1):
        for end in range(length, len(text)):
            if text[end - length : end] == context[-length:]:
                best = end, length
    return best


def test_the_longest_match_is_found_and_of_equal_ones_the_last() -> None:
    rng = np.random.default_rng(1)
    found = 0
    for _ in range(500):
        text = rng.integers(0, 4, rng.integers(0, 60)).astype(np.int32)
        context = rng.integers(0, 4, rng.integers(0, 12)).astype(np.int32)
        expected = search_slowly(text.tolist(), context.tolist())
        assert find_continuation(text, context) == expected
        found += expected is not None
        expected = search_slowly(text.tolist(), text.tolist())
        assert find_continuation(text, text) == expected
    assert 100 < found < 500


def test_recent_outputs_are_bounded_and_kept_apart() -> None:
    recent = RecentOutputs()
    one, other = ("t", "n", ""), ("t", "m", "")
    tokens = np.arange(100, dtype=np.int32)
    recent.add(one, tokens, num_prompt_tokens=90)
    kept = recent.get(one)
    assert kept is not None
    assert kept.tolist() == [*range(90 - MAX_MATCH, 100), SEPARATOR]
    assert recent.get(other) is None
    for _ in range(MAX_RECENT_TOKENS):
        recent.add(one, tokens, num_prompt_tokens=90)
    kept = recent.get(one)
    assert kept is not None and len(kept) == MAX_RECENT_TOKENS and kept[-1] == SEPARATOR
    for number in range(MAX_NAMESPACES):
        recent.add(("t", str(number), ""), tokens, num_prompt_tokens=90)
    assert recent.get(one) is None, "the key used least recently is dropped"
    recent.forget()
    assert recent.get(("t", "0", "")) is None


def timed(engine: SimulatedEngine, seconds: Callable[[int], float]) -> SimulatedEngine:
    """Let a step of so many rows take so long on the engine's clock."""
    compute = engine.model.execute

    def execute(output: SchedulerOutput) -> SampledTokens:
        engine.now += seconds(output.num_tokens)
        return compute(output)

    engine.model.execute = execute  # type: ignore[method-assign]
    return engine


def virtual_seconds(
    speculation: bool, vocab_size: int, num_sequences: int, seconds: Callable[[int], float]
) -> tuple[float, int]:
    """Time of some requests' decoding and the guesses that it has checked."""
    engine = SimulatedEngine(
        400, 16, vocab_size=vocab_size, check=False, speculates=speculation, max_num_seqs=32
    )
    timed(engine, seconds)
    for number in range(num_sequences):
        engine.add([number % vocab_size, 1, 0, 1], 600 // num_sequences + 60)
    engine.run()
    engine.check_outputs()
    return engine.now - 0.01 * engine.num_steps, engine.scheduler.stats().draft_tokens_total


COSTS: dict[str, Callable[[int], float]] = {
    "rows are free": lambda rows: 0.1,
    "rows are cheap": lambda rows: 0.1 + 0.002 * rows,
    "a step costs as much as its rows": lambda rows: 0.02 * rows,
    "a second tile": lambda rows: 0.1 if rows <= 4 else 0.2,
}


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("num_sequences", [1, 6])
def test_guesses_never_cost_more_than_they_save(cost: str, num_sequences: int) -> None:
    """With 2 tokens a guess is right about every second time, with 20 about every twentieth."""
    for vocab_size in (2, 20):
        plain, none = virtual_seconds(False, vocab_size, num_sequences, COSTS[cost])
        drafted, guesses = virtual_seconds(True, vocab_size, num_sequences, COSTS[cost])
        assert none == 0
        assert drafted <= 1.02 * plain, (cost, vocab_size)
        if vocab_size == 2 and cost in ("rows are free", "rows are cheap"):
            assert guesses > 0
            assert drafted < (0.9 if num_sequences == 1 else 0.99) * plain


def stepped(engine: SimulatedEngine) -> SchedulerOutput:
    """Run a step; returns what it computed."""
    output = engine.schedule()
    assert output is not None
    engine.commit()
    return output


class TimedDraftModel:
    """Guesses what a plain run has written, some tokens of it wrong; its passes take time.

    Args:
        outputs: of the plain run by key.
        wrong_every: of the guesses one of so many is wrong.
        pass_seconds, token_seconds: of a guess of all sequences, and of a token that is computed.
    """

    def __init__(
        self,
        engine: SimulatedEngine,
        outputs: dict[tuple[str, int], list[int]],
        wrong_every: int,
        pass_seconds: float,
        token_seconds: float,
    ) -> None:
        self._engine = engine
        self._outputs = outputs
        self._wrong_every = wrong_every
        self._pass_seconds = pass_seconds
        self._token_seconds = token_seconds
        self._known: dict[tuple[str, int], int] = {}
        self.num_passes = 0

    def warm_up(self) -> None:
        self._engine.now += self._pass_seconds

    def begin_step(self, contexts: list[DraftContext]) -> list[int | None]:
        return [len(each.token_ids) - self._known.get(each.key, 0) for each in contexts]

    def compute(self, contexts: list[DraftContext], max_tokens: int) -> int:
        left = max_tokens
        for each in contexts:
            known = self._known.get(each.key, 0)
            count = min(len(each.token_ids) - 1 - known, left)
            self._known[each.key] = known + count
            left -= count
        self._engine.now += (max_tokens - left) * self._token_seconds
        return max_tokens - left

    def guess(self, contexts: list[DraftContext], depth: int) -> list[list[int]]:
        self.num_passes += depth
        self._engine.now += depth * self._pass_seconds
        guessed = []
        for each in contexts:
            done = len(each.token_ids) - each.num_prompt_tokens
            self._known[each.key] = len(each.token_ids)
            guessed.append(
                [
                    (token + (at % self._wrong_every == 0)) % VOCABULARY
                    for at, token in enumerate(self._outputs[each.key][done : done + depth], done)
                ]
            )
        return guessed


VOCABULARY = 500  # so many that texts have no guesses
DRAFTING: dict[str, tuple[int, float, float]] = {
    "right and fast": (20, 0.01, 0.0005),
    "right and slow": (20, 0.15, 0.02),
    "right and slow to begin": (20, 0.01, 0.05),
    "half right": (2, 0.02, 0.001),
    "wrong": (1, 0.01, 0.0005),
}


@pytest.mark.parametrize("kind", DRAFTING)
@pytest.mark.parametrize("num_sequences", [1, 6])
def test_a_draft_model_never_costs_more_than_it_saves(kind: str, num_sequences: int) -> None:
    """Steps take 0.1 s and rows of guesses nearly nothing."""
    models: list[TimedDraftModel] = []

    def run(outputs: dict[tuple[str, int], list[int]] | None) -> tuple[SimulatedEngine, float]:
        engine = SimulatedEngine(
            900, 16, vocab_size=VOCABULARY, check=False, speculates=True, max_num_seqs=32
        )
        timed(engine, COSTS["rows are cheap"])
        if outputs is not None:
            models.append(TimedDraftModel(engine, outputs, *DRAFTING[kind]))
            engine.scheduler.drafts.use_model(models[0])
        for number in range(num_sequences):
            prompt = np.random.default_rng(number).integers(0, VOCABULARY, 200)
            engine.add(prompt.tolist(), 600)
        engine.run()
        engine.check_outputs()
        return engine, engine.now - 0.01 * engine.num_steps

    base, plain = run(None)
    _, drafted = run(base.outputs)
    assert drafted <= 1.02 * plain
    assert (models[0].num_passes == 0) == ("slow" in kind)
    if kind == "right and fast":
        assert drafted < 0.5 * plain
    if kind == "half right" and num_sequences == 1:
        assert drafted < 0.9 * plain


def test_an_operator_who_drops_a_tenant_drops_its_outputs() -> None:
    from chunkllama.cache_messages import CacheCommand

    engine = SimulatedEngine(40, 4, speculates=True)
    engine.add([0, 1, 0], 4, tenant="A", namespace="A")
    engine.run()
    lifecycle = engine.scheduler._lifecycle
    assert lifecycle.recent.get(("A", "A", "")) is not None
    engine.scheduler.cache_command(CacheCommand(command_id=1, action="drop_tenant", tenant="A"))
    assert lifecycle.recent.get(("A", "A", "")) is None


@pytest.mark.parametrize("unchecked", ["deferred", "without a mask"])
def test_guesses_that_were_not_checked_are_not_counted(unchecked: str) -> None:
    """All guesses are right, from a prediction of what follows."""
    prompt = [0, 1, 0, 1]
    plain = SimulatedEngine(40, 4)
    name = plain.add(prompt, 60)
    plain.run()
    engine = SimulatedEngine(40, 4, speculates=True)
    engine.add(prompt, 60, prediction_token_ids=[*plain.outputs[name, 0], 0])
    engine.model.defer_share = 0.4 if unchecked == "deferred" else 0.0
    num_unchecked = 0
    compute = engine.model.execute

    def execute(output: SchedulerOutput) -> SampledTokens:
        nonlocal num_unchecked
        sampled = compute(output)
        drafted = {piece.slot for piece in output.slices if piece.num_drafts}
        late = drafted & sampled.deferred
        if unchecked == "without a mask" and engine.num_steps % 3 == 0:
            late = drafted & sampled.accepted.keys()
            for slot in late:
                token, entry = sampled.accepted.pop(slot)[0]
                assert entry is not None
                sampled.token_ids[slot], sampled.logprobs[slot] = token, entry
        num_unchecked += len(late)
        return sampled

    engine.model.execute = execute  # type: ignore[method-assign]
    accepted = rejected = 0
    while not engine.finished:
        for delta in engine.step():
            accepted += delta.num_accepted_predicted
            rejected += delta.num_rejected_predicted
    engine.check_outputs()
    stats = engine.scheduler.stats()
    assert num_unchecked and accepted and rejected == 0
    assert stats.draft_tokens_total == stats.accepted_draft_tokens_total == accepted


def test_rows_of_guesses_are_charged_to_their_tenant() -> None:
    engine = SimulatedEngine(40, 4, speculates=True)
    engine.add([0, 1, 0, 1], 30, tenant="A")
    engine.run()
    stats = engine.scheduler.stats(include_tenants=True)
    wrong = stats.draft_tokens_total - stats.accepted_draft_tokens_total
    assert wrong > 0, "else this shows nothing"
    assert stats.tenants["A"].decoded_tokens == 29 + wrong


def test_guesses_fit_the_steps_that_a_device_has_memory_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the time of a step that it has none for says nothing of the others."""
    times: list[float] = []
    add = StepCost.add

    def record(self: StepCost, num_sequences: int, num_drafts: int, seconds: float) -> None:
        times.append(seconds)
        add(self, num_sequences, num_drafts, seconds)

    monkeypatch.setattr(StepCost, "add", record)
    engine = timed(SimulatedEngine(400, 16, vocab_size=2, speculates=True), lambda rows: 0.1)
    for number in range(2):
        engine.add([number, 1, 0, 1], 200)
    stepped(engine)
    assert max(stepped(engine).num_tokens for _ in range(40)) > 4, "else this shows nothing"
    before = len(times)
    engine.model.room = 0
    stepped(engine)
    assert len(times) == before
    caps = engine.scheduler._running.caps
    assert caps.sequences == 1 and caps.tokens > 4
    caps.tokens = engine.model.room = 4
    assert max(stepped(engine).num_tokens for _ in range(60)) == 4
    engine.model.room = 64
    engine.run()
    engine.check_outputs()


@pytest.mark.parametrize(("tenants", "is_bounded"), [("aa", False), ("ab", True)])
def test_guesses_lengthen_the_steps_of_other_tenants_within_the_bound(
    tenants: str, is_bounded: bool
) -> None:
    """Rows cost a tenth of a step, and nearly all guesses are right."""
    engine = SimulatedEngine(
        400, 16, vocab_size=2, check=False, speculates=True, max_tenant_slowdown=1.5
    )
    rows: list[int] = []

    def seconds(count: int) -> float:
        rows.append(count)
        return 0.1 + 0.01 * count

    timed(engine, seconds)
    for tenant in tenants:
        engine.add([0, 1, 0, 1, 0, 1], 400, tenant=tenant)
    engine.run()
    assert (max(rows[20:]) <= 2 + 6) == is_bounded
