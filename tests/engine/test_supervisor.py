"""An engine process that ends, hangs or fails a step is restarted, and its requests continue."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from chunkllama.config import EngineConfig
from chunkllama.engine import process, supervisor
from chunkllama.engine.supervisor import Started, SupervisedEngineClient
from chunkllama.errors import EngineDeadError, RequestFailedError
from chunkllama.messages import EngineRequest, EngineStats, TokenLogprob
from chunkllama.sampling_params import SamplingParams

PROMPT = [5, 6, 7, 8, 9] * 20


def request(name: str, prompt: list[int] = PROMPT, **fields: object) -> EngineRequest:
    sampling = {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True, "seed": 3}
    sampling |= {k: fields.pop(k) for k in list(fields) if k in SamplingParams.__struct_fields__}
    params = SamplingParams(**sampling)
    return EngineRequest(request_id=name, prompt_token_ids=prompt, sampling=params, **fields)


@dataclass
class Answer:
    """Everything that a caller of ``generate`` has got."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[TokenLogprob]] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    num_prompt_logprobs: int = 0
    embedding: list[float] | None = None
    cached: set[int] = field(default_factory=set)
    written: set[int] = field(default_factory=set)
    decode_seconds: list[float] = field(default_factory=list)


async def collect(
    client: SupervisedEngineClient, wanted: EngineRequest, answer: Answer | None = None
) -> Answer:
    answer = answer or Answer()
    async for delta in client.generate(wanted):
        answer.cached.add(delta.num_cached_tokens)
        answer.written.add(delta.num_cache_write_tokens)
        answer.decode_seconds.append(delta.decode_seconds)
        answer.num_prompt_logprobs += len(delta.prompt_logprobs or [])
        answer.embedding = delta.embedding or answer.embedding
        for choice in delta.choices:
            assert choice.index not in answer.reasons, "a delta after the choice's end"
            answer.tokens.setdefault(choice.index, []).extend(choice.token_ids)
            answer.logprobs.setdefault(choice.index, []).extend(choice.logprobs or [])
            if choice.finish_reason is not None:
                answer.reasons[choice.index] = choice.finish_reason
    return answer


def check_same(answer: Answer, undisturbed: Answer) -> None:
    assert answer.tokens == undisturbed.tokens
    assert answer.reasons == undisturbed.reasons
    assert answer.num_prompt_logprobs == undisturbed.num_prompt_logprobs
    assert len(answer.cached) == len(answer.written) == 1, "usage changed in the stream"
    assert sorted(answer.decode_seconds) == answer.decode_seconds
    for index, entries in undisturbed.logprobs.items():
        assert [e.token_id for e in answer.logprobs[index]] == [e.token_id for e in entries]
        assert [e.logprob for e in answer.logprobs[index]] == pytest.approx(
            [e.logprob for e in entries], abs=1e-3
        )
    assert answer.embedding == pytest.approx(undisturbed.embedding, abs=1e-4)


