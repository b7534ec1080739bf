"""The host of a replica's engine, without Ray: channels, one item a step, the engine's end."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
from tiny_model import write_tiny_model

from chunkllama.cache_messages import CacheCommand
from chunkllama.cluster.host import EngineHost
from chunkllama.cluster.messages import (
    ENCODER,
    FROM_REPLICA,
    REPEATED,
    Beat,
    Dropped,
    Ended,
    FromReplica,
    Spent,
    ToReplica,
)
from chunkllama.cluster.prefix_keys import prefix_keys
from chunkllama.config import EngineConfig
from chunkllama.messages import (
    CommandReply,
    EngineReady,
    EngineRequest,
    EngineStats,
    ExplainPrompt,
    SetTenants,
    TenantStats,
    TokenDelta,
)
from chunkllama.sampling_params import SamplingParams
from chunkllama.tenant_limits import TenantLimits

PROMPT = [5, 6, 7, 8] * 17


def request(name: str, max_tokens: int) -> EngineRequest:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, seed=1)
    return EngineRequest(request_id=name, prompt_token_ids=PROMPT, sampling=sampling)


async def explain(host: EngineHost, prompt: list[int]) -> str:
    command = ExplainPrompt(command_id=0, prompt_token_ids=prompt, namespace="", tenant="")
    reply = msgspec.msgpack.decode(await host.ask(ENCODER.encode([command])), type=CommandReply)
    assert reply.explanation is not None
    return reply.explanation.reason


class Front:
    """One front end's channel."""

    def __init__(self, host: EngineHost, name: str) -> None:
        self.host, self.name = host, name
        self.stream: AsyncIterator[bytes] = host.subscribe(name)
        self.items: list[list[FromReplica]] = []

    async def send(self, *messages: ToReplica) -> None:
        await self.host.send(self.name, ENCODER.encode(messages))

    async def read(self) -> list[FromReplica]:
        self.items.append(FROM_REPLICA.decode(await anext(self.stream)))
        return self.items[-1]

    async def answer(self, name: str, count: int) -> list[int]:
        """Read until a request has so many tokens."""
        tokens: list[int] = []
        while len(tokens) < count:
            for item in await self.read():
                if isinstance(item, TokenDelta) and item.request_id == name:
                    assert item.error is None
                    tokens += [token for choice in item.choices for token in choice.token_ids]
        return tokens


async def hear_of_drops(host: EngineHost, *fronts: Front) -> None:
    """Drop a tenant twice: all front ends hear of it, but not of a drop that is repeated."""
    for number in (REPEATED, 7):
        drop = CacheCommand(command_id=number, action="drop_tenant", tenant="t")
        await host.ask(ENCODER.encode([drop]))
    for front in fronts:
        found: list[Dropped] = []
        while not found:
            found = [item for item in await front.read() if isinstance(item, Dropped)]
        assert found == [Dropped(tenant="t", drop_id=7)]


def test_front_ends_share_an_engine_and_learn_of_its_end(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, 2048)
    config = EngineConfig.from_flat(
        model=str(tmp_path), dtype="float32", threads=1, num_chunks=64, log_level="error"
    )

    async def scenario() -> None:
        host = EngineHost(config.model_dump_json(), 30.0, {})
        asking = asyncio.create_task(host.hello())
        await host.start()
        assert msgspec.msgpack.decode(await asking, type=EngineReady).chunk_size == 64
        one, two = Front(host, "one"), Front(host, "two")
        await one.send(request("a", 6), request("b", 6))  # before the channel is read
        await two.send(request("c", 6))
        answers = [await one.answer("a", 6), await two.answer("c", 6)]
        assert answers[0] == answers[1]
        both = [i for i in one.items if sum(isinstance(each, TokenDelta) for each in i) == 2]
        assert both, "the tokens of one step are one item"
        assert not any(
            isinstance(each, TokenDelta) and each.request_id != "c" for i in two.items for each in i
        )

        explained = [await explain(host, prompt) for prompt in (PROMPT, [9, 9, 9])]
        assert explained == ["complete", "unknown"], "other replicas have seen prompts"

        await one.send(Spent(tenants={"t": (1.0, 20.0)}))
        spent: list[Spent] = []
        while not spent:
            spent = [item for item in await two.read() if isinstance(item, Spent)]
        assert spent == [Spent(tenants={"t": (1.0, 20.0)})]
        assert not any(isinstance(each, Spent) for each in host._links["one"].items)

        await hear_of_drops(host, one, two)

        heads: list[list[int]] = []
        while not heads or not heads[0]:
            for item in await one.read():
                heads = item.heads or heads if isinstance(item, Beat) else heads
        assert prefix_keys("", PROMPT, 64)[0] in heads[0]

        await one.send(SetTenants(tenants={"t": TenantLimits(pin_chunks=1)}))
        tenants: dict[str, TenantStats] = {}
        while not tenants:  # they are told where limits are divided
            for item in await one.read():
                if isinstance(item, Beat) and item.stats is not None:
                    tenants = item.stats.tenants
        assert tenants[""].computed_tokens > 0

        await two.send(request("endless", 1900))
        await two.answer("endless", 3)
        await one.send(request("endless", 6))  # as a front end whose channel was opened again
        assert await one.answer("endless", 6) == answers[0]
        await two.answer("endless", 3)
        await two.stream.aclose()  # type: ignore[attr-defined]
        running = 1
        while running:
            payload = await host.stats(False, False)
            running = msgspec.msgpack.decode(payload, type=EngineStats).requests_running

        await one.send(request("live", 1900))
        await one.answer("live", 3)
        assert host._engine is not None
        process = host._engine.process
        while True:  # until it stops inside a step
            os.kill(process.child.pid, signal.SIGSTOP)
            os.waitid(os.P_PID, process.child.pid, os.WSTOPPED)
            if process.journal.running_requests():
                break
            os.kill(process.child.pid, signal.SIGCONT)
        os.kill(process.child.pid, signal.SIGKILL)
        ends: list[Ended] = []
        while not ends:
            ends = [item for item in await one.read() if isinstance(item, Ended)]
        assert ends[0].running == ["live"]
        host._put_to_all(Beat())
        assert not host._links["one"].items, "nothing follows the end"
        assert await host.wait_end() == ends[0].reason
        await host.close()

    asyncio.run(scenario())
