"""One engine behind two clients: in a thread of this process, and in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import msgspec
import psutil
import pytest

from chunkllama.config import EngineConfig
from chunkllama.engine.client import MessageClient
from chunkllama.engine.in_process import InProcessEngineClient
from chunkllama.engine.process import ProcessEngineClient
from chunkllama.errors import (
    EngineDeadError,
    InvalidRequestError,
    RequestFailedError,
)
from chunkllama.messages import EngineRequest
from chunkllama.sampling_params import SamplingParams

PROMPT = [5, 6, 7, 8, 9]


def request(name: str, **sampling: object) -> EngineRequest:
    defaults = {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True}
    params = SamplingParams(**{**defaults, **sampling})
    return EngineRequest(request_id=name, prompt_token_ids=PROMPT, sampling=params)


async def collect(client: MessageClient, wanted: EngineRequest) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {}
    async for delta in client.generate(wanted):
        for choice in delta.choices:
            tokens.setdefault(choice.index, []).extend(choice.token_ids)
    return tokens


class Pause:
    """Stands for the faults of an engine in a thread: holds its loop at one passage of ``send``."""

    def __init__(self, passage: int) -> None:
        self._left = passage
        self.is_held = threading.Event()
        self.goes_on = threading.Event()

    def reach(self, point: str) -> None:
        self._left -= point == "send"
        if point == "send" and self._left == 0:
            self.is_held.set()
            self.goes_on.wait()


@dataclass
class Held:
    """A client whose engine stops before it sends what a certain step has computed.

    Until ``resume`` no request can end, however long the test takes.
    """

    client: MessageClient
    pause: Pause | None

    def _is_held(self) -> bool:
        if self.pause is not None:
            return self.pause.is_held.is_set()
        return psutil.Process(self.client.pid).status() == psutil.STATUS_STOPPED

    async def stopped(self) -> None:
        """Wait until the engine has stopped."""
        while not self._is_held():
            await asyncio.sleep(0.001)

    def resume(self) -> None:
        if self.pause is not None:
            self.pause.goes_on.set()
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.client.pid, signal.SIGCONT)

    async def resume_when_stopped(self) -> None:
        await self.stopped()
        self.resume()


@pytest.fixture(params=["thread", "process"])
def open_held(request, tiny_core, tiny_model, monkeypatch):
    """Open an engine that stops at step ``at`` before it sends the step's tokens; 0: never."""

    @asynccontextmanager
    async def open_(at: int) -> AsyncIterator[Held]:
        settings = {"num_chunks": 8, "max_waiting": 100}
        held: Held
        if request.param == "thread":
            core = tiny_core(**settings)
            core.faults = pause = Pause(at)
            held = Held(InProcessEngineClient(core), pause)
        else:
            if at:
                monkeypatch.setenv("CHUNKLLAMA_TEST_MODE", "1")
                monkeypatch.setenv("CHUNKLLAMA_FAULTS", f"send:stop@{at}")
            model = {"model": str(tiny_model[0]), "dtype": "float32", "threads": 1}
            config = EngineConfig.from_flat(**model, **settings)
            held = Held(await ProcessEngineClient.start(config), None)
        try:
            yield held
        finally:
            held.resume()
            await held.client.close()

    return open_


@pytest.fixture
def open_client(open_held):
    @asynccontextmanager
    async def open_() -> AsyncIterator[MessageClient]:
        async with open_held(0) as held:
            yield held.client

    return open_


def test_same_ids_alone_at_once_and_as_choices(open_client, tiny_truth) -> None:
    async def scenario() -> None:
        async with open_client() as client:
            assert client.is_ready and client.info.num_chunks == 8
            alone = await collect(client, request("alone"))
            several = await asyncio.gather(*(collect(client, request(f"r{i}")) for i in range(5)))
            choices = await collect(client, request("three", n=3, temperature=0.0))
            assert several == [alone] * 5
            assert list(choices.values()) == [alone[0]] * 3
            tiny_truth.check(PROMPT, alone[0])

    asyncio.run(scenario())