@pytest.fixture
def open_client(tiny_model):
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


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let engine processes run a statement when a step begins; ``ids`` are its requests."""

    def install(statement: str) -> None:
        (tmp_path / "sitecustomize.py").write_text(
            "import os, sys\n"
            "if 'chunkllama.engine.process' in sys.orig_argv:\n"
            "    from chunkllama.engine.journal import StepJournal\n"
            "    begin = StepJournal.begin_step\n"
            "    def faulty(self, ids):\n"
            "        begin(self, ids)\n"
            f"        {statement}\n"
            "    StepJournal.begin_step = faulty\n"
        )
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return install


def requests_of_all_kinds() -> list[EngineRequest]:
    other = [11, 12, 13] * 30
    return [
        request("greedy", max_tokens=60),
        request("choices", n=3, temperature=0.8, max_tokens=50),
        request("logprobs", other, logprobs=2, max_tokens=50),
        request("scored", other[:70], prompt_logprobs=1, max_tokens=50),
        request("penalties", repetition_penalty=1.2, presence_penalty=0.5, max_tokens=50),
        request("beams", n=2, beam_width=3, max_tokens=30),
        request("bounded", stop_token_ids=(17,), min_tokens=20, max_tokens=60, ignore_eos=False),
        request("pooled", other[:50], wants_hidden_states="mean"),
    ]


async def gained(streams: list[tuple[Answer, asyncio.Task[Answer]]], count: int) -> None:
    """Wait until every live stream has at least ``count`` tokens."""
    while not all(
        task.done() or sum(map(len, answer.tokens.values())) >= count for answer, task in streams
    ):
        await asyncio.sleep(0.001)


def test_streams_of_all_kinds_survive_kills(open_client) -> None:
    async def scenario() -> None:
        async with open_client() as client:
            alone = [await collect(client, wanted) for wanted in requests_of_all_kinds()]
            states: list[bool] = []
            client.on_restarting = states.append
            answers = [Answer() for _ in alone]
            tasks = [
                asyncio.create_task(collect(client, wanted, answer))
                for wanted, answer in zip(requests_of_all_kinds(), answers, strict=True)
            ]
            streaming = [
                (answer, task)
                for answer, task, wanted in zip(
                    answers, tasks, requests_of_all_kinds(), strict=True
                )
                if wanted.sampling.beam_width == 1 and not wanted.wants_hidden_states
            ]
            for count in (2, 12):
                await gained(streaming, count)
                first_pid = client.pid
                os.kill(first_pid, signal.SIGKILL)
                while client.pid == first_pid or states[-1:] != [False]:
                    await asyncio.sleep(0.01)
            await asyncio.gather(*tasks)
            assert states == [True, False] * 2 and client.restarts == 2
            for answer, undisturbed in zip(answers, alone, strict=True):
                check_same(answer, undisturbed)

    asyncio.run(scenario())


def test_a_shared_prefix_is_computed_once_by_the_next_process(open_client) -> None:
    shared, most = [7, 8, 9] * 67, 150
    wanted = [request(f"r{i}", [*shared, 20 + i], max_tokens=most) for i in range(8)]

    async def scenario() -> None:
        async with open_client() as client:
            alone = [await collect(client, each) for each in wanted]
            answers = [Answer() for _ in wanted]
            tasks = [
                asyncio.create_task(collect(client, *pair))
                for pair in zip(wanted, answers, strict=True)
            ]
            await gained([*zip(answers, tasks, strict=True)], 2)
            live = sum(not task.done() for task in tasks)
            os.kill(client.pid, signal.SIGKILL)
            await asyncio.gather(*tasks)
            assert [each.tokens for each in answers] == [each.tokens for each in alone]
            assert client.replays >= 1
            computed = (await client.stats()).prefill_tokens_computed_total
            own = 1 + most  # of a prompt, and what was delivered
            assert computed <= len(shared) + live * own

    asyncio.run(scenario())


def test_a_stopped_process_is_a_hang_and_waiting_requests_are_served(open_client) -> None:
    async def scenario() -> None:
        async with open_client(hang_seconds=2.0) as client:
            alone = await collect(client, request("alone", max_tokens=200))
            answer = Answer()
            live = asyncio.create_task(collect(client, request("live", max_tokens=200), answer))
            await gained([(answer, live)], 3)
            restarting = asyncio.Event()
            asked: list[asyncio.Task[EngineStats]] = []

            def note(down: bool) -> None:
                if down:
                    restarting.set()
                    asked.append(asyncio.create_task(client.stats()))

            client.on_restarting = note
            os.kill(client.pid, signal.SIGSTOP)
            await restarting.wait()
            with pytest.raises(EngineDeadError, match="restarted"):
                await asked[0]
            assert client.is_ready, "requests are accepted"
            late = asyncio.create_task(collect(client, request("late", max_tokens=200)))
            assert (await live).tokens == (await late).tokens == alone.tokens
            # an idle process that is stopped is noticed, too
            restarting.clear()
            os.kill(client.pid, signal.SIGSTOP)
            await restarting.wait()
            assert (await collect(client, request("after", max_tokens=200))).tokens == alone.tokens

    asyncio.run(scenario())


def test_prompts_from_before_a_restart_are_not_called_new(open_client) -> None:
    async def scenario() -> None:
        async with open_client() as client:
            assert (await client.explain(PROMPT)).reason == "never_seen"
            await collect(client, request("once", max_tokens=2))
            restarted = asyncio.Event()
            client.on_restarting = lambda down: None if down else restarted.set()
            os.kill(client.pid, signal.SIGKILL)
            await restarted.wait()
            assert (await client.explain(PROMPT)).reason == "unknown"
            await collect(client, request("again", max_tokens=2))
            assert (await client.explain(PROMPT)).reason == "complete"

    asyncio.run(scenario())


def test_no_descriptor_is_left_of_a_process_that_cannot_be_started(monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(process, "start_child", fail)

    async def scenario() -> int:
        before = psutil.Process().num_fds()
        for _ in range(3):
            with pytest.raises(OSError):
                await process.EngineProcess.start(EngineConfig.from_flat(num_chunks=8))
        return psutil.Process().num_fds() - before

    assert asyncio.run(scenario()) == 0


def test_an_error_of_a_listener_ends_the_streams_instead_of_leaving_them(open_client) -> None:
    async def scenario() -> None:
        async with open_client() as client:
            died = asyncio.Event()
            client.on_death = died.set
            live = asyncio.create_task(collect(client, request("live", max_tokens=200)))
            await asyncio.sleep(0)
            client.on_restarting = lambda down: [].pop()
            os.kill(client.pid, signal.SIGKILL)
            await died.wait()
            with pytest.raises(EngineDeadError):
                await live

    asyncio.run(scenario())


def test_an_idle_process_is_probed(open_client, monkeypatch) -> None:
    """Each probe is a turn of its loop, so that waiting is not taken for a hang."""
    monkeypatch.setattr(process, "_MAX_TICK", 0.01)

    async def scenario() -> None:
        async with open_client() as client:
            await collect(client, request("once", max_tokens=2))
            turns = client._process.journal.turns
            while client._process.journal.turns < turns + 12:
                await asyncio.sleep(0.01)
            assert client.restarts == 0

    asyncio.run(scenario())


def test_a_step_that_fails_is_repeated_in_another_process(open_client, plant, tmp_path) -> None:
    mark = tmp_path / "failed"
    plant(
        f"if self.steps == 8 and not os.path.exists({str(mark)!r}): open({str(mark)!r}, 'w'); [].x"
    )

    async def scenario() -> None:
        async with open_client() as client:
            answers = [await collect(client, request(f"r{i}", max_tokens=20)) for i in range(2)]
            assert client.restarts == 1 and mark.exists()
            assert answers[0].tokens == answers[1].tokens

    asyncio.run(scenario())


def test_a_request_that_ends_the_engine_alone_is_failed(open_client, plant) -> None:
    plant("any(i.startswith('poison') for i in ids) and os.kill(os.getpid(), 9)")

    async def scenario() -> None:
        async with open_client() as client:
            alone = await collect(client, request("alone"))
            names = ["a", "b", "poison", "c"]
            answers = await asyncio.gather(
                *(collect(client, request(name)) for name in names), return_exceptions=True
            )
            failed = answers.pop(2)
            assert isinstance(failed, RequestFailedError), failed
            assert failed.code == "engine_poison_request"
            assert [answer.tokens for answer in answers] == [alone.tokens] * 3
            # two steps with all, one beside the two that were tried before, one alone
            assert client.restarts <= 4
            assert (await collect(client, request("after"))).tokens == alone.tokens

    asyncio.run(scenario())


def test_restarting_is_abandoned_when_processes_do_nothing(open_client, monkeypatch) -> None:
    monkeypatch.setattr(supervisor, "_MAX_BACK_OFF", 0.01)
    monkeypatch.setattr(supervisor, "_MAX_BARREN", 1)

    async def scenario() -> None:
        async with open_client() as client:
            died = asyncio.Event()
            client.on_death = died.set
            restarted = asyncio.Event()
            client.on_restarting = lambda down: None if down else restarted.set()
            os.kill(client.pid, signal.SIGKILL)
            await restarted.wait()
            assert not died.is_set()
            os.kill(client.pid, signal.SIGKILL)
            await died.wait()
            assert not client.is_ready
            with pytest.raises(EngineDeadError):
                await collect(client, request("late"))

    asyncio.run(scenario())


@pytest.mark.parametrize("failure", [OSError(24, "Too many open files"), RuntimeError("a bug")])
def test_a_restart_that_fails_is_tried_again_or_abandoned(open_client, monkeypatch, failure):
    """Without a descriptor or a process for some time; a bug ends the server."""
    monkeypatch.setattr(supervisor, "_MAX_BACK_OFF", 0.01)

    async def scenario() -> None:
        async with open_client() as client:
            died, restarted = asyncio.Event(), asyncio.Event()
            client.on_death = died.set
            client.on_restarting = lambda down: None if down else restarted.set()
            start, failures = client._start_process, []

            async def start_later() -> Started:
                if len(failures) < 2:
                    failures.append(failure)
                    raise failure
                return await start()

            client._start_process = start_later
            alone = asyncio.create_task(collect(client, request("live", max_tokens=200)))
            await asyncio.sleep(0)
            os.kill(client.pid, signal.SIGKILL)
            if isinstance(failure, OSError):
                await restarted.wait()
                assert len((await alone).tokens[0]) == 200 and len(failures) == 2
                return
            await died.wait()
            with pytest.raises(EngineDeadError):
                await alone

    asyncio.run(scenario())


def test_a_process_that_is_stopped_while_it_loads_is_replaced(
    open_client, tmp_path, monkeypatch
) -> None:
    mark = tmp_path / "stop"
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        f"if 'chunkllama.engine.process' in sys.orig_argv and os.path.exists({str(mark)!r}):\n"
        f"    os.unlink({str(mark)!r})\n"
        "    os.kill(os.getpid(), signal.SIGSTOP)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    async def scenario() -> None:
        async with open_client(hang_seconds=2.0) as client:
            alone = await collect(client, request("alone"))
            mark.touch()
            os.kill(client.pid, signal.SIGKILL)
            assert (await collect(client, request("after"))).tokens == alone.tokens
            while mark.exists() or not client._is_up:  # the answer came from the first process
                await asyncio.sleep(0.01)
            assert client.restarts >= 1

    asyncio.run(scenario())


def test_pins_are_restored(open_client) -> None:
    async def scenario() -> None:
        async with open_client() as client:
            await collect(client, request("pinned", pin_seconds=3600.0, max_tokens=2))
            pinned = (await client.stats()).pinned_chunks
            assert pinned
            restarted = asyncio.Event()
            client.on_restarting = lambda down: None if down else restarted.set()
            os.kill(client.pid, signal.SIGKILL)
            await restarted.wait()
            while (await client.stats()).pinned_chunks < pinned:
                await asyncio.sleep(0.01)
            assert (await client.stats()).pinned_chunks == pinned

    asyncio.run(scenario())


def test_a_dropped_pin_stays_dropped_and_readers_of_the_cache_start_again(open_client) -> None:
    async def scenario() -> None:
        async with open_client() as client:
            kept, dropped = PROMPT, [11, 12, 13] * 40
            for name, prompt in (("kept", kept), ("dropped", dropped)):
                wanted = request(name, prompt, pin_seconds=3600.0, max_tokens=2)
                await collect(client, wanted)
            pins = sorted((await client.cache_command("pins")).pins, key=lambda pin: pin.num_tokens)
            assert len(kept) < pins[0].num_tokens < len(dropped) < pins[1].num_tokens
            pin = pins[1]  # its last chunk has some output, too
            assert (await client.cache_command("drop_pin", chunk_id=pin.chunk_id)).found
            stream = client.watch_cache(100)
            before = await anext(stream)
            assert len(before.events) == len(kept) // 64 + len(dropped) // 64
            os.kill(client.pid, signal.SIGKILL)
            assert (await anext(stream)).events == []
            snapshot = await anext(stream)
            assert snapshot.watch_id == before.watch_id
            assert client._restores_pins is not None
            await client._restores_pins
            restored = (await client.cache_command("pins")).pins
            assert [pin.num_tokens for pin in restored] == [len(kept)]
            hashes = [event.hash for event in snapshot.events]
            while len(hashes) < len(kept) // 64:
                hashes += [event.hash for event in (await anext(stream)).events]
            assert set(hashes) <= {event.hash for event in before.events}
            await stream.aclose()

    asyncio.run(scenario())


def engines() -> list[psutil.Process]:
    """Engine processes that this process has started and that have not ended."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if "chunkllama.engine.process" in child.cmdline():
                found.append(child)
    return found


