"""An engine process that ends or fails a step is restarted, and its requests continue."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from supervised import PROMPT, Answer, check_same, collect, gained, request

from chunkllama.config import EngineConfig
from chunkllama.engine import process, supervisor
from chunkllama.engine.supervisor import Started, SupervisedEngineClient
from chunkllama.errors import EngineDeadError, RequestFailedError
from chunkllama.messages import EngineRequest


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
