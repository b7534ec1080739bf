"""One engine behind two clients: in a thread of this process, and in a process of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import psutil
import pytest

from chunkllama.config import EngineConfig
from chunkllama.engine.client import InProcessEngineClient, MessageClient
from chunkllama.engine.process import ProcessEngineClient
from chunkllama.errors import (
    ConfigError,
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


@pytest.fixture(params=["thread", "process"])
def open_client(request, tiny_core, tiny_model):
    @asynccontextmanager
    async def open_() -> AsyncIterator[MessageClient]:
        settings = {"num_chunks": 8, "max_waiting": 100}
        client: MessageClient
        if request.param == "thread":
            client = InProcessEngineClient(tiny_core(**settings))
        else:
            model = {"model": str(tiny_model[0]), "dtype": "float32", "threads": 1}
            client = await ProcessEngineClient.start(EngineConfig.from_flat(**model, **settings))
        try:
            yield client
        finally:
            await client.close()

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


def test_leaving_a_stream_frees_its_chunks(open_client) -> None:
    async def scenario() -> None:
        async with open_client() as client:
            stream = client.generate(request("long", max_tokens=400))
            await anext(stream)
            await stream.aclose()
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


def test_a_caller_that_reads_too_slowly_loses_its_request(open_client) -> None:
    async def scenario() -> None:
        async with open_client() as client:
            alone = await collect(client, request("alone", max_tokens=100))
            client.max_backlog = 50
            slow = client.generate(request("slow", max_tokens=400, logprobs=3))
            await anext(slow)
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

    asyncio.run(scenario())


def test_one_choice_aborted_others_go_on(open_client) -> None:
    async def scenario() -> None:
        async with open_client() as client:
            counts = [0, 0]
            async for delta in client.generate(request("two", n=2, max_tokens=60)):
                if counts == [0, 0]:
                    await client.abort("two", 0)
                for choice in delta.choices:
                    counts[choice.index] += len(choice.token_ids)
            assert counts[1] == 60 and counts[0] < 60

    asyncio.run(scenario())


def test_nothing_of_a_choice_follows_its_end(open_client) -> None:
    """Tokens in transit when a choice is aborted are not delivered."""

    async def scenario() -> None:
        async with open_client() as client:
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
            await client.abort("whole")
            rest = [choice async for delta in stream for choice in delta.choices]
            assert [choice.index for choice in rest] == [0] * len(rest)
            assert rest[-1].finish_reason == "abort"

    asyncio.run(scenario())


def test_a_choice_of_a_beam_search_aborted_ends_the_search(open_client) -> None:
    async def scenario() -> None:
        async with open_client() as client:
            beams = request("beams", n=2, beam_width=2, max_tokens=240)
            stream = asyncio.ensure_future(anext(client.generate(beams)))
            while not (await client.stats()).requests_running:
                await asyncio.sleep(0)
            await client.abort("beams", 1)
            ended = (await asyncio.wait_for(stream, 30)).choices
            assert [(c.index, c.finish_reason) for c in ended] == [(0, "abort"), (1, "abort")]
            stats = await client.stats()
            assert stats.requests_running == 0
            assert stats.generation_tokens_total < 480

    asyncio.run(scenario())


def test_every_choice_ends_even_of_beams_with_few_tokens_to_choose_from(open_client) -> None:
    async def scenario() -> None:
        async with open_client() as client:
            beams = request("few", n=3, beam_width=3, allowed_token_ids=(5,), max_tokens=3)
            answer = await asyncio.wait_for(collect(client, beams), 30)
            assert answer == {i: [5, 5, 5] for i in range(3)}

    asyncio.run(scenario())


def test_an_engine_thread_that_fails_ends_its_requests(tiny_core, monkeypatch) -> None:
    async def scenario() -> None:
        core = tiny_core(num_chunks=8)
        client = InProcessEngineClient(core)
        stream = client.generate(request("doomed", max_tokens=400))
        await anext(stream)

        def fail() -> None:
            raise RuntimeError("planted")

        monkeypatch.setattr(core, "step", fail)
        with pytest.raises(EngineDeadError, match="planted"):
            async for _ in stream:
                pass
        assert not client.is_ready
        await asyncio.wait_for(client.close(), 10)

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
        config = EngineConfig.from_flat(model=str(tiny_model[0]), num_chunks=8, threads=1)
        client = await ProcessEngineClient.start(config)
        died = asyncio.Event()
        client.on_death = died.set
        stream = client.generate(request("doomed", max_tokens=400))
        await anext(stream)
        end(client, monkeypatch)
        with pytest.raises(EngineDeadError):
            async for _ in stream:
                pass
        await asyncio.wait_for(died.wait(), 10)
        assert not client.is_ready
        with pytest.raises(EngineDeadError):
            await collect(client, request("late"))
        await client.close()
        assert not psutil.pid_exists(client.pid)

    asyncio.run(scenario())


def test_the_engine_loads_while_its_client_is_busy(tiny_model) -> None:
    """It has its configuration before the client's event loop turns again."""

    async def scenario() -> None:
        config = EngineConfig.from_flat(model=str(tiny_model[0]), num_chunks=8, threads=1)
        starting = asyncio.create_task(ProcessEngineClient.start(config))
        await asyncio.sleep(0)
        (child,) = [
            p for p in psutil.Process().children() if "chunkllama.engine.process" in p.cmdline()
        ]
        deadline = time.monotonic() + 60
        while not any("libtorch" in entry.path for entry in child.memory_maps()):
            assert time.monotonic() < deadline, "the engine waits for its client"
            time.sleep(0.05)
        await (await starting).close()

    asyncio.run(scenario())


def test_an_engine_that_cannot_start_says_why_in_one_line(tmp_path) -> None:
    async def scenario() -> str:
        with pytest.raises(ConfigError) as failed:
            await ProcessEngineClient.start(EngineConfig.from_flat(model=str(tmp_path)))
        return str(failed.value)

    message = asyncio.run(scenario())
    assert "config.json" in message and "\n" not in message


def test_beams_that_arrive_at_once_are_no_backlog(open_client) -> None:
    async def scenario() -> None:
        async with open_client() as client:
            client.max_backlog = 5
            beams = request("beams", n=3, beam_width=3, allowed_token_ids=(5,), max_tokens=3)
            assert await collect(client, beams) == {i: [5, 5, 5] for i in range(3)}

    asyncio.run(scenario())