async def ready_spare(client: SupervisedEngineClient) -> int:
    """Process id of the standby process, once it has loaded its model."""
    while client._spare is None:
        await asyncio.sleep(0.01)
    process, _ = await asyncio.shield(client._spare)
    return process.child.pid


def test_the_standby_process_takes_over_and_another_one_follows(open_client) -> None:
    async def scenario() -> None:
        async with open_client(standby=True) as client:
            alone = await collect(client, request("alone", max_tokens=200))
            spare = await ready_spare(client)
            assert spare != client.pid and len(engines()) == 2
            answer = Answer()
            live = asyncio.create_task(collect(client, request("live", max_tokens=200), answer))
            await gained([(answer, live)], 3)
            os.kill(client.pid, signal.SIGKILL)
            assert (await live).tokens == alone.tokens
            while client.pid != spare:  # the request may have ended before
                await asyncio.sleep(0.01)
            assert client.restarts == 1
            assert await ready_spare(client) != spare
        assert not engines()

    asyncio.run(scenario())


@pytest.mark.nightly
def test_a_standby_process_that_has_ended_is_not_used(open_client) -> None:
    async def scenario() -> None:
        async with open_client(standby=True) as client:
            spare = await ready_spare(client)
            os.kill(spare, signal.SIGKILL)
            psutil.Process(spare).wait()
            os.kill(client.pid, signal.SIGKILL)
            answer = await collect(client, request("after"))
            assert len(answer.tokens[0]) == 40 and client.pid != spare
        assert not engines(), "closed while the next one was starting"

    asyncio.run(scenario())


