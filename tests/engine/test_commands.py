"""Test what a client keeps of replies to its commands."""

from __future__ import annotations

import asyncio

import pytest

from chunkllama.adapter_messages import AdapterInfo, LoadAdapter
from chunkllama.engine.commands import CommandClient
from chunkllama.messages import CommandReply, ToEngine


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
