"""Test that long Python work of one request rests while other requests run: counted, not timed."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from chunkllama import rests
from chunkllama.rests import FREE_SECONDS, PIECE_SECONDS, RESTS, rest, resting
from chunkllama_server.api.common import text_service

CHAT = "/v1/chat/completions"
MOST_CALLS = 20_000  # of Python functions between two rests, about 5 ms
USER = {"role": "user", "content": "a"}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
CALLS = [{"role": "assistant", "tool_calls": [CALL] * 50}, {"role": "tool", "content": "x"}]
WIDE = {f"p{i}": {"type": ["string", "null"]} for i in range(1000)}
TOOLS = [
    {"type": "function", "function": {"name": f"f{i}", "parameters": {"properties": fields}}}
    for i, fields in enumerate([{f"p{j}": {"type": "string"} for j in range(60)}] * 30)
]
LOOPS = "{% for a in range(9999) %}" * 2 + "x" + "{% endfor %}" * 2
FORM = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"properties": WIDE}}}
LONG_WORK: dict[str, dict[str, Any]] = {
    "tools": {"messages": [USER], "tools": TOOLS, "tool_choice": "required"},
    "messages": {"messages": [USER] * 1500},
    "calls": {"messages": [USER, *CALLS * 20]},
    "schema": {"messages": [USER], "response_format": FORM},
    "template": {"messages": [USER], "chat_template": LOOPS},
}


class Clock:
    """Seconds that a thread has computed, and those that have passed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.computed = self.passed = 0.0
        self.slept: list[float] = []
        names = {"thread_time": lambda: self.computed, "monotonic": lambda: self.passed}
        monkeypatch.setattr(rests, "time", SimpleNamespace(**names, sleep=self.sleep))

    def compute(self, seconds: float) -> None:
        self.computed += seconds
        self.passed += seconds

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.passed += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def compute(clock: Clock, seconds: float, piece: float = PIECE_SECONDS / 4) -> None:
    for _ in range(round(seconds / piece)):
        clock.compute(piece)
        rest()


def test_long_work_beside_others_rests_most_of_its_time(clock: Clock) -> None:
    with resting(lambda: True):
        compute(clock, FREE_SECONDS)
        assert not clock.slept, "ordinary requests would wait"
        compute(clock, 1.0)
    assert sum(clock.slept) == pytest.approx(RESTS, rel=0.02)
    assert max(clock.slept) < 3 * RESTS * PIECE_SECONDS


def test_a_piece_that_could_not_be_interrupted_is_followed_by_a_bounded_rest(clock: Clock) -> None:
    with resting(lambda: True):
        compute(clock, 10.0, piece=5.0)
    assert max(clock.slept) <= 0.1


def test_work_on_an_idle_server_does_not_rest(clock: Clock) -> None:
    with resting(lambda: False):
        compute(clock, 1.0)
    compute(clock, 1.0)  # outside of such a block
    assert not clock.slept


def test_a_thread_that_waits_for_a_processor_does_not_rest_for_it(clock: Clock) -> None:
    """A busy machine takes its time by itself."""
    with resting(lambda: True):
        for _ in range(100):
            clock.passed += 1.0
            rest()
    assert not clock.slept


class RestCounter:
    """Counts the Python functions that worker threads call between two rests."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.worst = self.rests = 0
        self.threads: set[str] = set()
        monkeypatch.setattr(text_service, "resting", self._counted)

    @contextmanager
    def _counted(self, is_busy: Callable[[], bool]) -> Iterator[None]:
        count, code = 0, rests._Turn.rest.__code__

        def note(frame: Any, event: str, _argument: Any) -> None:
            nonlocal count
            if event == "call":
                count += 1
                if frame.f_code is code:
                    self.worst, count = max(self.worst, count), 0
                    self.rests += 1

        self.threads.add(threading.current_thread().name.rpartition("_")[0])
        with resting(is_busy):
            sys.setprofile(note)
            try:
                yield
            finally:
                sys.setprofile(None)
                self.worst = max(self.worst, count)


@pytest.mark.parametrize("name", list(LONG_WORK))
def test_long_work_of_a_request_rests_often(start_server, name, monkeypatch) -> None:
    server = start_server(trust_request_chat_template=True, text_seconds=200.0)
    counter = RestCounter(monkeypatch)
    response = server.post(CHAT, {"model": "alias", "max_tokens": 2, **LONG_WORK[name]})
    assert response.status_code in (200, 400), response.text[:300]
    assert counter.rests > 100
    assert counter.worst < MOST_CALLS
    assert counter.threads <= {"body", "text", "template"}


def test_the_server_is_busy_while_a_request_runs(start_server) -> None:
    server = start_server()
    context = server.app.state.context
    assert not context.text.is_busy()
    context.engine.num_sequences = 1
    assert context.text.is_busy()
