"""Fake replicas, and a cluster's client over channels to them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from chunkllama.cache_messages import LoadPack
from chunkllama.cluster.client import ClusterEngineClient
from chunkllama.cluster.messages import ToReplica
from chunkllama.cluster.routing import PrefixRouting
from chunkllama.messages import (
    AbortRequest,
    ChoiceDelta,
    CommandReply,
    EngineErrorInfo,
    EngineReady,
    EngineRequest,
    EngineStats,
    SetTenants,
    ToEngine,
    TokenDelta,
)
from chunkllama.sampling_params import SamplingParams
from chunkllama.tenant_limits import TenantLimits

INFO = EngineReady(
    model_name="fake",
    vocab_size=1000,
    max_model_len=4096,
    eos_token_ids=[],
    num_chunks=100,
    chunk_size=64,
    max_request_tokens=4096,
    device="cpu",
    backend="fake",
)


class FakeReplica:
    """A channel whose replica answers token ``i`` with ``1000 + i``, when told to step."""

    def __init__(self, client: ClusterEngineClient, name: str) -> None:
        self.name, self.info, self.lost = name, INFO, asyncio.Event()
        self.client = client
        self.got: list[ToReplica] = []
        self.live: dict[str, EngineRequest] = {}
        self.done: dict[str, int] = {}
        self.is_full = 0
        self.commands: list[ToEngine] = []
        self.reply = CommandReply(command_id=0)
        self.computed: list[EngineRequest] = []
        self.files: list[LoadPack] = []

    def send(self, messages: Sequence[ToReplica]) -> None:
        self.got += messages
        for message in messages:
            if isinstance(message, EngineRequest):
                self._take(message)
            elif isinstance(message, AbortRequest) and message.index is None:
                self.live.pop(message.request_id, None)

    def _take(self, request: EngineRequest) -> None:
        if self.is_full and not request.is_replay:
            info = EngineErrorInfo(kind="overloaded", message="full", retry_after=self.is_full)
            failed = TokenDelta(request_id=request.request_id, choices=[], error=info)
            asyncio.get_running_loop().call_soon(self.client.receive, self, [failed])
            return
        self.live[request.request_id] = request
        self.done[request.request_id] = len(request.delivered[0]) if request.delivered else 0

    def shares(self) -> dict[str, TenantLimits]:
        """The limits of tenants that it was given last."""
        return [each for each in self.got if isinstance(each, SetTenants)][-1].tenants

    def step(self, names: list[str] | None = None) -> None:
        """Give each request its next token, or those named."""
        items = []
        for name in list(self.live) if names is None else names:
            request = self.live[name]
            done = self.done[name]
            self.done[name] += 1
            is_last = done + 1 == request.sampling.max_tokens
            choice = ChoiceDelta(
                index=0, token_ids=[1000 + done], finish_reason="length" if is_last else None
            )
            items.append(TokenDelta(request_id=name, choices=[choice]))
            if is_last:
                del self.live[name]
        self.client.receive(self, items)

    def die(self, running: set[str] | None = None) -> None:
        self.live.clear()
        self.client.lose(self, "killed", running)

    async def stats(self, include_tree: bool, include_tenants: bool) -> EngineStats:
        return EngineStats(requests_running=len(self.live), steps_total=7)

    async def ask(self, command: ToEngine) -> CommandReply:
        self.commands.append(command)
        return self.reply

    async def use_files(self, commands: list[LoadPack]) -> None:
        self.files += commands

    async def compute(self, request: EngineRequest) -> TokenDelta:
        self.computed.append(request)
        return TokenDelta(request_id=request.request_id, choices=[])


def request(name: str, prompt: int = 1, max_tokens: int = 6) -> EngineRequest:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, seed=1)
    return EngineRequest(request_id=name, prompt_token_ids=[prompt] * 130, sampling=sampling)


class Fixture:
    """A client with replicas a and b, and requests that collect their tokens."""

    def __init__(self, max_failovers: int = 2) -> None:
        self.client = ClusterEngineClient(PrefixRouting(), max_failovers)
        self.replicas: dict[str, FakeReplica] = {}
        self.states: list[bool] = []
        for name in ("a", "b"):
            self.add(name)
        self.client.on_restarting = self.states.append
        self.tokens: dict[str, list[int]] = {}

    def add(self, name: str, info: EngineReady = INFO) -> FakeReplica:
        made = self.replicas[name] = FakeReplica(self.client, name)
        made.info = info
        self.client.join(made)
        return made

    def begin(self, wanted: EngineRequest) -> asyncio.Task[list[int]]:
        got = self.tokens[wanted.request_id] = []

        async def run() -> list[int]:
            async for delta in self.client.generate(wanted):
                got.extend(token for choice in delta.choices for token in choice.token_ids)
            return got

        return asyncio.create_task(run())

    def home(self, name: str) -> FakeReplica:
        (found,) = [each for each in self.replicas.values() if name in each.live]
        return found

    async def step(self, count: int = 1) -> None:
        for _ in range(count):
            await settle()
            for replica in list(self.replicas.values()):
                replica.step()
        await settle()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def run(scenario: Callable[[Fixture], Coroutine[Any, Any, None]], **options: int) -> None:
    async def whole() -> None:
        await scenario(Fixture(**options))

    asyncio.run(whole())