def test_a_seed_repeats_and_none_differs(open_client) -> None:
    async def scenario() -> None:
        async with open_client() as client:
            seeded = [
                await collect(client, request(f"s{i}", temperature=1.0, seed=7, max_tokens=20))
                for i in range(2)
            ]
            free = [
                await collect(client, request(f"f{i}", temperature=1.0, max_tokens=20))
                for i in range(3)
            ]
            assert seeded[0] == seeded[1]
            assert free[0] != free[1] or free[1] != free[2]

    asyncio.run(scenario())


def test_leaving_a_stream_frees_its_chunks(open_held) -> None:
    async def scenario() -> None:
        async with open_held(5) as held:
            client = held.client
            stream = client.generate(request("long", max_tokens=400))
            await anext(stream)
            await held.stopped()
            await stream.aclose()
            held.resume()
            while (await client.stats()).requests_running:
                await asyncio.sleep(0)
            stats = await client.stats()
            assert stats.chunks_private == stats.chunks_referenced == 0
            assert stats.generation_tokens_total < 400

    asyncio.run(scenario())


def test_the_step_loop_sends_statistics_unasked(open_client) -> None:
    async def scenario() -> None:
        async with open_client() as client:
            pushed = asyncio.Queue()
            client.on_stats = pushed.put_nowait
            await collect(client, request("any"))
            stats = await pushed.get()
            assert stats.steps_total >= 1 and stats.chunks_total == 8
            asked = await client.stats()
            assert asked.steps_total >= stats.steps_total and not asked.is_pushed

    asyncio.run(scenario())


def test_a_caller_that_reads_too_slowly_loses_its_request(open_held) -> None:
    async def scenario() -> None:
        async with open_held(150) as held:
            client = held.client
            alone = await collect(client, request("alone", max_tokens=100))
            client.max_backlog = 50
            slow = client.generate(request("slow", max_tokens=400, logprobs=3))
            await anext(slow)
            while not client._streams["slow"].overflowed:  # by what 49 steps have sent
                await asyncio.sleep(0)
            # in this request, or in the last one if the engine knows already that it ended
            resuming = asyncio.create_task(held.resume_when_stopped())
            while (await client.stats()).requests_running:
                await asyncio.sleep(0)
            with pytest.raises(RequestFailedError, match="too slowly") as failure:
                await anext(slow)
            assert failure.value.code == "slow_reader"
            stats = await client.stats()
            assert stats.chunks_private == stats.chunks_referenced == 0
            assert stats.generation_tokens_total < 500
            client.max_backlog = 10**6
            assert await collect(client, request("after", max_tokens=100)) == alone
            await resuming

    asyncio.run(scenario())


def test_one_choice_aborted_others_go_on(open_held) -> None:
    async def scenario() -> None:
        async with open_held(5) as held:
            client = held.client
            counts = [0, 0]
            async for delta in client.generate(request("two", n=2, max_tokens=60)):
                if counts == [0, 0]:
                    await held.stopped()
                    await client.abort("two", 0)
                    held.resume()
                for choice in delta.choices:
                    counts[choice.index] += len(choice.token_ids)
            assert counts[1] == 60 and counts[0] < 60

    asyncio.run(scenario())


def test_nothing_of_a_choice_follows_its_end(open_held) -> None:
    """Tokens in transit when a choice is aborted are not delivered."""

    async def scenario() -> None:
        async with open_held(65) as held:
            client = held.client
            ended: list[int] = []
            async for delta in client.generate(request("both", n=2, max_tokens=60)):
                for choice in delta.choices:
                    assert choice.index in (0, 1) and choice.index not in ended
                    if choice.finish_reason is not None:
                        ended.append(choice.index)
                if not ended:
                    await client.abort("both", 0)
            assert sorted(ended) == [0, 1]
            stream = client.generate(request("whole", max_tokens=60))
            await anext(stream)
            await held.stopped()
            await client.abort("whole")
            held.resume()
            rest = [choice async for delta in stream for choice in delta.choices]
            assert [choice.index for choice in rest] == [0] * len(rest)
            assert rest[-1].finish_reason == "abort"

    asyncio.run(scenario())


