"""Test what a replayed request contains, and which past tokens its client receives again."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from chunkllama.cache_messages import EndedPin
from chunkllama.engine import pin_records
from chunkllama.engine.journal import StepJournal
from chunkllama.engine.pin_records import PinRecords
from chunkllama.engine.replay import ReplayState
from chunkllama.messages import (
    AbortRequest,
    ChoiceDelta,
    EngineErrorInfo,
    EngineRequest,
    TokenDelta,
)
from chunkllama.sampling_params import SamplingParams


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def state_of(
    clock: Clock,
    pin_seconds: float = 0.0,
    adapter: str = "",
    prompt_token_ids: Sequence[int] = (1, 2, 3, 4),
    **sampling: object,
) -> ReplayState:
    request = EngineRequest(
        request_id="r",
        prompt_token_ids=list(prompt_token_ids),
        sampling=SamplingParams(seed=5, **sampling),
        namespace="tenant",
        pin_seconds=pin_seconds,
        adapter=adapter,
    )
    state = ReplayState(request, clock)
    assert state.submission() == [request]
    return state


def delta(*choices: ChoiceDelta, **fields: object) -> TokenDelta:
    return TokenDelta(request_id="r", choices=list(choices), **fields)


def choice(index: int, token_ids: list[int], reason: str | None = None) -> ChoiceDelta:
    return ChoiceDelta(index=index, token_ids=token_ids, finish_reason=reason)


def test_a_replay_holds_what_was_delivered_and_aborts_what_has_ended() -> None:
    state = state_of(Clock(), n=3)
    state.record(delta(choice(0, [7]), choice(1, [8]), choice(2, [9], "stop")))
    state.record(delta(choice(0, [10, 11])))
    again, *aborts = state.submission()
    assert isinstance(again, EngineRequest)
    assert again.delivered == [[7, 10, 11], [8], [9]]
    assert again.sampling.seed == 5 and again.request_id == "r"
    assert aborts == [AbortRequest(request_id="r", index=2)]
    state.record(delta(choice(0, [], "abort"), choice(1, [12], "length")))
    assert not state.is_live


def test_an_error_ends_every_choice() -> None:
    state = state_of(Clock(), n=2)
    error = EngineErrorInfo(kind="failed", message="planted")
    state.record(delta(error=error))
    assert not state.is_live


def test_prompt_logprobs_are_computed_once() -> None:
    state = state_of(Clock(), prompt_logprobs=1)
    (again,) = state.submission()
    assert again.sampling.prompt_logprobs == 1, "nothing was delivered"
    state.record(delta(choice(0, [7]), prompt_logprobs=[None]))
    (again,) = state.submission()
    assert again.sampling.prompt_logprobs is None


def test_usage_and_durations_hold_for_the_whole_request() -> None:
    clock = Clock()
    state = state_of(clock, pin_seconds=50.0)
    first = {"num_cached_tokens": 3, "num_cache_write_tokens": 1, "queue_seconds": 0.5}
    state.record(delta(choice(0, [7]), **first, prefill_seconds=2.0, decode_seconds=0.0))
    clock.now += 20
    (again,) = state.submission()
    assert again.pin_seconds == 30.0
    later = delta(choice(0, [8]), num_cached_tokens=0, num_cache_write_tokens=4, pin_refused=True)
    clock.now += 5
    state.record(later)
    assert (later.num_cached_tokens, later.num_cache_write_tokens) == (3, 1)
    assert (later.queue_seconds, later.prefill_seconds, later.decode_seconds) == (0.5, 2.0, 25.0)
    assert not later.pin_refused


def test_time_in_a_process_that_ended_is_time_in_the_queue() -> None:
    clock = Clock()
    state = state_of(clock)
    clock.now += 4
    state.submission()
    first = delta(choice(0, [7]), queue_seconds=0.25)
    state.record(first)
    assert first.queue_seconds == 4.25


def test_time_before_the_first_submission_is_time_in_the_queue() -> None:
    """A request may arrive while the engine process is restarted."""
    clock = Clock()
    state = ReplayState(
        EngineRequest(request_id="r", prompt_token_ids=[1], sampling=SamplingParams()), clock
    )
    clock.now += 20
    state.submission()
    first, second = delta(choice(0, [7]), queue_seconds=0.25), delta(choice(0, [8]))
    state.record(first)
    state.record(second)
    assert (first.queue_seconds, second.queue_seconds) == (20.25, 0.0)


def test_crashes_in_a_row_count_while_no_token_is_gained() -> None:
    state = state_of(Clock())
    state.count_crash()
    state.count_crash()
    assert state.crashes == 2
    state.record(delta(choice(0, [7])))
    state.count_crash()
    assert state.crashes == 1


def test_pins_of_ended_requests_are_kept_for_their_time() -> None:
    clock = Clock()
    pins = PinRecords(4, clock)
    for seconds, refused in ((50.0, False), (90.0, True), (0.0, False)):
        state = state_of(clock, pin_seconds=seconds)
        state.record(delta(choice(0, [7], "stop"), pin_refused=refused))
        pins.add(state)
    clock.now += 10
    (restored,) = pins.requests()
    assert (restored.prompt_token_ids, restored.namespace) == ([1, 2, 3, 4], "tenant")
    assert restored.pin_seconds == 40.0
    clock.now += 41
    assert pins.requests() == []


def pinned(pins: PinRecords, clock: Clock, prompt: list[int], seconds: float = 50.0) -> None:
    """Let a request end that has pinned this prompt."""
    state = state_of(clock, pin_seconds=seconds, prompt_token_ids=prompt)
    state.record(delta(choice(0, [7], "stop")))
    pins.add(state)


@pytest.mark.parametrize("order", [1, -1])
def test_of_pinned_prompts_that_end_in_one_chunk_the_longest_is_kept(order: int) -> None:
    """One chunk of the pin budget pays for all of them."""
    clock = Clock()
    pins = PinRecords(4, clock)
    prompt = list(range(16))
    for length in [13, 14, 15, 16][::order]:
        pinned(pins, clock, prompt[:length], seconds=float(length))
    pinned(pins, clock, prompt[:13], seconds=90.0)
    pinned(pins, clock, prompt[:12])  # ends in the chunk before
    pinned(pins, clock, [*prompt[:14], 0])  # another chunk: it diverges
    restored = {tuple(r.prompt_token_ids): r.pin_seconds for r in pins.requests()}
    assert restored == {
        tuple(prompt): 90.0, tuple(prompt[:12]): 50.0, (*prompt[:14], 0): 50.0
    }  # fmt: skip
    clock.now += 60
    assert len(pins.requests()) == 1


def test_records_of_pins_are_bounded() -> None:
    """Those that end first are dropped; a prompt pinned again and again is one record."""
    clock = Clock()
    pins = PinRecords(4, clock, max_tokens=40)
    for number in range(20):
        pinned(pins, clock, [number] * 8, seconds=100.0 - number)
        pinned(pins, clock, [0] * 8, seconds=200.0)
    assert [r.prompt_token_ids[0] for r in pins.requests()] == [0, 1, 2, 3, 4]
    assert len(pins._ends) <= 6


def test_records_are_those_of_a_plain_list() -> None:
    """Of two prompts that end in one chunk and begin one another the longer one is kept."""
    rng = random.Random(0)
    for _ in range(40):
        clock, plain = Clock(), dict[tuple[int, ...], float]()
        pins = PinRecords(4, clock)
        for _ in range(30):
            prompt = tuple(rng.randrange(2) for _ in range(rng.randrange(1, 9)))
            until = rng.choice([10.0, 50.0, 90.0])
            pinned(pins, clock, list(prompt), seconds=until)
            near = [p for p in plain if (len(p) - 1) // 4 == (len(prompt) - 1) // 4]
            longer = [p for p in near if p[: len(prompt)] == prompt]
            shorter = [p for p in near if prompt[: len(p)] == p]
            if longer:
                plain[min(longer)] = max(plain[min(longer)], until)
            else:
                plain[prompt] = max([until, *(plain.pop(p) for p in shorter)])
        restored = {tuple(r.prompt_token_ids): r.pin_seconds for r in pins.requests()}
        assert restored == plain


def test_a_record_is_added_without_a_look_at_all_that_end_in_the_chunk(monkeypatch) -> None:
    """Short prompts of one tenant all end in the first chunk."""
    clock = Clock()
    pins, looks = PinRecords(64, clock), [0]
    tail = pin_records._Record.tail.fget

    def counted(record):
        looks[0] += 1
        return tail(record)

    monkeypatch.setattr(pin_records._Record, "tail", property(counted))
    for number in range(1000):
        pinned(pins, clock, [number, 1, 2, 3])
    assert len(pins) == 1000
    assert looks[0] < 1000 * 30


def ended(*token_ids: int, **fields: object) -> EndedPin:
    """A pin of tenant "" by a request without adapter, of this length unless ``askers`` says."""
    values = {"namespace": "tenant", "tenant": "", "askers": [(len(token_ids), "")], **fields}
    return EndedPin(token_ids=list(token_ids), **values)


@pytest.mark.parametrize(
    ("pin", "is_ended"),
    [
        (ended(1, 2, 3, 4), True),
        (ended(1, 2, 3, 4, namespace=""), True),  # a public chunk has the same tokens
        (ended(1, 2, 3, 4, 5, 6, askers=[(2, ""), (4, "")]), True),  # in a longer chunk
        (ended(1, 2, 3, askers=[(4, "")]), True),  # its last token has no chunk of its own
        (ended(1, 2, 3), False),  # a shorter prompt's
        (ended(1, 2, 3, 4, 5), False),  # a longer prompt's
        (ended(1, 2, 3, 5), False),
        (ended(1, 2, 3, 4, tenant="other"), False),
        (ended(1, 2, 3, 4, namespace="another"), False),
        (ended(1, 2, 3, 4, askers=[(4, "poet")]), False),  # under an adapter, elsewhere in the tree
        (ended(1, 2, 3, 4, askers=[(4, ""), (4, "poet")]), True),  # not active yet: one chunk
    ],
)
def test_a_pin_that_an_operator_has_ended_is_not_restored(pin: EndedPin, is_ended: bool) -> None:
    """Neither that of a request that has ended nor that of one which still runs."""
    clock = Clock()
    pins, running = PinRecords(4, clock), state_of(clock, pin_seconds=50.0)
    waiting = state_of(clock, pin_seconds=50.0)
    running.record(delta(choice(0, [7])))
    pins.add(running)
    pins.remove(pin)
    running.end_pin(pin)
    waiting.end_pin(pin)  # it has no pin yet
    assert len(pins.requests()) == (not is_ended)
    (again,) = running.submission()
    assert again.is_replay and again.pin_seconds == (0.0 if is_ended else 50.0)
    (again,) = waiting.submission()
    assert again.pin_seconds == 50.0
    pins.add(running)
    assert len(pins.requests()) == (not is_ended)
    assert all(request.is_replay for request in pins.requests())


def test_the_journal_tells_its_reader_what_ran() -> None:
    parent = StepJournal()
    engine = StepJournal(parent.fileno())
    engine.turn()
    engine.begin_step(["a", "b"])
    assert (parent.turns, parent.steps, parent.running_requests()) == (1, 0, ["a", "b"])
    engine.end_step()
    assert (parent.turns, parent.steps, parent.running_requests()) == (1, 1, [])
    engine.begin_step(["x" * (8 << 20)])
    assert parent.running_requests() == [], "too long to be written: counted against none"
    parent.close()
