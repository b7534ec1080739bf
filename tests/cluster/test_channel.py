"""A front end's channel to one replica, whose actor is a stand-in for Ray's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from fake_replicas import INFO

from chunkllama.cluster.channel import RayChannel
from chunkllama.messages import AbortRequest


class Actor:
    """Takes messages, and sends none."""

    def __init__(self) -> None:
        self.send = SimpleNamespace(remote=self._take)
        self.subscribe = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._items))

    async def _take(self, front: str, payload: bytes) -> None:
        pass

    async def _items(self, front: str) -> AsyncIterator[Any]:
        await asyncio.Event().wait()
        yield


@pytest.mark.parametrize("turns", range(8))
def test_a_channel_ends_when_cancelled_beside_a_message(turns: int) -> None:
    """In both orders: a channel that does not end keeps its front end from ending."""

    async def ends() -> bool:
        channel = RayChannel("replica", Actor(), INFO)
        task = asyncio.create_task(channel.run(SimpleNamespace(lose=None), 60.0))
        for _ in range(5):
            await asyncio.sleep(0)
        task.cancel()
        for _ in range(turns):
            await asyncio.sleep(0)
        channel.send([AbortRequest(request_id="a")])
        for _ in range(20):
            await asyncio.sleep(0)
        return task.done()

    assert asyncio.run(ends())