def test_a_choice_of_a_beam_search_aborted_ends_the_search(open_held) -> None:
    async def scenario() -> None:
        async with open_held(5) as held:
            client = held.client
            beams = request("beams", n=2, beam_width=2, max_tokens=240)
            stream = asyncio.ensure_future(anext(client.generate(beams)))
            await held.stopped()
            await client.abort("beams", 1)
            held.resume()
            ended = (await stream).choices
            assert [(c.index, c.finish_reason) for c in ended] == [(0, "abort"), (1, "abort")]
            stats = await client.stats()
            assert stats.requests_running == 0
            assert stats.generation_tokens_total < 480

    asyncio.run(scenario())


def test_every_choice_ends_even_of_beams_with_few_tokens_to_choose_from(open_client) -> None:
    async def scenario() -> None:
        async with open_client() as client:
            beams = request("few", n=3, beam_width=3, allowed_token_ids=(5,), max_tokens=3)
            answer = await collect(client, beams)
            assert answer == {i: [5, 5, 5] for i in range(3)}

    asyncio.run(scenario())


def test_an_engine_thread_that_fails_ends_its_requests(tiny_core, monkeypatch) -> None:
    async def scenario() -> None:
        core = tiny_core(num_chunks=8)
        core.faults = pause = Pause(5)
        client = InProcessEngineClient(core)
        held = Held(client, pause)
        stream = client.generate(request("doomed", max_tokens=400))
        await anext(stream)
        await held.stopped()

        def fail() -> None:
            raise RuntimeError("planted")

        monkeypatch.setattr(core, "step", fail)
        held.resume()
        with pytest.raises(EngineDeadError, match="planted"):
            async for _ in stream:
                pass
        assert not client.is_ready
        await client.close()

    asyncio.run(scenario())


def test_refusals_are_typed_and_leave_the_engine_alone(open_client) -> None:
    async def scenario() -> None:
        async with open_client() as client:
            with pytest.raises(InvalidRequestError) as refused:
                await collect(client, request("huge", max_tokens=100_000))
            assert refused.value.code == "context_length_exceeded"
            for token_id in (-1, 300):
                unknown = msgspec.structs.replace(request("odd"), prompt_token_ids=[5, token_id])
                with pytest.raises(InvalidRequestError, match=r"\[0, 299\]"):
                    await collect(client, unknown)
            assert len((await collect(client, request("after")))[0]) == 6

    asyncio.run(scenario())


def kill(client: ProcessEngineClient, _: pytest.MonkeyPatch) -> None:
    os.kill(client.pid, signal.SIGKILL)


def send_what_cannot_be_used(client: ProcessEngineClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise msgspec.DecodeError("planted")

    monkeypatch.setattr(client, "_dispatch", refuse)


@pytest.mark.parametrize("end", [kill, send_what_cannot_be_used])
def test_a_dead_engine_ends_its_requests(tiny_model, monkeypatch, end) -> None:
    async def scenario() -> None:
        monkeypatch.setenv("CHUNKLLAMA_TEST_MODE", "1")
        monkeypatch.setenv("CHUNKLLAMA_FAULTS", "send:stop@5")
        config = EngineConfig.from_flat(model=str(tiny_model[0]), num_chunks=8, threads=1)
        client = await ProcessEngineClient.start(config)
        held = Held(client, None)
        died = asyncio.Event()
        client.on_death = died.set
        stream = client.generate(request("doomed", max_tokens=400))
        await anext(stream)
        await held.stopped()
        end(client, monkeypatch)
        held.resume()
        with pytest.raises(EngineDeadError):
            async for _ in stream:
                pass
        await died.wait()
        assert not client.is_ready
        with pytest.raises(EngineDeadError):
            await collect(client, request("late"))
        await client.close()
        assert not psutil.pid_exists(client.pid)

    asyncio.run(scenario())


def test_beams_that_arrive_at_once_are_no_backlog(open_client) -> None:
    async def scenario() -> None:
        async with open_client() as client:
            client.max_backlog = 5
            beams = request("beams", n=3, beam_width=3, allowed_token_ids=(5,), max_tokens=3)
            assert await collect(client, beams) == {i: [5, 5, 5] for i in range(3)}

    asyncio.run(scenario())
