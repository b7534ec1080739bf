"""Which adapters are in memory, and which requests wait for one, without a model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest

from chunkllama.adapter_messages import LoadAdapter
from chunkllama.cache.adapter_tags import MAX_ADAPTERS
from chunkllama.engine.adapter_cache import AdapterCache, last_occurrence
from chunkllama.errors import ConfigError, InvalidRequestError
from chunkllama.messages import EngineRequest
from chunkllama.models.loading.adapter_file import AdapterFile
from chunkllama.sampling_params import SamplingParams
from chunkllama.scheduler.adapter_numbers import AdapterNumbers


class Loader:
    """Adapters of ten bytes; reading one waits while ``gate`` is closed."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.in_memory: dict[int, Any] = {}
        self.fails: Exception | None = None
        self.reads: list[str] = []

    def read_adapter(self, folder: Path) -> AdapterFile:
        return AdapterFile(folder, {"m": type("M", (), {"rank": 8})()}, (), folder.name, 10)

    def size_of(self, file: AdapterFile) -> int:
        return 1000 if file.digest == "large" else 10

    def load_adapter(self, file: AdapterFile) -> tuple[Any, int]:
        self.gate.wait()
        if self.fails is not None:
            raise self.fails
        self.reads.append(file.digest)
        return file.digest, 10

    def set_adapter(self, number: int, weights: Any | None) -> None:
        if weights is None:
            del self.in_memory[number]
        else:
            self.in_memory[number] = weights


class Cache:
    """A cache for ``places`` adapters, driven as the step loop drives it."""

    def __init__(self, places: int) -> None:
        self.loader, self.numbers = Loader(), AdapterNumbers()
        self.cache = AdapterCache(self.loader, self.numbers, 10 * places)
        self.started: list[str] = []
        self.failed: dict[str, str] = {}

    def load(self, *names: str) -> None:
        for name in names:
            reply = self.cache.load(LoadAdapter(command_id=1, name=name, folder=f"/{name}"))
            assert reply is None
            wait(self.cache.futures())
            (reply,) = self.cache.take_replies()
            assert reply.adapter is not None and reply.adapter.name == name, reply.error

    def ask(self, request_id: str, adapter: str) -> None:
        request = EngineRequest(
            request_id=request_id, prompt_token_ids=[1], sampling=SamplingParams(), adapter=adapter
        )
        self.cache.add(request)
        self.turn(request_id)

    def turn(self, request_id: str) -> None:
        """It is the request's turn to start."""
        if self.cache.may_start(request_id):
            self.started.append(request_id)

    def poll(self) -> None:
        """What has been read is put into place, and what may be read after it, read."""
        for _ in range(8):
            if self.loader.gate.is_set():
                wait(self.cache.futures())
            ready, failed = self.cache.poll()
            self.failed |= failed
            for request_id in ready:
                self.turn(request_id)
        assert self.cache.bytes_in_memory <= self.cache._max_bytes

    def names(self) -> set[str]:
        return set(self.loader.in_memory.values())


@pytest.fixture
def two() -> Iterator[Cache]:
    made = Cache(2)
    made.load("a", "b", "c")
    yield made
    made.loader.gate.set()
    made.cache.close()


def test_the_adapter_used_least_recently_makes_room(two: Cache) -> None:
    assert two.names() == {"b", "c"}
    two.ask("1", "b")
    two.cache.end("1")
    two.ask("2", "a")
    assert two.started == ["1"]
    two.poll()
    assert two.started == ["1", "2"] and two.names() == {"a", "b"}


def test_a_request_waits_for_room_and_later_ones_wait_behind_it(two: Cache) -> None:
    two.ask("1", "b")
    two.ask("2", "c")
    two.ask("3", "a")
    two.ask("4", "b")  # in memory, but it would keep the place that 3 waits for
    two.poll()
    assert two.started == ["1", "2"] and two.names() == {"b", "c"}
    two.cache.end("1")
    two.poll()  # 3 has its room; 4 waits for some, and 5 behind it
    two.ask("5", "c")
    two.poll()
    assert two.started == ["1", "2", "3"] and two.names() == {"a", "c"}
    two.cache.end("3")
    two.poll()
    assert set(two.started[3:]) == {"4", "5"} and two.names() == {"b", "c"}


def test_requests_in_the_queue_hold_no_weights(two: Cache) -> None:
    """They are added; their turn comes later."""
    for number in range(100):
        request = EngineRequest(
            request_id=f"b{number}", prompt_token_ids=[1], sampling=SamplingParams(), adapter="b"
        )
        two.cache.add(request)
    two.ask("1", "c")
    two.ask("2", "a")
    two.poll()
    assert two.started == ["1", "2"] and two.names() == {"a", "c"}