def test_a_restarted_process_has_a_pool_of_the_same_size(tiny_model) -> None:
    async def scenario() -> None:
        model = {"model": str(tiny_model[0]), "dtype": "float32", "threads": 1}
        config = EngineConfig.from_flat(**model, kv_cache_memory=8 << 20)
        client = await SupervisedEngineClient.start(config)
        assert client._config.cache.num_chunks == client.info.num_chunks
        await client.close()

    asyncio.run(scenario())


def test_closing_during_a_restart_leaves_no_process(open_client, monkeypatch) -> None:
    monkeypatch.setenv("CHUNKLLAMA_TEST_MODE", "1")
    monkeypatch.setenv("CHUNKLLAMA_FAULTS", "send:stop@5")  # so that the request cannot end

    async def scenario() -> None:
        async with open_client() as client:
            stream = client.generate(request("cut"))
            await anext(stream)
            restarting = asyncio.Event()
            client.on_restarting = lambda down: restarting.set() if down else None
            os.kill(client.pid, signal.SIGKILL)
            await restarting.wait()
            await asyncio.sleep(0)  # the next process has been spawned
            await client.close()
            with pytest.raises(EngineDeadError):
                async for _ in stream:  # tokens that arrived before the kill come first
                    pass
        commands = [p.cmdline() for p in psutil.Process().children()]
        assert not [c for c in commands if "chunkllama.engine.process" in c]

    asyncio.run(scenario())
