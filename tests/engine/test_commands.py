"""Test what a client keeps of replies to its commands."""

from __future__ import annotations

import asyncio

import pytest

from chunkllama.adapter_messages import AdapterInfo, LoadAdapter
from chunkllama.cache_messages import CacheCommand, LoadPack
from chunkllama.engine.commands import CommandClient
from chunkllama.messages import CommandReply, ToEngine
from chunkllama.tuning_messages import StartTuning, TuningOptions, TuningProgress


class Client(CommandClient):
    def __init__(self) -> None:
        super().__init__()
        self.sent: list[ToEngine] = []

    def _send(self, message: ToEngine) -> None:
        self.sent.append(message)


@pytest.mark.parametrize("is_cancelled", [True, False])
def test_an_adapter_is_known_even_if_its_caller_no_longer_waits(is_cancelled: bool) -> None:
    async def run() -> None:
        client = Client()
        load = asyncio.create_task(client.load_adapter("sql", "/x"))
        await asyncio.sleep(0)
        (command,) = client.sent
        assert isinstance(command, LoadAdapter)
        if is_cancelled:
            load.cancel()
            with pytest.raises(asyncio.CancelledError):
                await load
        info = AdapterInfo(
            name="sql", folder="/x", rank=8, num_bytes=1, is_activated=False, digest="0"
        )
        client._take_reply(CommandReply(command_id=command.command_id, adapter=info))
        assert client.adapters == {"sql": info}
        if not is_cancelled:
            assert await load == info

    asyncio.run(run())


@pytest.mark.parametrize("late", ["stopped", "succeeded", "failed"])
def test_late_reports_of_a_stopped_training_do_not_end_the_next_of_the_job(late: str) -> None:
    client = Client()
    heard: list[TuningProgress] = []
    client.on_tuning = heard.append
    command = StartTuning(
        job_id="j", folder="/x", options=TuningOptions(), max_step_seconds=1.0, max_bytes=1,
        slice_tokens=8,
    )  # fmt: skip
    client.start_tuning(command)
    first = client.sent[0]
    assert isinstance(first, StartTuning)
    client.stop_tuning("j")
    client.start_tuning(command)
    run = 0 if late == "stopped" else first.run
    client._take_progress(TuningProgress(job_id="j", state=late, run=run))  # type: ignore[arg-type]
    assert [each.state for each in heard] == (["stopped"] if late == "stopped" else [])
    (again,) = client._tunings_again()  # for the process after a crash
    assert again == client.sent[-1] and again.run != first.run
    client._take_progress(TuningProgress(job_id="j", state="succeeded", run=again.run))
    assert heard[-1].state == "succeeded" and not client._tunings_again()


def test_another_engine_process_loads_packs_without_a_dropped_tenant() -> None:
    async def run() -> None:
        client = Client()
        namespaces = {"": "", "alice": "a", "bob": "b"}
        client.use_file(LoadPack(path="/p.ckpack", namespaces=namespaces, template=""))
        drop = asyncio.create_task(client.cache_command("drop_tenant", tenant="alice"))
        await asyncio.sleep(0)
        command = client.sent[-1]
        assert isinstance(command, CacheCommand)
        client._take_reply(CommandReply(command_id=command.command_id, found=True))
        await drop
        (kept,) = client._files.values()
        assert isinstance(kept, LoadPack)
        assert kept.namespaces == {"": "", "bob": "b"} and len(namespaces) == 3

    asyncio.run(run())