def test_requests_behind_the_one_that_gets_room_hold_its_weights_up_to_a_bound() -> None:
    cache = Cache(1)
    cache.load("a", "b")
    cache.ask("0", "b")
    cache.ask("a0", "a")
    cache.ask("1", "b")
    for number in range(1, 50):
        cache.ask(f"a{number}", "a")
    cache.cache.end("0")
    cache.poll()
    admitted = [f"a{number}" for number in range(50) if f"a{number}" in cache.started]
    assert admitted == [f"a{number}" for number in range(16)] and cache.names() == {"a"}
    for request_id in admitted:
        cache.cache.end(request_id)
    cache.cache.close()


def test_requests_pass_while_another_ones_adapter_is_read(two: Cache) -> None:
    two.loader.gate.clear()
    two.ask("1", "a")
    two.ask("2", "c")
    two.ask("3", "a")
    two.poll()
    assert two.started == ["2"]
    two.loader.gate.set()
    two.poll()
    assert two.started == ["2", "1", "3"]
    assert two.loader.reads[3:] == ["a"], "one read for both"


def test_a_request_that_ends_while_it_waits_leaves_its_place(two: Cache) -> None:
    two.ask("1", "b")
    two.ask("2", "c")
    two.ask("3", "a")
    two.ask("4", "b")
    two.cache.end("3")
    two.poll()
    assert two.started == ["1", "2", "4"]
    with pytest.raises(InvalidRequestError, match="used by 2 requests"):
        two.cache.unload("b")
    for request_id in ("1", "4"):
        two.cache.end(request_id)
    assert two.cache.unload("b") == 2
    assert two.cache.unload("b") is None
    with pytest.raises(InvalidRequestError, match="'b' is not loaded"):
        two.cache.use_of("b", [1])


@pytest.mark.parametrize(
    ("error", "reason"),
    [(ConfigError("/a: gone"), "/a: gone"), (MemoryError(), "/a: cannot be read: MemoryError")],
)
def test_an_adapter_that_cannot_be_read_again_fails_its_requests_alone(
    two: Cache, error: Exception, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    two.loader.fails = error
    two.ask("1", "a")
    two.ask("2", "c")
    two.poll()
    assert two.started == ["2"] and two.failed == {"1": "adapter 'a' cannot be read"}
    assert f"adapter a: {reason}" in caplog.messages, "the path is for the operator alone"
    assert two.cache.load(LoadAdapter(command_id=7, name="d", folder="/a")) is None
    wait(two.cache.futures())
    (reply,) = two.cache.take_replies()
    assert reply.error == reason and reply.adapter is None and not two.cache.is_loading
    two.cache.end("1")
    two.loader.fails = None
    two.ask("3", "a")
    two.poll()
    assert two.started == ["2", "3"]


def test_an_adapter_that_can_never_fit_is_refused_before_it_is_read(two: Cache) -> None:
    reads = list(two.loader.reads)
    assert two.cache.load(LoadAdapter(command_id=7, name="d", folder="/large")) is None
    wait(two.cache.futures())
    (reply,) = two.cache.take_replies()
    assert "adapter_memory holds 0 MiB; raise adapter_memory" in reply.error
    assert two.loader.reads == reads


def test_names_are_loaded_once_and_numbers_are_reused_last() -> None:
    cache = Cache(3)
    cache.load("a", "b")
    reply = cache.cache.load(LoadAdapter(command_id=4, name="a", folder="/x"))
    assert reply is not None and "loaded already; unload it first" in reply.error
    number = cache.cache.unload("a")
    assert number == 1
    cache.numbers.release(number)
    cache.load("a")
    use = cache.cache.use_of("a", [1, 2])
    assert use is not None and (use.number, use.start) == (3, 0)
    cache.cache.close()


def test_loads_that_are_pending_count_as_adapters() -> None:
    cache = Cache(3)
    for _ in range(MAX_ADAPTERS - 1):
        cache.numbers.assign()
    cache.loader.gate.clear()
    assert cache.cache.load(LoadAdapter(command_id=1, name="a", folder="/a")) is None
    reply = cache.cache.load(LoadAdapter(command_id=2, name="b", folder="/b"))
    assert reply is not None and reply.error == "too many adapters are loaded; unload one"
    cache.loader.gate.set()
    wait(cache.cache.futures())
    (reply,) = cache.cache.take_replies()
    assert reply.adapter is not None and reply.adapter.name == "a"
    cache.cache.close()


def test_the_last_occurrence_counts() -> None:
    assert last_occurrence((1, 2), [1, 2, 3, 1, 2, 4]) == 3
    assert last_occurrence((1, 1), [1, 1, 1]) == 1
    assert last_occurrence((5,), [1, 2]) is None
    assert last_occurrence((1, 2, 3), [2, 3]) is None
