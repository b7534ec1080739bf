"""A process that stands still is replaced; a standby process, and pins that are restored."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal

import psutil
import pytest
from supervised import PROMPT, Answer, collect, gained, request

from chunkllama.engine import process
from chunkllama.engine.supervisor import SupervisedEngineClient
from chunkllama.errors import EngineDeadError
from chunkllama.messages import EngineStats


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
